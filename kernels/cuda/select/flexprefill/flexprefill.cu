// FlexPrefill's selection: the workspace and the order of its kernels.
#include "kernels/cuda/select/flexprefill/flexprefill.cuh"
#include "kernels/cuda/workspace.h"

namespace prefilld::cuda {
namespace {

// Sets the pointers; returns the bytes.
int64_t Lay(FlexPrefill* f, void* workspace) {
  const Problem& p = f->problem;
  Workspace arena(workspace);
  const int64_t pairs = static_cast<int64_t>(p.sequences) * p.q_heads;
  const int64_t blocks = p.rows * p.q_heads;
  arena.Take(&f->row_sums, pairs * MaxChunks(p) * p.block_size);
  arena.Take(&f->key_mean, p.rows * p.kv_heads * p.head_dim);
  arena.Take(&f->block_vertical, blocks);
  arena.Take(&f->block_diagonal, blocks);
  arena.Take(&f->block_diagonal_next, blocks);
  arena.Take(&f->pooled_probe, blocks);
  arena.Take(&f->budget, pairs);
  arena.Take(&f->bitmap, blocks * BitmapWords(p));
  // The scores of lines are done with before the first pooled map is written.
  const int64_t begin = arena.used();
  arena.Take(&f->vertical, blocks * p.block_size);
  arena.Take(&f->diagonal, blocks * p.block_size);
  arena.Take(&f->diagonal_next, blocks * p.block_size);
  const int64_t lines_end = arena.used();
  arena.Rewind(begin);
  const int64_t one = TriangleSize(p.k_blocks_max);
  const int64_t all = p.rows * (p.k_blocks_max + 1) / 2 * p.q_heads;  // or more
  const int64_t room = kPooledMapBytes / static_cast<int64_t>(sizeof(float));
  arena.Take(&f->pooled_map, std::max(one, std::min(all, room)));
  return std::max(lines_end, arena.used());
}

FlexPrefill Prepare(const Selection& selection) {
  FlexPrefill f = {};
  f.problem = selection.problem;
  f.report = selection.report;
  f.gamma = selection.gamma;
  f.tau = selection.flexprefill.tau;
  const int64_t B = f.problem.block_size;
  const auto blocks = [&](int64_t tokens) {
    return static_cast<int32_t>(std::min<int64_t>(CeilDiv(tokens, B), INT32_MAX));
  };
  f.least_blocks = blocks(std::max<int64_t>(selection.min_budget_tokens, 1));
  f.most_blocks = blocks(selection.max_budget_tokens);
  Lay(&f, selection.workspace);
  return f;
}

}  // namespace

int SharedMemoryLimit() {
  static const int limit = [] {  // a process has one device
    int device = 0, bytes = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    return bytes;
  }();
  return limit;
}

ChunkPlan PlanChunks(const Problem& problem, int unit, int64_t lanes, int multiprocessors) {
  // What a thread block costs before its first key: queries to shared memory, in key blocks.
  constexpr double kStart = 3;
  ChunkPlan best = {};
  for (int wanted = 1; wanted <= MaxChunks(problem); ++wanted) {
    const int64_t blocks = CeilDiv(CeilDiv(problem.k_blocks_max, wanted), unit) * unit;
    if (best.chunks > 0 && blocks == best.blocks) continue;
    int64_t whole = 0;  // chunks of this size; what is left of a sequence fills gaps
    double rest = 0;
    for (int s = 0; s < problem.sequences; ++s) {
      const int64_t n = problem.host_sequence[s].k_blocks;
      whole += n / blocks;
      if (n % blocks > 0) rest += static_cast<double>(n % blocks) + kStart;
    }
    const double rounds = static_cast<double>(CeilDiv(whole * lanes, multiprocessors));
    const double time = rounds * (static_cast<double>(blocks) + kStart) +
                        rest * static_cast<double>(lanes) / multiprocessors;
    if (best.chunks > 0 && time >= best.time) continue;
    best = {static_cast<int32_t>(blocks),
            static_cast<int32_t>(CeilDiv(problem.k_blocks_max, blocks)), time};
  }
  return best;
}

bool HasFlexPrefill(DType dtype, int head_dim) {
  return FlexPrefillTable::Has(dtype, head_dim) || PlainTable::Has(dtype, head_dim);
}

size_t FlexPrefillWorkspace(const Problem& problem) {
  FlexPrefill f = {};
  f.problem = problem;
  return static_cast<size_t>(Lay(&f, nullptr));
}

cudaError_t FlexPrefillEstimate(const Selection& selection, int multiprocessors,
                                cudaStream_t stream) {
  FlexPrefill f = Prepare(selection);
  const Sequence* const sequences = f.problem.host_sequence;
  if (std::all_of(sequences, sequences + f.problem.sequences,
                  [&](const Sequence& s) { return f.IsShort(s); })) {
    return cudaSuccess;
  }
  cudaError_t error = FlexPrefillRowSums(&f, multiprocessors, stream);
  if (error == cudaSuccess) error = FlexPrefillLines(f, multiprocessors, stream);
  if (error == cudaSuccess) error = FlexPrefillBudgets(f, multiprocessors, stream);
  return error;
}

cudaError_t FlexPrefillSelect(const Selection& selection, int, cudaStream_t stream) {
  const FlexPrefill f = Prepare(selection);
  cudaError_t error = FlexPrefillChoose(f, stream);
  if (error == cudaSuccess) error = FlexPrefillQueryAware(f, stream);
  if (error == cudaSuccess) error = WriteIndex(selection, f.bitmap, stream);
  return error;
}

}  // namespace prefilld::cuda

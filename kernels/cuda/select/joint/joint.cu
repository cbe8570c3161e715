// joint, stages 1 and 2: the probe; then the choice of lines, and the repair that writes the index.
#include <algorithm>

#include "kernels/cuda/select/block_index.cuh"
#include "kernels/cuda/select/joint/joint.cuh"

namespace prefilld::cuda {
namespace {

constexpr size_t kScratchBytesMax = size_t{5} << 28;  // 1.25 GiB: at 1M tokens, 128 per block

size_t AlignUp(size_t bytes) { return (bytes + 255) / 256 * 256; }

}  // namespace

JointPlan PlanJoint(const Problem& problem, void* workspace) {
  JointPlan plan = {};
  JointWork& work = plan.work;
  const auto take = [&](size_t bytes) {
    unsigned char* at = static_cast<unsigned char*>(workspace) + plan.bytes;
    plan.bytes += AlignUp(bytes);
    return at;
  };
  const size_t heads = static_cast<size_t>(problem.sequences) * problem.q_heads;
  const int64_t n = std::max(1, problem.k_blocks_max);
  work.slots = BlockSlots(problem);
  work.line_words = static_cast<int32_t>((n + 31) / 32 + 1);
  work.parts = reinterpret_cast<BlockPart*>(take(ProbeBytes(problem)));
  work.mass = reinterpret_cast<uint32_t*>(take(ProbeBytes(problem) / 2));
  work.pools = take(PooledKeyBytes(problem));
  work.lines = reinterpret_cast<uint32_t*>(take(heads * 2 * work.line_words * sizeof(uint32_t)));
  work.flags = reinterpret_cast<uint32_t*>(take(heads * sizeof(uint32_t)));
  if (n > kGainsInShared) work.gains = take(problem.q_heads * work.slots * kGainBytes);
  work.taken = reinterpret_cast<unsigned long long*>(take(sizeof(unsigned long long)));
  work.scratch_stride = static_cast<int64_t>(AlignUp(RepairScratchBytes(problem)));
  work.scratch_blocks = static_cast<int32_t>(std::clamp<int64_t>(
      static_cast<int64_t>(kScratchBytesMax) / work.scratch_stride, 8, kRepairBlocksMax));
  work.scratch = take(work.scratch_blocks * work.scratch_stride);
  return plan;
}

size_t JointWorkspace(const Problem& problem) { return PlanJoint(problem, nullptr).bytes; }

cudaError_t JointEstimate(const Selection& selection, int multiprocessors, cudaStream_t stream) {
  const JointWork work = PlanJoint(selection.problem, selection.workspace).work;
  return Probe(selection.problem, RowRule::kProbe, work.parts, work.pools, multiprocessors, stream);
}

cudaError_t JointSelect(const Selection& selection, int multiprocessors, cudaStream_t stream) {
  const JointWork work = PlanJoint(selection.problem, selection.workspace).work;
  cudaError_t error = ChooseLines(selection, work, stream);
  if (error == cudaSuccess) error = RepairRows(selection, work, multiprocessors, stream);
  if (error == cudaSuccess) error = WriteDensity(selection, stream);
  return error;
}

}  // namespace prefilld::cuda

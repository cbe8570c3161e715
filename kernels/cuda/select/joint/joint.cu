// joint, stages 1 and 2: the probe; then the choice of lines, and the repair that writes the index.
#include <algorithm>

#include "kernels/cuda/select/block_index.cuh"
#include "kernels/cuda/select/joint/joint.cuh"
#include "kernels/cuda/workspace.h"

namespace prefilld::cuda {
namespace {

constexpr size_t kScratchBytesMax = size_t{5} << 28;  // 1.25 GiB: at 1M tokens, 128 per block

}  // namespace

JointPlan PlanJoint(const Problem& problem, void* workspace) {
  JointPlan plan = {};
  JointWork& work = plan.work;
  Workspace parts(workspace);
  const int64_t heads = static_cast<int64_t>(problem.sequences) * problem.q_heads;
  const int64_t n = std::max(1, problem.k_blocks_max);
  const int64_t cells = static_cast<int64_t>(ProbeBytes(problem) / sizeof(BlockPart));
  work.slots = BlockSlots(problem);
  work.line_words = static_cast<int32_t>((n + 31) / 32 + 1);
  parts.Take(&work.parts, cells);
  parts.Take(&work.mass, cells);
  parts.Take(&work.pools, static_cast<int64_t>(PooledKeyBytes(problem) / sizeof(*work.pools)));
  parts.Take(&work.lines, heads * 2 * work.line_words);
  parts.Take(&work.flags, heads);
  if (n > kGainsInShared) parts.Take(&work.gains, problem.q_heads * work.slots * kGainBytes);
  parts.Take(&work.taken, 1);
  work.scratch_stride = Workspace::Aligned(static_cast<int64_t>(RepairScratchBytes(problem)));
  work.scratch_blocks = static_cast<int32_t>(std::clamp<int64_t>(
      static_cast<int64_t>(kScratchBytesMax) / work.scratch_stride, 8, kRepairBlocksMax));
  parts.Take(&work.scratch, work.scratch_blocks * work.scratch_stride);
  plan.bytes = static_cast<size_t>(parts.used());
  return plan;
}

bool HasJoint(DType dtype, int head_dim) {
  return HasProbe(dtype, head_dim) && HasRepair(dtype, head_dim);
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

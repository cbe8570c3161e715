// What the selection of every method takes and shares (stages 1 and 2): the policy beside the
// problem, the block index of what is kept, and the measurement of captured mass.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "kernels/attention.h"
#include "kernels/cuda/launch.h"

namespace prefilld::cuda {

struct Selection {
  Problem problem;
  double gamma = 0.9;
  FlexPrefillParameters flexprefill;
  int64_t min_budget_tokens = 0, max_budget_tokens = INT64_MAX;
  void* workspace = nullptr;     // 256-byte aligned, of the size that the layout says
  HeadReport* report = nullptr;  // [sequences, q_heads]; device or mapped host memory
};

// Every causal block, for method dense: count, index and report.
cudaError_t SelectCausal(const Selection& selection, cudaStream_t stream);

// Captured mass of every head on its own sampled rows (docs/sparse-attention.md, section 4); heads
// whose mean is below min_captured_mass get every causal block. Reads count and index.
bool HasCapturedMass(DType dtype, int head_dim);
size_t CapturedMassWorkspace(const Problem& problem);
cudaError_t MeasureCapturedMass(const Selection& selection, double min_captured_mass,
                                int multiprocessors, cudaStream_t stream);

// From a bitmap of kept blocks [q_heads, rows, bitmap_words(problem)] (bit J of a row: keep block
// J; only J <= I are set) to count, index, and the density in the report. `pattern` and
// dense_reason of the report are the method's.
inline int64_t BitmapWords(const Problem& problem) { return (problem.k_blocks_max + 31) / 32; }
cudaError_t WriteIndex(const Selection& selection, const uint32_t* bitmap, cudaStream_t stream);

}  // namespace prefilld::cuda

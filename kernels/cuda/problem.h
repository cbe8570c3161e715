// From what the engine asks to what the launchers take. Pure: needs no device.
#pragma once

#include <cstddef>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/attention.h"
#include "kernels/cuda/launch.h"

namespace prefilld::cuda {

// Two sets of stage-3 kernels over one set of stages 1 and 2.
enum class KernelSet { kSm80, kSm90 };

// The set that runs on a device of this compute capability (90 for 9.0). INVALID_ARGUMENT for a
// name that is none of auto, sm80, sm90, and for sm90 elsewhere: its code runs on 9.0 alone.
absl::StatusOr<KernelSet> ChooseKernelSet(std::string_view asked, int capability);
const char* BackendName(KernelSet set);  // "cuda-sm90"

// Whether the set's own attention kernel runs these; what it has none for, the sm80 set runs, and
// F32 the plain kernel.
bool RunsSm90(KernelSet set, const Problem& problem);

// The admission check of the backend.
absl::Status CheckSupported(KernelSet set, const AttentionShape& shape,
                            const SparsityPolicy& policy);

// INVALID_ARGUMENT for tensors that the kernels' 16-byte loads and 32-bit strides cannot take, and
// for pages that are none; UNIMPLEMENTED for pages that are not whole blocks.
absl::Status CheckTensors(const AttentionArgs& args);

// `sequences` becomes host_sequence, and must stay; device pointers into the workspace are not set.
Problem MakeProblem(const AttentionArgs& args, std::vector<Sequence>* sequences);

// Where things lie in the workspace of one call. The maps of the method, the measurement and the
// order of stage 3 are needed one after the other, and share one place.
struct WorkspaceLayout {
  size_t sequences = 0;  // [sequences] Sequence
  size_t stage = 0;
  size_t bytes = 0;  // of all
};
WorkspaceLayout LayOut(const Problem& problem, Method method);

}  // namespace prefilld::cuda

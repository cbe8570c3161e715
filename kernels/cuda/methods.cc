#include "kernels/cuda/methods.h"

#include "kernels/cuda/select/flexprefill/flexprefill.h"
#include "kernels/cuda/select/joint/joint.h"

namespace prefilld::cuda {
namespace {

constexpr MethodLaunchers kLaunchers[] = {
    {.method = Method::kDense,
     .has = [](DType, int) { return true; },
     .workspace = nullptr,
     .estimate = nullptr,
     .select = [](const Selection& selection, int,
                  cudaStream_t stream) { return SelectCausal(selection, stream); }},
    {.method = Method::kFlexPrefill,
     .has = HasFlexPrefill,
     .workspace = FlexPrefillWorkspace,
     .estimate = FlexPrefillEstimate,
     .select = FlexPrefillSelect},
    {.method = Method::kJoint,
     .has = HasJoint,
     .workspace = JointWorkspace,
     .estimate = JointEstimate,
     .select = JointSelect},
};
constexpr auto kServed = MethodsOf(kLaunchers);

}  // namespace

std::span<const Method> ServedMethods() { return kServed; }
const MethodLaunchers& LaunchersOf(Method method) { return *FindRow(kLaunchers, method); }

}  // namespace prefilld::cuda

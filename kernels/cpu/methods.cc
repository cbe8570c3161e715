#include "kernels/cpu/methods.h"

#include "kernels/cpu/joint.h"

namespace prefilld::cpu {
namespace {

constexpr MethodFunctions kFunctions[] = {
    {.method = Method::kDense,
     .reference = [](const reference::Head&, const SparsityPolicy&,
                     reference::Mask*) { return HeadReport(); },
     .estimate = nullptr,
     .select = [](const Head& head, const SparsityPolicy&,
                  const Maps&) { return HeadChoice{.blocks = head.WriteCausal()}; }},
    {.method = Method::kFlexPrefill,
     .reference = reference::FlexPrefill,
     .estimate =
         [](const AttentionArgs& args, std::span<const int> heads, int threads, Maps* maps) {
           maps->flexprefill.resize(static_cast<size_t>(args.shape.sequences()) *
                                    args.shape.q_heads);
           ForEachHead(args, heads, threads, [&](const Head& head) {
             maps->flexprefill[head.place] = EstimateFlexPrefill(head, PolicyOf(args, head.h));
           });
         },
     .select =
         [](const Head& head, const SparsityPolicy& policy, const Maps& maps) {
           return SelectFlexPrefill(head, policy, maps.flexprefill[head.place]);
         }},
    {.method = Method::kJoint,
     .reference = reference::Joint,
     .estimate = [](const AttentionArgs& args, std::span<const int> heads, int threads,
                    Maps* maps) { maps->probe.Probe(args, heads, ProbeRows, threads); },
     .select =
         [](const Head& head, const SparsityPolicy& policy, const Maps& maps) {
           return SelectJoint(head, policy, ReadJointMap(head, maps.probe));
         }},
};
constexpr auto kServed = MethodsOf(kFunctions);

}  // namespace

std::span<const Method> ServedMethods() { return kServed; }
const MethodFunctions& FunctionsOf(Method method) { return *FindRow(kFunctions, method); }
reference::MethodFunction reference::FunctionOf(Method method) {
  return FindRow(kFunctions, method)->reference;
}

}  // namespace prefilld::cpu

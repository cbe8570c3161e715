// The closed table of what each method runs on the CPU: the oracle's reading of it, and stages 1
// and 2. Admission and the stages search it.
#pragma once

#include <span>
#include <vector>

#include "kernels/attention.h"
#include "kernels/cpu/flexprefill.h"
#include "kernels/cpu/head.h"
#include "kernels/cpu/probe.h"
#include "kernels/cpu/reference_head.h"

namespace prefilld::cpu {

// What stage 1 leaves for stage 2; reused from call to call.
struct Maps {
  BlockMass probe;                          // of joint; then of the measurement
  std::vector<FlexPrefillMap> flexprefill;  // [sequences, q_heads]
};

struct MethodFunctions {
  Method method;
  reference::MethodFunction reference;
  // Stage 1 of the query heads that have this method, on a team of threads. Null: there is none.
  void (*estimate)(const AttentionArgs& args, std::span<const int> heads, int threads, Maps* maps);
  // Stage 2 of one of them: writes its rows. Called by several threads at once.
  HeadChoice (*select)(const Head& head, const SparsityPolicy& policy, const Maps& maps);
};

std::span<const Method> ServedMethods();
const MethodFunctions& FunctionsOf(Method method);  // of a served one

}  // namespace prefilld::cpu

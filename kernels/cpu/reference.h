// The oracle: docs/sparse-attention.md, the specification, read literally, in double precision,
// one plain loop inside another, on one thread. Every other implementation is compared with it; it
// shares no code with them and is never fast. Arguments are those of the stages (attention.h) and
// must be such that Backend::Supports() accepts them.
#pragma once

#include <vector>

#include "kernels/attention.h"

namespace prefilld::cpu {

// Stages 1 and 2: writes args.index, and pattern, dense_reason and density of args.report. Only q
// and k are read.
void ReferenceSelectBlocks(const AttentionArgs& args);

// The measurement between stages 2 and 3: writes captured_mass and captured_mass_min of
// args.report for every head; those below their policy's min_captured_mass get every causal block.
// Only q and k are read.
void ReferenceMeasureCapturedMass(const AttentionArgs& args);

// Stage 3 over args.index: o [total_q, q_heads, d] and lse [q_heads, total_q], natural log. args.o
// and args.lse are not used.
struct ReferenceOutput {
  std::vector<double> o;
  std::vector<double> lse;
};
ReferenceOutput ReferenceAttend(const AttentionArgs& args);

}  // namespace prefilld::cpu

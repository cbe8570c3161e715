// The accuracy that a block index really delivers: the share of exact softmax mass that it captures
// in sampled rows, others than those it was chosen from.
#pragma once

#include <span>

#include "kernels/attention.h"
#include "kernels/cpu/probe.h"

namespace prefilld::cpu {

// Writes captured_mass and captured_mass_min of these query heads in args.report from args.index.
// Heads whose mean is below their policy's min_captured_mass get every causal block and are
// reported as dense. `probe` is overwritten. q, k and index are read.
void MeasureCapturedMass(const AttentionArgs& args, std::span<const int> heads, int threads,
                         BlockMass* probe);

}  // namespace prefilld::cpu

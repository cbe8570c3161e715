// joint: vertical and diagonal lines of blocks chosen together from exact rows all over the prompt,
// by mass gained per block computed, then every row of blocks repaired from a pooled map until it
// reaches gamma.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/attention.h"
#include "kernels/cpu/head.h"
#include "kernels/cpu/probe.h"

namespace prefilld::cpu {

// The exact mass of key blocks in the probed rows of one head.
struct JointMap {
  std::vector<int64_t> query_block;  // [rows] absolute, ascending
  std::vector<double> mass;          // [rows, k_blocks]
};
JointMap ReadJointMap(const Head& head, const BlockMass& probe);

struct JointLines {
  std::vector<uint8_t> vertical;  // [n] by key block
  std::vector<uint8_t> diagonal;  // [n] by block offset
  bool reached = true;            // false: the lines fell short, the head keeps every causal block

  bool Keep(int64_t I, int64_t J) const {
    const int64_t n = static_cast<int64_t>(vertical.size());
    return !reached || I >= n - 2 || vertical[J] || diagonal[I - J];
  }
};
// Lines that cover `gamma` of the mass, a mean over the rows. gamma <= 0: the forced lines alone.
JointLines ChooseLines(const JointMap& map, int64_t n, double gamma);

// Stage 2 of one head: writes its rows.
HeadChoice SelectJoint(const Head& head, const SparsityPolicy& policy, const JointMap& map);

}  // namespace prefilld::cpu

// FlexPrefill (Lai et al., ICLR 2025, arXiv 2502.20766) as published and released: from the last
// block of queries, either lines (the best key blocks and block diagonals) or, where pooled
// attention predicts those rows well, single blocks of the pooled map. Needs Sq = Sk.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/attention.h"
#include "kernels/cpu/head.h"

namespace prefilld::cpu {

// Stage 1 of one head.
struct FlexPrefillMap {
  bool short_prompt = false;     // the rest is then empty: the head runs dense
  std::vector<double> vertical;  // [n] mass of key blocks
  std::vector<double> diagonal;  // [n] mass of bins of diagonals; bin u is block offset n - 1 - u
  int64_t vertical_budget = 0;   // blocks
  int64_t diagonal_budget = 0;   // offsets
  bool query_aware = false;
};
FlexPrefillMap EstimateFlexPrefill(const Head& head, const SparsityPolicy& policy);

// Stage 2: writes the rows of the head.
HeadChoice SelectFlexPrefill(const Head& head, const SparsityPolicy& policy,
                             const FlexPrefillMap& map);

// The steps that are functions of numbers alone.

// How many of the largest scores have a sum within `limit`: inclusive prefix sums, so the one that
// crosses is not counted.
int64_t CountWithin(std::vector<double> scores, double limit);
// Lines cover gamma with one score more than CountWithin; 128 of them make a block of the budget.
int64_t LineBudget(int64_t lines_within);
// Sums of block_size consecutive scores; the last may be of fewer. Diagonals are held by
// i = S - 1 - delta, so that the last bin, block offset 0, is the short one.
std::vector<double> SumBlocks(const std::vector<double>& scores, int64_t block_size);
// NaN, which is below no tau, where either distribution holds an exact zero.
double JensenShannonDistance(const std::vector<double>& a, const std::vector<double>& b);

}  // namespace prefilld::cpu

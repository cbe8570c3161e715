// The exact softmax mass of every block of keys in a few rows of queries: what joint chooses its
// lines from, and how captured mass is measured. One pass over K: each packed tile of keys serves
// the rows of all query heads that share it.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "kernels/attention.h"

namespace prefilld::cpu {

// One row in each of min(64, sq) equal strata of a sequence, spread within blocks by a radical
// inverse and always the same; ascending. The two rules give different rows of long sequences.
std::vector<int64_t> ProbeRows(int64_t sq);     // joint chooses from these
std::vector<int64_t> MeasuredRows(int64_t sq);  // captured mass is measured on these

class BlockMass {
 public:
  using RowRule = std::vector<int64_t> (*)(int64_t sq);

  // Probes these query heads of all sequences, on `threads` threads. q and k must be readable.
  void Probe(const AttentionArgs& args, std::span<const int> heads, RowRule rule, int threads);

  // Query tokens that were probed in sequence s, ascending.
  const std::vector<int64_t>& rows(int64_t s) const { return sequences_[s].rows; }
  // Of a head that was probed. mass[rows, k_blocks]: each row sums to 1, or is zero where q or k
  // hold NaN or infinity.
  void Read(int64_t s, int h, std::vector<double>* mass) const;

 private:
  // Of one row and block: the largest logit and the sum of exp(logit - max). The sum is 0 where the
  // row sees no key of the block.
  struct Part {
    float max, sum;
  };
  struct Sequence {
    SequenceBlocks blocks;
    std::vector<int64_t> rows;
    int64_t first_query;  // of this sequence in queries_, in rows of d
    int64_t first_part;   // of this sequence in parts_: [q_heads, rows, k_blocks]
  };
  void ProbeTile(const AttentionArgs& args, const Sequence& sequence, int kv, int64_t key);

  std::vector<uint8_t> probed_;  // [q_heads]
  std::vector<Sequence> sequences_;
  std::vector<float> queries_;  // per sequence [q_heads, rows, d], times softmax_scale
  std::vector<Part> parts_;
};

}  // namespace prefilld::cpu

// One head's attention between pools of consecutive tokens: softmax over the pools b <= a of
// <mean q of pool a, mean k of pool b> * scale. It costs 1/pool^2 of the exact map and is computed
// in double, so that what is chosen from it does not depend on the machine.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/cpu/head.h"

namespace prefilld::cpu {

class PooledMap {
 public:
  // Pools are aligned to absolute positions; `pool` divides the block size and is at least 32.
  // Reads all keys of the head now, its queries as rows are asked for.
  PooledMap(const Head& head, int64_t pool, double scale);

  // row[J] for J <= I: the share of key block J, summed over its pools and averaged over the pools
  // of query block I that hold queries.
  void BlockRow(int64_t I, std::vector<double>* row);

 private:
  // The mean query of each pool in [begin, begin + pools) that holds one, to queries_; their
  // number.
  int64_t PoolQueries(int64_t begin, int64_t pools);

  const Head& head_;
  const int64_t pool_;
  const double scale_;
  const int64_t key_pools_;
  std::vector<float> rows_;      // [pool, d] tokens being averaged
  std::vector<double> keys_;     // [d, key_pools] means
  std::vector<double> queries_;  // [pools of a block, d] means, times scale
  std::vector<double> logits_;   // [pools of a block, key_pools]
};

}  // namespace prefilld::cpu

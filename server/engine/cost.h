// What a job will cost on this device, learned: rates are measured at start-up and follow what is
// observed. Used to refuse deadlines that cannot be met, to order jobs by slack, and to run dense
// where the selection of blocks would cost more than it saves. Thread-safe.
#pragma once

#include <atomic>
#include <cstdint>

#include "kernels/attention.h"

namespace prefilld {

class CostModel {
 public:
  // Share of the causal blocks that joint at gamma .9 keeps in a prompt of n blocks of keys: a fit
  // to measured prompts (n = 60: .29, n = 1024: .14, synthetic), corrected by what is observed.
  double PredictedDensity(int64_t k_blocks) const;

  // Seconds of one attention call over one sequence.
  double AttentionSeconds(int q_heads, int head_dim, int64_t sq, int64_t sk, double density) const;
  double SelectSeconds(int q_heads, int head_dim, int64_t sk) const;
  // Seconds of one layer's linear part: per token and per weight.
  double LinearSeconds(int64_t tokens, int64_t layer_weights) const;

  bool SparseIsFaster(int q_heads, int head_dim, int64_t sq, int64_t sk) const;

  // Observations; each moves its rate by a tenth towards what was seen.
  void ObserveAttention(int q_heads, int head_dim, int64_t sq, int64_t sk, double density,
                        double seconds);
  void ObserveSelect(int q_heads, int head_dim, int64_t sk, double seconds);
  void ObserveLinear(int64_t tokens, int64_t layer_weights, double seconds);
  void ObserveDensity(int64_t k_blocks, double density);

 private:
  std::atomic<double> attention_flops_{5e10};  // per second
  std::atomic<double> select_flops_{2e10};
  std::atomic<double> linear_flops_{5e10};
  std::atomic<double> density_ratio_{1};  // observed over predicted
};

}  // namespace prefilld

#include "server/engine/cost.h"

#include <algorithm>
#include <cmath>

namespace prefilld {
namespace {

// FLOPs of dense causal attention of one sequence: QK and PV over the visible keys.
double AttentionFlops(int q_heads, int head_dim, int64_t sq, int64_t sk) {
  const double prefix = static_cast<double>(sk - sq);
  const double visible =
      static_cast<double>(sq) * prefix + 0.5 * static_cast<double>(sq) * (sq + 1.0);
  return 4.0 * q_heads * head_dim * visible;
}

// Selection probes 64 rows and measures the captured mass on 64 more, each against every key.
double SelectFlops(int q_heads, int head_dim, int64_t sk) {
  return 2.0 * 128 * q_heads * head_dim * static_cast<double>(sk);
}

void Follow(std::atomic<double>& rate, double seen) {
  if (!std::isfinite(seen) || seen <= 0) return;
  rate.store(0.9 * rate.load(std::memory_order_relaxed) + 0.1 * seen, std::memory_order_relaxed);
}

double Fit(int64_t k_blocks) { return std::min(1.0, 0.14 + 9.0 / static_cast<double>(k_blocks)); }

}  // namespace

double CostModel::PredictedDensity(int64_t k_blocks) const {
  return std::clamp(Fit(k_blocks) * density_ratio_.load(std::memory_order_relaxed), 0.01, 1.0);
}

double CostModel::AttentionSeconds(int q_heads, int head_dim, int64_t sq, int64_t sk,
                                   double density) const {
  return density * AttentionFlops(q_heads, head_dim, sq, sk) / attention_flops_;
}

double CostModel::SelectSeconds(int q_heads, int head_dim, int64_t sk) const {
  return SelectFlops(q_heads, head_dim, sk) / select_flops_;
}

double CostModel::LinearSeconds(int64_t tokens, int64_t layer_weights) const {
  return 2.0 * static_cast<double>(tokens) * static_cast<double>(layer_weights) / linear_flops_;
}

bool CostModel::SparseIsFaster(int q_heads, int head_dim, int64_t sq, int64_t sk) const {
  const double density = PredictedDensity((sk + 127) / 128);
  return SelectSeconds(q_heads, head_dim, sk) +
             AttentionSeconds(q_heads, head_dim, sq, sk, density) <
         AttentionSeconds(q_heads, head_dim, sq, sk, 1);
}

void CostModel::ObserveAttention(int q_heads, int head_dim, int64_t sq, int64_t sk, double density,
                                 double seconds) {
  Follow(attention_flops_, density * AttentionFlops(q_heads, head_dim, sq, sk) / seconds);
}

void CostModel::ObserveSelect(int q_heads, int head_dim, int64_t sk, double seconds) {
  Follow(select_flops_, SelectFlops(q_heads, head_dim, sk) / seconds);
}

void CostModel::ObserveLinear(int64_t tokens, int64_t layer_weights, double seconds) {
  Follow(linear_flops_,
         2.0 * static_cast<double>(tokens) * static_cast<double>(layer_weights) / seconds);
}

void CostModel::ObserveDensity(int64_t k_blocks, double density) {
  Follow(density_ratio_, density / Fit(k_blocks));
}

}  // namespace prefilld

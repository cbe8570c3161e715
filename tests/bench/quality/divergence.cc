#include "tests/bench/quality/divergence.h"

#include <algorithm>
#include <cmath>

namespace prefilld {
namespace {

constexpr int64_t kTileRows = 256;  // 50 MB of logits for a vocabulary of 49152

// Exponentials in F32, summed in double: a divergence of 1e-3 needs the sum to about 1e-6.
double LogSumExp(const float* logits, int64_t n) {
  const float top = *std::max_element(logits, logits + n);
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += std::exp(logits[i] - top);
  return top + std::log(sum);
}

// sum p (ln p - ln q), with ln p = a - lse(a) and ln q = b - lse(b).
double KullbackLeibler(const float* a, double lse_a, const float* b, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) {
    const float p = std::exp(static_cast<float>(a[i] - lse_a));
    sum += p * (static_cast<double>(a[i]) - b[i]);
  }
  return sum - lse_a + LogSumExp(b, n);
}

}  // namespace

absl::StatusOr<std::vector<std::vector<double>>> Divergence(
    Transformer& model, const PrefillBatch& dense, const std::vector<const PrefillBatch*>& sparse) {
  const int64_t vocab = model.info().vocab_size, tokens = dense.tokens();
  std::vector<float> p(kTileRows * vocab), q(kTileRows * vocab);
  std::vector<double> lse(kTileRows);
  std::vector<std::vector<double>> divergence(sparse.size(), std::vector<double>(tokens));
  for (int64_t first = 0; first < tokens; first += kTileRows) {
    const int64_t rows = std::min(kTileRows, tokens - first);
    absl::Status status = model.Logits(dense, {first, rows, p.data()}, Stream{});
    if (!status.ok()) return status;
#pragma omp parallel for
    for (int64_t r = 0; r < rows; ++r) lse[r] = LogSumExp(&p[r * vocab], vocab);
    for (size_t i = 0; i < sparse.size(); ++i) {
      status = model.Logits(*sparse[i], {first, rows, q.data()}, Stream{});
      if (!status.ok()) return status;
#pragma omp parallel for
      for (int64_t r = 0; r < rows; ++r) {
        divergence[i][first + r] = KullbackLeibler(&p[r * vocab], lse[r], &q[r * vocab], vocab);
      }
    }
  }
  return divergence;
}

}  // namespace prefilld

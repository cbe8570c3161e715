// FlexPrefill as published and released; numbers are the steps of docs/sparse-attention.md, section
// 2.
#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/cpu/reference_head.h"

namespace prefilld::cpu::reference {
namespace {

int64_t CeilDiv(int64_t a, int64_t b) { return a / b + (a % b != 0); }

// fp32's exponential: an exact zero is part of the algorithm (the pattern test fails on one), so
// probabilities below the smallest normal float are zero here too.
void Fp32Softmax(std::vector<double>* row) {
  double largest = -INFINITY;
  for (double x : *row) largest = std::max(largest, x);
  for (double& x : *row) {
    if (x - largest < -87) x = -INFINITY;
  }
  Softmax(row);
}

// 3. The number of blocks for the lines that cover gamma.
int64_t Budget(const std::vector<double>& a, double gamma) {
  std::vector<double> sorted = a;
  std::sort(sorted.begin(), sorted.end(), std::greater<>());
  int64_t k = 1;
  double sum = 0;
  for (double x : sorted) {
    sum += x;
    if (sum <= gamma) ++k;
  }
  return k / 128 + 1;
}

// The means of the valid tokens of blocks of B rows.
Matrix BlockMeans(const Matrix& x, int64_t block_size) {
  Matrix means(CeilDiv(x.rows, block_size), x.columns);
  for (int64_t b = 0; b < means.rows; ++b) {
    const int64_t end = std::min((b + 1) * block_size, x.rows);
    for (int64_t t = b * block_size; t < end; ++t) {
      for (int64_t c = 0; c < x.columns; ++c) means[b][c] += x[t][c];
    }
    for (int64_t c = 0; c < x.columns; ++c) means[b][c] /= end - b * block_size;
  }
  return means;
}

// 5. NaN where either holds an exact zero.
double JensenShannonDistance(const std::vector<double>& a, const std::vector<double>& b) {
  double sum = 0;
  for (size_t j = 0; j < a.size(); ++j) {
    const double m = (a[j] + b[j]) / 2;
    sum += 0.5 * (a[j] * std::log(a[j] / m) + b[j] * std::log(b[j] / m));
  }
  return std::sqrt(sum < 0 ? 0 : sum);
}

}  // namespace

HeadReport FlexPrefill(const Head& head, const SparsityPolicy& policy, Mask* keep) {
  const int64_t B = head.block_size, S = head.blocks.sk, n = head.blocks.k_blocks;
  const int d = head.head_dim;
  const int64_t n_min = CeilDiv(std::max<int64_t>(policy.min_budget_tokens, 1), B);
  const int64_t n_max = std::min(CeilDiv(policy.max_budget_tokens, B), n);
  if (S <= 2 * B || n_min >= CeilDiv(S, B)) {  // S <= max(2B, Nmin B)
    return {.dense_reason = DenseReason::kShortPrompt};
  }

  // 1, 2. The last B rows; scores of columns j and of diagonals delta.
  Matrix q(B, d);
  for (int64_t r = 0; r < B; ++r) {
    for (int c = 0; c < d; ++c) {
      q[r][c] = RoundToBFloat16(head.q[S - B + r][c] / std::sqrt(static_cast<double>(d)));
    }
  }
  std::vector<double> a_v(S), a_s(S);
  for (int64_t r = 0; r < B; ++r) {
    const int64_t t = S - B + r;
    std::vector<double> p(t + 1);
    for (int64_t j = 0; j <= t; ++j) p[j] = RoundToBFloat16(Dot(q[r], head.k[j], d));
    Fp32Softmax(&p);
    for (int64_t j = 0; j <= t; ++j) {
      a_v[j] += p[j] / B;
      a_s[t - j] += p[j] / B;
    }
  }

  // 3.
  int64_t n_v = std::min(std::max(Budget(a_v, policy.gamma), n_min), n_max);
  int64_t n_s = std::min(std::max(Budget(a_s, policy.gamma), n_min), n_max);

  // 4. Bin u of the diagonals runs over i = S - 1 - delta and stands for block offset n - 1 - u.
  std::vector<double> A_v(n), A_s(n);
  for (int64_t i = 0; i < S; ++i) {
    A_v[i / B] += a_v[i];
    A_s[i / B] += a_s[S - 1 - i];
  }

  // 5, 6.
  Matrix kbar = BlockMeans(head.k, B);
  for (double& x : kbar.x) x = RoundToBFloat16(x);
  Matrix qt = BlockMeans(q, B);
  for (double& x : qt.x) x = RoundToBFloat16(x);
  std::vector<double> b(n);
  for (int64_t J = 0; J < n; ++J) b[J] = Dot(qt[0], kbar[J], d);
  Fp32Softmax(&b);
  const bool query_aware = JensenShannonDistance(b, A_v) < policy.flexprefill.tau;
  if (query_aware) n_v = n_s = n_min;

  // 7, 8.
  A_v[0] = INFINITY;
  A_s[n - 1] = INFINITY;
  const std::vector<int64_t> by_v = DescendingOrder(A_v), by_s = DescendingOrder(A_s);
  for (int64_t I = 0; I < n; ++I) {
    for (int64_t x = 0; x < n_v; ++x) {
      if (by_v[x] <= I) (*keep)[I][by_v[x]] = true;
    }
    for (int64_t x = 0; x < n_s; ++x) {
      const int64_t o = n - 1 - by_s[x];
      if (o <= I) (*keep)[I][I - o] = true;
    }
  }
  (*keep)[0][0] = true;
  if (!query_aware) return {.pattern = Pattern::kVerticalSlash};

  // 9.
  const Matrix q_mean = BlockMeans(head.q, B), k_mean = BlockMeans(head.k, B);
  std::vector<double> E(n * n);
  for (int64_t I = 0; I < n; ++I) {
    std::vector<double> row(I + 1);
    for (int64_t J = 0; J <= I; ++J) {
      row[J] = Dot(q_mean[I], k_mean[J], d) / std::sqrt(static_cast<double>(d));
    }
    Softmax(&row);
    std::copy(row.begin(), row.end(), E.begin() + I * n);
  }
  double sum = 0;
  for (int64_t flat : DescendingOrder(E)) {
    sum += E[flat];
    if (!(sum <= policy.gamma * n)) break;
    const int64_t I = flat / n, J = flat % n;
    if (J <= I) (*keep)[I][J] = true;
  }
  return {.pattern = Pattern::kQueryAware};
}

}  // namespace prefilld::cpu::reference

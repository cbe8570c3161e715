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

// 1. The last B rows, as the kernels of the paper's authors hold them.
Matrix LastQueries(const Head& head) {
  const int64_t B = head.block_size;
  Matrix q(B, head.head_dim);
  for (int64_t r = 0; r < B; ++r) {
    for (int c = 0; c < head.head_dim; ++c) {
      q[r][c] = RoundToBFloat16(head.q[head.blocks.sk - B + r][c] /
                                std::sqrt(static_cast<double>(head.head_dim)));
    }
  }
  return q;
}

// 2. Mean scores of columns j and of diagonals delta.
struct LineScores {
  std::vector<double> columns, diagonals;  // [S]
};
LineScores ScoreLines(const Head& head, const Matrix& q) {
  const int64_t B = head.block_size, S = head.blocks.sk;
  LineScores a = {std::vector<double>(S), std::vector<double>(S)};
  for (int64_t r = 0; r < B; ++r) {
    const int64_t t = S - B + r;
    std::vector<double> p(t + 1);
    for (int64_t j = 0; j <= t; ++j) p[j] = RoundToBFloat16(Dot(q[r], head.k[j], head.head_dim));
    Fp32Softmax(&p);
    for (int64_t j = 0; j <= t; ++j) {
      a.columns[j] += p[j] / B;
      a.diagonals[t - j] += p[j] / B;
    }
  }
  return a;
}

// 5. What pooled queries and keys make of the last row of blocks.
std::vector<double> PooledLastRow(const Head& head, const Matrix& q) {
  const int64_t n = head.blocks.k_blocks;
  Matrix kbar = BlockMeans(head.k, head.block_size), qt = BlockMeans(q, head.block_size);
  for (double& x : kbar.x) x = RoundToBFloat16(x);
  for (double& x : qt.x) x = RoundToBFloat16(x);
  std::vector<double> b(n);
  for (int64_t J = 0; J < n; ++J) b[J] = Dot(qt[0], kbar[J], head.head_dim);
  Fp32Softmax(&b);
  return b;
}

// 7, 8. Bin u of the diagonals stands for block offset n - 1 - u.
void KeepLines(const std::vector<int64_t>& columns, const std::vector<int64_t>& diagonals,
               Mask* keep) {
  const int64_t n = static_cast<int64_t>(keep->size());
  for (int64_t I = 0; I < n; ++I) {
    for (int64_t J : columns) {
      if (J <= I) (*keep)[I][J] = true;
    }
    for (int64_t u : diagonals) {
      const int64_t offset = n - 1 - u;
      if (offset <= I) (*keep)[I][I - offset] = true;
    }
  }
  (*keep)[0][0] = true;
}

// 9. Over all rows at once.
void KeepPooledBlocks(const Head& head, double gamma, Mask* keep) {
  const int64_t n = head.blocks.k_blocks;
  const int d = head.head_dim;
  const Matrix q_mean = BlockMeans(head.q, head.block_size);
  const Matrix k_mean = BlockMeans(head.k, head.block_size);
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
    if (!(sum <= gamma * n)) break;
    const int64_t I = flat / n, J = flat % n;
    if (J <= I) (*keep)[I][J] = true;
  }
}

}  // namespace

HeadReport FlexPrefill(const Head& head, const SparsityPolicy& policy, Mask* keep) {
  const int64_t B = head.block_size, S = head.blocks.sk, n = head.blocks.k_blocks;
  const int64_t n_min = CeilDiv(std::max<int64_t>(policy.min_budget_tokens, 1), B);
  const int64_t n_max = std::min(CeilDiv(policy.max_budget_tokens, B), n);
  if (S <= 2 * B || n_min >= CeilDiv(S, B)) {  // S <= max(2B, Nmin B)
    return {.dense_reason = DenseReason::kShortPrompt};
  }
  const Matrix q = LastQueries(head);
  const LineScores a = ScoreLines(head, q);

  // 3.
  int64_t n_v = std::min(std::max(Budget(a.columns, policy.gamma), n_min), n_max);
  int64_t n_s = std::min(std::max(Budget(a.diagonals, policy.gamma), n_min), n_max);

  // 4. Bins of the diagonals run over i = S - 1 - delta.
  std::vector<double> A_v(n), A_s(n);
  for (int64_t i = 0; i < S; ++i) {
    A_v[i / B] += a.columns[i];
    A_s[i / B] += a.diagonals[S - 1 - i];
  }

  // 6.
  const bool query_aware =
      JensenShannonDistance(PooledLastRow(head, q), A_v) < policy.flexprefill.tau;
  if (query_aware) n_v = n_s = n_min;

  A_v[0] = INFINITY;
  A_s[n - 1] = INFINITY;
  std::vector<int64_t> by_v = DescendingOrder(A_v), by_s = DescendingOrder(A_s);
  by_v.resize(n_v);
  by_s.resize(n_s);
  KeepLines(by_v, by_s, keep);
  if (!query_aware) return {.pattern = Pattern::kVerticalSlash};
  KeepPooledBlocks(head, policy.gamma, keep);
  return {.pattern = Pattern::kQueryAware};
}

}  // namespace prefilld::cpu::reference

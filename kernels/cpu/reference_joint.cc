// joint; numbers are the steps of docs/sparse-attention.md, section 3.
#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/cpu/reference_head.h"

namespace prefilld::cpu::reference {
namespace {

constexpr int64_t kPool = 32;

int64_t CeilDiv(int64_t a, int64_t b) { return a / b + (a % b != 0); }

// 1, 2. Rows of the probe and the mass of every key block in each.
struct Probe {
  int64_t rows;
  std::vector<int64_t> I;  // [rows] query block
  Matrix M;                // [rows, n]
};

Probe ProbeRows(const Head& head) {
  const int64_t n = head.blocks.k_blocks, R = std::min<int64_t>(64, head.blocks.sq);
  Probe probe = {.rows = R, .I = std::vector<int64_t>(R), .M = Matrix(R, n)};
  for (int64_t r = 0; r < R; ++r) {
    const int64_t t =
        static_cast<int64_t>(std::floor((r + RadicalInverse(r)) * head.blocks.sq / R));
    const int64_t position = head.blocks.prefix + t;
    probe.I[r] = position / head.block_size;
    std::vector<double> p(position + 1);
    for (int64_t j = 0; j <= position; ++j) {
      p[j] = Dot(head.q[t], head.k[j], head.head_dim) * head.softmax_scale;
    }
    Softmax(&p);
    for (int64_t j = 0; j <= position; ++j) probe.M[r][j / head.block_size] += p[j];
  }
  return probe;
}

// 3, 5. Gains of all verticals, of all diagonals: uncovered mass per probe row that pays for it.
struct Gains {
  std::vector<double> vertical, diagonal;
};
Gains LineGains(const Probe& probe, const Matrix& U, int64_t n) {
  Gains gains = {std::vector<double>(n), std::vector<double>(n)};
  for (int64_t x = 0; x < n; ++x) {
    int64_t cost = 0;
    for (int64_t r = 0; r < probe.rows; ++r) {
      gains.vertical[x] += U[r][x];
      if (probe.I[r] >= x) gains.diagonal[x] += U[r][probe.I[r] - x];
      if (probe.I[r] >= x) ++cost;
    }
    gains.vertical[x] /= std::max<int64_t>(1, cost);
    gains.diagonal[x] /= std::max<int64_t>(1, cost);
  }
  return gains;
}

double Covered(const Matrix& U) {
  double sum = 0;
  for (int64_t r = 0; r < U.rows; ++r) {
    double row = 0;
    for (int64_t J = 0; J < U.columns; ++J) row += U[r][J];
    sum += row;
  }
  return 1 - sum / U.rows;
}

// 4, 5. The lines a head takes; false where forty rounds did not reach the threshold.
bool ChooseLines(const Probe& probe, double gamma_lines, std::vector<bool>* vertical,
                 std::vector<bool>* diagonal) {
  const int64_t n = probe.M.columns;
  Matrix U = probe.M;
  const auto take_vertical = [&](int64_t J) {
    (*vertical)[J] = true;
    for (int64_t r = 0; r < probe.rows; ++r) U[r][J] = 0;
  };
  const auto take_diagonal = [&](int64_t o) {
    (*diagonal)[o] = true;
    for (int64_t r = 0; r < probe.rows; ++r) {
      if (probe.I[r] >= o) U[r][probe.I[r] - o] = 0;
    }
  };
  take_vertical(0);
  take_diagonal(0);
  if (n > 1) take_diagonal(1);
  for (int64_t r = 0; r < probe.rows; ++r) {
    if (probe.I[r] >= n - 2) std::fill(U[r], U[r] + n, 0.0);
  }
  if (gamma_lines <= 0) return true;

  double theta = INFINITY;
  for (int round = 0; round < 40; ++round) {
    if (Covered(U) >= gamma_lines) return true;
    Gains gains = LineGains(probe, U, n);
    double largest = 0;
    for (double gain : gains.vertical) largest = std::max(largest, gain);
    for (double gain : gains.diagonal) largest = std::max(largest, gain);
    if (largest == 0) return true;
    theta = std::min(largest / 2, theta / 2);
    for (int64_t J : DescendingOrder(gains.vertical)) {
      if (gains.vertical[J] < theta || Covered(U) >= gamma_lines) break;
      take_vertical(J);
    }
    gains = LineGains(probe, U, n);
    for (int64_t o : DescendingOrder(gains.diagonal)) {
      if (gains.diagonal[o] < theta || Covered(U) >= gamma_lines) break;
      take_diagonal(o);
    }
  }
  return Covered(U) >= gamma_lines;
}

// 6. The means of the tokens of each pool that this matrix holds; `first` is the absolute position
// of its row 0. Pools before it stay empty.
Matrix PoolMeans(const Matrix& x, int64_t first) {
  Matrix means(CeilDiv(first + x.rows, kPool), x.columns);
  for (int64_t a = first / kPool; a < means.rows; ++a) {
    const int64_t begin = std::max(a * kPool, first),
                  end = std::min((a + 1) * kPool, first + x.rows);
    for (int64_t t = begin; t < end; ++t) {
      for (int64_t c = 0; c < x.columns; ++c) means[a][c] += x[t - first][c];
    }
    for (int64_t c = 0; c < x.columns; ++c) means[a][c] /= end - begin;
  }
  return means;
}

Matrix PooledMap(const Head& head) {
  const int64_t n = head.blocks.k_blocks, per_block = head.block_size / kPool;
  const Matrix q = PoolMeans(head.q, head.blocks.prefix), k = PoolMeans(head.k, 0);
  Matrix P(n, n);
  for (int64_t a = head.blocks.prefix / kPool; a < q.rows; ++a) {
    std::vector<double> row(a + 1);
    for (int64_t b = 0; b <= a; ++b) {
      row[b] = Dot(q[a], k[b], head.head_dim) * head.softmax_scale;
    }
    Softmax(&row);
    for (int64_t b = 0; b <= a; ++b) P[a / per_block][b / per_block] += row[b];
  }
  for (int64_t I = head.blocks.first_q_block; I < n; ++I) {
    double sum = 0;
    for (int64_t J = 0; J <= I; ++J) sum += P[I][J];
    for (int64_t J = 0; J <= I; ++J) P[I][J] = sum > 0 ? P[I][J] / sum : 0;
  }
  return P;
}

void RepairRow(const double* P, double gamma, std::vector<bool>* row, int64_t I) {
  for (;;) {
    double mass = 0;
    for (int64_t J = 0; J <= I; ++J) mass += (*row)[J] ? P[J] : 0;
    if (mass >= gamma) return;
    int64_t best = -1;
    for (int64_t J = 0; J <= I; ++J) {
      if (!(*row)[J] && (best < 0 || P[J] > P[best])) best = J;
    }
    if (best < 0) return;
    (*row)[best] = true;
  }
}

// 7. A cap is a cap: it holds for the last two query blocks too.
void ApplyBudgets(const double* P, int64_t least, int64_t most, std::vector<bool>* row, int64_t I) {
  int64_t count = std::count(row->begin(), row->end(), true);
  for (int64_t J = I; J >= 0 && count < least; --J) {
    if (!(*row)[J]) ++count;
    (*row)[J] = true;
  }
  if (count <= most) return;
  std::vector<double> worth(I + 1, -1);
  for (int64_t J = 0; J <= I; ++J) {
    if ((*row)[J]) worth[J] = P[J];
  }
  for (int64_t J : {int64_t{0}, I, std::max<int64_t>(I - 1, 0)}) worth[J] = INFINITY;
  const int64_t forced = std::min<int64_t>(3, I + 1);
  std::fill(row->begin(), row->end(), false);
  const std::vector<int64_t> order = DescendingOrder(worth);
  for (int64_t x = 0; x < std::max(most, forced); ++x) (*row)[order[x]] = true;
}

}  // namespace

HeadReport Joint(const Head& head, const SparsityPolicy& policy, Mask* keep) {
  const int64_t n = head.blocks.k_blocks;
  const Probe probe = ProbeRows(head);
  std::vector<bool> vertical(n), diagonal(n);
  const bool reached = ChooseLines(probe, policy.gamma - 0.1, &vertical, &diagonal);
  for (int64_t I = head.blocks.first_q_block; I < n; ++I) {
    for (int64_t J = 0; J <= I; ++J) {
      (*keep)[I][J] = !reached || vertical[J] || diagonal[I - J] || I >= n - 2;
    }
  }

  int64_t short_rows = 0;
  for (int64_t r = 0; r < probe.rows; ++r) {
    double captured = 0;
    for (int64_t J = 0; J <= probe.I[r]; ++J)
      captured += (*keep)[probe.I[r]][J] ? probe.M[r][J] : 0;
    if (captured < policy.gamma) ++short_rows;
  }
  const Matrix P = PooledMap(head);
  const int64_t least = CeilDiv(std::max<int64_t>(policy.min_budget_tokens, 0), head.block_size);
  const int64_t most = CeilDiv(policy.max_budget_tokens, head.block_size);
  for (int64_t I = head.blocks.first_q_block; I < n; ++I) {
    if (short_rows > probe.rows / 20) RepairRow(P[I], policy.gamma, &(*keep)[I], I);
    ApplyBudgets(P[I], least, most, &(*keep)[I], I);
  }
  return {.pattern = Pattern::kJoint};
}

}  // namespace prefilld::cpu::reference

#include "kernels/cpu/joint.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <optional>

#include "kernels/cpu/pooled_map.h"

namespace prefilld::cpu {
namespace {

constexpr double kLinesBelowGamma = 0.1;  // what the repair is left to find
constexpr int kRoundsMax = 40;
constexpr int64_t kPool = 32;             // tokens; 16 choose a little better, 64 worse
constexpr int64_t kRowsPerShortRow = 20;  // one probe row in 20 may fall short without a repair

int64_t CeilDiv(int64_t a, int64_t b) { return a / b + (a % b != 0); }

// The mass that no line covers yet, and what each line would cover of it per block that it
// computes.
class Uncovered {
 public:
  Uncovered(const JointMap& map, int64_t n)
      : query_block_(map.query_block),
        rows_(static_cast<int64_t>(query_block_.size())),
        n_(n),
        mass_(map.mass),
        cost_(n) {
    for (int64_t last : query_block_) {
      for (int64_t x = 0; x <= last; ++x) ++cost_[x];
    }
    for (int64_t& cost : cost_) cost = std::max<int64_t>(1, cost);
    for (int64_t r = 0; r < rows_; ++r) {
      if (query_block_[r] >= n - 2) std::fill(Row(r), Row(r) + n, 0.0);
    }
  }

  double Covered() const {
    double sum = 0;
    for (int64_t r = 0; r < rows_; ++r) {
      const double* row = mass_.data() + r * n_;
      sum += std::accumulate(row, row + n_, 0.0);
    }
    return 1 - sum / rows_;
  }

  std::vector<double> VerticalGains() const {
    std::vector<double> gains(n_);
    for (int64_t r = 0; r < rows_; ++r) {
      for (int64_t J = 0; J <= query_block_[r]; ++J) gains[J] += mass_[r * n_ + J];
    }
    for (int64_t x = 0; x < n_; ++x) gains[x] /= cost_[x];
    return gains;
  }

  std::vector<double> DiagonalGains() const {
    std::vector<double> gains(n_);
    for (int64_t r = 0; r < rows_; ++r) {
      const int64_t I = query_block_[r];
      for (int64_t o = 0; o <= I; ++o) gains[o] += mass_[r * n_ + I - o];
    }
    for (int64_t x = 0; x < n_; ++x) gains[x] /= cost_[x];
    return gains;
  }

  void TakeVertical(int64_t J) {
    for (int64_t r = 0; r < rows_; ++r) Row(r)[J] = 0;
  }

  void TakeDiagonal(int64_t o) {
    for (int64_t r = 0; r < rows_; ++r) {
      if (query_block_[r] >= o) Row(r)[query_block_[r] - o] = 0;
    }
  }

 private:
  double* Row(int64_t r) { return mass_.data() + r * n_; }

  const std::vector<int64_t>& query_block_;
  const int64_t rows_, n_;
  std::vector<double> mass_;   // [rows, n]
  std::vector<int64_t> cost_;  // [n] of vertical x and of diagonal x: probe rows that it reaches
};

// Indices with gain >= least, the highest first; ties: the lower index.
std::vector<int64_t> LinesFrom(const std::vector<double>& gains, double least) {
  std::vector<int64_t> lines;
  for (size_t x = 0; x < gains.size(); ++x) {
    if (gains[x] >= least) lines.push_back(static_cast<int64_t>(x));
  }
  std::stable_sort(lines.begin(), lines.end(),
                   [&](int64_t a, int64_t b) { return gains[a] > gains[b]; });
  return lines;
}

// One probe row in twenty may capture less than gamma.
bool NeedsRepair(const JointMap& map, const JointLines& lines, double gamma) {
  const int64_t rows = static_cast<int64_t>(map.query_block.size());
  const int64_t n = static_cast<int64_t>(lines.vertical.size());
  int64_t short_rows = 0;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t I = map.query_block[r];
    double captured = 0;
    for (int64_t J = 0; J <= I; ++J) captured += lines.Keep(I, J) ? map.mass[r * n + J] : 0;
    short_rows += captured < gamma;
  }
  return short_rows > rows / kRowsPerShortRow;
}

// Adds blocks to row I, those with the largest pooled mass first, until what it keeps holds gamma.
void Repair(const std::vector<double>& pooled, double gamma, std::vector<uint8_t>* keep) {
  double mass = 0;
  std::vector<int64_t> missing;
  for (size_t J = 0; J < pooled.size(); ++J) {
    if ((*keep)[J]) {
      mass += pooled[J];
    } else {
      missing.push_back(static_cast<int64_t>(J));
    }
  }
  if (mass >= gamma) return;
  std::stable_sort(missing.begin(), missing.end(),
                   [&](int64_t a, int64_t b) { return pooled[a] > pooled[b]; });
  for (int64_t J : missing) {
    (*keep)[J] = 1;
    mass += pooled[J];
    if (mass >= gamma) return;
  }
}

// Extends row I to `least` blocks with the nearest earlier ones. Returns how many it then keeps.
int64_t Extend(int64_t I, int64_t least, std::vector<uint8_t>* keep) {
  int64_t count = std::count(keep->begin(), keep->begin() + I + 1, 1);
  for (int64_t J = I; J >= 0 && count < least; --J) {
    count += !(*keep)[J];
    (*keep)[J] = 1;
  }
  return count;
}

// Leaves row I its blocks 0, I and I - 1 and of the others the `most` in all of the largest pooled
// mass. It holds for every row, the last two as well: a limit that was asked for has no exceptions.
void Cut(const std::vector<double>& pooled, int64_t I, int64_t most, std::vector<uint8_t>* keep) {
  std::vector<int64_t> kept;
  for (int64_t J = 1; J < I - 1; ++J) {
    if ((*keep)[J]) kept.push_back(J);
  }
  const int64_t forced = std::min<int64_t>(3, I + 1);
  std::stable_sort(kept.begin(), kept.end(),
                   [&](int64_t a, int64_t b) { return pooled[a] > pooled[b]; });
  for (size_t x = std::max<int64_t>(0, most - forced); x < kept.size(); ++x) (*keep)[kept[x]] = 0;
}

}  // namespace

JointMap ReadJointMap(const Head& head, const BlockMass& probe) {
  JointMap map;
  for (int64_t t : probe.rows(head.blocks.sequence)) {
    map.query_block.push_back((head.blocks.prefix + t) / head.block_size);
  }
  probe.Read(head.blocks.sequence, head.h, &map.mass);
  return map;
}

JointLines ChooseLines(const JointMap& map, int64_t n, double gamma) {
  JointLines lines = {std::vector<uint8_t>(n), std::vector<uint8_t>(n)};
  Uncovered uncovered(map, n);
  const auto take_vertical = [&](int64_t J) {
    lines.vertical[J] = 1;
    uncovered.TakeVertical(J);
  };
  const auto take_diagonal = [&](int64_t o) {
    lines.diagonal[o] = 1;
    uncovered.TakeDiagonal(o);
  };
  take_vertical(0);
  take_diagonal(0);
  if (n > 1) take_diagonal(1);
  if (gamma <= 0) return lines;

  // Every round halves the bar, so that lines of both kinds of like worth come before lesser ones,
  // and a line that the others have made worthless does not come at all.
  double bar = std::numeric_limits<double>::infinity();
  for (int round = 0; round < kRoundsMax; ++round) {
    if (uncovered.Covered() >= gamma) return lines;
    const std::vector<double> vertical = uncovered.VerticalGains();
    std::vector<double> diagonal = uncovered.DiagonalGains();
    const double largest = std::max(*std::max_element(vertical.begin(), vertical.end()),
                                    *std::max_element(diagonal.begin(), diagonal.end()));
    if (largest == 0) return lines;
    bar = std::min(largest / 2, bar / 2);
    for (int64_t J : LinesFrom(vertical, bar)) {
      if (uncovered.Covered() >= gamma) return lines;
      take_vertical(J);
    }
    diagonal = uncovered.DiagonalGains();
    for (int64_t o : LinesFrom(diagonal, bar)) {
      if (uncovered.Covered() >= gamma) return lines;
      take_diagonal(o);
    }
  }
  lines.reached = uncovered.Covered() >= gamma;
  return lines;
}

HeadChoice SelectJoint(const Head& head, const SparsityPolicy& policy, const JointMap& map) {
  const int64_t n = head.blocks.k_blocks;
  const JointLines lines = ChooseLines(map, n, policy.gamma - kLinesBelowGamma);
  const bool repair = NeedsRepair(map, lines, policy.gamma);
  const int64_t least = CeilDiv(std::max<int64_t>(policy.min_budget_tokens, 0), head.block_size);
  const int64_t most = CeilDiv(policy.max_budget_tokens, head.block_size);
  std::optional<PooledMap> pooled_map;
  if (repair || most < n) pooled_map.emplace(head, kPool, head.softmax_scale);

  HeadChoice choice = {.pattern = Pattern::kJoint};
  std::vector<uint8_t> keep(n);
  std::vector<double> pooled;
  for (int64_t I = head.blocks.first_q_block; I < n && !head.cancelled(); ++I) {
    for (int64_t J = 0; J <= I; ++J) keep[J] = lines.Keep(I, J);
    if (pooled_map) pooled_map->BlockRow(I, &pooled);
    if (repair) Repair(pooled, policy.gamma, &keep);
    if (Extend(I, least, &keep) > most) Cut(pooled, I, most, &keep);
    choice.blocks += head.WriteRow(I, keep);
  }
  return choice;
}

}  // namespace prefilld::cpu

#include "kernels/cpu/flexprefill.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <numeric>

#include "kernels/cpu/pooled_map.h"
#include "kernels/cpu/tile.h"

namespace prefilld::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

int64_t CeilDiv(int64_t a, int64_t b) { return a / b + (a % b != 0); }

float RoundToBFloat16(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000;
  return x != x ? x : std::bit_cast<float>(rounded);
}

// The logits of one row and one tile, rounded to bf16. The F32 sum differs from the exact one in
// its last bits; where it lies next to the middle of two bf16 numbers it is summed again in double,
// so that logits, and with them the mask, are the same on every machine.
void RoundLogits(const float* q, const float* tile, int d, int n, float* logits) {
  for (int x = 0; x < n; ++x) {
    constexpr uint32_t kNear = 64;  // units in the last place of F32
    const uint32_t below_bf16 = std::bit_cast<uint32_t>(logits[x]) & 0xffff;
    if (below_bf16 - (0x8000 - kNear) > 2 * kNear) continue;
    double exact = 0;
    for (int c = 0; c < d; ++c) exact += static_cast<double>(q[c]) * tile[c * kTileKeys + x];
    logits[x] = static_cast<float>(exact);
  }
  for (int x = 0; x < n; ++x) logits[x] = RoundToBFloat16(logits[x]);
}

// The last block of queries against all keys, tile by tile; nothing of size [rows, S] is kept.
class ProbeOfLastRows {
 public:
  explicit ProbeOfLastRows(const Head& head)
      : head_(head),
        rows_(head.block_size),
        first_(head.blocks.sk - rows_),
        q_(rows_ * head.d),
        tile_(static_cast<size_t>(head.d) * kTileKeys),
        logits_(rows_ * kTileKeys),
        max_(rows_, -kInfinity),
        sum_(rows_) {
    head.WidenQueries(first_, rows_, q_.data());
    // Always 1/sqrt d: the released code ignores the softmax scale when it selects.
    for (float& x : q_) {
      x = RoundToBFloat16(static_cast<float>(x / std::sqrt(static_cast<double>(head.d))));
    }
    ForEachRow([this](int64_t r, int64_t, float* logits, int n) {
      const float max = std::max(max_[r], RowMax(logits, n));
      if (max != max_[r]) sum_[r] *= std::exp(static_cast<double>(max_[r]) - max);
      max_[r] = max;
      sum_[r] += ExpRowInPlace(logits, n, max);
    });
  }

  // Mean probability of every key, and of every diagonal delta at S - 1 - delta.
  void LineScores(std::vector<double>* vertical, std::vector<double>* diagonal) {
    vertical->assign(head_.blocks.sk, 0);
    diagonal->assign(head_.blocks.sk, 0);
    ForEachRow([&](int64_t r, int64_t key, float* logits, int n) {
      if (!std::isfinite(sum_[r])) return;  // the row holds NaN or infinity and says nothing
      ExpRowInPlace(logits, n, max_[r]);
      const double weight = 1 / (sum_[r] * rows_);
      double* v = vertical->data() + key;
      double* s = diagonal->data() + key + (rows_ - 1 - r);
      for (int x = 0; x < n; ++x) {
        const double p = logits[x] * weight;
        v[x] += p;
        s[x] += p;
      }
    });
  }

  // The mean probe row, rounded to bf16.
  std::vector<double> MeanQuery() const {
    std::vector<double> mean(head_.d);
    for (int64_t r = 0; r < rows_; ++r) {
      for (int c = 0; c < head_.d; ++c) mean[c] += q_[r * head_.d + c];
    }
    for (double& x : mean) x = RoundToBFloat16(static_cast<float>(x / rows_));
    return mean;
  }

 private:
  // visit(r, first key of the tile, logits of the keys that row r sees, their number), for every
  // tile ascending and in it every row that sees some of it.
  template <typename Visit>
  void ForEachRow(Visit visit) {
    const int d = head_.d;
    for (int64_t key = 0; key < head_.blocks.sk && !head_.cancelled(); key += kTileKeys) {
      const int keys = static_cast<int>(std::min<int64_t>(kTileKeys, head_.blocks.sk - key));
      head_.PackKeys(key, keys, tile_.data());
      const int64_t begin = std::max<int64_t>(0, key - first_);
      ScoreTile(q_.data() + begin * d, d, static_cast<int>(rows_ - begin), tile_.data(), d,
                logits_.data(), kTileKeys);
      for (int64_t r = begin; r < rows_; ++r) {
        float* logits = logits_.data() + (r - begin) * kTileKeys;
        const int n = static_cast<int>(std::min<int64_t>(keys, first_ + r - key + 1));
        RoundLogits(q_.data() + r * d, tile_.data(), d, n, logits);
        visit(r, key, logits, n);
      }
    }
  }

  const Head& head_;
  const int64_t rows_;
  const int64_t first_;        // token of row 0
  std::vector<float> q_;       // [rows, d]
  std::vector<float> tile_;    // [d, kTileKeys]
  std::vector<float> logits_;  // [rows, kTileKeys]
  std::vector<float> max_;     // [rows]
  std::vector<double> sum_;    // [rows] of exp(logit - max)
};

// Attention of the mean probe row over the mean key of each block, without a causal mask.
std::vector<double> PooledProbe(const Head& head, const std::vector<double>& query) {
  const int64_t n = head.blocks.k_blocks;
  std::vector<double> p(n), mean(head.d);
  std::vector<float> keys(head.block_size * head.d);
  for (int64_t J = 0; J < n; ++J) {
    const int64_t begin = J * head.block_size;
    const int64_t tokens = std::min(head.block_size, head.blocks.sk - begin);
    head.WidenKeys(begin, tokens, keys.data());
    std::fill(mean.begin(), mean.end(), 0.0);
    for (int64_t t = 0; t < tokens; ++t) {
      for (int c = 0; c < head.d; ++c) mean[c] += keys[t * head.d + c];
    }
    for (int c = 0; c < head.d; ++c) {
      p[J] += query[c] * RoundToBFloat16(static_cast<float>(mean[c] / tokens));
    }
  }
  const double largest = *std::max_element(p.begin(), p.end());
  double sum = 0;
  for (double& x : p) {
    // As F32 has it: an exact zero is part of the pattern test.
    x = x - largest < -87 ? 0 : std::exp(x - largest);
    sum += x;
  }
  for (double& x : p) x /= sum;
  return p;
}

// Indices of the `count` largest scores; ties: the lower index.
std::vector<int64_t> Largest(const std::vector<double>& scores, int64_t count) {
  std::vector<int64_t> order(scores.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return scores[a] > scores[b]; });
  order.resize(std::min<size_t>(order.size(), count));
  return order;
}

// The blocks of the pooled map that query-aware heads add: keep[I][J], triangular from I (I + 1)
// / 2.
std::vector<uint8_t> PooledBlocks(const Head& head, double gamma) {
  const int64_t n = head.blocks.k_blocks;
  PooledMap map(head, head.block_size, 1 / std::sqrt(static_cast<double>(head.d)));
  std::vector<double> all, row;
  all.reserve(n * (n + 1) / 2);
  for (int64_t I = 0; I < n && !head.cancelled(); ++I) {
    map.BlockRow(I, &row);
    all.insert(all.end(), row.begin(), row.end());
  }
  std::vector<uint8_t> keep(n * (n + 1) / 2);
  for (int64_t x : Largest(all, CountWithin(all, gamma * n))) keep[x] = 1;
  return keep;
}

}  // namespace

int64_t CountWithin(std::vector<double> scores, double limit) {
  // K is read twice on the way here and may have changed meanwhile. NaN has no place in an order:
  // sorting it would be undefined.
  for (double& x : scores) x = std::isnan(x) ? 0 : x;
  std::sort(scores.begin(), scores.end(), std::greater<>());
  double sum = 0;
  int64_t count = 0;
  for (double x : scores) {
    sum += x;
    if (!(sum <= limit)) break;
    ++count;
  }
  return count;
}

int64_t LineBudget(int64_t lines_within) {
  return (lines_within + 1) / 128 + 1;  // a literal of the released code, whatever the block size
}

std::vector<double> SumBlocks(const std::vector<double>& scores, int64_t block_size) {
  const int64_t size = static_cast<int64_t>(scores.size());
  std::vector<double> sums(CeilDiv(size, block_size));
  for (int64_t x = 0; x < size; ++x) sums[x / block_size] += scores[x];
  return sums;
}

double JensenShannonDistance(const std::vector<double>& a, const std::vector<double>& b) {
  double sum = 0;
  for (size_t x = 0; x < a.size(); ++x) {
    const double m = (a[x] + b[x]) / 2;
    sum += 0.5 * (a[x] * std::log(a[x] / m) + b[x] * std::log(b[x] / m));
  }
  return std::sqrt(sum < 0 ? 0 : sum);  // rounding may take equal distributions below zero
}

FlexPrefillMap EstimateFlexPrefill(const Head& head, const SparsityPolicy& policy) {
  const int64_t B = head.block_size, n = head.blocks.k_blocks;
  const int64_t least = CeilDiv(std::max<int64_t>(policy.min_budget_tokens, 1), B);
  const int64_t most = std::min(CeilDiv(policy.max_budget_tokens, B), n);
  FlexPrefillMap map;
  map.short_prompt = head.blocks.sk <= 2 * B || n <= least;  // S <= max(2 B, least B)
  if (map.short_prompt) return map;

  ProbeOfLastRows probe(head);
  std::vector<double> vertical, diagonal;
  probe.LineScores(&vertical, &diagonal);
  map.vertical = SumBlocks(vertical, B);
  map.diagonal = SumBlocks(diagonal, B);
  const double distance = JensenShannonDistance(PooledProbe(head, probe.MeanQuery()), map.vertical);
  map.query_aware = distance < policy.flexprefill.tau;
  if (map.query_aware) {  // the minimum itself, whatever max_budget says
    map.vertical_budget = map.diagonal_budget = least;
    return map;
  }
  const auto budget = [&](std::vector<double> scores) {
    return std::min(std::max(LineBudget(CountWithin(std::move(scores), policy.gamma)), least),
                    most);
  };
  map.vertical_budget = budget(std::move(vertical));
  map.diagonal_budget = budget(std::move(diagonal));
  return map;
}

HeadChoice SelectFlexPrefill(const Head& head, const SparsityPolicy& policy,
                             const FlexPrefillMap& map) {
  if (map.short_prompt) {
    return {.dense_reason = DenseReason::kShortPrompt, .blocks = head.WriteCausal()};
  }
  const int64_t n = head.blocks.k_blocks;
  // The first key block and the diagonal of blocks each use one slot.
  std::vector<double> vertical = map.vertical, diagonal = map.diagonal;
  vertical[0] = kInfinity;
  diagonal[n - 1] = kInfinity;
  std::vector<uint8_t> columns(n), offsets(n);
  for (int64_t J : Largest(vertical, map.vertical_budget)) columns[J] = 1;
  for (int64_t u : Largest(diagonal, map.diagonal_budget)) offsets[n - 1 - u] = 1;
  std::vector<uint8_t> pooled;
  if (map.query_aware) pooled = PooledBlocks(head, policy.gamma);

  HeadChoice choice = {.pattern = map.query_aware ? Pattern::kQueryAware : Pattern::kVerticalSlash};
  std::vector<uint8_t> keep(n);
  for (int64_t I = 0; I < n; ++I) {
    for (int64_t J = 0; J <= I; ++J) {
      keep[J] = columns[J] || offsets[I - J] || (map.query_aware && pooled[I * (I + 1) / 2 + J]);
    }
    choice.blocks += head.WriteRow(I, keep);
  }
  return choice;
}

}  // namespace prefilld::cpu

#include "kernels/cpu/pooled_map.h"

#include <algorithm>
#include <cmath>

namespace prefilld::cpu {
namespace {

constexpr int64_t kColumns = 256;  // logits of one pass: with the keys' they stay in the L1 cache

// logits[x] = sum_c queries[c] keys[c][x]. Four channels a pass: the logits are loaded and stored a
// quarter as often, and each is still summed in the order of channels. d is a multiple of four.
void Multiply(const double* queries, const double* keys, int64_t stride, int d, int64_t columns,
              double* logits) {
  std::fill(logits, logits + columns, 0.0);
  for (int c = 0; c < d; c += 4) {
    const double q0 = queries[c], q1 = queries[c + 1], q2 = queries[c + 2], q3 = queries[c + 3];
    const double *k0 = keys + c * stride, *k1 = k0 + stride, *k2 = k1 + stride, *k3 = k2 + stride;
    for (int64_t x = 0; x < columns; ++x) {
      logits[x] = (((logits[x] + q0 * k0[x]) + q1 * k1[x]) + q2 * k2[x]) + q3 * k3[x];
    }
  }
}

// In place. A row that holds NaN or infinity becomes zeros.
void Softmax(double* row, int64_t n) {
  const double largest = *std::max_element(row, row + n);
  double sum = 0;
  for (int64_t x = 0; x < n; ++x) sum += row[x] = std::exp(row[x] - largest);
  for (int64_t x = 0; x < n; ++x) row[x] = std::isfinite(sum) ? row[x] / sum : 0;
}

}  // namespace

PooledMap::PooledMap(const Head& head, int64_t pool, double scale)
    : head_(head),
      pool_(pool),
      scale_(scale),
      key_pools_((head.blocks.sk + pool - 1) / pool),
      rows_(pool * head.d),
      keys_(head.d * key_pools_),
      queries_(head.block_size / pool * head.d),
      logits_(head.block_size / pool * key_pools_) {
  std::vector<double> mean(head.d);
  for (int64_t b = 0; b < key_pools_; ++b) {
    const int64_t tokens = std::min(pool, head.blocks.sk - b * pool);
    head.WidenKeys(b * pool, tokens, rows_.data());
    std::fill(mean.begin(), mean.end(), 0.0);
    for (int64_t t = 0; t < tokens; ++t) {
      for (int c = 0; c < head.d; ++c) mean[c] += rows_[t * head.d + c];
    }
    for (int c = 0; c < head.d; ++c) keys_[c * key_pools_ + b] = mean[c] / tokens;
  }
}

int64_t PooledMap::PoolQueries(int64_t begin, int64_t pools) {
  const SequenceBlocks& blocks = head_.blocks;
  std::fill(queries_.begin(), queries_.end(), 0.0);
  double* mean = queries_.data();
  for (int64_t a = begin; a < begin + pools; ++a) {
    const int64_t from = std::max(a * pool_, blocks.prefix);
    const int64_t tokens = std::min((a + 1) * pool_, blocks.sk) - from;
    if (tokens <= 0) continue;
    head_.WidenQueries(from - blocks.prefix, tokens, rows_.data());
    for (int64_t t = 0; t < tokens; ++t) {
      for (int c = 0; c < head_.d; ++c) mean[c] += rows_[t * head_.d + c];
    }
    for (int c = 0; c < head_.d; ++c) mean[c] *= scale_ / tokens;
    mean += head_.d;
  }
  return (mean - queries_.data()) / head_.d;
}

void PooledMap::BlockRow(int64_t I, std::vector<double>* row) {
  const int64_t per_block = head_.block_size / pool_;
  const int64_t begin = std::max(I * per_block, head_.blocks.prefix / pool_);
  const int64_t count = PoolQueries(begin, (I + 1) * per_block - begin);
  const int64_t width = std::min((I + 1) * per_block, key_pools_);
  for (int64_t x = 0; x < width; x += kColumns) {
    for (int64_t a = 0; a < count; ++a) {
      Multiply(queries_.data() + a * head_.d, keys_.data() + x, key_pools_, head_.d,
               std::min(kColumns, width - x), logits_.data() + a * key_pools_ + x);
    }
  }
  row->assign(I + 1, 0);
  for (int64_t a = 0; a < count; ++a) {
    double* logits = logits_.data() + a * key_pools_;
    const int64_t seen = begin + a + 1;  // pools that hold queries are consecutive
    Softmax(logits, seen);
    for (int64_t b = 0; b < seen; ++b) (*row)[b / per_block] += logits[b] / count;
  }
}

}  // namespace prefilld::cpu

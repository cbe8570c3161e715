#include "kernels/cpu/probe.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/cpu/head.h"
#include "kernels/cpu/tile.h"

namespace prefilld::cpu {
namespace {

constexpr int64_t kProbeRows = 64;

// The base-2 radical inverse of r < 64, in 64ths.
int64_t RadicalInverse64(int64_t r) {
  int64_t inverse = 0;
  for (int bit = 0; bit < 6; ++bit) inverse |= ((r >> bit) & 1) << (5 - bit);
  return inverse;
}

std::vector<int64_t> AllRows(int64_t sq) {
  std::vector<int64_t> rows(sq);
  for (int64_t t = 0; t < sq; ++t) rows[t] = t;
  return rows;
}

// floor((64 r + in_64ths) * sq / 64^2) without overflow for any sq < 2^50.
int64_t RowOfStratum(int64_t r, int64_t in_64ths, int64_t sq) {
  return (kProbeRows * r + in_64ths) * sq / (kProbeRows * kProbeRows);
}

}  // namespace

std::vector<int64_t> ProbeRows(int64_t sq) {
  if (sq <= kProbeRows) return AllRows(sq);
  std::vector<int64_t> rows(kProbeRows);
  for (int64_t r = 0; r < kProbeRows; ++r) rows[r] = RowOfStratum(r, RadicalInverse64(r), sq);
  return rows;
}

std::vector<int64_t> MeasuredRows(int64_t sq) {
  if (sq <= kProbeRows) return AllRows(sq);
  std::vector<int64_t> rows(kProbeRows);
  for (int64_t r = 0; r < kProbeRows; ++r) {
    rows[r] = std::min(RowOfStratum(r, kProbeRows - RadicalInverse64(r), sq), sq - 1);
  }
  return rows;
}

void BlockMass::Probe(const AttentionArgs& args, std::span<const int> heads, RowRule rule,
                      int threads) {
  const AttentionShape& shape = args.shape;
  const int group = shape.q_heads / shape.kv_heads;
  probed_.assign(shape.q_heads, 0);
  for (int h : heads) probed_[h] = 1;
  sequences_.clear();
  struct Tile {
    int64_t sequence, key;
    int kv;
  };
  std::vector<Tile> tiles;
  int64_t queries = 0, parts = 0;
  for (const SequenceBlocks& blocks : SplitIntoBlocks(shape, args.policy.block_size)) {
    for (int kv = 0; kv < shape.kv_heads; ++kv) {
      const auto first = probed_.begin() + kv * group;
      if (std::find(first, first + group, 1) == first + group) continue;
      for (int64_t key = 0; key < blocks.sk; key += kTileKeys) {
        tiles.push_back({static_cast<int64_t>(sequences_.size()), key, kv});
      }
    }
    sequences_.push_back({blocks, rule(blocks.sq), queries, parts});
    const int64_t rows = static_cast<int64_t>(sequences_.back().rows.size()) * shape.q_heads;
    queries += rows;
    parts += rows * blocks.k_blocks;
  }
  queries_.resize(queries * shape.head_dim);
  parts_.resize(parts);

  for (const Sequence& sequence : sequences_) {
    const int64_t rows = static_cast<int64_t>(sequence.rows.size());
    for (int h : heads) {
      float* dst = queries_.data() + (sequence.first_query + h * rows) * shape.head_dim;
      const Head head(args, sequence.blocks, h);
      for (int64_t t : sequence.rows) {
        head.WidenQueries(t, 1, dst);
        for (int c = 0; c < head.d; ++c) dst[c] *= static_cast<float>(args.softmax_scale);
        dst += head.d;
      }
    }
  }
  const int64_t count = static_cast<int64_t>(tiles.size());
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t x = 0; x < count; ++x) {
    if (Cancelled(args)) continue;
    ProbeTile(args, sequences_[tiles[x].sequence], tiles[x].kv, tiles[x].key);
  }
}

// Writes the parts of the blocks of one tile of keys, which no other tile writes: the result does
// not depend on the order of tiles.
void BlockMass::ProbeTile(const AttentionArgs& args, const Sequence& sequence, int kv,
                          int64_t key) {
  const int group = args.shape.q_heads / args.shape.kv_heads;
  const SequenceBlocks& blocks = sequence.blocks;
  const int64_t rows = static_cast<int64_t>(sequence.rows.size());
  const int keys = static_cast<int>(std::min<int64_t>(kTileKeys, blocks.sk - key));
  const int block_size = args.policy.block_size;
  const Head first(args, blocks, kv * group);
  std::vector<float> tile(static_cast<size_t>(first.d) * kTileKeys), scores(rows * kTileKeys);
  first.PackKeys(key, keys, tile.data());

  // Rows ascend, so those that see the tile are the last ones.
  const int64_t first_row =
      std::lower_bound(sequence.rows.begin(), sequence.rows.end(), key - blocks.prefix) -
      sequence.rows.begin();
  for (int h = kv * group; h < (kv + 1) * group; ++h) {
    if (!probed_[h]) continue;
    const float* q = queries_.data() + (sequence.first_query + h * rows) * first.d;
    Part* parts = parts_.data() + sequence.first_part + h * rows * blocks.k_blocks;
    if (first_row < rows) {
      ScoreTile(q + first_row * first.d, first.d, static_cast<int>(rows - first_row), tile.data(),
                first.d, scores.data(), kTileKeys);
    }
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t seen = std::min<int64_t>(keys, blocks.prefix + sequence.rows[r] - key + 1);
      for (int begin = 0; begin < keys; begin += block_size) {
        Part& part = parts[r * blocks.k_blocks + (key + begin) / block_size];
        const int n = static_cast<int>(std::min<int64_t>(block_size, seen - begin));
        part = {-std::numeric_limits<float>::infinity(), 0};
        if (n <= 0) continue;
        float* row = scores.data() + (r - first_row) * kTileKeys + begin;
        part.max = RowMax(row, n);
        part.sum = ExpRowInPlace(row, n, part.max);
      }
    }
  }
}

void BlockMass::Read(int64_t s, int h, std::vector<double>* mass) const {
  const Sequence& sequence = sequences_[s];
  const int64_t rows = static_cast<int64_t>(sequence.rows.size()), n = sequence.blocks.k_blocks;
  mass->assign(rows * n, 0);
  for (int64_t r = 0; r < rows; ++r) {
    const Part* parts = parts_.data() + sequence.first_part + (h * rows + r) * n;
    double* out = mass->data() + r * n;
    float largest = -std::numeric_limits<float>::infinity();
    for (int64_t J = 0; J < n; ++J) largest = std::max(largest, parts[J].max);
    double total = 0;
    for (int64_t J = 0; J < n; ++J) {
      if (parts[J].sum == 0) continue;
      out[J] = parts[J].sum * std::exp(static_cast<double>(parts[J].max) - largest);
      total += out[J];
    }
    for (int64_t J = 0; J < n; ++J) out[J] = std::isfinite(total) ? out[J] / total : 0;
  }
}

}  // namespace prefilld::cpu

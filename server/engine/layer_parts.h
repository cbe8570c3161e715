// A layer in parts, one a step, so that nobody waits for a long one: q, k and v of some rows,
// attention of some heads, or of some queries of one, the rest of the layer for some rows. Pure.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/attention.h"
#include "server/model/transformer.h"

namespace prefilld {

// Batches of up to so many tokens pass longer ones in the middle of a layer: both have their q, k,
// v and o at the same time.
inline constexpr int64_t kShortBatchTokens = 4096;
// Layers that have q, k, v and o in turn: where K and V leave beside what is computed next, a short
// one does not wait until those of the one before have been read.
constexpr int ScratchTurns(int64_t tokens, bool host_memory) {
  return tokens <= kShortBatchTokens && !host_memory ? 2 : 1;
}

// Query heads: of whole groups that share a kv head, or some of one group. Of one head these
// queries of the only sequence, or, where they are none, all.
struct AttendRange {
  int first = 0, count = 0;
  RowRange queries;
  // Of one head whose stage 3 is divided by rows of its block index: the selection, or these rows.
  bool selection = false;
  RowRange rows;
};

// What one step enqueues of a layer, in this order; a range may be empty.
struct LayerPart {
  RowRange project;    // q, k and v of these rows
  bool store = false;  // then K and V of all rows go to their cache
  AttendRange attend;
  RowRange finish;  // output projection and MLP of these rows
};

// A layer of one prompt, and the seconds that it takes by prediction.
struct LayerWork {
  const ModelInfo& info;
  int64_t tokens = 0, tile_tokens = 0;  // rows come in pieces of a tile
  bool last = false;                    // of the model: no rows of it are finished
  bool by_queries = false;              // attention has no selection, which sees all queries
  double project = 0, attend = 0, finish = 0;
};

// Attention alone.
struct AttentionWork {
  int q_heads = 0, kv_heads = 0;
  double seconds = 0;                  // of all heads
  int64_t by_queries = 0, prefix = 0;  // of the only sequence, and keys before them; 0: not
  // Causal blocks of every row of the block index, by which a head is divided that takes longer
  // than so many seconds; empty: it is not.
  std::vector<int64_t> row_blocks;
  double row_seconds = 0;
};

// Parts of at most `most` seconds each, where no piece takes longer. A piece of attention is a
// group of heads, one head where a group would take longer than that, and some blocks of queries
// where a head would.
std::vector<LayerPart> DivideLayer(const LayerWork& work, double most);
std::vector<AttendRange> DivideAttention(const AttentionWork& work, double most);
// Makes a call of all heads one of these: shape, q, k, v, o and lse. Nothing else that goes by
// heads or queries may be set yet.
void NarrowTo(const AttendRange& range, AttentionArgs& args);
// All of it in one.
LayerPart WholeLayer(const ModelInfo& info, int64_t tokens, bool last);

}  // namespace prefilld

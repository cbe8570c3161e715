// A layer in parts, one a step, so that nobody waits for a long one: q, k and v of some rows,
// attention of some heads, the rest of the layer for some rows. Pure.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/attention.h"
#include "server/model/transformer.h"

namespace prefilld {

// Batches of up to so many tokens pass longer ones in the middle of a layer: both have their q, k,
// v and o at the same time.
inline constexpr int64_t kShortBatchTokens = 4096;
// Layers that have q, k, v and o in turn: a short one does not wait until K and V of the one before
// have been read.
constexpr int ScratchTurns(int64_t tokens) { return tokens <= kShortBatchTokens ? 2 : 1; }

// Query heads: of whole groups that share a kv head, or some of one group.
struct HeadRange {
  int first = 0, count = 0;
};

// What one step enqueues of a layer, in this order; a range may be empty.
struct LayerPart {
  RowRange project;    // q, k and v of these rows
  bool store = false;  // then K and V of all rows go to their cache
  HeadRange attend;
  RowRange finish;  // output projection and MLP of these rows
};

// A layer of one prompt, and the seconds that it takes by prediction.
struct LayerWork {
  const ModelInfo& info;
  int64_t tokens = 0, tile_tokens = 0;  // rows come in pieces of a tile
  bool last = false;                    // of the model: no rows of it are finished
  double project = 0, attend = 0, finish = 0;
};

// Parts of at most `most` seconds each, where no piece takes longer. A piece of attention is a
// group of heads, or one head where a group would take longer than that.
std::vector<LayerPart> DivideLayer(const LayerWork& work, double most);
// Attention alone: all heads, in ranges.
std::vector<HeadRange> DivideHeads(int q_heads, int kv_heads, double seconds, double most);
// Makes a call of all heads one of these: shape, q, k, v, o and lse. Nothing else that goes by
// heads may be set yet.
void NarrowTo(const HeadRange& heads, AttentionArgs& args);
// All of it in one.
LayerPart WholeLayer(const ModelInfo& info, int64_t tokens, bool last);

}  // namespace prefilld

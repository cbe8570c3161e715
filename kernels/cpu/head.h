// One query head of one sequence, as the modules of selection see it: where its rows of q and k lie
// and where its rows of blocks go. Cheap to copy; points into AttentionArgs.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "kernels/attention.h"
#include "kernels/cpu/tile.h"

namespace prefilld::cpu {

struct Head {
  Head(const AttentionArgs& args, const SequenceBlocks& blocks_in, int h_in);

  // dst[rows, d] F32, unscaled. Queries and keys count from the begin of the sequence.
  void WidenQueries(int64_t begin, int64_t rows, float* dst) const;
  void WidenKeys(int64_t begin, int64_t rows, float* dst) const;
  // Keys [begin, begin + keys) as a tile, kTileKeys columns.
  void PackKeys(int64_t begin, int keys, float* tile) const;

  // Writes the row of absolute query block I: the J <= I where keep[J] is set. Returns their
  // number.
  int64_t WriteRow(int64_t I, const std::vector<uint8_t>& keep) const;
  // Every causal block in every row. Returns their number.
  int64_t WriteCausal() const;
  // Nobody waits for it any more, and what is not written yet need not be.
  bool cancelled() const { return cancelled_ != nullptr && *cancelled_; }

  SequenceBlocks blocks;
  int h;
  int64_t place;  // in what is [sequences, q_heads]
  int64_t block_size;
  double softmax_scale;
  int d;

 private:
  DType dtype_;
  const char* q_;  // this head, first row of this sequence
  const char* k_;
  int64_t q_stride_, k_stride_;  // elements
  int32_t* count_;               // [q_blocks]
  uint16_t* index_;              // [q_blocks, index_stride_]
  int64_t index_stride_;
  const std::atomic<bool>* cancelled_;
};

// What stage 2 gave a head.
struct HeadChoice {
  Pattern pattern = Pattern::kDense;
  DenseReason dense_reason = DenseReason::kNone;
  int64_t blocks = 0;  // written
};

// Calls `body` for these query heads of every sequence, on `threads` threads. Heads differ much in
// their work, so each is handed out as a thread comes free. Once the call is cancelled none is.
void ForEachHead(const AttentionArgs& args, std::span<const int> heads, int threads,
                 const std::function<void(const Head&)>& body);

}  // namespace prefilld::cpu

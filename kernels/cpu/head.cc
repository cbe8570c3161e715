#include "kernels/cpu/head.h"

#include <numeric>

namespace prefilld::cpu {
namespace {

const char* FirstRow(const ConstHeadsView& view, DType dtype, int64_t token, int64_t head) {
  const int64_t at = token * view.token_stride + head * view.head_stride;
  return static_cast<const char*>(view.data) + at * static_cast<int64_t>(SizeOf(dtype));
}

}  // namespace

Head::Head(const AttentionArgs& args, const SequenceBlocks& blocks_in, int h_in)
    : blocks(blocks_in),
      h(h_in),
      place(blocks.sequence * args.shape.q_heads + h),
      block_size(args.policy.block_size),
      softmax_scale(args.softmax_scale),
      d(args.shape.head_dim),
      dtype_(args.shape.dtype),
      q_(FirstRow(args.q, dtype_, blocks.q_begin, h)),
      k_(FirstRow(args.k, dtype_, blocks.k_begin, h / (args.shape.q_heads / args.shape.kv_heads))),
      q_stride_(args.q.token_stride),
      k_stride_(args.k.token_stride),
      count_(&args.index.count_at(h, blocks.row_begin)),
      index_(args.index.row_at(h, blocks.row_begin)),
      index_stride_(args.index.stride),
      cancelled_(args.cancelled) {}

void Head::WidenQueries(int64_t begin, int64_t rows, float* dst) const {
  const int64_t offset = begin * q_stride_ * static_cast<int64_t>(SizeOf(dtype_));
  WidenRows(q_ + offset, dtype_, q_stride_, rows, d, 1.0f, dst, d);
}

void Head::WidenKeys(int64_t begin, int64_t rows, float* dst) const {
  const int64_t offset = begin * k_stride_ * static_cast<int64_t>(SizeOf(dtype_));
  WidenRows(k_ + offset, dtype_, k_stride_, rows, d, 1.0f, dst, d);
}

void Head::PackKeys(int64_t begin, int keys, float* tile) const {
  const int64_t offset = begin * k_stride_ * static_cast<int64_t>(SizeOf(dtype_));
  PackKeysTransposed(k_ + offset, dtype_, k_stride_, keys, d, tile);
}

int64_t Head::WriteRow(int64_t I, const std::vector<uint8_t>& keep) const {
  const int64_t row = I - blocks.first_q_block;
  uint16_t* out = index_ + row * index_stride_;
  int32_t count = 0;
  for (int64_t J = 0; J <= I; ++J) {
    if (keep[J]) out[count++] = static_cast<uint16_t>(J);
  }
  return count_[row] = count;
}

int64_t Head::WriteCausal() const {
  for (int64_t row = 0; row < blocks.q_blocks; ++row) {
    count_[row] = static_cast<int32_t>(blocks.first_q_block + row + 1);
    uint16_t* out = index_ + row * index_stride_;
    std::iota(out, out + count_[row], uint16_t{0});
  }
  return blocks.causal_blocks();
}

void ForEachHead(const AttentionArgs& args, std::span<const int> heads, int threads,
                 const std::function<void(const Head&)>& body) {
  const std::vector<SequenceBlocks> sequences = SplitIntoBlocks(args.shape, args.policy.block_size);
  const int64_t per_sequence = static_cast<int64_t>(heads.size());
  const int64_t count = static_cast<int64_t>(sequences.size()) * per_sequence;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t x = 0; x < count; ++x) {
    if (Cancelled(args)) continue;
    body(Head(args, sequences[x / per_sequence], heads[x % per_sequence]));
  }
}

}  // namespace prefilld::cpu

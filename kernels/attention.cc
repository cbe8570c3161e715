#include "kernels/attention.h"

#include <algorithm>

namespace prefilld {

std::vector<SequenceBlocks> SplitIntoBlocks(const AttentionShape& shape, int block_size) {
  std::vector<SequenceBlocks> sequences(shape.sequences());
  int64_t row = 0;
  for (int s = 0; s < shape.sequences(); ++s) {
    SequenceBlocks& blocks = sequences[s];
    blocks.sequence = s;
    blocks.q_begin = shape.cu_seqlens_q[s];
    blocks.k_begin = shape.cu_seqlens_k[s];
    blocks.sq = shape.cu_seqlens_q[s + 1] - blocks.q_begin;
    blocks.sk = shape.cu_seqlens_k[s + 1] - blocks.k_begin;
    blocks.prefix = blocks.sk - blocks.sq;
    blocks.first_q_block = blocks.prefix / block_size;
    blocks.k_blocks = (blocks.sk + block_size - 1) / block_size;
    blocks.q_blocks = blocks.k_blocks - blocks.first_q_block;
    blocks.row_begin = row;
    row += blocks.q_blocks;
  }
  return sequences;
}

int64_t TotalRows(const std::vector<SequenceBlocks>& sequences) {
  return sequences.empty() ? 0 : sequences.back().row_begin + sequences.back().q_blocks;
}

int64_t MaxKeyBlocks(const std::vector<SequenceBlocks>& sequences) {
  int64_t most = 0;
  for (const SequenceBlocks& blocks : sequences) most = std::max(most, blocks.k_blocks);
  return most;
}

bool Measures(const AttentionArgs& args) {
  if (args.per_head.of_head.empty()) return Measures(args.policy);
  return std::any_of(args.per_head.of_head.begin(), args.per_head.of_head.end(),
                     [&](uint16_t place) { return Measures(args.per_head.policies[place]); });
}

}  // namespace prefilld

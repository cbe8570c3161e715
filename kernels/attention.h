// The contract of attention: what a method may choose (SparsityPolicy), what it writes (the block
// index) and what is known about it afterwards (HeadReport). Every backend takes and fills these.
//
// Words: t token, h query head, g kv head, I query block, J key block. A sequence with Sq query and
// Sk key tokens has prefix p = Sk - Sq; query t sits at absolute position p + t; blocks of queries
// are aligned to absolute positions.
#pragma once

#include <atomic>
#include <cstdint>
#include <limits>
#include <span>
#include <vector>

#include "kernels/methods.h"
#include "kernels/tensor.h"

namespace prefilld {

struct SparsityPolicy {
  Method method = kOpenMethod;
  double gamma = 0.9;  // coverage, 0 < gamma < 1
  FlexPrefillParameters flexprefill;
  int64_t min_budget_tokens = 0;
  int64_t max_budget_tokens = std::numeric_limits<int64_t>::max();
  int block_size = 128;  // 64 or 128
  bool measure_captured_mass = true;
  double min_captured_mass = 0;  // > 0: a head whose mean captured mass is below it runs dense

  bool operator==(const SparsityPolicy&) const = default;
};
// Whether captured mass is to be known.
constexpr bool Measures(const SparsityPolicy& policy) {
  return policy.measure_captured_mass || policy.min_captured_mass > 0;
}

inline constexpr int64_t kKeyBlocksMax = 65536;  // of a sequence: a block index is 16 bits wide

struct AttentionShape {
  DType dtype = DType::kF32;
  int q_heads = 0;
  int kv_heads = 0;
  int head_dim = 0;
  std::vector<int64_t> cu_seqlens_q;  // [sequences + 1], from 0
  std::vector<int64_t> cu_seqlens_k;  // [sequences + 1], from 0

  int sequences() const { return static_cast<int>(cu_seqlens_q.size()) - 1; }
  int64_t total_q() const { return cu_seqlens_q.back(); }
  int64_t total_k() const { return cu_seqlens_k.back(); }
};

// One sequence of a shape, in blocks.
struct SequenceBlocks {
  int64_t sequence;          // its number in the shape
  int64_t q_begin, k_begin;  // first row of this sequence in q, in k
  int64_t sq, sk;            // tokens
  int64_t prefix;            // sk - sq
  int64_t first_q_block;     // absolute number of the first query block: prefix / block_size
  int64_t q_blocks;          // ceil(sk / B) - first_q_block
  int64_t k_blocks;          // ceil(sk / B)
  int64_t row_begin;         // first row of this sequence in the block index

  // Blocks a dense causal pass computes: row i (from 0) sees first_q_block + i + 1 of them.
  int64_t causal_blocks() const { return q_blocks * first_q_block + q_blocks * (q_blocks + 1) / 2; }
};
std::vector<SequenceBlocks> SplitIntoBlocks(const AttentionShape& shape, int block_size);
int64_t TotalRows(const std::vector<SequenceBlocks>& sequences);     // sum of q_blocks
int64_t MaxKeyBlocks(const std::vector<SequenceBlocks>& sequences);  // max of k_blocks

// For each (head, row of blocks) the ascending key blocks to read, relative to their sequence.
// Rows of all sequences are concatenated. Entries at and beyond count are unspecified. 16 bits name
// 65536 blocks: a sequence of 1M tokens has 8192 or 16384, and its index must fit beside it.
struct BlockIndexView {
  int32_t* count = nullptr;   // [q_heads, rows]
  uint16_t* index = nullptr;  // [q_heads, rows, stride]
  int64_t rows = 0;
  int64_t stride = 0;  // >= MaxKeyBlocks

  int32_t& count_at(int64_t h, int64_t row) const { return count[h * rows + row]; }
  uint16_t* row_at(int64_t h, int64_t row) const { return index + (h * rows + row) * stride; }
};

// Why a head ran dense although its policy is sparse.
enum class DenseReason : uint8_t { kNone, kShortPrompt, kMinCapturedMass, kBelowCrossover };
constexpr const char* Name(DenseReason reason) {
  constexpr const char* kNames[] = {"none", "short_prompt", "min_captured_mass", "below_crossover"};
  return kNames[static_cast<int>(reason)];
}

struct HeadReport {
  Pattern pattern = Pattern::kDense;
  DenseReason dense_reason = DenseReason::kNone;
  float density = 1;            // computed / causal blocks
  float captured_mass = 1;      // mean over the sampled rows; meaningful when measured
  float captured_mass_min = 1;  // minimum over the sampled rows
};

// Paged K and V. Where arena is not null, k and v of the call are not read; what fills the last
// page of a sequence beyond its tokens is not read either, nor is a page that no sequence names.
// The caller's; on a device that does not compute in host memory both arrays are device memory.
struct KvPages {
  const void* arena = nullptr;  // [arena_pages, kv_heads, k|v, page_tokens, d] in the shape's dtype
  // For each sequence the ceil(sk / page_tokens) pages of its tokens in order, sequences one after
  // the other. Each from 0 to below arena_pages.
  const int32_t* pages = nullptr;
  int64_t arena_pages = 0;  // > 0
  int page_tokens = 0;      // a power of two from 16 to 4096
};

// Policies that differ from head to head. One block_size for all: that of the call's policy.
struct HeadPolicies {
  std::span<const SparsityPolicy> policies;
  // [q_heads]: the place in policies of each query head's. Empty: all have the call's policy.
  std::span<const uint16_t> of_head;
};

// One call of the three stages. All pointers are the caller's and outlive the stages. q, k, v and o
// may lie in memory that others write meanwhile: what comes out is then of no use, but no stage
// reads or writes anything but its arguments.
struct AttentionArgs {
  AttentionShape shape;
  SparsityPolicy policy;
  HeadPolicies per_head;     // instead of policy where it names any
  double softmax_scale = 0;  // > 0
  ConstHeadsView q;          // [total_q, q_heads, d]
  ConstHeadsView k, v;       // [total_k, kv_heads, d]
  KvPages kv_pages;          // instead of k and v where its arena is set
  HeadsView o;               // [total_q, q_heads, d], the dtype of q
  float* lse = nullptr;      // [q_heads, total_q] natural log, or null
  BlockIndexView index;
  // [sequences, q_heads], never null. On a device that does not compute in host memory it is the
  // host's all the same, from Device::AllocateHost: the stages write it there, and it can be read
  // after Synchronize.
  HeadReport* report = nullptr;
  // Stage 3 computes these rows of the block index alone, of every head; none: all. In host memory
  // only: elsewhere it is what queries there are that says so.
  int64_t first_row = 0, row_count = 0;
  // When it turns true, any stage may stop early and leave what it writes unspecified: none that
  // follows may be called then. May be null.
  const std::atomic<bool>* cancelled = nullptr;
};
inline bool Cancelled(const AttentionArgs& args) {
  return args.cancelled != nullptr && args.cancelled->load(std::memory_order_relaxed);
}
inline const SparsityPolicy& PolicyOf(const AttentionArgs& args, int h) {
  const HeadPolicies& heads = args.per_head;
  return heads.of_head.empty() ? args.policy : heads.policies[heads.of_head[h]];
}
bool Measures(const AttentionArgs& args);  // of any head

}  // namespace prefilld

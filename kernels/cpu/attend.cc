#include "kernels/cpu/attend.h"

#include <omp.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "kernels/cpu/attend_block.h"
#include "kernels/cpu/cpu_device.h"

namespace prefilld::cpu {
namespace {

// Heads are packed together up to this much, so that short sequences fill the threads; a longer
// sequence is taken one kv head at a time, which bounds the workspace.
constexpr int64_t kPassFloats = (int64_t{32} << 20) / sizeof(float);

// Rows of one sequence that are to be computed.
struct Rows {
  const SequenceBlocks* sequence;
  int64_t first, end;  // of the sequence's
  int64_t keys;        // that they may see, from the first on

  int64_t tiles() const { return (keys + kTileKeys - 1) / kTileKeys; }
};

// One kv head of one sequence, with its place in the workspace.
struct KvHead {
  const Rows* rows;
  int g;
  float* keys;
  float* values;
};

struct Task {
  int kv_head;  // of the pass
  int h;
  int64_t row;  // of the sequence
  int32_t count;
};

const char* At(const void* data, int64_t element, DType dtype) {
  return static_cast<const char*>(data) + element * static_cast<int64_t>(SizeOf(dtype));
}

void PackTile(const AttentionArgs& args, const KvHead& head, int64_t tile) {
  const AttentionShape& shape = args.shape;
  const int64_t d = shape.head_dim;
  const int64_t first = tile * kTileKeys;
  const SequenceBlocks& sequence = *head.rows->sequence;
  const int64_t token = sequence.k_begin + first;
  const int keys = static_cast<int>(std::min<int64_t>(kTileKeys, sequence.sk - first));
  PackKeysTransposed(
      At(args.k.data, token * args.k.token_stride + head.g * args.k.head_stride, shape.dtype),
      shape.dtype, args.k.token_stride, keys, shape.head_dim, head.keys + first * d);
  WidenRows(At(args.v.data, token * args.v.token_stride + head.g * args.v.head_stride, shape.dtype),
            shape.dtype, args.v.token_stride, keys, shape.head_dim, 1.0f, head.values + first * d,
            d);
}

QueryBlock MakeQueryBlock(const AttentionArgs& args, const KvHead& head, const Task& task) {
  const AttentionShape& shape = args.shape;
  const SequenceBlocks& sequence = *head.rows->sequence;
  const int64_t block_size = args.policy.block_size;
  const int64_t row = sequence.row_begin + task.row;
  // The first block of queries starts where the prefix ends, inside a block of positions.
  const int64_t block_begin = (sequence.first_q_block + task.row) * block_size;
  const int64_t begin = std::max(block_begin, sequence.prefix);
  const int64_t end = std::min(block_begin + block_size, sequence.sk);
  const int64_t token = sequence.q_begin + begin - sequence.prefix;
  return {
      .q = At(args.q.data, token * args.q.token_stride + task.h * args.q.head_stride, shape.dtype),
      .q_stride = args.q.token_stride,
      .o = const_cast<char*>(
          At(args.o.data, token * args.o.token_stride + task.h * args.o.head_stride, shape.dtype)),
      .o_stride = args.o.token_stride,
      .lse = args.lse == nullptr ? nullptr : args.lse + task.h * shape.total_q() + token,
      .dtype = shape.dtype,
      .rows = static_cast<int>(end - begin),
      .d = shape.head_dim,
      .position = begin,
      .blocks = args.index.row_at(task.h, row),
      .count = task.count,
      .block_size = args.policy.block_size,
      .keys = head.keys,
      .values = head.values,
      .scale = static_cast<float>(args.softmax_scale * 1.4426950408889634)};
}

// Every block of queries of these kv heads, the longest lists first so that threads end together.
std::vector<Task> ListTasks(const AttentionArgs& args, const std::vector<KvHead>& heads) {
  const int group = args.shape.q_heads / args.shape.kv_heads;
  std::vector<Task> tasks;
  for (int i = 0; i < static_cast<int>(heads.size()); ++i) {
    const Rows& rows = *heads[i].rows;
    const SequenceBlocks& sequence = *rows.sequence;
    for (int h = heads[i].g * group; h < (heads[i].g + 1) * group; ++h) {
      for (int64_t row = rows.first; row < rows.end; ++row) {
        tasks.push_back({i, h, row, args.index.count_at(h, sequence.row_begin + row)});
      }
    }
  }
  std::stable_sort(tasks.begin(), tasks.end(),
                   [](const Task& a, const Task& b) { return a.count > b.count; });
  return tasks;
}

void RunPass(const AttentionArgs& args, const std::vector<KvHead>& heads, float* scratch,
             int threads) {
  std::vector<std::pair<int, int64_t>> tiles;
  for (int i = 0; i < static_cast<int>(heads.size()); ++i) {
    for (int64_t tile = 0; tile < heads[i].rows->tiles(); ++tile) tiles.emplace_back(i, tile);
  }
  const std::vector<Task> tasks = ListTasks(args, heads);
  const int64_t scratch_floats = static_cast<int64_t>(Scratch::Floats(args.shape.head_dim));
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(dynamic, 4)
    for (size_t i = 0; i < tiles.size(); ++i) {
      if (Cancelled(args)) continue;
      PackTile(args, heads[tiles[i].first], tiles[i].second);
    }
    const Scratch mine(scratch + omp_get_thread_num() * scratch_floats, args.shape.head_dim);
#pragma omp for schedule(dynamic, 1)
    for (size_t i = 0; i < tasks.size(); ++i) {
      if (Cancelled(args)) continue;
      AttendBlock(MakeQueryBlock(args, heads[tasks[i].kv_head], tasks[i]), mine);
    }
  }
}

std::vector<Rows> RowsOf(const AttentionArgs& args, const std::vector<SequenceBlocks>& sequences) {
  const int64_t begin = args.first_row;
  const int64_t end = args.row_count > 0 ? begin + args.row_count : TotalRows(sequences);
  std::vector<Rows> all;
  for (const SequenceBlocks& sequence : sequences) {
    const int64_t first = std::max<int64_t>(0, begin - sequence.row_begin);
    const int64_t last = std::min(sequence.q_blocks, end - sequence.row_begin);
    if (first >= last) continue;
    const int64_t seen = (sequence.first_q_block + last) * args.policy.block_size;
    all.push_back({&sequence, first, last, std::min(sequence.sk, seen)});
  }
  return all;
}

}  // namespace

Attention::Attention(int threads) : threads_(threads) {}

absl::Status Attention::Reserve(size_t bytes) {
  if (workspace_.bytes() >= bytes) return absl::OkStatus();
  workspace_ = Buffer();  // the old one goes first: both together may be too much
  absl::StatusOr<Buffer> larger = AllocatePages(bytes);
  if (!larger.ok()) return larger.status();
  workspace_ = *std::move(larger);
  return absl::OkStatus();
}

absl::Status Attention::Run(const AttentionArgs& args) {
  const std::vector<SequenceBlocks> sequences = SplitIntoBlocks(args.shape, args.policy.block_size);
  const int64_t d = args.shape.head_dim;
  const std::vector<Rows> all = RowsOf(args, sequences);
  const auto packed_floats = [d](const Rows& rows) { return 2 * d * rows.tiles() * kTileKeys; };
  int64_t largest = kPassFloats;
  for (const Rows& rows : all) largest = std::max(largest, packed_floats(rows));
  const int64_t scratch_floats =
      threads_ * static_cast<int64_t>(Scratch::Floats(args.shape.head_dim));
  absl::Status status = Reserve(static_cast<size_t>(scratch_floats + largest) * sizeof(float));
  if (!status.ok()) return status;
  float* scratch = workspace_.as<float>();
  float* packed = scratch + scratch_floats;

  std::vector<KvHead> heads;
  int64_t used = 0;
  for (const Rows& rows : all) {
    const int64_t floats = packed_floats(rows);
    for (int g = 0; g < args.shape.kv_heads; ++g) {
      if (used + floats > largest) {
        RunPass(args, heads, scratch, threads_);
        heads.clear();
        used = 0;
      }
      heads.push_back({&rows, g, packed + used, packed + used + floats / 2});
      used += floats;
    }
  }
  RunPass(args, heads, scratch, threads_);
  return absl::OkStatus();
}

}  // namespace prefilld::cpu

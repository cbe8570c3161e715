#include "server/kv/block_pool.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"
#include "server/record/errors.h"

namespace prefilld {

absl::StatusOr<std::unique_ptr<BlockPool>> BlockPool::Create(Device& device, size_t bytes,
                                                             size_t block_bytes) {
  const size_t total = block_bytes == 0 ? 0 : bytes / block_bytes;
  if (total == 0 || total > static_cast<size_t>(std::numeric_limits<int32_t>::max())) {
    return absl::InvalidArgumentError(absl::StrCat("KV memory of ", bytes, " bytes holds ", total,
                                                   " blocks of ", block_bytes,
                                                   " bytes; 1 to 2147483647 are allowed"));
  }
  auto arena = device.host_memory() ? device.Allocate(total * block_bytes)
                                    : device.AllocateHost(total * block_bytes);
  if (!arena.ok()) return arena.status();
  return std::unique_ptr<BlockPool>(
      new BlockPool(device, *std::move(arena), block_bytes, static_cast<int64_t>(total)));
}

BlockPool::BlockPool(Device& device, Buffer arena, size_t block_bytes, int64_t total)
    : device_(device), arena_(std::move(arena)), block_bytes_(block_bytes), total_(total) {
  free_.reserve(total);
  for (int64_t block = total; block-- > 0;) free_.push_back(static_cast<int32_t>(block));
  counts_[static_cast<int>(BlockState::kFree)] = total;
}

absl::StatusOr<std::vector<int32_t>> BlockPool::Take(int64_t count) {
  if (count > total_) {
    return absl::ResourceExhaustedError(
        absl::StrCat("the KV cache needs ", count, " blocks, the server has ", total_,
                     "; pull with retain = false or shorten the prompt"));
  }
  absl::MutexLock lock(&mutex_);
  if (count > static_cast<int64_t>(free_.size())) {
    return RetryLater(absl::StatusCode::kResourceExhausted, "kv_memory",
                      absl::StrCat("the KV cache needs ", count, " blocks, ", free_.size(), " of ",
                                   total_, " are free"),
                      absl::Seconds(1));
  }
  std::vector<int32_t> blocks(free_.end() - count, free_.end());
  free_.resize(free_.size() - count);
  counts_[static_cast<int>(BlockState::kFree)] -= count;
  counts_[static_cast<int>(BlockState::kComputing)] += count;
  return blocks;
}

void BlockPool::GiveBack(const std::vector<int32_t>& blocks, BlockState from) {
  std::function<void()> on_give_back;
  {
    absl::MutexLock lock(&mutex_);
    free_.insert(free_.end(), blocks.begin(), blocks.end());
    given_back_.SignalAll();
    counts_[static_cast<int>(from)] -= static_cast<int64_t>(blocks.size());
    counts_[static_cast<int>(BlockState::kFree)] += static_cast<int64_t>(blocks.size());
    on_give_back = on_give_back_;
  }
  if (on_give_back) on_give_back();
}

void BlockPool::SetOnGiveBack(std::function<void()> on_give_back) {
  absl::MutexLock lock(&mutex_);
  on_give_back_ = std::move(on_give_back);
}

int64_t BlockPool::free() const {
  absl::MutexLock lock(&mutex_);
  return static_cast<int64_t>(free_.size());
}

void BlockPool::Move(int64_t count, BlockState from, BlockState to) {
  absl::MutexLock lock(&mutex_);
  counts_[static_cast<int>(from)] -= count;
  counts_[static_cast<int>(to)] += count;
}

// One call for each run of neighbours: pages that two of them share go too.
void BlockPool::Discard(std::vector<int32_t> blocks) {
  std::sort(blocks.begin(), blocks.end());
  for (size_t begin = 0, end = 0; begin < blocks.size(); begin = end) {
    for (end = begin + 1; end < blocks.size() && blocks[end] == blocks[end - 1] + 1;) ++end;
    device_.Discard(data(blocks[begin]), (end - begin) * block_bytes_);
  }
}

std::array<int64_t, 4> BlockPool::CountByState() const {
  absl::MutexLock lock(&mutex_);
  return counts_;
}

bool BlockPool::WaitAllFree(SteadyTime deadline) const {
  absl::MutexLock lock(&mutex_);
  const auto all_free = [this]() ABSL_SHARED_LOCKS_REQUIRED(mutex_) {
    return static_cast<int64_t>(free_.size()) == total_;
  };
  return given_back_.AwaitUntil(deadline, mutex_, all_free);
}

}  // namespace prefilld

#include "kernels/cuda/model/upload.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <thread>
#include <utility>

#include "kernels/cuda/workspace.h"

namespace prefilld::cuda {
namespace {

constexpr Stream kStream{};
constexpr size_t kHalfBytes = size_t{4} << 20;
constexpr size_t kSharedBytes = size_t{2} << 20;  // what the device is asked for at once
constexpr size_t kSmallBytes = kSharedBytes / 8;  // and what is taken of that at most

}  // namespace

absl::Status Upload::Pieces(const std::vector<Piece>& pieces, Buffer* buffer) {
  size_t bytes = 0;
  for (const Piece& piece : pieces) bytes += piece.bytes;
  absl::Status status = Take(bytes, buffer);
  return status.ok() ? PiecesTo(pieces, buffer->as<char>()) : status;
}

// Zeroed: of what is shared no part is handed out twice.
absl::Status Upload::Take(size_t bytes, Buffer* buffer) {
  if (bytes > kSmallBytes) {
    auto memory = device_.Allocate(bytes);
    if (memory.ok()) *buffer = *std::move(memory);
    return memory.status();
  }
  if (shared_ == nullptr || shared_taken_ + bytes > kSharedBytes) {
    auto memory = device_.Allocate(kSharedBytes);
    if (!memory.ok()) return memory.status();
    shared_ = std::make_shared<const Buffer>(*std::move(memory));
    shared_taken_ = 0;
  }
  *buffer = Buffer(shared_->as<char>() + shared_taken_, bytes, [all = shared_](void*, size_t) {});
  shared_taken_ += static_cast<size_t>(Workspace::Aligned(static_cast<int64_t>(bytes)));
  return absl::OkStatus();
}

absl::Status Upload::PiecesTo(const std::vector<Piece>& pieces, char* to) {
  std::vector<Part> parts;
  for (const Piece& piece : pieces) {
    const char* from = static_cast<const char*>(piece.data);
    for (size_t at = 0; from != nullptr && at < piece.bytes; at += kHalfBytes) {
      parts.push_back({from + at, to + at, std::min(kHalfBytes, piece.bytes - at)});
    }
    to += piece.bytes;
  }
  return Send(parts);
}

// Every lane takes the next part that none has taken. What there is too little of for a second
// thread, such as a batch's tokens, the caller copies.
absl::Status Upload::Send(const std::vector<Part>& parts) {
  std::atomic<size_t> taken{0};
  std::array<absl::Status, kLanes> results;
  const auto run = [&](size_t lane) {
    absl::Status& status = results[lane];
    for (size_t i = taken++; i < parts.size() && status.ok(); i = taken++) {
      status = Send(parts[i], lanes_[lane]);
    }
    if (!status.ok()) taken = parts.size();  // nor need the others go on
  };
  std::vector<std::thread> helpers;
  for (size_t lane = 1; lane < std::min(kLanes, parts.size()); ++lane) {
    helpers.emplace_back(run, lane);
  }
  run(0);
  for (std::thread& helper : helpers) helper.join();
  const auto failed = std::find_if(results.begin(), results.end(),
                                   [](const absl::Status& status) { return !status.ok(); });
  return failed == results.end() ? absl::OkStatus() : *failed;
}

absl::Status Upload::Send(const Part& part, Lane& lane) {
  Lane::Half& half = lane.halves[lane.next];
  lane.next = 1 - lane.next;
  absl::Status status;
  if (half.copied == nullptr) {
    auto pinned = device_.AllocateHost(kHalfBytes);
    if (!pinned.ok()) return pinned.status();
    auto mark = device_.NewMark();
    if (!mark.ok()) return mark.status();
    half = {*std::move(pinned), *std::move(mark)};
  } else {
    status = half.copied->Await();
  }
  if (!status.ok()) return status;
  std::memcpy(half.pinned.data(), part.from, part.bytes);
  status = device_.Copy(part.to, half.pinned.data(), part.bytes, kStream);
  return status.ok() ? half.copied->Record(kStream) : status;
}

}  // namespace prefilld::cuda

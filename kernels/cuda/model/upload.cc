#include "kernels/cuda/model/upload.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <thread>
#include <utility>

namespace prefilld::cuda {
namespace {

constexpr Stream kStream{};
constexpr size_t kHalfBytes = size_t{4} << 20;

}  // namespace

absl::Status Upload::Pieces(const std::vector<Piece>& pieces, Buffer* buffer) {
  size_t bytes = 0;
  for (const Piece& piece : pieces) bytes += piece.bytes;
  auto memory = device_.Allocate(bytes);
  if (!memory.ok()) return memory.status();
  *buffer = *std::move(memory);
  return PiecesTo(pieces, buffer->as<char>());
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

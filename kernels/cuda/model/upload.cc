#include "kernels/cuda/model/upload.h"

#include <algorithm>
#include <cstring>
#include <utility>

namespace prefilld::cuda {
namespace {

constexpr Stream kStream{};
constexpr size_t kHalfBytes = size_t{16} << 20;

}  // namespace

absl::Status Upload::Pieces(const std::vector<Piece>& pieces, Buffer* buffer) {
  size_t bytes = 0;
  for (const Piece& piece : pieces) bytes += piece.bytes;
  auto memory = device_.Allocate(bytes);
  if (!memory.ok()) return memory.status();
  *buffer = *std::move(memory);
  char* to = buffer->as<char>();
  for (const Piece& piece : pieces) {
    absl::Status status = piece.data == nullptr ? absl::OkStatus() : Send(piece, to);
    if (!status.ok()) return status;
    to += piece.bytes;
  }
  return absl::OkStatus();
}

absl::Status Upload::Send(const Piece& piece, char* to) {
  for (size_t at = 0; at < piece.bytes; at += kHalfBytes, next_ = 1 - next_) {
    Half& half = halves_[next_];
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
    const size_t bytes = std::min(kHalfBytes, piece.bytes - at);
    std::memcpy(half.pinned.data(), static_cast<const char*>(piece.data) + at, bytes);
    status = device_.Copy(to + at, half.pinned.data(), bytes, kStream);
    if (status.ok()) status = half.copied->Record(kStream);
    if (!status.ok()) return status;
  }
  return absl::OkStatus();
}

}  // namespace prefilld::cuda

#include "server/transport/staging.h"

#include <algorithm>
#include <cstring>
#include <utility>

namespace prefilld {
namespace {

constexpr uint64_t kAlignment = 256;
constexpr uint64_t Aligned(uint64_t bytes) {
  return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

}  // namespace

absl::StatusOr<std::shared_ptr<Staging>> Staging::Create(Device& device,
                                                         std::vector<Tensor> tensors) {
  uint64_t end = 0;
  for (const Tensor& tensor : tensors) end += Aligned(tensor.bytes);
  std::shared_ptr<Staging> staging(new Staging(device));
  auto host = device.AllocateHost(end);
  if (!host.ok()) return host.status();
  staging->host_ = *std::move(host);
  std::byte* place = staging->host_.as<std::byte>();
  for (Tensor& tensor : tensors) tensor.host = std::exchange(place, place + Aligned(tensor.bytes));
  staging->tensors_ = std::move(tensors);
  return staging;
}

Staging::~Staging() {
  // A fault leaves nothing behind that would still read.
  if (any_) (void)device_.Synchronize(device_.upload_stream());
}

absl::Status Staging::Arrived(size_t tensor, uint64_t bytes) {
  if (tensor != current_) {
    current_ = tensor;
    enqueued_ = 0;
  }
  const Tensor& arriving = tensors_[tensor];
  while (enqueued_ + kGroupBytes <= bytes) {
    absl::Status status = Enqueue(arriving, enqueued_ + kGroupBytes);
    if (!status.ok()) return status;
  }
  if (bytes < arriving.bytes || enqueued_ == bytes) return absl::OkStatus();
  return Enqueue(arriving, bytes);
}

absl::Status Staging::CopyFrom(size_t tensor, const void* source) {
  const Tensor& to = tensors_[tensor];
  for (uint64_t begin = 0; begin < to.bytes; begin += kGroupBytes) {
    const uint64_t bytes = std::min(kGroupBytes, to.bytes - begin);
    std::memcpy(static_cast<std::byte*>(to.host) + begin,
                static_cast<const std::byte*>(source) + begin, bytes);
    if (absl::Status status = Arrived(tensor, begin + bytes); !status.ok()) return status;
  }
  return absl::OkStatus();
}

absl::Status Staging::Enqueue(const Tensor& tensor, uint64_t end) {
  const uint64_t begin = std::exchange(enqueued_, end);
  any_ = true;
  return device_.Copy(static_cast<std::byte*>(tensor.device) + begin,
                      static_cast<const std::byte*>(tensor.host) + begin, end - begin,
                      device_.upload_stream());
}

}  // namespace prefilld

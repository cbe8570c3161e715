// Tensors as the client sends and receives them: a TensorSpec and plain memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "prefilld/v1/tensor.pb.h"
#include "proto/wire/chunk.h"

namespace prefilld::client {

// Bytes of one element; 0 for DATA_TYPE_UNSPECIFIED and values this client does not know.
size_t ElementBytes(v1::DataType type);

// The size of a dense tensor. INVALID_ARGUMENT for an unknown type, no or more than 4 dimensions, a
// dimension below 1, and a size over 2^62 bytes.
absl::StatusOr<uint64_t> TensorBytes(const v1::TensorSpec& spec);

// "q [128, 8, 64] BF16"
std::string Describe(const v1::TensorSpec& spec);

// A tensor to send. Read until the call returns; with an `owner`, which is then held for as long as
// the transport needs the bytes, they are sent in place, without one they are copied chunk by
// chunk.
struct InputTensor {
  v1::TensorSpec spec;
  const void* data = nullptr;  // [TensorBytes(spec)]
  std::shared_ptr<const void> owner;
};

// A tensor being received: checks that its chunks come in order, complete and unharmed, and copies
// each once to its place.
class TensorReceiver {
 public:
  // `data` [bytes] is borrowed for this object's life.
  TensorReceiver(void* data, uint64_t bytes) : data_(static_cast<uint8_t*>(data)), bytes_(bytes) {}

  // DATA_LOSS when the chunk does not continue the tensor, overruns it, ends it early or late, or
  // has another checksum than it says.
  absl::Status Add(const ParsedChunk& chunk);

  uint64_t received() const { return received_; }
  bool complete() const { return received_ == bytes_; }

 private:
  uint8_t* data_;
  uint64_t bytes_;
  uint64_t received_ = 0;
};

}  // namespace prefilld::client

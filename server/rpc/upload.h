// The tensors of an Attend as they arrive: chunk after chunk, tensor after tensor, each byte copied
// once to its place; or all at once, in a segment that the caller writes. Not thread-safe.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "proto/wire/chunk.h"

namespace prefilld {

class Upload {
 public:
  struct Tensor {
    void* data;      // the caller's, outlives the upload
    uint64_t bytes;  // > 0
  };
  explicit Upload(std::vector<Tensor> tensors);

  // DATA_LOSS for a chunk that is out of order, too long, empty or damaged; the upload is then
  // useless.
  absl::Status Take(const ParsedChunk& chunk);

  // The caller says that it has written all of them. DATA_LOSS when it says so again.
  absl::Status Written();

  bool complete() const { return current_ == tensors_.size(); }
  uint64_t total_bytes() const { return total_; }
  uint64_t received_bytes() const { return received_; }

 private:
  const std::vector<Tensor> tensors_;
  uint64_t total_ = 0;
  uint64_t received_ = 0;
  size_t current_ = 0;   // the tensor that arrives
  uint64_t offset_ = 0;  // its bytes that are here
};

}  // namespace prefilld

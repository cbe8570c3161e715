// Safetensors files: an 8-byte little-endian header length, a JSON header that gives every tensor's
// dtype, shape and byte range, then the bytes. Read and written through a memory map, so tensors
// larger than memory's spare half can go from the file to the wire and back without a second copy.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "client/cpp/tensor.h"

namespace prefilld::client {

// A file opened for reading. Constant: safe on any thread. The tensors keep the map alive, so they
// may outlive this object; the file must not be truncated meanwhile.
class SafetensorsFile {
 public:
  // INVALID_ARGUMENT for a file that is truncated, or whose header is no JSON, names a tensor
  // twice, or gives a tensor a range that is not its size, lies outside the file or overlaps
  // another's; NOT_FOUND and such when it cannot be opened. Blocks on the disk.
  static absl::StatusOr<SafetensorsFile> Open(const std::string& path);

  // Tensors of a dtype that TensorSpec cannot express are not listed.
  const std::vector<InputTensor>& tensors() const { return tensors_; }
  // Null when the file has no such tensor, or one that is not listed.
  const InputTensor* Find(const std::string& name) const;
  // The same, or INVALID_ARGUMENT that says which it is.
  absl::StatusOr<InputTensor> Get(const std::string& name) const;

 private:
  std::vector<InputTensor> tensors_;
  std::string path_;
  std::map<std::string, std::string> unlisted_;  // by name, what they are
};

// A file being written: made under a temporary name, given its full size when the tensors are
// known, filled in place, and given its own name by Commit. Destroyed without Commit it leaves
// nothing behind. One thread at a time, but different tensors may be filled on different threads.
class SafetensorsWriter {
 public:
  // Fails when `path` is something else than a regular file or its folder cannot be written. Blocks
  // on the disk, as the other methods do.
  static absl::StatusOr<std::unique_ptr<SafetensorsWriter>> Create(const std::string& path);
  ~SafetensorsWriter();
  SafetensorsWriter(const SafetensorsWriter&) = delete;
  SafetensorsWriter& operator=(const SafetensorsWriter&) = delete;

  // Reserves the disk space; returns where the bytes of each tensor go, valid until Commit or the
  // next Allocate, which starts over. INVALID_ARGUMENT for a bad spec or two of one name; errors of
  // the disk as they are (RESOURCE_EXHAUSTED when full).
  absl::StatusOr<std::vector<void*>> Allocate(const std::vector<v1::TensorSpec>& specs);

  // Replaces `path` by the file. Call after Allocate.
  absl::Status Commit();

 private:
  SafetensorsWriter(std::string path, std::string temporary_path, int fd);
  void Unmap();

  std::string path_;
  std::string temporary_path_;  // empty once committed
  int fd_;
  void* map_ = nullptr;
  size_t map_bytes_ = 0;
};

}  // namespace prefilld::client

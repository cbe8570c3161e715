// Reads the safetensors files of a model directory through memory maps: model.safetensors, or the
// shards that model.safetensors.index.json lists. Everything a header says is checked before a
// tensor is handed out; the bytes of tensors are never copied.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"

namespace prefilld {

// One tensor in a map. Row-major, little-endian.
struct SafeTensor {
  std::string dtype;  // "F32", "BF16", ... as the file says
  std::vector<int64_t> shape;
  const std::byte* data = nullptr;  // aligned to the element size
  size_t bytes = 0;                 // product of shape times the element size
};

class MappedFile;

// Owns the maps; its tensors live as long as it. Immutable, any thread may read. What somebody
// writes into a file, or takes from its end, while it is mapped changes the tensors under whoever
// computes with them: CheckFiles tells afterwards. A file that another is renamed over stays.
class SafeTensors {
 public:
  // NOT_FOUND without model files, INVALID_ARGUMENT for a file that breaks the format; both name
  // it.
  static absl::StatusOr<SafeTensors> Open(const std::string& directory);

  const std::map<std::string, SafeTensor, std::less<>>& tensors() const { return tensors_; }

  // UNAVAILABLE, for good, where a file is not any more what Open found: it has another size or
  // time of change. Asks the file system.
  absl::Status CheckFiles() const;

 private:
  std::vector<std::shared_ptr<const MappedFile>> files_;
  std::map<std::string, SafeTensor, std::less<>> tensors_;
};

}  // namespace prefilld

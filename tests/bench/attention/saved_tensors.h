// A safetensors file of 16-bit tensors [tokens, heads, d], mapped. No more of the format than a
// benchmark needs that links no gRPC; client/cpp/safetensors.h reads all of it. An error ends the
// process.
#pragma once

#include <cstddef>
#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

namespace prefilld::bench {

class SavedTensors {
 public:
  explicit SavedTensors(const std::string& path);
  ~SavedTensors();
  SavedTensors(const SavedTensors&) = delete;
  SavedTensors& operator=(const SavedTensors&) = delete;

  struct View {
    std::string dtype;  // "BF16", "F16"
    std::vector<int64_t> shape;
    const uint8_t* data;
  };
  View Find(const std::string& name) const;

 private:
  const uint8_t* data_ = nullptr;
  size_t bytes_ = 0, data_begin_ = 0;
  nlohmann::json tensors_;
};

}  // namespace prefilld::bench

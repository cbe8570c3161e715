#include "tests/bench/attention/saved_tensors.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstring>

#include "tests/bench/attention/device_clock.h"

namespace prefilld::bench {

SavedTensors::SavedTensors(const std::string& path) {
  const int fd = open(path.c_str(), O_RDONLY);
  struct stat stat;
  if (fd < 0 || fstat(fd, &stat) != 0) Die("cannot open " + path);
  bytes_ = static_cast<size_t>(stat.st_size);
  void* map = mmap(nullptr, bytes_, PROT_READ, MAP_PRIVATE, fd, 0);
  close(fd);
  if (map == MAP_FAILED) Die("cannot map " + path);
  data_ = static_cast<const uint8_t*>(map);
  uint64_t header = 0;
  if (bytes_ >= 8) std::memcpy(&header, data_, 8);
  if (header == 0 || header > bytes_ - 8) Die(path + " is no safetensors file");
  tensors_ = nlohmann::json::parse(data_ + 8, data_ + 8 + header, nullptr, false);
  data_begin_ = 8 + header;
  if (tensors_.is_discarded()) Die(path + " has no JSON header");
}

SavedTensors::~SavedTensors() { munmap(const_cast<uint8_t*>(data_), bytes_); }

SavedTensors::View SavedTensors::Find(const std::string& name) const {
  if (!tensors_.contains(name)) Die("the file has no tensor " + name);
  const nlohmann::json& tensor = tensors_[name];
  const std::string dtype = tensor["dtype"];
  const std::vector<int64_t> shape = tensor["shape"];
  const std::vector<uint64_t> range = tensor["data_offsets"];
  if (shape.size() != 3) Die(name + " is not [tokens, heads, d]");
  if (dtype != "BF16" && dtype != "F16") Die(name + " is " + dtype + ", not BF16 or F16");
  const auto size = static_cast<uint64_t>(shape[0] * shape[1] * shape[2]) * 2;
  if (range[1] - range[0] != size || data_begin_ + range[1] > bytes_) Die(name + " is truncated");
  return {dtype, shape, data_ + data_begin_ + range[0]};
}

}  // namespace prefilld::bench

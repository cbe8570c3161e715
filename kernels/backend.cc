#include "kernels/backend.h"

#include <utility>

namespace prefilld {

Buffer& Buffer::operator=(Buffer&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  std::swap(free_, other.free_);
  return *this;
}

Buffer::~Buffer() {
  if (data_ != nullptr && free_ != nullptr) free_(data_, bytes_);
}

}  // namespace prefilld

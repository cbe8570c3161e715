#include "client/cpp/tensor.h"

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/strip.h"

namespace prefilld::client {

size_t ElementBytes(v1::DataType type) {
  switch (type) {
    case v1::DATA_TYPE_F32:
    case v1::DATA_TYPE_I32:
      return 4;
    case v1::DATA_TYPE_BF16:
    case v1::DATA_TYPE_F16:
      return 2;
    case v1::DATA_TYPE_U8:
      return 1;
    default:
      return 0;
  }
}

absl::StatusOr<uint64_t> TensorBytes(const v1::TensorSpec& spec) {
  constexpr uint64_t kBytesMax = uint64_t{1} << 62;
  uint64_t bytes = ElementBytes(spec.data_type());
  if (bytes == 0 || spec.shape_size() < 1 || spec.shape_size() > 4) {
    return absl::InvalidArgumentError(absl::StrCat("not a tensor: ", Describe(spec)));
  }
  for (int64_t dimension : spec.shape()) {
    if (dimension < 1 || static_cast<uint64_t>(dimension) > kBytesMax / bytes) {
      return absl::InvalidArgumentError(absl::StrCat("dimension out of range: ", Describe(spec)));
    }
    bytes *= static_cast<uint64_t>(dimension);
  }
  return bytes;
}

std::string Describe(const v1::TensorSpec& spec) {
  return absl::StrCat(spec.name(), " [", absl::StrJoin(spec.shape(), ", "), "] ",
                      absl::StripPrefix(v1::DataType_Name(spec.data_type()), "DATA_TYPE_"));
}

absl::Status TensorReceiver::Add(const ParsedChunk& chunk) {
  const ChunkHeader& header = chunk.header;
  if (header.byte_offset != received_) {
    return absl::DataLossError(
        absl::StrCat("chunk at byte ", header.byte_offset, ", expected ", received_));
  }
  if (chunk.payload_bytes > bytes_ - received_) {
    return absl::DataLossError(absl::StrCat("chunk of ", chunk.payload_bytes, " bytes at ",
                                            received_, " overruns a tensor of ", bytes_));
  }
  const uint64_t end = received_ + chunk.payload_bytes;
  if (header.last != (end == bytes_)) {
    return absl::DataLossError(
        absl::StrCat("chunk ends at byte ", end, " of ", bytes_, " with last=", header.last));
  }
  const uint32_t crc = chunk.CopyTo(data_ + received_);
  if (crc != header.crc32c) {
    return absl::DataLossError(absl::StrCat("checksum of the chunk at byte ", received_, " is ",
                                            absl::Hex(crc), ", expected ",
                                            absl::Hex(header.crc32c)));
  }
  received_ = end;
  return absl::OkStatus();
}

}  // namespace prefilld::client

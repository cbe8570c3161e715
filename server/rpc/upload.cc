#include "server/rpc/upload.h"

#include <utility>

#include "absl/strings/str_cat.h"

namespace prefilld {

Upload::Upload(std::vector<Tensor> tensors) : tensors_(std::move(tensors)) {
  for (const Tensor& tensor : tensors_) total_ += tensor.bytes;
}

absl::Status Upload::Take(const ParsedChunk& chunk) {
  if (complete()) return absl::DataLossError("a chunk after the last tensor's last chunk");
  const Tensor& tensor = tensors_[current_];
  const ChunkHeader& header = chunk.header;
  const auto loss = [&](const std::string& what) {
    return absl::DataLossError(absl::StrCat("chunk of tensor ", header.tensor_index, " at byte ",
                                            header.byte_offset, ": ", what));
  };
  if (header.tensor_index != current_ || header.byte_offset != offset_) {
    return loss(absl::StrCat("expected tensor ", current_, " at byte ", offset_));
  }
  if (chunk.payload_bytes == 0) return loss("no data");
  if (chunk.payload_bytes > tensor.bytes - offset_) {
    return loss(absl::StrCat(chunk.payload_bytes, " bytes, the tensor ends after ",
                             tensor.bytes - offset_));
  }
  const bool last = chunk.payload_bytes == tensor.bytes - offset_;
  if (header.last != last) {
    return loss(last ? "completes the tensor without `last`" : "`last` before the tensor's end");
  }
  const uint32_t crc = chunk.CopyTo(static_cast<char*>(tensor.data) + offset_);
  if (crc != header.crc32c) {
    return loss(absl::StrCat("CRC32C ", absl::Hex(crc), " of the data is not the announced ",
                             absl::Hex(header.crc32c)));
  }
  received_ += chunk.payload_bytes;
  offset_ += chunk.payload_bytes;
  if (last) {
    ++current_;
    offset_ = 0;
  }
  return absl::OkStatus();
}

absl::Status Upload::Written() {
  if (complete()) return absl::DataLossError("`written` again after the tensors were written");
  received_ = total_;
  current_ = tensors_.size();
  return absl::OkStatus();
}

}  // namespace prefilld

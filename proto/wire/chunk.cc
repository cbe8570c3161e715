#include "proto/wire/chunk.h"

#include <isa-l.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"

namespace prefilld {
namespace {

enum WireType : uint32_t { kVarint = 0, kFixed64 = 1, kLengthDelimited = 2, kFixed32 = 5 };

// Field numbers of TensorChunk.
constexpr int kTensorIndex = 1;
constexpr int kLayer = 2;
constexpr int kByteOffset = 3;
constexpr int kCrc32c = 4;
constexpr int kLast = 5;
constexpr int kBuffer = 6;
constexpr int kData = 15;

// The bytes in front of a payload. All fields together need at most 45.
class Prefix {
 public:
  void Varint(uint64_t value) {
    for (; value >= 0x80; value >>= 7) Byte(static_cast<uint8_t>(value | 0x80));
    Byte(static_cast<uint8_t>(value));
  }
  void Tag(int field, WireType type) { Varint(static_cast<uint32_t>(field) << 3 | type); }
  // proto3: a field that has its default value is not on the wire.
  void VarintField(int field, uint64_t value) {
    if (value == 0) return;
    Tag(field, kVarint);
    Varint(value);
  }
  void Fixed32Field(int field, uint32_t value) {
    if (value == 0) return;
    Tag(field, kFixed32);
    for (int shift = 0; shift < 32; shift += 8) Byte(static_cast<uint8_t>(value >> shift));
  }
  void Append(const Prefix& other) {
    std::memcpy(bytes_.data() + size_, other.bytes_.data(), other.size_);
    size_ += other.size_;
  }
  const uint8_t* data() const { return bytes_.data(); }
  size_t size() const { return size_; }

 private:
  void Byte(uint8_t byte) { bytes_[size_++] = byte; }

  std::array<uint8_t, 64> bytes_;
  size_t size_ = 0;
};

// Reads forward through the slices of a message; every read says whether the bytes were there.
class Reader {
 public:
  explicit Reader(const grpc::ByteBuffer& buffer) {
    if (!buffer.Valid() || !buffer.Dump(&slices_).ok()) slices_.clear();
    for (const grpc::Slice& slice : slices_) remaining_ += slice.size();
  }

  size_t remaining() const { return remaining_; }

  bool Byte(uint8_t* byte) {
    if (remaining_ == 0) return false;
    SkipEmpty();
    *byte = slices_[slice_].begin()[offset_];
    Advance(1);
    return true;
  }

  // At most 64 bits, of 10 bytes, or fewer.
  bool Varint(uint64_t* value, int bytes = 10) {
    *value = 0;
    for (int shift = 0; shift < 7 * bytes; shift += 7) {
      uint8_t byte;
      if (!Byte(&byte) || (shift == 63 && byte > 1)) return false;
      *value |= static_cast<uint64_t>(byte & 0x7f) << shift;
      if (byte < 0x80) return true;
    }
    return false;
  }

  bool Fixed32(uint32_t* value) {
    *value = 0;
    for (int shift = 0; shift < 32; shift += 8) {
      uint8_t byte;
      if (!Byte(&byte)) return false;
      *value |= static_cast<uint32_t>(byte) << shift;
    }
    return true;
  }

  // As protobuf reads them: of 5 bytes at most, overlong ones included.
  bool Length(uint64_t* value) { return Varint(value, 5); }
  bool Tag(int* field, uint32_t* type) {
    uint64_t tag;
    if (!Varint(&tag, 5) || tag > std::numeric_limits<uint32_t>::max() || tag < 8) return false;
    *field = static_cast<int>(tag >> 3);
    *type = static_cast<uint32_t>(tag & 7);
    return true;
  }

  // The next `size` bytes are passed over and, where `out` is given, appended to it in place.
  bool Take(uint64_t size, std::vector<grpc::Slice>* out) {
    if (size > remaining_) return false;
    while (size > 0) {
      SkipEmpty();
      const size_t left = slices_[slice_].size() - offset_;
      const size_t n = std::min<uint64_t>(left, size);
      if (out != nullptr) out->push_back(slices_[slice_].sub(offset_, offset_ + n));
      Advance(n);
      size -= n;
    }
    return true;
  }

  bool SkipField(uint32_t type) {
    uint64_t value;
    switch (type) {
      case kVarint:
        return Varint(&value);
      case kFixed64:
        return Take(8, nullptr);
      case kFixed32:
        return Take(4, nullptr);
      case kLengthDelimited:
        return Length(&value) && Take(value, nullptr);
      default:  // groups are not used since proto3; 6 and 7 never were
        return false;
    }
  }

 private:
  void SkipEmpty() {
    while (offset_ == slices_[slice_].size()) {
      ++slice_;
      offset_ = 0;
    }
  }
  void Advance(size_t n) {
    offset_ += n;
    remaining_ -= n;
  }

  std::vector<grpc::Slice> slices_;
  size_t slice_ = 0;   // index of the current slice
  size_t offset_ = 0;  // within it
  size_t remaining_ = 0;
};

absl::Status Malformed(int field) {
  return absl::InvalidArgumentError(field == 0
                                        ? absl::StrCat("malformed TensorChunk")
                                        : absl::StrCat("malformed TensorChunk: field ", field));
}

// Reads the value of a known field; false when it is truncated, of the wrong type or out of range.
bool ReadField(Reader& reader, int field, uint32_t type, ParsedChunk& chunk) {
  ChunkHeader& header = chunk.header;
  uint64_t value = 0;
  switch (field) {
    case kTensorIndex:
    case kLayer:
      if (type != kVarint || !reader.Varint(&value)) return false;
      if (value > std::numeric_limits<uint32_t>::max()) return false;
      (field == kLayer ? header.layer : header.tensor_index) = static_cast<uint32_t>(value);
      return true;
    case kByteOffset:
      return type == kVarint && reader.Varint(&header.byte_offset);
    case kCrc32c:
      return type == kFixed32 && reader.Fixed32(&header.crc32c);
    case kLast:
      if (type != kVarint || !reader.Varint(&value)) return false;
      header.last = value != 0;
      return true;
    case kData:
      if (type != kLengthDelimited || !reader.Length(&value)) return false;
      if (value > kMaxChunkBytes || !reader.Take(value, &chunk.payload)) return false;
      chunk.payload_bytes = static_cast<size_t>(value);
      return true;
    default:
      return reader.SkipField(type);
  }
}

}  // namespace

uint32_t Crc32c(uint32_t crc, const void* data, size_t size) {
  // crc32_iscsi works on the raw register; CRC32C is defined with it inverted before and after.
  auto* bytes = static_cast<unsigned char*>(const_cast<void*>(data));  // read only: an old C header
  uint32_t state = ~crc;
  while (size > 0) {
    const int n = static_cast<int>(std::min<size_t>(size, std::numeric_limits<int>::max()));
    state = crc32_iscsi(bytes, n, state);
    bytes += n;
    size -= n;
  }
  return ~state;
}

grpc::Slice SliceOf(const void* data, size_t size, std::shared_ptr<const void> owner) {
  if (owner == nullptr) return grpc::Slice(data, size);
  using Owner = std::shared_ptr<const void>;
  return grpc::Slice(
      const_cast<void*>(data), size, [](void* held) { delete static_cast<Owner*>(held); },
      new Owner(std::move(owner)));
}

grpc::ByteBuffer EncodeChunk(const ChunkHeader& header, const std::vector<grpc::Slice>& payload,
                             int outer_field) {
  size_t payload_bytes = 0;
  for (const grpc::Slice& slice : payload) payload_bytes += slice.size();

  Prefix fields;
  fields.VarintField(kTensorIndex, header.tensor_index);
  fields.VarintField(kLayer, header.layer);
  fields.VarintField(kByteOffset, header.byte_offset);
  fields.Fixed32Field(kCrc32c, header.crc32c);
  fields.VarintField(kLast, header.last ? 1 : 0);
  if (payload_bytes > 0) {
    fields.Tag(kData, kLengthDelimited);
    fields.Varint(payload_bytes);
  }

  Prefix prefix;
  if (outer_field != kBareChunk) {
    prefix.Tag(outer_field, kLengthDelimited);
    prefix.Varint(fields.size() + payload_bytes);
  }
  prefix.Append(fields);

  std::vector<grpc::Slice> slices;
  slices.reserve(payload.size() + 1);
  slices.emplace_back(prefix.data(), prefix.size());
  slices.insert(slices.end(), payload.begin(), payload.end());
  return grpc::ByteBuffer(slices.data(), slices.size());
}

uint32_t ParsedChunk::CopyTo(void* dst) const {
  uint32_t crc = 0;
  auto* out = static_cast<uint8_t*>(dst);
  for (const grpc::Slice& slice : payload) {
    std::memcpy(out, slice.begin(), slice.size());
    crc = Crc32c(crc, out, slice.size());  // of what was written, still in the cache
    out += slice.size();
  }
  return crc;
}

absl::StatusOr<ParsedChunk> ParseChunk(const grpc::ByteBuffer& buffer, int outer_field) {
  Reader reader(buffer);
  int field = 0;
  uint32_t type = 0;
  if (outer_field != kBareChunk) {
    uint64_t size;
    if (!reader.Tag(&field, &type) || field != outer_field || type != kLengthDelimited ||
        !reader.Length(&size)) {
      return absl::InvalidArgumentError(absl::StrCat("field ", outer_field, " is no TensorChunk"));
    }
    if (size != reader.remaining()) {
      return absl::InvalidArgumentError(
          absl::StrCat("TensorChunk of ", size, " bytes in ", reader.remaining(), " bytes"));
    }
  }

  ParsedChunk chunk;
  uint32_t seen = 0;  // bit per known field
  while (reader.remaining() > 0) {
    if (!reader.Tag(&field, &type)) return Malformed(0);
    if (field == kBuffer) {
      return absl::InvalidArgumentError("a TensorChunk with `buffer` where bytes are sent");
    }
    if (!ReadField(reader, field, type, chunk)) return Malformed(field);
    if (field > kLast && field != kData) continue;  // unknown: protobuf lets those repeat
    if (seen & (1u << field)) {
      return absl::InvalidArgumentError(absl::StrCat("TensorChunk field ", field, " repeated"));
    }
    seen |= 1u << field;
  }
  return chunk;
}

int FirstField(const grpc::ByteBuffer& buffer) {
  Reader reader(buffer);
  int field = 0;
  uint32_t type = 0;
  return reader.Tag(&field, &type) ? field : 0;
}

}  // namespace prefilld

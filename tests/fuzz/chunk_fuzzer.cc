// ParseChunk beside protobuf's reading of the same bytes, which arrive in slices of any size.
#include <fuzzer/FuzzedDataProvider.h>

#include <string>
#include <vector>

#include "prefilld/v1/prefill_service.pb.h"
#include "proto/wire/chunk.h"
#include "tests/fuzz/property.h"

namespace prefilld {
namespace {

grpc::ByteBuffer InSlices(const std::string& bytes, const std::vector<size_t>& sizes) {
  std::vector<grpc::Slice> slices;
  size_t begin = 0;
  for (size_t size : sizes) {
    size = std::min(size, bytes.size() - begin);
    slices.emplace_back(bytes.data() + begin, size);
    begin += size;
  }
  slices.emplace_back(bytes.data() + begin, bytes.size() - begin);
  return grpc::ByteBuffer(slices.data(), slices.size());
}

std::string Bytes(const grpc::ByteBuffer& buffer) {
  std::vector<grpc::Slice> slices;
  Promise(buffer.Dump(&slices).ok(), "an encoded chunk can be read");
  std::string bytes;
  for (const grpc::Slice& slice : slices) {
    bytes.append(reinterpret_cast<const char*>(slice.begin()), slice.size());
  }
  return bytes;
}

// False where protobuf cannot read it, or it is something else than one chunk.
bool ReadByProtobuf(const std::string& bytes, int outer_field, v1::TensorChunk* chunk) {
  if (outer_field == kBareChunk) return chunk->ParseFromString(bytes);
  v1::AttendRequest request;
  if (!request.ParseFromString(bytes) || !request.has_chunk()) return false;
  *chunk = request.chunk();
  return true;
}

void CheckSame(const ParsedChunk& parsed, const v1::TensorChunk& chunk) {
  const ChunkHeader& header = parsed.header;
  Promise(header.tensor_index == chunk.tensor_index() && header.layer == chunk.layer() &&
              header.byte_offset == chunk.byte_offset() && header.crc32c == chunk.crc32c() &&
              header.last == chunk.last(),
          "the header is what protobuf reads", chunk.ShortDebugString());
  Promise(!chunk.has_buffer(), "a chunk in memory is refused", chunk.ShortDebugString());
  std::string data(parsed.payload_bytes, '\0');
  size_t in_slices = 0;
  for (const grpc::Slice& slice : parsed.payload) in_slices += slice.size();
  Promise(in_slices == parsed.payload_bytes && in_slices <= kMaxChunkBytes,
          "the payload has the bytes that it says, within the limit", std::to_string(in_slices));
  Promise(parsed.CopyTo(data.data()) == Crc32c(0, chunk.data().data(), chunk.data().size()) &&
              data == chunk.data(),
          "the payload and its checksum are those of protobuf's", chunk.ShortDebugString());
}

// parse(encode(x)) == x, and the bytes are protobuf's own.
void CheckRoundTrip(v1::TensorChunk chunk, int outer_field) {
  chunk.DiscardUnknownFields();
  const ChunkHeader header = {chunk.tensor_index(), chunk.layer(), chunk.byte_offset(),
                              chunk.crc32c(), chunk.last()};
  std::vector<grpc::Slice> payload;
  if (!chunk.data().empty()) payload.emplace_back(chunk.data().data(), chunk.data().size());
  const grpc::ByteBuffer encoded = EncodeChunk(header, payload, outer_field);
  std::string expected = chunk.SerializeAsString();
  if (outer_field != kBareChunk) {
    v1::AttendRequest request;
    *request.mutable_chunk() = chunk;
    expected = request.SerializeAsString();
    Promise(FirstField(encoded) == outer_field, "the first field tells a chunk");
  }
  Promise(Bytes(encoded) == expected, "a chunk is encoded as by protobuf");
  const auto again = ParseChunk(encoded, outer_field);
  Promise(again.ok(), "what is encoded can be read", again.status().ToString());
  CheckSame(*again, chunk);
}

}  // namespace
}  // namespace prefilld

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace prefilld;              // NOLINT
  FuzzedDataProvider input(data, size);  // numbers are taken from the end: the message comes first
  const int outer_field = input.ConsumeBool() ? kAttendChunk : kBareChunk;
  std::vector<size_t> sizes(input.ConsumeIntegralInRange<size_t>(0, 4));
  for (size_t& slice : sizes) slice = input.ConsumeIntegralInRange<size_t>(0, 40);
  const std::string bytes = input.ConsumeRemainingBytesAsString();

  v1::TensorChunk chunk;
  const bool readable = ReadByProtobuf(bytes, outer_field, &chunk);
  const auto parsed = ParseChunk(InSlices(bytes, sizes), outer_field);
  if (parsed.ok()) {
    Promise(readable, "protobuf can read what we can");
    CheckSame(*parsed, chunk);
    if (outer_field == kBareChunk) {
      const auto more = ParseChunk(InSlices(bytes + "\x40\x01\x40\x02", sizes), outer_field);
      Promise(more.ok(), "fields of later versions are passed over", more.status().ToString());
    }
  } else {
    Promise(absl::IsInvalidArgument(parsed.status()), "a refusal is INVALID_ARGUMENT",
            parsed.status().ToString());
  }
  if (readable && !chunk.has_buffer()) CheckRoundTrip(chunk, outer_field);
  return 0;
}

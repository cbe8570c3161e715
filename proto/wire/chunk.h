// TensorChunk on the wire: encoded and parsed by hand, so that the bulk bytes of a tensor never
// pass through a protobuf string. A sent chunk is one small slice (every field but the bytes) in
// front of the payload's own slices; a received one is read in place and copied once, to where it
// belongs.
//
// The bytes are those of prefilld.v1.TensorChunk (proto/prefilld/v1/tensor.proto), alone as PullKv
// streams it, or as the field `chunk` of AttendRequest and AttendResponse.
//
// Functions only, no state: safe on any thread; none blocks.
#pragma once

#include <grpcpp/impl/codegen/proto_utils.h>
#include <grpcpp/support/byte_buffer.h>
#include <grpcpp/support/slice.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace prefilld {

// The most payload bytes one chunk may carry.
inline constexpr size_t kMaxChunkBytes = size_t{1} << 20;

// A receive limit (SetMaxReceiveMessageSize) that fits every chunk and every other message but a
// Prefill of some hundred thousand tokens.
inline constexpr int kMaxMessageBytes = static_cast<int>(kMaxChunkBytes) + (64 << 10);

// `outer_field`: where the chunk lies in its message.
inline constexpr int kBareChunk = 0;      // the message is a TensorChunk (PullKv)
inline constexpr int kAttendChunk = 2;    // AttendRequest.chunk, AttendResponse.chunk
inline constexpr int kAttendWritten = 3;  // AttendRequest.written: instead of chunks

// CRC32C (Castagnoli) of `size` bytes that follow bytes whose CRC32C is `crc`; 0 to start.
uint32_t Crc32c(uint32_t crc, const void* data, size_t size);

// A slice over `data` that holds `owner` for as long as gRPC needs the bytes, which may be longer
// than the call that sends them (a cancelled call leaves slices behind in the transport). Without
// an owner the bytes are copied.
grpc::Slice SliceOf(const void* data, size_t size, std::shared_ptr<const void> owner);

// Every field of TensorChunk but its bytes.
struct ChunkHeader {
  uint32_t tensor_index = 0;
  uint32_t layer = 0;
  uint64_t byte_offset = 0;  // bytes of the tensor before this chunk
  uint32_t crc32c = 0;       // of the payload
  bool last = false;         // the last chunk of its tensor
};

// The message as protobuf would serialise it. The payload's slices are referenced, not copied.
grpc::ByteBuffer EncodeChunk(const ChunkHeader& header, const std::vector<grpc::Slice>& payload,
                             int outer_field);

// A received chunk. The payload still lies in the received buffers, which it keeps alive.
struct ParsedChunk {
  ChunkHeader header;
  std::vector<grpc::Slice> payload;
  size_t payload_bytes = 0;  // sum of the slices; at most kMaxChunkBytes

  // Copies the payload to `dst` [payload_bytes] and returns its CRC32C, for the caller to compare
  // with header.crc32c.
  uint32_t CopyTo(void* dst) const;
};

// Reads a chunk from bytes that may be hostile: any order of fields and unknown fields are fine;
// INVALID_ARGUMENT for bytes that are no message, truncated or repeated fields, wrong wire types,
// numbers out of range, a payload over kMaxChunkBytes, a chunk that names a buffer instead (those
// of posix_shm are not bulk), and anything beside the chunk in its message. Does not compare the
// checksum.
absl::StatusOr<ParsedChunk> ParseChunk(const grpc::ByteBuffer& buffer, int outer_field);

// The number of the first field in a message: tells a chunk (kAttendChunk) from the other members
// of its oneof, which protobuf parses. 0 when the message is empty or starts with no valid tag.
int FirstField(const grpc::ByteBuffer& buffer);

// A message that is not bulk, to and from the raw buffers of the same stream.
template <typename Message>
grpc::ByteBuffer EncodeMessage(const Message& message) {
  grpc::ByteBuffer buffer;
  bool owned = false;
  grpc::SerializationTraits<Message>::Serialize(message, &buffer, &owned);
  return buffer;
}

// False when the bytes are no such message. Leaves `buffer` empty.
template <typename Message>
bool ParseMessage(grpc::ByteBuffer* buffer, Message* message) {
  return grpc::SerializationTraits<Message>::Deserialize(buffer, message).ok();
}

}  // namespace prefilld

#include "proto/wire/chunk.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "prefilld/v1/prefill_service.pb.h"
#include "prefilld/v1/tensor.pb.h"

namespace prefilld {
namespace {

// The bytes as a message whose every slice has `piece` bytes (0: one slice).
grpc::ByteBuffer BufferOf(const std::string& bytes, size_t piece = 0) {
  if (piece == 0) piece = bytes.size() + 1;
  std::vector<grpc::Slice> slices;
  for (size_t i = 0; i < bytes.size(); i += piece) {
    slices.emplace_back(bytes.data() + i, std::min(piece, bytes.size() - i));
    if (i % 3 == 0) slices.emplace_back();  // the transport may hand out empty slices too
  }
  return grpc::ByteBuffer(slices.data(), slices.size());
}

std::string BytesOf(const grpc::ByteBuffer& buffer) {
  std::vector<grpc::Slice> slices;
  EXPECT_TRUE(buffer.Dump(&slices).ok());
  std::string bytes;
  for (const grpc::Slice& slice : slices) {
    bytes.append(reinterpret_cast<const char*>(slice.begin()), slice.size());
  }
  return bytes;
}

std::string PayloadOf(const ParsedChunk& chunk) {
  std::string payload(chunk.payload_bytes, '\0');
  const uint32_t crc = chunk.CopyTo(payload.data());
  EXPECT_EQ(crc, Crc32c(0, payload.data(), payload.size()));
  return payload;
}

std::string RandomBytes(std::mt19937& rng, size_t size) {
  std::string bytes(size, '\0');
  for (char& byte : bytes) byte = static_cast<char>(rng());
  return bytes;
}

v1::TensorChunk RandomChunk(std::mt19937& rng) {
  // Values at the edges of their varints, and default values, which protobuf leaves out.
  const uint64_t edges[] = {0, 1, 127, 128, 16383, 16384, std::numeric_limits<uint32_t>::max()};
  v1::TensorChunk chunk;
  chunk.set_tensor_index(static_cast<uint32_t>(edges[rng() % 7]));
  chunk.set_layer(static_cast<uint32_t>(edges[rng() % 7]));
  chunk.set_byte_offset(edges[rng() % 7] << (rng() % 32));
  chunk.set_crc32c(rng() % 4 == 0 ? 0 : static_cast<uint32_t>(rng()));
  chunk.set_last(rng() % 2 == 0);
  const size_t sizes[] = {0, 1, 127, 128, 4000};
  chunk.set_data(RandomBytes(rng, sizes[rng() % 5]));
  return chunk;
}

ChunkHeader HeaderOf(const v1::TensorChunk& chunk) {
  return {.tensor_index = chunk.tensor_index(),
          .layer = chunk.layer(),
          .byte_offset = chunk.byte_offset(),
          .crc32c = chunk.crc32c(),
          .last = chunk.last()};
}

void ExpectEqual(const ParsedChunk& parsed, const v1::TensorChunk& expected) {
  EXPECT_EQ(parsed.header.tensor_index, expected.tensor_index());
  EXPECT_EQ(parsed.header.layer, expected.layer());
  EXPECT_EQ(parsed.header.byte_offset, expected.byte_offset());
  EXPECT_EQ(parsed.header.crc32c, expected.crc32c());
  EXPECT_EQ(parsed.header.last, expected.last());
  EXPECT_EQ(parsed.payload_bytes, expected.data().size());
  EXPECT_EQ(PayloadOf(parsed), expected.data());
}

TEST(Crc32c, IsCastagnoliAndContinues) {
  EXPECT_EQ(Crc32c(0, "123456789", 9), 0xE3069283u);
  EXPECT_EQ(Crc32c(0, "", 0), 0u);
  for (size_t cut = 0; cut <= 9; ++cut) {
    EXPECT_EQ(Crc32c(Crc32c(0, "123456789", cut), "123456789" + cut, 9 - cut), 0xE3069283u) << cut;
  }
  EXPECT_EQ(Crc32c(0, std::string(32, '\0').data(), 32), 0x8A9136AAu);    // RFC 3720, B.4
  EXPECT_EQ(Crc32c(0, std::string(32, '\xff').data(), 32), 0x62A8AB43u);  // RFC 3720, B.4
}

TEST(EncodeChunk, WritesWhatProtobufWrites) {
  std::mt19937 rng(1);
  for (int i = 0; i < 300; ++i) {
    const v1::TensorChunk chunk = RandomChunk(rng);
    const size_t cut = chunk.data().size() / 3;
    const std::vector<grpc::Slice> payload = {
        grpc::Slice(chunk.data().data(), cut),
        grpc::Slice(chunk.data().data() + cut, chunk.data().size() - cut)};
    EXPECT_EQ(BytesOf(EncodeChunk(HeaderOf(chunk), payload, kBareChunk)),
              chunk.SerializeAsString());
    v1::AttendRequest request;
    *request.mutable_chunk() = chunk;
    EXPECT_EQ(BytesOf(EncodeChunk(HeaderOf(chunk), payload, kAttendChunk)),
              request.SerializeAsString());
  }
}

TEST(EncodeChunk, ReferencesThePayload) {
  const auto owner = std::make_shared<std::string>(kMaxChunkBytes, 'x');
  {
    const grpc::Slice slice = SliceOf(owner->data(), owner->size(), owner);
    EXPECT_EQ(owner.use_count(), 2);
    const grpc::ByteBuffer message = EncodeChunk({.last = true}, {slice}, kBareChunk);
    std::vector<grpc::Slice> slices;
    ASSERT_TRUE(message.Dump(&slices).ok());
    ASSERT_EQ(slices.size(), 2u);
    EXPECT_EQ(reinterpret_cast<const char*>(slices[1].begin()), owner->data());
  }
  EXPECT_EQ(owner.use_count(), 1) << "the last slice lets go of the owner";
}

TEST(SliceOf, CopiesBytesNobodyOwns) {
  std::string bytes(100, 'x');
  const grpc::Slice slice = SliceOf(bytes.data(), bytes.size(), nullptr);
  bytes.assign(100, 'y');
  EXPECT_EQ(std::string(reinterpret_cast<const char*>(slice.begin()), slice.size()),
            std::string(100, 'x'));
}

TEST(ParseChunk, ReadsWhatProtobufWritesHoweverItIsSliced) {
  std::mt19937 rng(2);
  for (int i = 0; i < 300; ++i) {
    v1::AttendResponse response;
    *response.mutable_chunk() = RandomChunk(rng);
    for (size_t piece : {0, 1, 7, 1000}) {
      const auto bare =
          ParseChunk(BufferOf(response.chunk().SerializeAsString(), piece), kBareChunk);
      ASSERT_TRUE(bare.ok()) << bare.status();
      ExpectEqual(*bare, response.chunk());
      const auto inner = ParseChunk(BufferOf(response.SerializeAsString(), piece), kAttendChunk);
      ASSERT_TRUE(inner.ok()) << inner.status();
      ExpectEqual(*inner, response.chunk());
    }
  }
}

TEST(ParseChunk, AcceptsAnyOrderOfFieldsAndUnknownOnes) {
  // data, unknown varint 8 (twice), last, unknown bytes 100 (twice), unknown fixed64 7,
  // tensor_index.
  const std::string bytes =
      std::string("\x7a\x03xyz\x40\x05\x40\x06\x28\x01\xa2\x06\x01u\xa2\x06\x01u\x39", 20) +
      "12345678" + "\x08\x02";
  const auto chunk = ParseChunk(BufferOf(bytes, 1), kBareChunk);
  ASSERT_TRUE(chunk.ok()) << chunk.status();
  EXPECT_EQ(PayloadOf(*chunk), "xyz");
  EXPECT_TRUE(chunk->header.last);
  EXPECT_EQ(chunk->header.tensor_index, 2u);
}

TEST(ParseChunk, RefusesMalformedBytes) {
  const std::string u32_overflow("\x08\x80\x80\x80\x80\x10", 6);  // 2^32 in tensor_index
  const std::pair<const char*, std::string> cases[] = {
      {"tag 0", std::string("\x00\x01", 2)},
      {"field number 0", std::string("\x02\x00", 2)},
      {"a tag and nothing", "\x08"},
      {"an open varint", "\x18\x80"},
      {"a varint of 11 bytes", absl::StrCat("\x18", std::string(10, '\x80'), "\x01")},
      {"a varint over 64 bits", absl::StrCat("\x18", std::string(9, '\xff'), "\x02")},
      {"a uint32 over 32 bits", u32_overflow},
      {"a truncated fixed32", std::string("\x25\x01\x02\x03", 4)},
      {"fixed32 where a varint belongs", std::string("\x0d\x01\x02\x03\x04", 5)},
      {"a varint where fixed32 belongs", "\x20\x01"},
      {"a varint where bytes belong", "\x78\x01"},
      {"bytes where a varint belongs", "\x0a\x01x"},
      {"data longer than the message", "\x7a\x05xyz"},
      {"data of 2^63 bytes", absl::StrCat("\x7a", std::string(9, '\x80'), "\x01")},
      {"an unknown field longer than the message", "\x32\x05xyz"},
      {"a group", "\x33\x34"},
      {"wire type 6", "\x36"},
      {"a repeated number", "\x08\x01\x08\x01"},
      {"repeated data", "\x7a\x01x\x7a\x01y"},
      {"a tag over 32 bits", "\xff\xff\xff\xff\x7f\x01"},
      {"a length of 6 bytes", std::string("\x32\x80\x80\x80\x80\x80\x00", 7)},
      {"a tag of 6 bytes", std::string("\x98\x80\xfe\x80\x80\x00\x01", 7)},
  };
  for (const auto& [what, bytes] : cases) {
    for (size_t piece : {0, 1}) {
      const auto chunk = ParseChunk(BufferOf(bytes, piece), kBareChunk);
      EXPECT_EQ(chunk.status().code(), absl::StatusCode::kInvalidArgument) << what;
    }
    const std::string outer =
        absl::StrCat("\x12", std::string(1, static_cast<char>(bytes.size())), bytes);
    EXPECT_EQ(ParseChunk(BufferOf(outer), kAttendChunk).status().code(),
              absl::StatusCode::kInvalidArgument)
        << what;
  }
}

TEST(ParseChunk, RefusesEveryTruncation) {
  v1::AttendRequest request;
  std::mt19937 rng(3);
  *request.mutable_chunk() = RandomChunk(rng);
  request.mutable_chunk()->set_data("0123456789");
  const std::string bytes = request.SerializeAsString();
  for (size_t size = 0; size < bytes.size(); ++size) {
    EXPECT_FALSE(ParseChunk(BufferOf(bytes.substr(0, size)), kAttendChunk).ok()) << size;
  }
  EXPECT_TRUE(ParseChunk(BufferOf(bytes), kAttendChunk).ok());
}

TEST(ParseChunk, RefusesAnythingBesideTheChunk) {
  v1::AttendRequest request;
  request.mutable_chunk()->set_data("x");
  const std::string bytes = request.SerializeAsString();
  EXPECT_FALSE(ParseChunk(BufferOf(bytes + bytes), kAttendChunk).ok());
  request.mutable_header()->set_priority(1);
  EXPECT_FALSE(ParseChunk(BufferOf(bytes + request.SerializeAsString()), kAttendChunk).ok());
  EXPECT_FALSE(ParseChunk(BufferOf(request.SerializeAsString()), kAttendChunk).ok());
}

TEST(ParseChunk, RefusesAChunkThatNamesABuffer) {
  v1::TensorChunk chunk;
  chunk.set_data("x");
  chunk.mutable_buffer();
  EXPECT_EQ(ParseChunk(BufferOf(chunk.SerializeAsString()), kBareChunk).status().code(),
            absl::StatusCode::kInvalidArgument);
}

TEST(ParseChunk, LimitsThePayload) {
  v1::TensorChunk chunk;
  chunk.set_data(std::string(kMaxChunkBytes, 'x'));
  EXPECT_TRUE(ParseChunk(BufferOf(chunk.SerializeAsString()), kBareChunk).ok());
  chunk.mutable_data()->push_back('x');
  EXPECT_EQ(ParseChunk(BufferOf(chunk.SerializeAsString()), kBareChunk).status().code(),
            absl::StatusCode::kInvalidArgument);
}

TEST(ParseChunk, SurvivesRandomBytesAndAgreesWithProtobuf) {
  std::mt19937 rng(4);
  int accepted = 0;
  for (int i = 0; i < 20000; ++i) {
    std::string bytes = RandomChunk(rng).SerializeAsString();
    if (bytes.size() > 200) bytes.resize(200);
    for (int flips = rng() % 4; flips > 0 && !bytes.empty(); --flips) {
      bytes[rng() % std::min<size_t>(bytes.size(), 40)] = static_cast<char>(rng());
    }
    const auto chunk = ParseChunk(BufferOf(bytes, rng() % 9), kBareChunk);
    if (!chunk.ok()) continue;
    ++accepted;
    v1::TensorChunk reference;
    ASSERT_TRUE(reference.ParseFromString(bytes)) << "accepted what protobuf refuses";
    ExpectEqual(*chunk, reference);
  }
  EXPECT_GT(accepted, 1000);
}

TEST(FirstField, TellsChunksFromTheOtherParts) {
  v1::AttendResponse response;
  EXPECT_EQ(FirstField(EncodeMessage(response)), 0);
  EXPECT_EQ(FirstField(BufferOf("\xff")), 0);
  response.mutable_admission();
  EXPECT_EQ(FirstField(EncodeMessage(response)), v1::AttendResponse::kAdmission);
  response.mutable_chunk();
  EXPECT_EQ(FirstField(EncodeMessage(response)), kAttendChunk);
  EXPECT_EQ(kAttendChunk, v1::AttendResponse::kChunkFieldNumber);
  EXPECT_EQ(kAttendChunk, v1::AttendRequest::kChunkFieldNumber);
  EXPECT_EQ(kAttendWritten, v1::AttendRequest::kWrittenFieldNumber);
  response.mutable_summary()->set_tokens(7);
  grpc::ByteBuffer buffer = EncodeMessage(response);
  EXPECT_EQ(FirstField(buffer), v1::AttendResponse::kSummary);
  v1::AttendResponse parsed;
  ASSERT_TRUE(ParseMessage(&buffer, &parsed));
  EXPECT_EQ(parsed.summary().tokens(), 7u);
}

}  // namespace
}  // namespace prefilld

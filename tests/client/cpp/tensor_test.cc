#include "client/cpp/tensor.h"

#include <gtest/gtest.h>

#include <limits>
#include <string>
#include <vector>

namespace prefilld::client {
namespace {

v1::TensorSpec Spec(v1::DataType type, std::vector<int64_t> shape) {
  v1::TensorSpec spec;
  spec.set_name("t");
  spec.set_data_type(type);
  spec.mutable_shape()->Add(shape.begin(), shape.end());
  return spec;
}

ParsedChunk Chunk(uint64_t offset, const std::string& bytes, bool last) {
  return {.header = {.byte_offset = offset,
                     .crc32c = Crc32c(0, bytes.data(), bytes.size()),
                     .last = last},
          .payload = {grpc::Slice(bytes)},
          .payload_bytes = bytes.size()};
}

TEST(TensorBytes, MultipliesWithoutOverflow) {
  EXPECT_EQ(*TensorBytes(Spec(v1::DATA_TYPE_BF16, {3, 5, 7})), 210u);
  EXPECT_EQ(*TensorBytes(Spec(v1::DATA_TYPE_U8, {int64_t{1} << 62})), uint64_t{1} << 62);
  constexpr int64_t kMax = std::numeric_limits<int64_t>::max();
  const std::vector<int64_t> bad_shapes[] = {
      {}, {0}, {-1}, {1, 1, 1, 1, 1}, {kMax}, {int64_t{1} << 61, 4}, {kMax, kMax, kMax, kMax}};
  for (const auto& shape : bad_shapes) {
    EXPECT_FALSE(TensorBytes(Spec(v1::DATA_TYPE_F32, shape)).ok())
        << Describe(Spec(v1::DATA_TYPE_F32, shape));
  }
  EXPECT_FALSE(TensorBytes(Spec(v1::DATA_TYPE_UNSPECIFIED, {1})).ok());
  EXPECT_FALSE(TensorBytes(Spec(static_cast<v1::DataType>(99), {1})).ok());
}

TEST(TensorReceiver, PutsChunksInTheirPlace) {
  std::string data(6, '.');
  TensorReceiver receiver(data.data(), data.size());
  EXPECT_TRUE(receiver.Add(Chunk(0, "abcd", false)).ok());
  EXPECT_FALSE(receiver.complete());
  EXPECT_EQ(receiver.received(), 4u);
  EXPECT_TRUE(receiver.Add(Chunk(4, "ef", true)).ok());
  EXPECT_TRUE(receiver.complete());
  EXPECT_EQ(data, "abcdef");
}

TEST(TensorReceiver, RefusesWhatDoesNotContinueTheTensor) {
  ParsedChunk damaged = Chunk(2, "cd", false);
  damaged.header.crc32c ^= 1;
  const std::pair<const char*, ParsedChunk> cases[] = {
      {"twice", Chunk(0, "ab", false)},      {"a gap", Chunk(3, "d", false)},
      {"too long", Chunk(2, "cdefg", true)}, {"an early end", Chunk(2, "cd", true)},
      {"no end", Chunk(2, "cdef", false)},   {"a wrong checksum", damaged}};
  for (const auto& [what, chunk] : cases) {
    std::string data(7, '.');
    TensorReceiver receiver(data.data(), 6);
    ASSERT_TRUE(receiver.Add(Chunk(0, "ab", false)).ok());
    EXPECT_EQ(receiver.Add(chunk).code(), absl::StatusCode::kDataLoss) << what;
    EXPECT_EQ(receiver.received(), 2u) << what;
    EXPECT_EQ(data.back(), '.') << what;
  }
}

}  // namespace
}  // namespace prefilld::client

#include "server/rpc/upload.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

namespace prefilld {
namespace {

class UploadTest : public testing::Test {
 protected:
  static ParsedChunk Chunk(uint32_t tensor, uint64_t offset, const std::string& data, bool last) {
    ParsedChunk chunk;
    chunk.header = {.tensor_index = tensor,
                    .byte_offset = offset,
                    .crc32c = Crc32c(0, data.data(), data.size()),
                    .last = last};
    if (!data.empty()) chunk.payload = {grpc::Slice(data)};
    chunk.payload_bytes = data.size();
    return chunk;
  }
  absl::StatusCode Take(const ParsedChunk& chunk) { return upload_.Take(chunk).code(); }

  std::string a_ = std::string(5, '.'), b_ = std::string(3, '.');
  Upload upload_{{{a_.data(), 5}, {b_.data(), 3}}};
};

constexpr auto kOk = absl::StatusCode::kOk;
constexpr auto kLoss = absl::StatusCode::kDataLoss;

TEST_F(UploadTest, PutsEveryByteInItsPlace) {
  EXPECT_EQ(upload_.total_bytes(), 8u);
  EXPECT_EQ(Take(Chunk(0, 0, "ab", false)), kOk);
  EXPECT_EQ(Take(Chunk(0, 2, "cde", true)), kOk);
  EXPECT_EQ(upload_.received_bytes(), 5u);
  EXPECT_FALSE(upload_.complete());
  EXPECT_EQ(Take(Chunk(1, 0, "xyz", true)), kOk);
  EXPECT_TRUE(upload_.complete());
  EXPECT_EQ(a_, "abcde");
  EXPECT_EQ(b_, "xyz");
}

TEST_F(UploadTest, RefusesWhatIsOutOfOrderTwiceOrMissing) {
  EXPECT_EQ(Take(Chunk(1, 0, "xyz", true)), kLoss) << "another tensor first";
  EXPECT_EQ(Take(Chunk(0, 2, "cde", true)), kLoss) << "a gap";
  EXPECT_EQ(Take(Chunk(0, 0, "ab", false)), kOk);
  EXPECT_EQ(Take(Chunk(0, 0, "ab", false)), kLoss) << "twice";
  EXPECT_EQ(Take(Chunk(2, 0, "ab", false)), kLoss) << "a tensor nobody announced";
}

TEST_F(UploadTest, RefusesWrongLengths) {
  EXPECT_EQ(Take(Chunk(0, 0, "abcdef", true)), kLoss) << "longer than the tensor";
  EXPECT_EQ(Take(Chunk(0, 0, "ab", true)), kLoss) << "last too early";
  EXPECT_EQ(Take(Chunk(0, 0, "abcde", false)), kLoss) << "complete, but not last";
  EXPECT_EQ(Take(Chunk(0, 0, "", false)), kLoss) << "no progress";
}

TEST_F(UploadTest, RefusesABadChecksum) {
  ParsedChunk chunk = Chunk(0, 0, "ab", false);
  chunk.header.crc32c ^= 1;
  EXPECT_EQ(Take(chunk), kLoss);
}

TEST_F(UploadTest, RefusesAnythingAfterTheEnd) {
  EXPECT_EQ(Take(Chunk(0, 0, "abcde", true)), kOk);
  EXPECT_EQ(Take(Chunk(1, 0, "xyz", true)), kOk);
  EXPECT_EQ(Take(Chunk(2, 0, "x", true)), kLoss);
  EXPECT_EQ(Take(Chunk(1, 0, "xyz", true)), kLoss);
}

TEST_F(UploadTest, WrittenIsAllOfItAndOnce) {
  EXPECT_TRUE(upload_.Written().ok());
  EXPECT_TRUE(upload_.complete());
  EXPECT_EQ(upload_.received_bytes(), upload_.total_bytes());
  EXPECT_EQ(upload_.Written().code(), kLoss);
}

}  // namespace
}  // namespace prefilld

#include "kernels/validate.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>

namespace prefilld {
namespace {

constexpr DType kDTypes[] = {DType::kBF16, DType::kF16};
constexpr int kHeadDims[] = {64, 128};
constexpr Method kServed[] = {Method::kFlexPrefill, Method::kJoint};
constexpr KernelTable kTable{
    .backend = "some", .dtypes = kDTypes, .head_dims = kHeadDims, .methods = kServed};

AttentionShape Shape(int64_t sq, int64_t sk) { return {DType::kBF16, 4, 2, 64, {0, sq}, {0, sk}}; }

void ExpectStatus(const absl::Status& status, absl::StatusCode code, const std::string& text) {
  EXPECT_EQ(status.code(), code) << status;
  EXPECT_THAT(std::string(status.message()), testing::HasSubstr(text));
}

TEST(ValidateAttention, NamesTheDTypeAndTheTable) {
  AttentionShape shape = Shape(10, 10);
  shape.dtype = DType::kF32;
  ExpectStatus(ValidateAttention(shape, {}, kTable), absl::StatusCode::kUnimplemented,
               "dtype F32 not supported by some (BF16, F16)");
}

TEST(ValidateAttention, NamesTheHeadDimAndTheTable) {
  AttentionShape shape = Shape(10, 10);
  shape.head_dim = 96;
  ExpectStatus(ValidateAttention(shape, {}, kTable), absl::StatusCode::kUnimplemented,
               "head_dim 96 not supported by some (64, 128)");
}

TEST(ValidateAttention, NamesTheMethodAndTheTable) {
  ExpectStatus(ValidateAttention(Shape(10, 10), {.method = Method::kDense}, kTable),
               absl::StatusCode::kUnimplemented,
               "method dense not supported by some (flexprefill, joint)");
}

TEST(ValidateAttention, ForFewerQueriesThanKeysNamesTheMethodsThatTakeThem) {
  EXPECT_TRUE(ValidateAttention(Shape(10, 10), {.method = Method::kFlexPrefill}, kTable).ok());
  ExpectStatus(ValidateAttention(Shape(9, 10), {.method = Method::kFlexPrefill}, kTable),
               absl::StatusCode::kUnimplemented,
               "method flexprefill not supported by some for fewer queries than keys (joint)");
  EXPECT_TRUE(ValidateAttention(Shape(9, 10), {.method = Method::kJoint}, kTable).ok());
}

TEST(ValidateAttention, AnIndexNames65536Blocks) {
  const int64_t most = 65536 * 64;
  EXPECT_TRUE(ValidateAttention(Shape(1, most), {.block_size = 64}, kTable).ok());
  ExpectStatus(ValidateAttention(Shape(1, most + 1), {.block_size = 64}, kTable),
               absl::StatusCode::kUnimplemented, "sequence 0 has 4194305 keys");
  EXPECT_TRUE(ValidateAttention(Shape(1, most + 1), {.block_size = 128}, kTable).ok());
}

// What is wrong for every backend is said before what one has no kernel for.
TEST(ValidateAttention, AnInvalidRequestIsInvalidEverywhere) {
  AttentionShape shape = Shape(10, 10);
  shape.dtype = DType::kF32;
  shape.kv_heads = 3;
  ExpectStatus(ValidateAttention(shape, {}, kTable), absl::StatusCode::kInvalidArgument,
               "4 query heads over 3 kv heads");
  ExpectStatus(ValidateAttention(Shape(11, 10), {}, kTable), absl::StatusCode::kInvalidArgument,
               "1 <= queries <= keys");
  ExpectStatus(ValidateAttention(Shape(10, 10), {.block_size = 32}, kTable),
               absl::StatusCode::kInvalidArgument, "block_size 32 is not one of 64, 128");
  ExpectStatus(ValidateAttention(Shape(10, 10), {.gamma = 1}, kTable),
               absl::StatusCode::kInvalidArgument, "gamma 1");
}

TEST(ValidatePages, NamesWhatIsWrong) {
  const int32_t page = 0;
  EXPECT_TRUE(ValidatePages({}).ok());
  for (int tokens : {16, 64, 4096}) EXPECT_TRUE(ValidatePages({&page, &page, 1, tokens}).ok());
  for (int tokens : {0, -16, 8, 48, 8192}) {
    ExpectStatus(ValidatePages({&page, &page, 1, tokens}), absl::StatusCode::kInvalidArgument,
                 "page_tokens " + std::to_string(tokens));
  }
  ExpectStatus(ValidatePages({&page, nullptr, 1, 64}), absl::StatusCode::kInvalidArgument,
               "pages is null");
  ExpectStatus(ValidatePages({&page, &page, 0, 64}), absl::StatusCode::kInvalidArgument,
               "arena_pages 0 is not positive");
}

}  // namespace
}  // namespace prefilld

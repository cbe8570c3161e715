#include "server/rpc/messages.h"

#include <gtest/gtest.h>

#include <string>

namespace prefilld {
namespace {

JobReport TwoHeads() {
  JobReport report;
  report.layers = 1;
  report.heads = 2;
  report.entries = {{Pattern::kJoint, DenseReason::kNone, 0.25f, 0.5f, 0.125f},
                    {Pattern::kDense, DenseReason::kShortPrompt, 1.0f, 1.0f, 1.0f}};
  return report;
}

uint16_t U16(const std::string& bytes, size_t i) {
  return static_cast<uint16_t>(static_cast<uint8_t>(bytes[2 * i]) |
                               static_cast<uint8_t>(bytes[2 * i + 1]) << 8);
}

TEST(SparsityReport, PacksRatiosAndCountsFallbacks) {
  JobReport report = TwoHeads();
  report.captured_mass_measured = true;
  const v1::SparsityReport proto = ProtoOf(report);
  EXPECT_EQ(proto.layers(), 1u);
  EXPECT_EQ(proto.heads(), 2u);
  EXPECT_DOUBLE_EQ(proto.mean_density(), 0.625);
  ASSERT_EQ(proto.density_u16().size(), 4u);
  EXPECT_EQ(U16(proto.density_u16(), 0), 16384);
  EXPECT_EQ(U16(proto.density_u16(), 1), 65535);
  EXPECT_EQ(proto.pattern_u8(), std::string("\x03\x00", 2));
  EXPECT_EQ(U16(proto.captured_mass_u16(), 0), 32768);
  EXPECT_EQ(U16(proto.captured_mass_min_u16(), 0), 8192);
  EXPECT_EQ(proto.dense_fallback_heads(), 1u);
  ASSERT_EQ(proto.reasons_size(), 1);
  EXPECT_EQ(proto.reasons(0), "short_prompt");
}

TEST(SparsityReport, LeavesOutWhatWasNotMeasured) {
  const v1::SparsityReport proto = ProtoOf(TwoHeads());
  EXPECT_TRUE(proto.captured_mass_u16().empty());
  EXPECT_TRUE(proto.captured_mass_min_u16().empty());
  EXPECT_EQ(proto.mean_captured_mass(), 0);
  EXPECT_FALSE(proto.captured_mass_measured());
}

TEST(Duration, SplitsIntoSecondsAndNanos) {
  const auto proto = ProtoOf(absl::Milliseconds(1500));
  EXPECT_EQ(proto.seconds(), 1);
  EXPECT_EQ(proto.nanos(), 500'000'000);
}

TEST(DType, GoesThereAndBack) {
  for (DType dtype : {DType::kF32, DType::kBF16, DType::kF16}) {
    EXPECT_EQ(DTypeOf(ProtoOf(dtype)), dtype);
  }
  EXPECT_FALSE(DTypeOf(v1::DATA_TYPE_I32));
  EXPECT_FALSE(DTypeOf(static_cast<v1::DataType>(1234)));
  EXPECT_EQ(DataTypeName(v1::DATA_TYPE_BF16), "BF16");
  EXPECT_EQ(DataTypeName(1234), "1234");
}

}  // namespace
}  // namespace prefilld

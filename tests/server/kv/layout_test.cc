#include "server/kv/layout.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>

#include "tests/server/kv/compute_tile.h"

namespace prefilld {
namespace {

// A committed layer whose element (head, token, d) of K and V is known.
class LayoutTest : public testing::TestWithParam<DType> {
 protected:
  static constexpr int kHeads = 3, kTokens = 300, kDim = 64;

  void SetUp() override {
    geometry_ = {
        .layers = 1, .kv_heads = kHeads, .head_dim = kDim, .dtype = GetParam(), .tokens = kTokens};
    backend_ = *CreateBackend("cpu", 1);
    pool_ = *BlockPool::Create(backend_->device(), 8 * geometry_.block_bytes(),
                               geometry_.block_bytes());
    cache_ = *KvCache::Create(*pool_, geometry_, true);
    const size_t size = SizeOf(GetParam());
    std::mt19937 rng(1);
    for (bool value : {false, true}) {
      std::string& plain = value ? v_ : k_;
      for (int g = 0; g < kHeads; ++g) {
        for (int t = 0; t < kTokens; ++t) {
          std::byte* row = ComputeTile(*cache_, 0, t / kKvBlockTokens, g, value) +
                           static_cast<size_t>(t % kKvBlockTokens) * kDim * size;
          for (size_t i = 0; i < kDim * size; ++i) row[i] = static_cast<std::byte>(rng());
          plain.append(reinterpret_cast<const char*>(row), kDim * size);
        }
      }
    }
    cache_->Commit(0);
    (*cache_->Open([] {}))->WhenReady(0, [&](auto pin) { pin_ = *std::move(pin); });
  }

  std::string Spans(bool value, uint64_t offset, size_t bytes) const {
    std::string joined;
    for (const ByteSpan& span : HfSpans(*pin_, {value, offset, bytes})) {
      joined.append(reinterpret_cast<const char*>(span.data), span.bytes);
    }
    return joined;
  }

  KvGeometry geometry_;
  std::unique_ptr<Backend> backend_;
  std::unique_ptr<BlockPool> pool_;
  std::shared_ptr<KvCache> cache_;
  std::shared_ptr<const KvCache::Pin> pin_;
  std::string k_, v_;  // [head, token, d], as written
};

TEST_P(LayoutTest, EveryRangeOfBytesIsThatOfTheTensor) {
  const uint64_t total = HfTensorBytes(geometry_, GetParam());
  ASSERT_EQ(total, k_.size());
  EXPECT_EQ(Spans(false, 0, total), k_);
  EXPECT_EQ(Spans(true, 0, total), v_);
  std::mt19937 rng(2);
  for (int i = 0; i < 200; ++i) {
    const uint64_t offset = rng() % total;
    const size_t bytes = 1 + rng() % (total - offset);
    EXPECT_EQ(Spans(i % 2, offset, bytes), (i % 2 ? v_ : k_).substr(offset, bytes))
        << offset << " + " << bytes;
  }
}

TEST_P(LayoutTest, ConvertsAnyRangeLikeTheWhole) {
  for (DType dtype : {DType::kF32, DType::kBF16, DType::kF16}) {
    const uint64_t total = HfTensorBytes(geometry_, dtype);
    std::string whole(total, '\0');
    ConvertHf(*pin_, dtype, {true, 0, total}, reinterpret_cast<std::byte*>(whole.data()));
    std::mt19937 rng(3);
    for (int i = 0; i < 100; ++i) {
      const uint64_t offset = rng() % total;
      const size_t bytes = 1 + rng() % std::min<uint64_t>(total - offset, 1000);
      std::string part(bytes, '\0');
      ConvertHf(*pin_, dtype, {true, offset, bytes}, reinterpret_cast<std::byte*>(part.data()));
      EXPECT_EQ(part, whole.substr(offset, bytes)) << Name(dtype) << " " << offset;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Dtypes, LayoutTest,
                         testing::Values(DType::kF32, DType::kBF16, DType::kF16),
                         [](const auto& dtype) { return Name(dtype.param); });

// One row of known floats, converted.
class ConversionTest : public testing::Test {
 protected:
  template <typename T>
  std::vector<T> Convert(DType from, DType to, const void* row, size_t row_bytes) {
    const KvGeometry geometry{
        .layers = 1, .kv_heads = 1, .head_dim = 64, .dtype = from, .tokens = 1};
    auto backend = *CreateBackend("cpu", 1);
    auto pool =
        *BlockPool::Create(backend->device(), geometry.block_bytes(), geometry.block_bytes());
    auto cache = *KvCache::Create(*pool, geometry, true);
    std::memcpy(ComputeTile(*cache, 0, 0, 0, false), row, row_bytes);
    cache->Commit(0);
    std::vector<T> out(64);
    (*cache->Open([] {}))->WhenReady(0, [&](auto pin) {
      ConvertHf(**pin, to, {false, 0, out.size() * sizeof(T)},
                reinterpret_cast<std::byte*>(out.data()));
    });
    return out;
  }
};

TEST_F(ConversionTest, RoundsToNearestEven) {
  const float inf = std::numeric_limits<float>::infinity();
  // bf16 has 8 significant bits, fp16 has 11: ties go to the even neighbour.
  const float row[64] = {1.0f,     1.00390625f, 1.01171875f,   -1.00390625f,   1.0039064f,
                         inf,      -inf,        std::nanf(""), 1.00048828125f, 1.00146484375f,
                         65504.0f, 65520.0f,    6e-8f,         0.0f,           -0.0f};
  const auto bf16 = Convert<uint16_t>(DType::kF32, DType::kBF16, row, sizeof(row));
  EXPECT_EQ(bf16[0], 0x3f80);
  EXPECT_EQ(bf16[1], 0x3f80) << "a tie goes down to even";
  EXPECT_EQ(bf16[2], 0x3f82) << "a tie goes up to even";
  EXPECT_EQ(bf16[3], 0xbf80);
  EXPECT_EQ(bf16[4], 0x3f81) << "just above the tie";
  EXPECT_EQ(bf16[5], 0x7f80);
  EXPECT_EQ(bf16[6], 0xff80);
  EXPECT_EQ(bf16[7] & 0x7fc0, 0x7fc0) << "NaN stays NaN";
  const auto f16 = Convert<uint16_t>(DType::kF32, DType::kF16, row, sizeof(row));
  EXPECT_EQ(f16[0], 0x3c00);
  EXPECT_EQ(f16[8], 0x3c00) << "a tie goes down to even";
  EXPECT_EQ(f16[9], 0x3c02) << "a tie goes up to even";
  EXPECT_EQ(f16[10], 0x7bff);
  EXPECT_EQ(f16[11], 0x7c00) << "too large";
  EXPECT_EQ(f16[12], 0x0001) << "subnormal";
  EXPECT_EQ(f16[14], 0x8000);
}

TEST_F(ConversionTest, WidensExactly) {
  uint16_t row[64] = {0x3f81, 0x7f80, 0x8000};
  const auto bf16 = Convert<float>(DType::kBF16, DType::kF32, row, sizeof(row));
  EXPECT_EQ(bf16[0], 1.0078125f);
  EXPECT_EQ(bf16[1], std::numeric_limits<float>::infinity());
  EXPECT_TRUE(std::signbit(bf16[2]));
  row[0] = 0x3c01;
  EXPECT_EQ(Convert<float>(DType::kF16, DType::kF32, row, sizeof(row))[0], 1.0009765625f);
}

}  // namespace
}  // namespace prefilld

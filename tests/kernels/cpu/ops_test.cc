#include "kernels/cpu/ops.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/kernels/cpu/numbers.h"

namespace prefilld::cpu {
namespace {

constexpr float kUntouched = 12345;

// y = x W^T + bias in double.
std::vector<double> Product(const std::vector<float>& x, const std::vector<float>& weight,
                            const std::vector<float>& bias, int64_t in) {
  std::vector<double> y;
  for (size_t row = 0; row < x.size(); row += in) {
    for (size_t out = 0; out * in < weight.size(); ++out) {
      double sum = bias.empty() ? 0 : bias[out];
      for (int64_t i = 0; i < in; ++i) sum += double{x[row + i]} * weight[out * in + i];
      y.push_back(sum);
    }
  }
  return y;
}

// Each row of `width` over its root mean square, times the weight, in double.
std::vector<double> Normed(const std::vector<double>& x, const std::vector<float>& weight,
                           float eps) {
  const size_t width = weight.size();
  std::vector<double> out;
  for (size_t row = 0; row < x.size(); row += width) {
    double squares = 0;
    for (size_t i = 0; i < width; ++i) squares += x[row + i] * x[row + i];
    const double scale = 1 / std::sqrt(squares / static_cast<double>(width) + double{eps});
    for (size_t i = 0; i < width; ++i) out.push_back(x[row + i] * scale * weight[i]);
  }
  return out;
}

class OpsTest : public testing::Test {
 protected:
  std::unique_ptr<Norm> MakeNorm(const std::vector<float>& weight, float eps) {
    return *ops_->Prepare(NormWeights{
        .weight = weight.data(), .width = static_cast<int64_t>(weight.size()), .eps = eps});
  }
  std::unique_ptr<Linear> MakeLinear(const std::vector<LinearPart>& parts, int64_t in) {
    return *ops_->Prepare(LinearWeights{.parts = parts, .in_features = in});
  }

  std::unique_ptr<Ops> ops_ = CreateOps(2);
};

TEST_F(OpsTest, RowsAreF32WhateverTheWeights) {
  for (DType dtype : {DType::kF32, DType::kBF16, DType::kF16}) {
    EXPECT_EQ(ops_->activations(dtype), DType::kF32);
  }
}

TEST_F(OpsTest, EmbedWidensTheRowsOfTheTable) {
  for (DType dtype : {DType::kF32, DType::kBF16, DType::kF16}) {
    for (int64_t width : {3, 64, 577}) {
      std::vector<float> table = Random(50 * width, 3);
      const std::vector<char> bytes = Narrowed(table, dtype);
      const std::vector<uint32_t> ids = {49, 0, 7, 7, 48};
      const auto embedding = *ops_->Prepare(EmbeddingWeights{
          .table = bytes.data(), .dtype = dtype, .vocabulary = 50, .width = width});
      const auto tokens = *ops_->Prepare(BatchTokens{.ids = ids, .positions = {0, 1, 2, 3, 4}});
      std::vector<float> out(ids.size() * width);
      ASSERT_TRUE(ops_->Embed({embedding.get(), tokens.get(), F32Rows(out, width)}, Stream{}).ok());
      for (size_t t = 0; t < ids.size(); ++t) {
        for (int64_t i = 0; i < width; ++i) {
          ASSERT_EQ(out[t * width + i], table[ids[t] * width + i]) << Name(dtype) << " " << t;
        }
      }
    }
  }
}

TEST_F(OpsTest, EmbedOfAnIdBeyondTheTableReadsItsLastRow) {
  std::vector<float> table = {1, 2, 3}, out(3);
  const auto embedding =
      *ops_->Prepare(EmbeddingWeights{.table = table.data(), .vocabulary = 3, .width = 1});
  const auto tokens =
      *ops_->Prepare(BatchTokens{.ids = {3, 0, 0xFFFFFFFF}, .positions = {0, 1, 2}});
  ASSERT_TRUE(ops_->Embed({embedding.get(), tokens.get(), F32Rows(out, 1)}, Stream{}).ok());
  EXPECT_THAT(out, testing::ElementsAre(3, 1, 3));
}

TEST_F(OpsTest, NormalizeTakesStridedRowsAndWidensItsWeight) {
  for (DType dtype : {DType::kF32, DType::kBF16, DType::kF16}) {
    const int64_t width = 65, tokens = 700, stride = 70;
    std::vector<float> weight = Random(width, 2), x = Random(tokens * stride, 1, 3);
    const std::vector<char> bytes = Narrowed(weight, dtype);
    const auto norm = *ops_->Prepare(
        NormWeights{.weight = bytes.data(), .dtype = dtype, .width = width, .eps = 1e-5f});
    std::vector<double> rows;
    for (int64_t t = 0; t < tokens; ++t) {
      rows.insert(rows.end(), &x[t * stride], &x[t * stride] + width);
    }
    std::vector<float> out(tokens * width);
    ASSERT_TRUE(
        ops_->Normalize({norm.get(), F32Rows(x, stride), F32Rows(out, width), tokens}, Stream{})
            .ok());
    EXPECT_TRUE(IsNear(out, Normed(rows, weight, 1e-5f), 1e-6)) << Name(dtype);
  }
}

TEST_F(OpsTest, AddProductAddsToTheResidualAndNormalizesTheSum) {
  const int64_t in = 40, out = 24, tokens = 9;
  std::vector<float> x = Random(tokens * in, 1), weight = Random(out * in, 2);
  const std::vector<float> bias = Random(out, 3), gain = Random(out, 4);
  const std::vector<float> before = Random(tokens * out, 5);
  const auto linear = MakeLinear({{weight.data(), bias.data(), out}}, in);
  const auto norm = MakeNorm(gain, 1e-6f);
  std::vector<double> sum = Product(x, weight, bias, in);
  for (size_t i = 0; i < sum.size(); ++i) sum[i] += before[i];

  std::vector<float> residual = before, normed(before.size(), kUntouched);
  AddProductArgs args{.linear = linear.get(),
                      .x = F32Rows(x, in),
                      .residual = F32Rows(residual, out),
                      .tokens = tokens,
                      .normed = F32Rows(normed, out)};
  ASSERT_TRUE(ops_->AddProduct(args, Stream{}).ok());
  EXPECT_TRUE(IsNear(residual, sum, 2e-6));
  EXPECT_EQ(normed, std::vector<float>(before.size(), kUntouched)) << "no norm was asked for";

  residual = before;
  args.norm = norm.get();
  ASSERT_TRUE(ops_->AddProduct(args, Stream{}).ok());
  EXPECT_TRUE(IsNear(residual, sum, 2e-6));
  EXPECT_TRUE(IsNear(normed, Normed(sum, gain, 1e-6f), 4e-6));
}

TEST_F(OpsTest, GateIsSiluOfTheFirstPartTimesTheSecond) {
  const int64_t in = 33, width = 47, tokens = 600;
  std::vector<float> x = Random(tokens * in, 1);
  const std::vector<float> gate = Random(width * in, 2), up = Random(width * in, 3);
  const std::vector<float> bias = Random(width, 4);
  const auto linear =
      MakeLinear({{gate.data(), bias.data(), width}, {up.data(), nullptr, width}}, in);
  std::vector<double> want = Product(x, gate, bias, in);
  const std::vector<double> factor = Product(x, up, {}, in);
  for (size_t i = 0; i < want.size(); ++i) want[i] *= factor[i] / (1 + std::exp(-want[i]));

  std::vector<char> workspace(linear->WorkspaceBytes(tokens));
  std::vector<float> out(tokens * width);
  ASSERT_TRUE(ops_->Gate({.linear = linear.get(),
                          .x = F32Rows(x, in),
                          .out = F32Rows(out, width),
                          .tokens = tokens,
                          .workspace = workspace.data()},
                         Stream{})
                  .ok());
  EXPECT_TRUE(IsNear(out, want, 4e-6));
}

// --- q, k and v

constexpr int kQHeads = 3, kKvHeads = 2, kHeadDim = 64;
constexpr int64_t kIn = 48, kTokens = 11;

struct QkvCase {
  int rotary_dim = kHeadDim;
  RotaryPairing pairing = RotaryPairing::kHalf;
  bool norms = false;
  float scale = 1;
  bool by_prompt = false;  // frequencies of each prompt, not of the rotary
};

class ProjectQkv : public OpsTest, public testing::WithParamInterface<QkvCase> {
 protected:
  // One of q and k in double: product, norm of each head, rotation.
  std::vector<double> Want(const std::vector<float>& weight, const std::vector<float>& gain) const {
    const QkvCase& c = GetParam();
    std::vector<double> y = Product(x_, weight, {}, kIn);
    if (c.norms) y = Normed(y, gain, 1e-6f);
    const size_t heads = weight.size() / kIn / kHeadDim;
    for (size_t head = 0; head < kTokens * heads; ++head) {
      for (int i = 0; i < c.rotary_dim / 2; ++i) {
        const float position = static_cast<float>(positions_[kFirst + head / heads]);
        const double slower = c.by_prompt ? Slower(kFirst + static_cast<int>(head / heads)) : 1;
        const double angle = position * frequencies_.inverse[i] / slower;
        const bool halves = c.pairing == RotaryPairing::kHalf;
        double& low = y[head * kHeadDim + (halves ? i : 2 * i)];
        double& high = y[head * kHeadDim + (halves ? i + c.rotary_dim / 2 : 2 * i + 1)];
        const double a = low, b = high;
        low = c.scale * (a * std::cos(angle) - b * std::sin(angle));
        high = c.scale * (b * std::cos(angle) + a * std::sin(angle));
      }
    }
    return y;
  }

  // The tokens are of two prompts, where prompts have frequencies of their own.
  static int PromptOf(int token) { return token < kFirst + 4 ? 0 : 1; }
  static float Slower(int token) { return PromptOf(token) == 0 ? 4 : 2; }
  BatchTokens Tokens() const {
    BatchTokens tokens{.ids = std::vector<uint32_t>(positions_.size()), .positions = positions_};
    if (!GetParam().by_prompt) return tokens;
    for (size_t t = 0; t < positions_.size(); ++t) {
      tokens.prompts.push_back(PromptOf(static_cast<int>(t)));
    }
    for (const int first : {0, kFirst + 4}) {
      for (const float inverse : frequencies_.inverse) {
        tokens.inverse.push_back(inverse / Slower(first));
      }
    }
    return tokens;
  }

  void SetUp() override {
    frequencies_ = {.pairing = GetParam().pairing, .head_dim = kHeadDim, .scale = GetParam().scale};
    for (int i = 0; i < GetParam().rotary_dim / 2; ++i) {
      frequencies_.inverse.push_back(1.0f / static_cast<float>(1 << i % 20));
    }
    for (int t = 0; t < kFirst + kTokens; ++t) positions_.push_back(t * 37 % 101);
  }

  static constexpr int kFirst = 5;
  std::vector<float> x_ = Random(kTokens * kIn, 1);
  RotaryFrequencies frequencies_;
  std::vector<int32_t> positions_;
};
INSTANTIATE_TEST_SUITE_P(
    Families, ProjectQkv,
    testing::Values(QkvCase{}, QkvCase{.norms = true},
                    QkvCase{.rotary_dim = 32, .pairing = RotaryPairing::kInterleaved},
                    QkvCase{.rotary_dim = 32, .norms = true},
                    QkvCase{.rotary_dim = 32, .scale = 1.25f}, QkvCase{.by_prompt = true},
                    QkvCase{.pairing = RotaryPairing::kInterleaved}),
    [](const auto& c) {
      return std::to_string(c.param.rotary_dim) +
             (c.param.pairing == RotaryPairing::kHalf ? "Halves" : "Interleaved") +
             (c.param.norms ? "Norms" : "") + (c.param.scale != 1 ? "Scaled" : "") +
             (c.param.by_prompt ? "ByPrompt" : "");
    });

TEST_P(ProjectQkv, IsProductThenNormOfHeadsThenRotation) {
  std::vector<float> wq = Random(kQHeads * kHeadDim * kIn, 2);
  std::vector<float> wk = Random(kKvHeads * kHeadDim * kIn, 3), wv = Random(wk.size(), 4);
  const std::vector<float> q_gain = Random(kHeadDim, 5), k_gain = Random(kHeadDim, 6);
  const auto linear = MakeLinear({{wq.data(), nullptr, kQHeads * kHeadDim},
                                  {wk.data(), nullptr, kKvHeads * kHeadDim},
                                  {wv.data(), nullptr, kKvHeads * kHeadDim}},
                                 kIn);
  const auto q_norm = MakeNorm(q_gain, 1e-6f), k_norm = MakeNorm(k_gain, 1e-6f);
  const auto rotary = *ops_->Prepare(frequencies_);
  const auto tokens = *ops_->Prepare(Tokens());
  std::vector<float> q(kTokens * kQHeads * kHeadDim), k(kTokens * kKvHeads * kHeadDim), v(k.size());
  ASSERT_TRUE(ops_->ProjectQkv({.linear = linear.get(),
                                .x = F32Rows(x_, kIn),
                                .q = F32Rows(q, kQHeads * kHeadDim),
                                .k = F32Rows(k, kKvHeads * kHeadDim),
                                .v = F32Rows(v, kKvHeads * kHeadDim),
                                .q_heads = kQHeads,
                                .kv_heads = kKvHeads,
                                .q_norm = GetParam().norms ? q_norm.get() : nullptr,
                                .k_norm = GetParam().norms ? k_norm.get() : nullptr,
                                .rotary = rotary.get(),
                                .batch = tokens.get(),
                                .first = kFirst,
                                .tokens = kTokens},
                               Stream{})
                  .ok());
  EXPECT_TRUE(IsNear(q, Want(wq, q_gain), 4e-6));
  EXPECT_TRUE(IsNear(k, Want(wk, k_gain), 4e-6));
  EXPECT_TRUE(IsNear(v, Product(x_, wv, {}, kIn), 2e-6));
}

TEST_F(OpsTest, RotationOfAnOddOrHugeHeadIsRefused) {
  const auto prepare = [&](int rotary_dim, int head_dim) {
    return ops_->Prepare(RotaryFrequencies{.inverse = std::vector<float>(rotary_dim / 2, 1.0f),
                                           .head_dim = head_dim});
  };
  for (int head_dim : {2, 64, 256}) EXPECT_TRUE(prepare(head_dim, head_dim).ok()) << head_dim;
  for (int head_dim : {0, 63, 258}) EXPECT_FALSE(prepare(head_dim, head_dim).ok()) << head_dim;
  EXPECT_TRUE(prepare(32, 64).ok());
  EXPECT_EQ(prepare(66, 64).status().code(), absl::StatusCode::kInvalidArgument);
}

// --- Where K and V go

// K and V of [tokens, 2 heads, 6], each value its own number, and where a target puts them.
class WriteKv : public OpsTest {
 protected:
  static constexpr int64_t kKvTokens = 300, kD = 6;
  static constexpr int kPadding = 3;

  // got(page, offset in elements) of every value, in F32.
  template <typename T, typename Widen>
  void Check(const KvTarget& target, const Widen& widen) {
    const int64_t stride = 2 * kD + kPadding;
    std::vector<float> k = Random(kKvTokens * stride, 1), v = Random(kKvTokens * stride, 2);
    ASSERT_TRUE(ops_->WriteKv({.k = F32Rows(k, stride),
                               .v = F32Rows(v, stride),
                               .kv_heads = 2,
                               .head_dim = kD,
                               .parts = {{.tokens = kKvTokens, .target = target}}},
                              Stream{})
                    .ok());
    Narrowed(k, target.dtype);
    Narrowed(v, target.dtype);
    for (int64_t t = 0; t < kKvTokens; ++t) {
      const T* page = static_cast<const T*>(target.pages[t / target.page_tokens]);
      for (int64_t i = 0; i < 2 * kD; ++i) {
        const T* at = page + i / kD * target.head_stride + t % target.page_tokens * kD + i % kD;
        ASSERT_EQ(widen(at[0]), k[t * stride + i]) << t << " " << i;
        ASSERT_EQ(widen(at[target.value_stride]), v[t * stride + i]) << t << " " << i;
      }
    }
  }
};

float WidenBF16(uint16_t half) {
  const uint32_t bits = uint32_t{half} << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

TEST_F(WriteKv, GoesToPagesOfHeadsThatHoldKAndV) {
  constexpr int64_t kPage = 128, kTile = kPage * kD;
  std::vector<std::vector<uint16_t>> memory(3, std::vector<uint16_t>(4 * kTile, 0xABCD));
  Check<uint16_t>({.pages = {memory[1].data(), memory[0].data(), memory[2].data()},
                   .page_tokens = kPage,
                   .head_stride = 2 * kTile,
                   .value_stride = kTile,
                   .dtype = DType::kBF16},
                  WidenBF16);
  for (int64_t tile = 0; tile < 4; ++tile) {  // the last page ends with the prompt
    for (int64_t i = (kKvTokens - 2 * kPage) * kD; i < kTile; ++i) {
      ASSERT_EQ(memory[2][tile * kTile + i], 0xABCD);
    }
  }
}

TEST_F(WriteKv, GoesToOnePageOfTheWholePrompt) {
  constexpr int64_t kMatrix = kKvTokens * kD;
  std::vector<float> memory(4 * kMatrix + 64, kUntouched);
  Check<float>({.pages = {memory.data()},
                .page_tokens = kKvTokens,
                .head_stride = kMatrix,
                .value_stride = 2 * kMatrix + 64},
               [](float value) { return value; });
  EXPECT_THAT(std::vector<float>(&memory[2 * kMatrix], &memory[2 * kMatrix] + 64),
              testing::Each(kUntouched));
}

TEST_F(WriteKv, GoesToPagesThatAreNoMultipleOfAnything) {
  std::vector<std::vector<float>> memory(3, std::vector<float>(4 * 130 * kD));
  Check<float>({.pages = {memory[0].data(), memory[1].data(), memory[2].data()},
                .page_tokens = 130,
                .head_stride = 130 * kD,
                .value_stride = 2 * 130 * kD},
               [](float value) { return value; });
}

TEST_F(OpsTest, RemovedRowsMakeRoomForThoseBehindThem) {
  const std::vector<float> rows = {0, 0, 9, 1, 1, 9, 2, 2, 9, 3, 3, 9, 4, 4};  // stride 3
  const auto remove = [&](int64_t begin, int64_t end) {
    std::vector<float> left = rows;
    EXPECT_TRUE(ops_->RemoveRows({F32Rows(left, 3), 2, 5, begin, end}, Stream{}).ok());
    std::vector<float> first;
    for (int64_t row = 0; row < 5 - (end - begin); ++row) first.push_back(left[row * 3 + 1]);
    return first;
  };
  EXPECT_THAT(remove(1, 3), testing::ElementsAre(0, 3, 4));
  EXPECT_THAT(remove(0, 1), testing::ElementsAre(1, 2, 3, 4));
  EXPECT_THAT(remove(2, 5), testing::ElementsAre(0, 1));
  EXPECT_THAT(remove(4, 5), testing::ElementsAre(0, 1, 2, 3));
}

TEST_F(OpsTest, LogitsAreTheProductOfTheNorm) {
  const int64_t in = 24, vocabulary = 77, tokens = 5;
  std::vector<float> x = Random(tokens * in, 1), normed(x.size());
  const std::vector<float> weight = Random(vocabulary * in, 2), gain = Random(in, 3);
  const auto linear = MakeLinear({{weight.data(), nullptr, vocabulary}}, in);
  const auto norm = MakeNorm(gain, 1e-5f);
  std::vector<float> out(tokens * vocabulary);
  ASSERT_TRUE(ops_->Logits({.norm = norm.get(),
                            .linear = linear.get(),
                            .x = F32Rows(x, in),
                            .normed = F32Rows(normed, in),
                            .tokens = tokens,
                            .out = out.data()},
                           Stream{})
                  .ok());
  const std::vector<double> wide = Normed({x.begin(), x.end()}, gain, 1e-5f);
  EXPECT_TRUE(IsNear(out, Product({wide.begin(), wide.end()}, weight, {}, in), 4e-6));
}

}  // namespace
}  // namespace prefilld::cpu

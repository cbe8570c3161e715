// A transformer's operations on CUDA, beside those of the CPU: both are given the same weights and
// rows, which every dtype holds exactly.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "kernels/backend.h"
#include "kernels/convert.h"

namespace prefilld::cuda {
namespace {

std::vector<std::byte> Converted(const void* src, DType from, DType to, int64_t count) {
  std::vector<std::byte> out(static_cast<size_t>(count) * SizeOf(to));
  Convert({.src = src, .from = from, .dst = out.data(), .to = to, .count = count});
  return out;
}

// Values that a dtype holds, in F32 and in it.
struct Values {
  std::vector<float> wide;
  std::vector<std::byte> narrow;
};

// A backend with rows of its own. Both of a test are asked for the same.
struct Side {
  std::unique_ptr<Backend> backend;
  DType rows;
  std::vector<Buffer> memory;
  std::vector<std::unique_ptr<Linear>> linears;
  std::vector<std::unique_ptr<Norm>> norms;

  Ops& ops() { return **backend->ops(); }
  void* Take(size_t bytes) {
    return memory.emplace_back(*backend->device().Allocate(bytes)).data();
  }
  void* TakeForTokens(int64_t tokens, const Rotary* rotary = nullptr) {
    return Take(ops().TokensBytes(tokens, rotary) + 1);  // a CPU needs none
  }
  uint64_t held() { return backend->device().memory()[0].bytes; }  // "device"
  Rows Put(const std::vector<float>& values, int64_t stride) {
    const auto bytes = Converted(values.data(), DType::kF32, rows, values.size());
    Rows out = {Take(bytes.size()), rows, stride};
    EXPECT_TRUE(backend->device().Copy(out.data, bytes.data(), bytes.size(), {}).ok());
    EXPECT_TRUE(backend->device().Synchronize({}).ok());
    return out;
  }
  Rows Empty(int64_t count, int64_t width) {
    return Put(std::vector<float>(static_cast<size_t>(count * width), 77), width);
  }
  std::vector<float> Get(const Rows& from, int64_t count) {
    std::vector<std::byte> bytes(static_cast<size_t>(count) * SizeOf(rows));
    EXPECT_TRUE(backend->device().Copy(bytes.data(), from.data, bytes.size(), {}).ok());
    EXPECT_TRUE(backend->device().Synchronize({}).ok());
    const auto wide = Converted(bytes.data(), rows, DType::kF32, count);
    std::vector<float> values(static_cast<size_t>(count));
    std::memcpy(values.data(), wide.data(), wide.size());
    return values;
  }
};

class CudaOpsOnGpu : public testing::TestWithParam<DType> {
 protected:
  void SetUp() override {
    auto backend = CreateBackend("cuda", 1);
    if (!backend.ok()) GTEST_SKIP() << "no GPU";
    if (!(*backend)->ops().ok()) GTEST_SKIP() << (*backend)->ops().status();
    gpu_.backend = *std::move(backend);
    gpu_.rows = GetParam();
    cpu_.backend = *CreateBackend("cpu", 4);
    cpu_.rows = DType::kF32;
  }

  Values Random(int64_t count, float scale = 1) {
    std::normal_distribution<float> normal(0, scale);
    Values values;
    values.wide.resize(static_cast<size_t>(count));
    for (float& value : values.wide) value = normal(rng_);
    values.narrow = Converted(values.wide.data(), DType::kF32, GetParam(), count);
    const auto wide = Converted(values.narrow.data(), GetParam(), DType::kF32, count);
    std::memcpy(values.wide.data(), wide.data(), wide.size());
    return values;
  }

  const Linear* Prepare(Side& side, const std::vector<Values>& weights,
                        const std::vector<Values>& biases, int64_t in) {
    LinearWeights linear{.dtype = GetParam(), .in_features = in};
    for (size_t i = 0; i < weights.size(); ++i) {
      linear.parts.push_back({.weight = weights[i].narrow.data(),
                              .bias = biases.empty() ? nullptr : biases[i].narrow.data(),
                              .out_features = static_cast<int64_t>(weights[i].wide.size()) / in});
    }
    auto prepared = side.ops().Prepare(linear);
    EXPECT_TRUE(prepared.ok()) << prepared.status();
    return side.linears.emplace_back(*std::move(prepared)).get();
  }
  const Norm* Prepare(Side& side, const Values& weight) {
    auto prepared =
        side.ops().Prepare(NormWeights{.weight = weight.narrow.data(),
                                       .dtype = GetParam(),
                                       .width = static_cast<int64_t>(weight.wide.size()),
                                       .eps = 1e-5f});
    EXPECT_TRUE(prepared.ok()) << prepared.status();
    return side.norms.emplace_back(*std::move(prepared)).get();
  }

  // Of the norm of what they differ by; one rounding of the dtype is 2^-9 of a value, or 2^-12.
  void ExpectNear(const std::vector<float>& got, const std::vector<float>& want, double bound) {
    ASSERT_EQ(got.size(), want.size());
    double difference = 0, norm = 0, worst = 0;
    for (size_t i = 0; i < got.size(); ++i) {
      ASSERT_TRUE(std::isfinite(got[i])) << i;
      const double d = static_cast<double>(got[i]) - want[i];
      difference += d * d;
      norm += static_cast<double>(want[i]) * want[i];
      worst = std::max(worst, std::abs(d));
    }
    EXPECT_LE(std::sqrt(difference / norm), bound);
    EXPECT_LE(worst, 16 * bound * std::max(1.0, std::sqrt(norm / got.size())));
  }
  double Rounding() const {
    return GetParam() == DType::kBF16 ? 0x1p-8 : GetParam() == DType::kF16 ? 0x1p-11 : 5e-6;
  }

  std::mt19937 rng_{7};
  Side gpu_, cpu_;
};

TEST_P(CudaOpsOnGpu, EmbedsExactly) {
  constexpr int64_t kWidth = 264, kVocabulary = 50;
  const Values table = Random(kVocabulary * kWidth);
  const std::vector<uint32_t> ids = {0, 49, 7,
                                     7, 31, 4'000'000'000};  // the last reads the last row
  std::vector<std::vector<float>> out;
  for (Side* side : {&gpu_, &cpu_}) {
    auto embedding = side->ops().Prepare(EmbeddingWeights{.table = table.narrow.data(),
                                                          .dtype = GetParam(),
                                                          .vocabulary = kVocabulary,
                                                          .width = kWidth});
    auto tokens = side->ops().Prepare(
        BatchTokens{.ids = ids, .positions = {0, 1, 2, 3, 4, 5}, .memory = side->TakeForTokens(6)});
    ASSERT_TRUE(embedding.ok() && tokens.ok());
    const Rows rows = side->Empty(6, kWidth);
    ASSERT_TRUE(
        side->ops()
            .Embed({.embedding = embedding->get(), .tokens = tokens->get(), .out = rows}, {})
            .ok());
    out.push_back(side->Get(rows, 6 * kWidth));
  }
  EXPECT_EQ(out[0], out[1]);
}

// More than one thread copies it, in parts of which the last is short.
TEST_P(CudaOpsOnGpu, ALargeTableArrivesWholeAndATiedHeadSharesIt) {
  constexpr int64_t kWidth = 512, kVocabulary = 50001;
  std::vector<uint8_t> table(kVocabulary * kWidth * SizeOf(GetParam()));  // any bits are a value
  for (size_t i = 0; i < table.size(); ++i) table[i] = static_cast<uint8_t>(i * 2654435761u >> 20);
  auto embedding = gpu_.ops().Prepare(EmbeddingWeights{
      .table = table.data(), .dtype = GetParam(), .vocabulary = kVocabulary, .width = kWidth});
  ASSERT_TRUE(embedding.ok()) << embedding.status();
  const uint64_t before = gpu_.held();
  auto head = gpu_.ops().Prepare(
      LinearWeights{.parts = {{.weight = table.data(), .out_features = kVocabulary}},
                    .dtype = GetParam(),
                    .in_features = kWidth,
                    .tied = embedding->get()});
  ASSERT_TRUE(head.ok()) << head.status();
  EXPECT_EQ(gpu_.held(), before);

  BatchTokens every;
  for (uint32_t id = 0; id < kVocabulary; ++id) {
    every.ids.push_back(id);
    every.positions.push_back(0);
  }
  every.memory = gpu_.TakeForTokens(kVocabulary);
  auto tokens = gpu_.ops().Prepare(std::move(every));
  ASSERT_TRUE(tokens.ok());
  const Rows out = {gpu_.Take(table.size()), GetParam(), kWidth};
  ASSERT_TRUE(gpu_.ops()
                  .Embed({.embedding = embedding->get(), .tokens = tokens->get(), .out = out}, {})
                  .ok());
  std::vector<uint8_t> got(table.size());
  Device& device = gpu_.backend->device();
  ASSERT_TRUE(device.Copy(got.data(), out.data, got.size(), {}).ok());
  ASSERT_TRUE(device.Synchronize({}).ok());
  EXPECT_EQ(got, table);
}

TEST_P(CudaOpsOnGpu, Normalizes) {
  for (int64_t width : {8, 576, 4096, 5120, 12288}) {
    SCOPED_TRACE(width);
    const Values x = Random(5 * width, 3), weight = Random(width);
    std::vector<std::vector<float>> out;
    for (Side* side : {&gpu_, &cpu_}) {
      const Rows rows = side->Put(x.wide, width);  // in place
      ASSERT_TRUE(
          side->ops()
              .Normalize({.norm = Prepare(*side, weight), .x = rows, .out = rows, .tokens = 5}, {})
              .ok());
      out.push_back(side->Get(rows, 5 * width));
    }
    ExpectNear(out[0], out[1], Rounding());
  }
}

// The norms of 32 layers are a MiB together; by itself each would take two.
TEST_P(CudaOpsOnGpu, SmallTensorsShareAnAllocation) {
  constexpr int64_t kWidth = 4096;
  const Values x = Random(kWidth), first = Random(kWidth), last = Random(kWidth);
  const uint64_t before = gpu_.held();
  const Norm* of_first = Prepare(gpu_, first);
  for (int i = 0; i < 62; ++i) Prepare(gpu_, x);
  const Norm* of_last = Prepare(gpu_, last);
  EXPECT_LE(gpu_.held() - before, uint64_t{2} << 20);
  for (const auto& [norm, weight] : {std::pair(of_first, &first), {of_last, &last}}) {
    std::vector<std::vector<float>> out;
    for (Side* side : {&gpu_, &cpu_}) {
      const Norm* of = side == &gpu_ ? norm : Prepare(cpu_, *weight);
      const Rows rows = side->Put(x.wide, kWidth);
      ASSERT_TRUE(
          side->ops().Normalize({.norm = of, .x = rows, .out = rows, .tokens = 1}, {}).ok());
      out.push_back(side->Get(rows, kWidth));
    }
    ExpectNear(out[0], out[1], Rounding());
  }
}

TEST_P(CudaOpsOnGpu, AddsAProductAndNormalizes) {
  for (const bool biased : {false, true}) {
    for (const bool normed : {false, true}) {
      SCOPED_TRACE(testing::Message() << biased << normed);
      constexpr int64_t kIn = 512, kOut = 256, kTokens = 300;
      const std::vector<Values> weight = {Random(kIn * kOut, 0.05f)};
      const std::vector<Values> bias = {Random(kOut)};
      const Values x = Random(kTokens * kIn), residual = Random(kTokens * kOut),
                   scale = Random(kOut);
      std::vector<std::vector<float>> sums, norms;
      for (Side* side : {&gpu_, &cpu_}) {
        const Linear* linear = Prepare(*side, weight, biased ? bias : std::vector<Values>(), kIn);
        const Rows to = side->Put(residual.wide, kOut), out = side->Empty(kTokens, kOut);
        ASSERT_TRUE(side->ops()
                        .AddProduct({.linear = linear,
                                     .x = side->Put(x.wide, kIn),
                                     .residual = to,
                                     .tokens = kTokens,
                                     .norm = normed ? Prepare(*side, scale) : nullptr,
                                     .normed = out},
                                    {})
                        .ok());
        sums.push_back(side->Get(to, kTokens * kOut));
        norms.push_back(side->Get(out, kTokens * kOut));
      }
      ExpectNear(sums[0], sums[1], Rounding());
      ExpectNear(norms[0], norms[1], 2 * Rounding());
    }
  }
}

struct Turning {
  int head_dim, rotary_dim;
  RotaryPairing pairing;
  bool normed, biased;
  float scale = 1;
  bool by_prompt = false;  // frequencies of each prompt, not of the rotary
};

TEST_P(CudaOpsOnGpu, ProjectsAndTurnsHeads) {
  constexpr int64_t kIn = 256, kTokens = 70;
  constexpr int kQHeads = 6, kKvHeads = 2;
  for (const Turning& turning : {Turning{64, 64, RotaryPairing::kHalf, false, false},
                                 Turning{128, 128, RotaryPairing::kHalf, false, true},
                                 Turning{128, 128, RotaryPairing::kHalf, true, false},
                                 Turning{128, 64, RotaryPairing::kInterleaved, false, true},
                                 Turning{256, 128, RotaryPairing::kHalf, true, false},
                                 Turning{256, 256, RotaryPairing::kInterleaved, false, false},
                                 Turning{128, 64, RotaryPairing::kInterleaved, true, true, 1.25f},
                                 Turning{64, 64, RotaryPairing::kHalf, false, false, 1.25f, true},
                                 Turning{96, 96, RotaryPairing::kHalf, false, false}}) {
    const int d = turning.head_dim;
    SCOPED_TRACE(testing::Message() << d << " " << turning.rotary_dim);
    const std::vector<Values> weights = {Random(kIn * kQHeads * d, 0.1f),
                                         Random(kIn * kKvHeads * d, 0.1f),
                                         Random(kIn * kKvHeads * d, 0.1f)};
    const std::vector<Values> biases = {Random(kQHeads * d), Random(kKvHeads * d),
                                        Random(kKvHeads * d)};
    const Values q_norm = Random(d), k_norm = Random(d), x = Random(kTokens * kIn);
    RotaryFrequencies frequencies{
        .pairing = turning.pairing, .head_dim = d, .scale = turning.scale};
    for (int i = 0; i < turning.rotary_dim / 2; ++i) {
      frequencies.inverse.push_back(std::pow(10000.0f, -2.0f * i / turning.rotary_dim));
    }
    BatchTokens tokens;
    for (int64_t t = 0; t < kTokens + 3; ++t) {
      tokens.ids.push_back(0);
      tokens.positions.push_back(static_cast<int32_t>(t < 40 ? t * 2000 : t - 40));
      if (turning.by_prompt) tokens.prompts.push_back(t < 40 ? 0 : 1);
    }
    for (const float slower : {3.0f, 2.0f}) {
      for (const float inverse : frequencies.inverse) {
        if (turning.by_prompt) tokens.inverse.push_back(inverse / slower);
      }
    }
    std::vector<std::vector<float>> q, k, v;
    for (Side* side : {&gpu_, &cpu_}) {
      const Linear* linear =
          Prepare(*side, weights, turning.biased ? biases : std::vector<Values>(), kIn);
      auto rotary = side->ops().Prepare(frequencies);
      ASSERT_TRUE(rotary.ok()) << rotary.status();
      tokens.rotary = rotary->get();
      tokens.memory = side->TakeForTokens(kTokens + 3, tokens.rotary);
      const uint64_t held = side == &gpu_ ? side->held() : 0;
      auto batch = side->ops().Prepare(tokens);
      ASSERT_TRUE(batch.ok()) << batch.status();
      if (side == &gpu_) {
        EXPECT_EQ(side->held(), held) << "no more than it was given";
      }
      ProjectQkvArgs args{.linear = linear,
                          .x = side->Put(x.wide, kIn),
                          .q = side->Empty(kTokens, kQHeads * d),
                          .k = side->Empty(kTokens, kKvHeads * d),
                          .v = side->Empty(kTokens, kKvHeads * d),
                          .q_heads = kQHeads,
                          .kv_heads = kKvHeads,
                          .q_norm = turning.normed ? Prepare(*side, q_norm) : nullptr,
                          .k_norm = turning.normed ? Prepare(*side, k_norm) : nullptr,
                          .rotary = rotary->get(),
                          .batch = batch->get(),
                          .first = 3,
                          .tokens = kTokens,
                          .workspace = side->Take(linear->WorkspaceBytes(kTokens))};
      ASSERT_TRUE(side->ops().ProjectQkv(args, {}).ok());
      q.push_back(side->Get(args.q, kTokens * kQHeads * d));
      k.push_back(side->Get(args.k, kTokens * kKvHeads * d));
      v.push_back(side->Get(args.v, kTokens * kKvHeads * d));
    }
    ExpectNear(q[0], q[1], 2 * Rounding());
    ExpectNear(k[0], k[1], 2 * Rounding());
    ExpectNear(v[0], v[1], Rounding());
  }
}

TEST_P(CudaOpsOnGpu, Gates) {
  constexpr int64_t kIn = 256, kOut = 688, kTokens = 65;
  const std::vector<Values> weights = {Random(kIn * kOut, 0.1f), Random(kIn * kOut, 0.1f)};
  const Values x = Random(kTokens * kIn, 2);
  std::vector<std::vector<float>> out;
  for (Side* side : {&gpu_, &cpu_}) {
    const Linear* linear = Prepare(*side, weights, {}, kIn);
    const Rows rows = side->Empty(kTokens, kOut);
    ASSERT_TRUE(side->ops()
                    .Gate({.linear = linear,
                           .x = side->Put(x.wide, kIn),
                           .out = rows,
                           .tokens = kTokens,
                           .workspace = side->Take(linear->WorkspaceBytes(kTokens))},
                          {})
                    .ok());
    out.push_back(side->Get(rows, kTokens * kOut));
  }
  ExpectNear(out[0], out[1], 3 * Rounding());
}

TEST_P(CudaOpsOnGpu, WritesLogitsToTheHost) {
  constexpr int64_t kIn = 256, kOut = 1003, kTokens = 3;  // a vocabulary of any size
  const std::vector<Values> weight = {Random(kIn * kOut, 0.1f)};
  const Values x = Random(kTokens * kIn, 2), scale = Random(kIn);
  std::vector<std::vector<float>> out;
  for (Side* side : {&gpu_, &cpu_}) {
    const Linear* linear = Prepare(*side, weight, {}, kIn);
    std::vector<float> logits(kTokens * kOut);
    ASSERT_TRUE(side->ops()
                    .Logits({.norm = Prepare(*side, scale),
                             .linear = linear,
                             .x = side->Put(x.wide, kIn),
                             .normed = side->Empty(kTokens, kIn),
                             .tokens = kTokens,
                             .out = logits.data(),
                             .workspace = side->Take(linear->WorkspaceBytes(kTokens))},
                            {})
                    .ok());
    ASSERT_TRUE(side->backend->device().Synchronize({}).ok());
    out.push_back(logits);
  }
  ExpectNear(out[0], out[1], Rounding());
}

// Two sequences, in pages, and in one piece with a gap before V, as a region has it.
TEST_P(CudaOpsOnGpu, WritesKAndVWhereTargetsLie) {
  constexpr int kHeads = 3, kDim = 64;
  constexpr int64_t kPage = 128, kWidth = kHeads * kDim, kGap = 40;
  const std::vector<int64_t> lengths = {300, 129};
  const int64_t tokens = std::accumulate(lengths.begin(), lengths.end(), int64_t{0});
  const Values k = Random(tokens * kWidth), v = Random(tokens * kWidth);
  for (const auto& [paged, cache] : {std::pair(true, GetParam()),
                                     {false, GetParam()},
                                     {true, DType::kBF16},
                                     {false, DType::kF16},
                                     {true, DType::kF32}}) {
    SCOPED_TRACE(Name(cache));
    const int64_t words = static_cast<int64_t>(SizeOf(cache) / 2);
    struct Form {
      int64_t page, pages, head, value, span;
    };
    std::vector<Form> forms;
    for (const int64_t n : lengths) {
      forms.push_back(paged ? Form{kPage, (n + kPage - 1) / kPage, 2 * kPage * kDim, kPage * kDim,
                                   2 * kPage * kWidth}
                            : Form{n, 1, n * kDim, n * kWidth + kGap, 2 * n * kWidth + kGap});
    }
    std::vector<std::vector<std::vector<uint16_t>>> out;
    for (Side* side : {&gpu_, &cpu_}) {
      std::vector<std::vector<uint16_t>> memory;
      for (const Form& form : forms) {
        memory.emplace_back(static_cast<size_t>(form.pages * form.span * words), uint16_t{0x7777});
      }
      const Stream copies = side->backend->device().download_stream();
      WriteKvArgs args{.k = side->Put(k.wide, kWidth),
                       .v = side->Put(v.wide, kWidth),
                       .kv_heads = kHeads,
                       .head_dim = kDim};
      int64_t first = 0;
      for (size_t s = 0; s < forms.size(); ++s) {
        WriteKvArgs::Part part{.first = first, .tokens = lengths[s]};
        part.target = {.page_tokens = forms[s].page,
                       .head_stride = forms[s].head,
                       .value_stride = forms[s].value,
                       .dtype = cache};
        for (int64_t i = 0; i < forms[s].pages; ++i) {
          part.target.pages.push_back(memory[s].data() + i * forms[s].span * words);
        }
        args.parts.push_back(part);
        first += lengths[s];
      }
      ASSERT_TRUE(side->backend->device().Wait(copies, Stream{}).ok());
      ASSERT_TRUE(side->ops().WriteKv(args, copies).ok());
      ASSERT_TRUE(side->backend->device().Synchronize(copies).ok());
      out.push_back(memory);
    }
    for (size_t s = 0; s < forms.size(); ++s) {
      const Form& form = forms[s];
      for (int64_t t = 0; t < lengths[s]; ++t) {
        for (int64_t x = 0; x < 2 * kWidth; ++x) {
          const int64_t at = t / form.page * form.span + x / kDim % kHeads * form.head +
                             (x < kWidth ? 0 : form.value) + t % form.page * kDim + x % kDim;
          for (int64_t w = at * words; w < (at + 1) * words; ++w) {
            ASSERT_EQ(out[0][s][w], out[1][s][w]) << "token " << t << " channel " << x;
          }
        }
      }
      if (!paged) {
        EXPECT_EQ(out[0][s][lengths[s] * kWidth * words], 0x7777) << "the gap";
      }
    }
  }
}

TEST_P(CudaOpsOnGpu, TakesRowsOut) {
  constexpr int64_t kWidth = 72, kTokens = 100;
  const Values x = Random(kTokens * kWidth);
  for (const auto& [begin, end] :
       {std::pair<int64_t, int64_t>{0, 1}, {10, 40}, {0, 70}, {60, 100}}) {
    std::vector<std::vector<float>> out;
    for (Side* side : {&gpu_, &cpu_}) {
      const Rows rows = side->Put(x.wide, kWidth);
      ASSERT_TRUE(
          side->ops()
              .RemoveRows(
                  {.rows = rows, .width = kWidth, .tokens = kTokens, .begin = begin, .end = end},
                  {})
              .ok());
      out.push_back(side->Get(rows, (kTokens - end + begin) * kWidth));
    }
    EXPECT_EQ(out[0], out[1]) << begin;
  }
}

TEST_P(CudaOpsOnGpu, RefusesWhatItHasNoKernelFor) {
  const Values some = Random(64 * 64);
  const auto code = [](const auto& prepared) { return prepared.status().code(); };
  EXPECT_EQ(code(gpu_.ops().Prepare(
                LinearWeights{.parts = {{.weight = some.narrow.data(), .out_features = 64}},
                              .dtype = GetParam(),
                              .in_features = 63})),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(code(gpu_.ops().Prepare(
                NormWeights{.weight = some.narrow.data(), .dtype = GetParam(), .width = 33})),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(code(gpu_.ops().Prepare(RotaryFrequencies{.inverse = {1, 1, 1}, .head_dim = 64})),
            absl::StatusCode::kInvalidArgument);
}

INSTANTIATE_TEST_SUITE_P(DTypes, CudaOpsOnGpu,
                         testing::Values(DType::kBF16, DType::kF16, DType::kF32),
                         [](const auto& of) { return std::string(Name(of.param)); });

}  // namespace
}  // namespace prefilld::cuda

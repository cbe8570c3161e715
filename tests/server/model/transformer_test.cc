#include "server/model/transformer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "kernels/backend.h"
#include "tests/server/model/model_directory.h"

namespace prefilld {
namespace {

using testing::AllOf;
using testing::HasSubstr;
using testing::Not;

std::vector<float> Floats(const SafeTensors& file, std::string_view name) {
  const SafeTensor& tensor = file.tensors().find(name)->second;
  std::vector<float> values(tensor.bytes / sizeof(float));
  std::memcpy(values.data(), tensor.data, tensor.bytes);
  return values;
}

// What transformers computed, from tests/fixtures/make_models.py.
struct Expected {
  std::vector<uint32_t> token_ids;
  std::vector<float> k, v;    // [layers, tokens, kv_heads, head_dim]
  std::vector<float> logits;  // [vocab], of the last token
  double own_error_k = 0, own_error_v = 0, own_error_logits = 0;  // half precision only
};

Expected ReadExpected(const std::string& fixture) {
  ModelDirectory directory;
  std::filesystem::copy(FixtureModel(fixture) + "/expected.safetensors",
                        directory / "model.safetensors");
  const SafeTensors file = *SafeTensors::Open(directory.path());
  Expected expected{
      .k = Floats(file, "k"), .v = Floats(file, "v"), .logits = Floats(file, "logits")};
  const SafeTensor& ids = file.tensors().find("token_ids")->second;
  expected.token_ids.resize(ids.bytes / sizeof(uint32_t));
  std::memcpy(expected.token_ids.data(), ids.data, ids.bytes);
  if (file.tensors().count("own_error_k") != 0) {
    expected.own_error_k = Floats(file, "own_error_k")[0];
    expected.own_error_v = Floats(file, "own_error_v")[0];
    expected.own_error_logits = Floats(file, "own_error_logits")[0];
  }
  return expected;
}

// All layers of a ragged batch, with dense attention in F32.
struct Outputs {
  std::vector<float> k, v;                 // [layers, tokens, kv_heads, head_dim]
  std::vector<std::vector<float>> logits;  // of each prompt's last token
};

absl::Status RunDense(Transformer& model, Backend& backend,
                      std::vector<std::vector<uint32_t>> prompts, Outputs* out) {
  const ModelInfo& info = model.info();
  PrefillBatch batch{.cu_seqlens = {0}};
  for (const std::vector<uint32_t>& prompt : prompts) {
    batch.token_ids.insert(batch.token_ids.end(), prompt.begin(), prompt.end());
    batch.cu_seqlens.push_back(batch.tokens());
  }
  if (absl::Status s = model.Begin(batch, Stream{}); !s.ok()) return s;

  Buffer memory = *backend.device().Allocate(LayerScratchBytes(info, batch.tokens()));
  const LayerScratch scratch = SplitLayerScratch(info, batch.tokens(), memory.data());
  AttentionArgs args;
  args.shape = {.dtype = info.activations,
                .q_heads = info.q_heads,
                .kv_heads = info.kv_heads,
                .head_dim = info.head_dim,
                .cu_seqlens_q = batch.cu_seqlens,
                .cu_seqlens_k = batch.cu_seqlens};
  args.policy = {.method = Method::kDense, .measure_captured_mass = false};
  args.softmax_scale = 1 / std::sqrt(static_cast<double>(info.head_dim));
  args.q = {scratch.q.data, scratch.q.stride, info.head_dim};
  args.k = {scratch.k.data, scratch.k.stride, info.head_dim};
  args.v = {scratch.v.data, scratch.v.stride, info.head_dim};
  args.o = {scratch.o.data, scratch.o.stride, info.head_dim};
  const auto sequences = SplitIntoBlocks(args.shape, args.policy.block_size);
  const int64_t rows = TotalRows(sequences), stride = MaxKeyBlocks(sequences);
  std::vector<int32_t> count(info.q_heads * rows);
  std::vector<uint16_t> index(count.size() * stride);
  args.index = {count.data(), index.data(), rows, stride};
  std::vector<HeadReport> report(sequences.size() * info.q_heads);
  args.report = report.data();

  const int64_t kv_values = batch.tokens() * info.kv_heads * info.head_dim;
  for (int layer = 0; layer < info.layers; ++layer) {
    if (absl::Status s = model.ProjectQkv(layer, batch, scratch, {0, batch.tokens()}, Stream{});
        !s.ok())
      return s;
    const float* k = static_cast<const float*>(scratch.k.data);
    const float* v = static_cast<const float*>(scratch.v.data);
    out->k.insert(out->k.end(), k, k + kv_values);
    out->v.insert(out->v.end(), v, v + kv_values);
    if (absl::Status s = backend.EstimatePattern(args, Stream{}); !s.ok()) return s;
    if (absl::Status s = backend.SelectBlocks(args, Stream{}); !s.ok()) return s;
    if (absl::Status s = backend.Attend(args, Stream{}); !s.ok()) return s;
    if (absl::Status s = model.FinishLayer(layer, batch, scratch, {0, batch.tokens()}, Stream{});
        !s.ok())
      return s;
  }
  for (size_t i = 1; i < batch.cu_seqlens.size(); ++i) {
    std::vector<float>& logits = out->logits.emplace_back(info.vocab_size);
    absl::Status s = model.Logits(batch, {batch.cu_seqlens[i] - 1, 1, logits.data()}, Stream{});
    if (!s.ok()) return s;
  }
  return absl::OkStatus();
}

// Relative Frobenius error at most `bound`.
testing::AssertionResult IsNear(const std::vector<float>& got, const std::vector<float>& want,
                                double bound) {
  if (got.size() != want.size()) {
    return testing::AssertionFailure() << got.size() << " values, not " << want.size();
  }
  double error = 0, norm = 0;
  size_t worst = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    error += std::pow(double{got[i]} - want[i], 2);
    norm += std::pow(want[i], 2);
    if (!(std::abs(got[i] - want[i]) <= std::abs(got[worst] - want[worst]))) worst = i;
  }
  const double relative = std::sqrt(error / norm);
  if (relative <= bound) return testing::AssertionSuccess() << relative;
  return testing::AssertionFailure()
         << "relative error " << relative << " above " << bound << "; worst at " << worst << " of "
         << got.size() << ": " << got[worst] << ", not " << want[worst];
}

std::vector<float> LayerOf(const std::vector<float>& values, int layer, int layers) {
  const size_t size = values.size() / layers;
  return {values.begin() + layer * size, values.begin() + (layer + 1) * size};
}

class TransformerTest : public testing::Test {
 protected:
  std::unique_ptr<Transformer> Load(const std::string& directory) {
    auto model = Transformer::Load("test", directory, *backend_);
    EXPECT_TRUE(model.ok()) << model.status();
    return model.ok() ? *std::move(model) : nullptr;
  }
  absl::Status LoadError(const ModelDirectory& directory) {
    return Transformer::Load("test", directory.path(), *backend_).status();
  }
  std::string Fingerprint(const ModelDirectory& directory) {
    const auto model = Load(directory.path());
    return model == nullptr ? "" : model->info().fingerprint;
  }

  std::unique_ptr<Backend> backend_ = *CreateBackend("cpu", 2);
};

class TransformerParity : public TransformerTest,
                          public testing::WithParamInterface<const char*> {};

TEST_P(TransformerParity, KvOfEveryLayerAndLastLogitsAreThoseOfTransformers) {
  const Expected expected = ReadExpected(GetParam());
  const auto model = Load(FixtureModel(GetParam()));
  ASSERT_NE(model, nullptr);
  Outputs got;
  ASSERT_TRUE(RunDense(*model, *backend_, {expected.token_ids}, &got).ok());
  // In half precision: at most 1.5 times the error that transformers makes itself.
  const auto bound = [](double own_error) { return own_error == 0 ? 1e-4 : 1.5 * own_error; };
  const int layers = model->info().layers;
  for (int layer = 0; layer < layers; ++layer) {
    EXPECT_TRUE(IsNear(LayerOf(got.k, layer, layers), LayerOf(expected.k, layer, layers),
                       bound(expected.own_error_k)))
        << "K of layer " << layer;
    EXPECT_TRUE(IsNear(LayerOf(got.v, layer, layers), LayerOf(expected.v, layer, layers),
                       bound(expected.own_error_v)))
        << "V of layer " << layer;
  }
  EXPECT_TRUE(IsNear(got.logits[0], expected.logits, bound(expected.own_error_logits)));
}

INSTANTIATE_TEST_SUITE_P(Fixtures, TransformerParity,
                         testing::Values("base", "tied", "llama3", "linear", "biases", "head_dim96",
                                         "qwen2", "qwen3", "glm", "mistral", "yarn", "dynamic",
                                         "qwen2_yarn_bf16", "qwen3_bf16", "glm_bf16",
                                         "mistral_dynamic_bf16", "head_dim128", "sharded", "bf16",
                                         "f16"),
                         [](const auto& fixture) { return std::string(fixture.param); });

TEST_F(TransformerTest, EachPromptOfARaggedBatchIsComputedAsIfAlone) {
  const auto model = Load(FixtureModel("base"));
  const std::vector<uint32_t> ids = ReadExpected("base").token_ids;
  // Together more than one tile of tokens.
  const std::vector<std::vector<uint32_t>> prompts = {{ids.begin(), ids.begin() + 1},
                                                      {ids.begin() + 3, ids.begin() + 140},
                                                      ids,
                                                      ids,
                                                      {ids.begin() + 9, ids.end() - 1}};
  Outputs together;
  ASSERT_TRUE(RunDense(*model, *backend_, prompts, &together).ok());
  const int layers = model->info().layers;
  const int64_t width = int64_t{model->info().kv_heads} * model->info().head_dim;
  int64_t begin = 0;
  for (size_t i = 0; i < prompts.size(); ++i) {
    Outputs alone;
    ASSERT_TRUE(RunDense(*model, *backend_, {prompts[i]}, &alone).ok());
    const int64_t end = begin + static_cast<int64_t>(prompts[i].size());
    const std::vector<float> k = LayerOf(together.k, layers - 1, layers);
    EXPECT_TRUE(IsNear({k.begin() + begin * width, k.begin() + end * width},
                       LayerOf(alone.k, layers - 1, layers), 1e-5))
        << "prompt " << i;
    EXPECT_TRUE(IsNear(together.logits[i], alone.logits[0], 1e-5)) << "prompt " << i;
    begin = end;
  }
}

TEST_F(TransformerTest, DynamicScalingIsOfEachPromptsLength) {
  const auto model = Load(FixtureModel("dynamic"));
  const std::vector<uint32_t> ids = ReadExpected("dynamic").token_ids;
  const std::vector<std::vector<uint32_t>> prompts = {
      {ids.begin(), ids.begin() + 40}, ids, {ids.begin(), ids.begin() + 100}};
  Outputs together;
  ASSERT_TRUE(RunDense(*model, *backend_, prompts, &together).ok());
  const int layers = model->info().layers;
  const int64_t width = int64_t{model->info().kv_heads} * model->info().head_dim;
  const std::vector<float> k = LayerOf(together.k, 0, layers);
  std::vector<std::vector<float>> at_39;  // K of the same token at the same place
  int64_t begin = 0;
  for (const std::vector<uint32_t>& prompt : prompts) {
    Outputs alone;
    ASSERT_TRUE(RunDense(*model, *backend_, {prompt}, &alone).ok());
    const auto first = k.begin() + begin * width;
    begin += static_cast<int64_t>(prompt.size());
    EXPECT_TRUE(IsNear({first, k.begin() + begin * width}, LayerOf(alone.k, 0, layers), 1e-5))
        << prompt.size() << " tokens";
    at_39.emplace_back(first + 39 * width, first + 40 * width);
  }
  EXPECT_FALSE(IsNear(at_39[0], at_39[1], 0.01)) << "200 tokens turn slower than 40";
  EXPECT_FALSE(IsNear(at_39[1], at_39[2], 0.01)) << "and slower than 100";
}

TEST_F(TransformerTest, APromptBesideARemovedOneKeepsItsFrequencies) {
  const auto model = Load(FixtureModel("dynamic"));
  PrefillBatch batch{.token_ids = std::vector<uint32_t>(250, 7), .cu_seqlens = {0, 100, 250}};
  PrefillBatch want{.token_ids = std::vector<uint32_t>(150, 7), .cu_seqlens = {0, 150}};
  ASSERT_TRUE(model->Begin(batch, Stream{}).ok());
  ASSERT_TRUE(model->Remove(batch, 0, Stream{}).ok());
  ASSERT_TRUE(model->Begin(want, Stream{}).ok());
  const int64_t bytes = LayerScratchBytes(model->info(), 150);
  Buffer memory = *backend_->device().Allocate(2 * bytes);
  const LayerScratch got = SplitLayerScratch(model->info(), 150, memory.data());
  const LayerScratch expected = SplitLayerScratch(model->info(), 150, memory.as<char>() + bytes);
  ASSERT_TRUE(model->ProjectQkv(0, batch, got, {0, batch.tokens()}, Stream{}).ok());
  ASSERT_TRUE(model->ProjectQkv(0, want, expected, {0, want.tokens()}, Stream{}).ok());
  EXPECT_EQ(std::memcmp(got.k.data, expected.k.data, 150 * got.k.stride * sizeof(float)), 0);
}

TEST_F(TransformerTest, LogitsOfManyRowsAreThoseOfEachRow) {
  const auto model = Load(FixtureModel("base"));
  const int vocab = model->info().vocab_size;
  PrefillBatch batch{.token_ids = std::vector<uint32_t>(700, 7), .cu_seqlens = {0, 700}};
  for (size_t t = 0; t < batch.token_ids.size(); ++t) batch.token_ids[t] = t % vocab;
  ASSERT_TRUE(model->Begin(batch, Stream{}).ok());
  std::vector<float> all(690 * vocab), one(vocab);
  ASSERT_TRUE(model->Logits(batch, {10, 690, all.data()}, Stream{}).ok());
  ASSERT_TRUE(model->Logits(batch, {699, 1, one.data()}, Stream{}).ok());
  EXPECT_TRUE(IsNear(one, {all.end() - vocab, all.end()}, 1e-6));
}

TEST_F(TransformerTest, APromptThatIsRemovedLeavesTheOthersAsTheyWere) {
  const auto model = Load(FixtureModel("base"));
  const int64_t hidden = model->info().hidden_size;
  PrefillBatch batch{.token_ids = {1, 2, 3, 4, 5, 6}, .cu_seqlens = {0, 1, 4, 6}};
  ASSERT_TRUE(model->Begin(batch, Stream{}).ok());
  ASSERT_TRUE(model->Remove(batch, 1, Stream{}).ok());
  PrefillBatch want{.token_ids = {1, 5, 6}, .cu_seqlens = {0, 1, 3}};
  ASSERT_TRUE(model->Begin(want, Stream{}).ok());
  EXPECT_EQ(batch.token_ids, want.token_ids);
  EXPECT_EQ(batch.cu_seqlens, want.cu_seqlens);
  EXPECT_EQ(std::memcmp(batch.residual.data, want.residual.data, 3 * hidden * sizeof(float)), 0);

  // Positions start at 0 again for the one that moved up.
  Buffer memory = *backend_->device().Allocate(2 * LayerScratchBytes(model->info(), 3));
  const LayerScratch got = SplitLayerScratch(model->info(), 3, memory.data());
  const LayerScratch expected =
      SplitLayerScratch(model->info(), 3, memory.as<char>() + LayerScratchBytes(model->info(), 3));
  ASSERT_TRUE(model->ProjectQkv(0, batch, got, {0, batch.tokens()}, Stream{}).ok());
  ASSERT_TRUE(model->ProjectQkv(0, want, expected, {0, want.tokens()}, Stream{}).ok());
  EXPECT_EQ(std::memcmp(got.k.data, expected.k.data, 3 * got.k.stride * sizeof(float)), 0);
}

// A backend as of a device that models have no operations for.
class WithoutOps : public Backend {
 public:
  std::string_view name() const override { return "none"; }
  Device& device() override { return cpu_->device(); }
  absl::StatusOr<Ops*> ops() override { return absl::UnavailableError("none are here"); }
  absl::Status Supports(const AttentionShape&, const SparsityPolicy&) const override {
    return absl::OkStatus();
  }
  absl::Status EstimatePattern(const AttentionArgs&, Stream) override { return absl::OkStatus(); }
  absl::Status SelectBlocks(const AttentionArgs&, Stream) override { return absl::OkStatus(); }
  absl::Status MeasureCapturedMass(const AttentionArgs&, Stream) override {
    return absl::OkStatus();
  }
  absl::Status Attend(const AttentionArgs&, Stream) override { return absl::OkStatus(); }

 private:
  std::unique_ptr<Backend> cpu_ = *CreateBackend("cpu", 1);
};

TEST_F(TransformerTest, ABackendWithoutOperationsRefusesModelsByName) {
  WithoutOps backend;
  const absl::Status status = Transformer::Load("test", FixtureModel("base"), backend).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kUnimplemented);
  EXPECT_THAT(status.message(),
              AllOf(HasSubstr("serves no models here: none are here"), HasSubstr("none")));
}

TEST_F(TransformerTest, InfoIsThatOfTheConfig) {
  const auto model = Load(FixtureModel("llama3"));
  const ModelInfo& info = model->info();
  EXPECT_EQ(info.name, "test");
  EXPECT_EQ(info.model_type, "llama");
  EXPECT_EQ(info.layers, 2);
  EXPECT_EQ(info.q_heads, 2);
  EXPECT_EQ(info.kv_heads, 1);
  EXPECT_EQ(info.head_dim, 64);
  EXPECT_EQ(info.hidden_size, 64);
  EXPECT_EQ(info.vocab_size, 96);
  EXPECT_EQ(info.max_positions, 1024);
  EXPECT_EQ(info.dtype, DType::kF32);
  EXPECT_EQ(info.activations, DType::kF32);
  EXPECT_EQ(info.rope_theta, 500000);
  EXPECT_EQ(info.rope_scaling, "llama3");
  EXPECT_EQ(info.fingerprint.size(), 64u);
}

TEST_F(TransformerTest, InfoSaysWhatBoundsAPrompt) {
  EXPECT_EQ(Load(FixtureModel("dynamic"))->info().max_positions, 256);
  EXPECT_EQ(Load(FixtureModel("dynamic"))->info().rope_scaling, "dynamic");
  const auto mistral = Load(FixtureModel("mistral"));
  EXPECT_EQ(mistral->info().max_positions, 256);
  EXPECT_EQ(mistral->info().sliding_window, 256);
}

TEST_F(TransformerTest, BatchThatDoesNotFitTheModelIsRefused) {
  const auto model = Load(FixtureModel("base"));
  const auto begin = [&](std::vector<uint32_t> ids, std::vector<int64_t> cu_seqlens) {
    PrefillBatch batch{.token_ids = std::move(ids), .cu_seqlens = std::move(cu_seqlens)};
    return std::string(model->Begin(batch, Stream{}).message());
  };
  EXPECT_EQ(begin({1, 2}, {0, 2}), "");
  EXPECT_EQ(begin({1, 96}, {0, 2}), "") << "IDs are refused at the door";
  EXPECT_THAT(begin({}, {0}), HasSubstr("cu_seqlens"));
  EXPECT_THAT(begin({1, 2}, {0, 1}), HasSubstr("does not go from 0 to 2"));
  EXPECT_THAT(begin({1, 2}, {0, 0, 2}), HasSubstr("a prompt of 0 tokens"));
  EXPECT_THAT(begin(std::vector<uint32_t>(1025), {0, 1025}), HasSubstr("a prompt of 1025 tokens"));
}

TEST_F(TransformerTest, FingerprintIsOfWeightsAndMathematicsOnly) {
  const ModelDirectory first("base"), elsewhere("base");
  const std::string fingerprint = Fingerprint(first);
  EXPECT_EQ(Fingerprint(elsewhere), fingerprint);

  elsewhere.Replace("config.json", "\"transformers_version\": \"", "\"transformers_version\": \"9");
  EXPECT_EQ(Fingerprint(elsewhere), fingerprint);

  const ModelDirectory other_rope("base");
  other_rope.Replace("config.json", "\"rope_theta\": 10000.0", "\"rope_theta\": 10001.0");
  EXPECT_NE(Fingerprint(other_rope), fingerprint);

  const ModelDirectory other_norm("base");
  other_norm.Replace("config.json", "\"rms_norm_eps\": 1e-05", "\"rms_norm_eps\": 1e-06");
  EXPECT_NE(Fingerprint(other_norm), fingerprint);

  const ModelDirectory renamed("base");
  renamed.Replace("config.json", "{\n  \"arch", "{\n  \"_name_or_path\": \"org/model\",\n  \"arch");
  EXPECT_NE(Fingerprint(renamed), fingerprint);

  const ModelDirectory one_bit("base");
  std::string bytes = one_bit.Read("model.safetensors");
  bytes.back() ^= 1;
  one_bit.Write("model.safetensors", bytes);
  EXPECT_NE(Fingerprint(one_bit), fingerprint);
}

TEST_F(TransformerTest, MissingTensorIsNamed) {
  const ModelDirectory model("base");
  model.Replace("model.safetensors", "\"model.norm.weight\"", "\"model.mean.weight\"");
  EXPECT_THAT(LoadError(model).message(),
              AllOf(HasSubstr(model.path()), HasSubstr("'model.norm.weight' is missing")));
}

TEST_F(TransformerTest, UnknownTensorIsNamed) {
  const ModelDirectory model("base");
  model.Replace("config.json", "\"tie_word_embeddings\": false", "\"tie_word_embeddings\": true");
  EXPECT_THAT(LoadError(model).message(),
              HasSubstr("'lm_head.weight' is not one that config.json accounts for"));
}

TEST_F(TransformerTest, TensorOfTheWrongShapeIsNamed) {
  const ModelDirectory model("base");
  model.Replace("config.json", "\"intermediate_size\": 80", "\"intermediate_size\": 81");
  EXPECT_THAT(LoadError(model).message(),
              HasSubstr("'model.layers.0.mlp.gate_proj.weight' is F32 [80, 64], config.json needs "
                        "F32 [81, 64]"));
}

TEST_F(TransformerTest, TensorOfTheWrongDTypeIsNamed) {
  const ModelDirectory model("base");
  model.Replace("config.json", "\"dtype\": \"float32\"", "\"dtype\": \"bfloat16\"");
  EXPECT_THAT(LoadError(model).message(), HasSubstr("is F32 [96, 64], config.json needs BF16"));
}

TEST_F(TransformerTest, MissingBiasIsNamed) {
  const ModelDirectory model("base");
  model.Replace("config.json", "\"attention_bias\": false", "\"attention_bias\": true");
  EXPECT_THAT(LoadError(model).message(), HasSubstr("q_proj.bias' is missing"));
}

TEST_F(TransformerTest, DTypeIsThatOfTheTensorsWhenTheConfigHasNone) {
  const ModelDirectory model("bf16");
  model.Replace("config.json", "\"dtype\": \"bfloat16\",", "");
  const auto loaded = Load(model.path());
  ASSERT_NE(loaded, nullptr);
  EXPECT_EQ(loaded->info().dtype, DType::kBF16);
}

TEST_F(TransformerTest, UnsupportedConfigKeyIsNamed) {
  const ModelDirectory model("base");
  model.Replace("config.json", "\"use_cache\": true", "\"sliding_window\": 4096");
  EXPECT_THAT(LoadError(model).message(),
              HasSubstr("config.json: sliding_window = 4096 is not supported"));
}

TEST_F(TransformerTest, DirectoryWithoutAModelIsNotFound) {
  const ModelDirectory empty;
  EXPECT_EQ(LoadError(empty).code(), absl::StatusCode::kNotFound);
  const ModelDirectory no_weights("base");
  std::filesystem::remove(no_weights / "model.safetensors");
  EXPECT_THAT(LoadError(no_weights).message(), HasSubstr("/model.safetensors: No such file"));
}

TEST_F(TransformerTest, EveryErrorIsOneLine) {
  const ModelDirectory model("base");
  model.Replace("config.json", "\"use_cache\": true", "\"use\\ncache\": \"a\\nb\"");
  EXPECT_THAT(LoadError(model).message(), Not(HasSubstr("\n")));
}

}  // namespace
}  // namespace prefilld

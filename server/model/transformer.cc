#include "server/model/transformer.h"

#include <algorithm>
#include <fstream>
#include <iterator>
#include <set>
#include <utility>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "server/model/fingerprint.h"

namespace prefilld {
namespace {

// Tokens whose hidden activations are held at once. At 512 the products run as fast as over a whole
// prompt, and gate and up of a small model stay in the last-level cache between them.
constexpr int64_t kTileTokens = 512;
constexpr size_t kMaxConfigBytes = 1 << 20;
// Older checkpoints store rope's frequencies, which follow from the config.
constexpr std::string_view kIgnoredSuffix = ".rotary_emb.inv_freq";

absl::StatusOr<std::string> ReadConfigFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) return absl::NotFoundError(path + ": cannot be opened");
  std::string text(kMaxConfigBytes + 1, '\0');
  file.read(text.data(), static_cast<std::streamsize>(text.size()));
  text.resize(file.gcount());
  if (text.size() > kMaxConfigBytes) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": is above ", kMaxConfigBytes, " bytes"));
  }
  return text;
}

// Takes tensors out of a checkpoint by name. The first failure is kept and what follows returns
// nothing, so that a caller checks once, in Finish.
class WeightReader {
 public:
  WeightReader(const std::string& directory, const SafeTensors& tensors, DType dtype, Ops& ops)
      : directory_(directory), tensors_(tensors), dtype_(dtype), ops_(ops) {}

  const void* Take(const std::string& name, const std::vector<int64_t>& shape) {
    const auto it = tensors_.tensors().find(name);
    if (it == tensors_.tensors().end()) {
      Fail(absl::StrCat("tensor '", name, "' is missing"));
      return nullptr;
    }
    taken_.insert(name);
    const SafeTensor& tensor = it->second;
    if (tensor.dtype != Name(dtype_) || tensor.shape != shape) {
      Fail(absl::StrCat("tensor '", name, "' is ", tensor.dtype, " [",
                        absl::StrJoin(tensor.shape, ", "), "], config.json needs ", Name(dtype_),
                        " [", absl::StrJoin(shape, ", "), "]"));
      return nullptr;
    }
    return tensor.data;
  }

  std::vector<float> Norm(const std::string& name, int width) {
    const void* data = Take(name, {width});
    if (!status_.ok()) return {};
    std::vector<float> weight(width);
    const uint32_t row = 0;  // a norm's weight is widened as the one row of an embedding
    Keep(ops_.Embed(data, dtype_, width, &row, 1, weight.data(), Stream{}));
    return weight;
  }

  std::unique_ptr<Linear> Layer(const std::string& name, int64_t out, int64_t in, bool has_bias) {
    const void* weight = Take(name + ".weight", {out, in});
    const void* bias = has_bias ? Take(name + ".bias", {out}) : nullptr;
    if (!status_.ok()) return nullptr;
    absl::StatusOr<std::unique_ptr<Linear>> linear =
        ops_.PrepareLinear(weight, bias, dtype_, out, in);
    Keep(linear.status());
    return linear.ok() ? *std::move(linear) : nullptr;
  }

  // The first failure, or a tensor that nobody took.
  absl::Status Finish() {
    for (const auto& [name, tensor] : tensors_.tensors()) {
      if (!status_.ok()) break;
      if (taken_.count(name) == 0 && !std::string_view(name).ends_with(kIgnoredSuffix)) {
        Fail(absl::StrCat("tensor '", absl::CHexEscape(name),
                          "' is not one that config.json accounts for"));
      }
    }
    return status_;
  }

 private:
  void Fail(const std::string& problem) {
    Keep(absl::InvalidArgumentError(absl::StrCat(directory_, ": ", problem)));
  }
  void Keep(const absl::Status& status) {
    if (status_.ok()) status_ = status;
  }

  const std::string& directory_;
  const SafeTensors& tensors_;
  const DType dtype_;
  Ops& ops_;
  std::set<std::string> taken_;
  absl::Status status_;
};

// The config's dtype, else that of the embedding.
absl::StatusOr<DType> CheckpointDType(const ModelConfig& config, const SafeTensors& tensors,
                                      const std::string& directory) {
  if (config.dtype.has_value()) return *config.dtype;
  const auto it = tensors.tensors().find("model.embed_tokens.weight");
  const std::string name = it == tensors.tensors().end() ? "" : it->second.dtype;
  for (const DType dtype : {DType::kF32, DType::kBF16, DType::kF16}) {
    if (name == Name(dtype)) return dtype;
  }
  return absl::InvalidArgumentError(absl::StrCat(
      directory,
      ": neither config.json nor model.embed_tokens.weight gives a dtype of F32, BF16, F16"));
}

// Elements of one layer's linear maps.
int64_t LinearWeights(const ModelConfig& c) {
  const int64_t heads = 2 * (int64_t{c.q_heads} + c.kv_heads);
  return c.hidden_size * (heads * c.head_dim + int64_t{3} * c.intermediate_size);
}

absl::Status CheckBatch(const PrefillBatch& batch, const ModelInfo& info) {
  const std::vector<int64_t>& ends = batch.cu_seqlens;
  if (ends.size() < 2 || ends.front() != 0 || ends.back() != batch.tokens()) {
    return absl::InvalidArgumentError(absl::StrCat("cu_seqlens [", absl::StrJoin(ends, ", "),
                                                   "] does not go from 0 to ", batch.tokens()));
  }
  for (size_t i = 1; i < ends.size(); ++i) {
    if (ends[i] <= ends[i - 1] || ends[i] - ends[i - 1] > info.max_positions) {
      return absl::InvalidArgumentError(absl::StrCat("a prompt of ", ends[i] - ends[i - 1],
                                                     " tokens; model ", info.name, " takes 1 to ",
                                                     info.max_positions));
    }
  }
  for (size_t t = 0; t < batch.token_ids.size(); ++t) {
    if (batch.token_ids[t] >= static_cast<uint32_t>(info.vocab_size)) {
      return absl::InvalidArgumentError(absl::StrCat("token ID ", batch.token_ids[t], " at ", t,
                                                     " is not below vocab_size ", info.vocab_size));
    }
  }
  return absl::OkStatus();
}

}  // namespace

int64_t LayerScratchBytes(const ModelInfo& info, int64_t tokens) {
  return tokens * (2 * info.q_heads + 2 * info.kv_heads) * info.head_dim *
         static_cast<int64_t>(sizeof(float));
}

LayerScratch SplitLayerScratch(const ModelInfo& info, int64_t tokens, void* memory) {
  const int64_t q_values = tokens * info.q_heads * info.head_dim;
  const int64_t kv_values = tokens * info.kv_heads * info.head_dim;
  LayerScratch scratch;
  scratch.q = static_cast<float*>(memory);
  scratch.o = scratch.q + q_values;
  scratch.k = scratch.o + q_values;
  scratch.v = scratch.k + kv_values;
  return scratch;
}

absl::StatusOr<std::unique_ptr<Transformer>> Transformer::Load(const std::string& name,
                                                               const std::string& directory,
                                                               Backend& backend) {
  const std::string config_path = directory + "/config.json";
  absl::StatusOr<std::string> text = ReadConfigFile(config_path);
  if (!text.ok()) return text.status();
  absl::StatusOr<ModelConfig> config = ParseModelConfig(*text, config_path);
  if (!config.ok()) return config.status();
  absl::StatusOr<SafeTensors> tensors = SafeTensors::Open(directory);
  if (!tensors.ok()) return tensors.status();
  absl::StatusOr<DType> dtype = CheckpointDType(*config, *tensors, directory);
  if (!dtype.ok()) return dtype.status();

  std::unique_ptr<Transformer> model(
      new Transformer(*std::move(config), *std::move(tensors), backend));
  const ModelConfig& c = model->config_;
  model->info_ = {.name = name,
                  .model_type = c.model_type,
                  .revision = c.revision,
                  .layers = c.layers,
                  .q_heads = c.q_heads,
                  .kv_heads = c.kv_heads,
                  .head_dim = c.head_dim,
                  .hidden_size = c.hidden_size,
                  .vocab_size = c.vocab_size,
                  .max_positions = c.max_positions,
                  .layer_weights = LinearWeights(c),
                  .dtype = *dtype,
                  .rope_theta = c.rope.theta,
                  .rope_scaling = Name(c.rope.scaling)};
  if (absl::Status s = model->LoadWeights(directory); !s.ok()) return s;
  if (absl::Status s = model->AllocateTiles(); !s.ok()) return s;
  model->info_.fingerprint = Fingerprint(c, *dtype, model->tensors_);
  return model;
}

absl::Status Transformer::LoadWeights(const std::string& directory) {
  const ModelConfig& c = config_;
  const int64_t q_width = int64_t{c.q_heads} * c.head_dim;
  const int64_t kv_width = int64_t{c.kv_heads} * c.head_dim;
  WeightReader read(directory, tensors_, info_.dtype, backend_.ops());
  inverse_frequency_ = InverseFrequencies(c.rope, c.head_dim);
  embedding_ = read.Take("model.embed_tokens.weight", {c.vocab_size, c.hidden_size});
  for (int i = 0; i < c.layers; ++i) {
    const std::string prefix = absl::StrCat("model.layers.", i, ".");
    const std::string attention = prefix + "self_attn.";
    const std::string mlp = prefix + "mlp.";
    Layer layer;
    layer.input_norm = read.Norm(prefix + "input_layernorm.weight", c.hidden_size);
    layer.q = read.Layer(attention + "q_proj", q_width, c.hidden_size, c.attention_bias);
    layer.k = read.Layer(attention + "k_proj", kv_width, c.hidden_size, c.attention_bias);
    layer.v = read.Layer(attention + "v_proj", kv_width, c.hidden_size, c.attention_bias);
    layer.o = read.Layer(attention + "o_proj", c.hidden_size, q_width, c.attention_bias);
    layer.post_attention_norm =
        read.Norm(prefix + "post_attention_layernorm.weight", c.hidden_size);
    layer.gate = read.Layer(mlp + "gate_proj", c.intermediate_size, c.hidden_size, c.mlp_bias);
    layer.up = read.Layer(mlp + "up_proj", c.intermediate_size, c.hidden_size, c.mlp_bias);
    layer.down = read.Layer(mlp + "down_proj", c.hidden_size, c.intermediate_size, c.mlp_bias);
    layers_.push_back(std::move(layer));
  }
  final_norm_ = read.Norm("model.norm.weight", c.hidden_size);
  const std::string head = c.tie_word_embeddings ? "model.embed_tokens" : "lm_head";
  lm_head_ = read.Layer(head, c.vocab_size, c.hidden_size, /*has_bias=*/false);
  return read.Finish();
}

absl::Status Transformer::AllocateTiles() {
  const auto allocate = [&](int64_t width, Buffer* buffer) -> absl::Status {
    absl::StatusOr<Buffer> memory = backend_.device().Allocate(kTileTokens * width * sizeof(float));
    if (memory.ok()) *buffer = *std::move(memory);
    return memory.status();
  };
  if (absl::Status s = allocate(config_.hidden_size, &normed_); !s.ok()) return s;
  if (absl::Status s = allocate(config_.intermediate_size, &gate_); !s.ok()) return s;
  return allocate(config_.intermediate_size, &up_);
}

absl::Status Transformer::Begin(PrefillBatch& batch, Stream stream) {
  if (absl::Status s = CheckBatch(batch, info_); !s.ok()) return s;
  absl::StatusOr<Buffer> residual =
      backend_.device().Allocate(batch.tokens() * info_.hidden_size * sizeof(float));
  if (!residual.ok()) return residual.status();
  batch.residual = *std::move(residual);
  batch.positions.clear();
  batch.positions.reserve(batch.token_ids.size());
  for (size_t i = 1; i < batch.cu_seqlens.size(); ++i) {
    const int64_t length = batch.cu_seqlens[i] - batch.cu_seqlens[i - 1];
    for (int64_t p = 0; p < length; ++p) batch.positions.push_back(static_cast<int32_t>(p));
  }
  return backend_.ops().Embed(embedding_, info_.dtype, info_.hidden_size, batch.token_ids.data(),
                              batch.tokens(), batch.residual.as<float>(), stream);
}

absl::Status Transformer::ProjectQkv(int layer, const PrefillBatch& batch,
                                     const LayerScratch& scratch, Stream stream) {
  const Layer& weights = layers_[layer];
  for (int64_t begin = 0; begin < batch.tokens(); begin += kTileTokens) {
    const int64_t tokens = std::min(kTileTokens, batch.tokens() - begin);
    if (absl::Status s = Normalize(weights.input_norm, batch, begin, tokens, stream); !s.ok()) {
      return s;
    }
    const float* x = normed_.as<float>();
    const int64_t q_begin = begin * info_.q_heads * info_.head_dim;
    const int64_t kv_begin = begin * info_.kv_heads * info_.head_dim;
    float* q = scratch.q + q_begin;
    float* k = scratch.k + kv_begin;
    if (absl::Status s = Multiply(*weights.q, x, q, tokens, false, stream); !s.ok()) return s;
    if (absl::Status s = Multiply(*weights.k, x, k, tokens, false, stream); !s.ok()) return s;
    if (absl::Status s = Multiply(*weights.v, x, scratch.v + kv_begin, tokens, false, stream);
        !s.ok()) {
      return s;
    }
    const int32_t* positions = batch.positions.data() + begin;
    if (absl::Status s = Rotate(q, info_.q_heads, positions, tokens, stream); !s.ok()) return s;
    if (absl::Status s = Rotate(k, info_.kv_heads, positions, tokens, stream); !s.ok()) return s;
  }
  return absl::OkStatus();
}

absl::Status Transformer::FinishLayer(int layer, PrefillBatch& batch, const LayerScratch& scratch,
                                      Stream stream) {
  const Layer& weights = layers_[layer];
  float* gate = gate_.as<float>();
  float* up = up_.as<float>();
  for (int64_t begin = 0; begin < batch.tokens(); begin += kTileTokens) {
    const int64_t tokens = std::min(kTileTokens, batch.tokens() - begin);
    const float* attended = scratch.o + begin * info_.q_heads * info_.head_dim;
    float* residual = batch.residual.as<float>() + begin * info_.hidden_size;
    if (absl::Status s = Multiply(*weights.o, attended, residual, tokens, true, stream); !s.ok()) {
      return s;
    }
    if (absl::Status s = Normalize(weights.post_attention_norm, batch, begin, tokens, stream);
        !s.ok()) {
      return s;
    }
    const float* x = normed_.as<float>();
    if (absl::Status s = Multiply(*weights.gate, x, gate, tokens, false, stream); !s.ok()) return s;
    if (absl::Status s = Multiply(*weights.up, x, up, tokens, false, stream); !s.ok()) return s;
    if (absl::Status s =
            backend_.ops().SwiGlu(gate, up, tokens * config_.intermediate_size, gate, stream);
        !s.ok()) {
      return s;
    }
    if (absl::Status s = Multiply(*weights.down, gate, residual, tokens, true, stream); !s.ok()) {
      return s;
    }
  }
  return absl::OkStatus();
}

absl::Status Transformer::Logits(const PrefillBatch& batch, int64_t row, int64_t rows, float* out,
                                 Stream stream) {
  for (int64_t done = 0; done < rows; done += kTileTokens) {
    const int64_t tokens = std::min(kTileTokens, rows - done);
    if (absl::Status s = Normalize(final_norm_, batch, row + done, tokens, stream); !s.ok()) {
      return s;
    }
    if (absl::Status s = Multiply(*lm_head_, normed_.as<float>(), out + done * info_.vocab_size,
                                  tokens, false, stream);
        !s.ok()) {
      return s;
    }
  }
  return absl::OkStatus();
}

absl::Status Transformer::Normalize(const std::vector<float>& weight, const PrefillBatch& batch,
                                    int64_t begin, int64_t tokens, Stream stream) {
  return backend_.ops().RmsNorm(batch.residual.as<float>() + begin * info_.hidden_size,
                                weight.data(), config_.rms_norm_eps, info_.hidden_size, tokens,
                                normed_.as<float>(), stream);
}

absl::Status Transformer::Multiply(const Linear& linear, const float* x, float* y, int64_t tokens,
                                   bool accumulate, Stream stream) {
  return backend_.ops().Apply({.linear = &linear,
                               .x = x,
                               .x_stride = linear.in_features(),
                               .y = y,
                               .y_stride = linear.out_features(),
                               .tokens = tokens,
                               .accumulate = accumulate},
                              stream);
}

absl::Status Transformer::Rotate(float* x, int heads, const int32_t* positions, int64_t tokens,
                                 Stream stream) {
  return backend_.ops().Rope({.x = x,
                              .token_stride = int64_t{heads} * info_.head_dim,
                              .heads = heads,
                              .head_dim = info_.head_dim,
                              .positions = positions,
                              .inverse_frequency = inverse_frequency_.data(),
                              .tokens = tokens},
                             stream);
}

}  // namespace prefilld

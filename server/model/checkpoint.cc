#include "server/model/checkpoint.h"

#include <fstream>
#include <set>
#include <string_view>
#include <utility>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "server/model/fingerprint.h"
#include "server/model/rope.h"

namespace prefilld {
namespace {

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
  WeightReader(const std::string& directory, const Checkpoint& checkpoint, Ops& ops)
      : directory_(directory),
        tensors_(checkpoint.tensors),
        dtype_(checkpoint.dtype),
        eps_(checkpoint.config.rms_norm_eps),
        ops_(ops) {}

  std::unique_ptr<Norm> TakeNorm(const std::string& name, int64_t width) {
    const void* weight = Take(name + ".weight", {width});
    return Prepare<Norm>(
        NormWeights{.weight = weight, .dtype = dtype_, .width = width, .eps = eps_});
  }

  std::unique_ptr<Embedding> TakeEmbedding(const std::string& name, int64_t rows, int64_t width) {
    const void* table = Take(name + ".weight", {rows, width});
    return Prepare<Embedding>(
        EmbeddingWeights{.table = table, .dtype = dtype_, .vocabulary = rows, .width = width});
  }

  // Maps of `in` features that are read together, each a tensor of its own.
  struct Part {
    std::string name;
    int64_t out;
    bool has_bias;
  };
  std::unique_ptr<Linear> TakeLinear(int64_t in, const std::vector<Part>& parts) {
    LinearWeights weights{.dtype = dtype_, .in_features = in};
    for (const Part& part : parts) {
      const void* weight = Take(part.name + ".weight", {part.out, in});
      const void* bias = part.has_bias ? Take(part.name + ".bias", {part.out}) : nullptr;
      weights.parts.push_back({.weight = weight, .bias = bias, .out_features = part.out});
    }
    return Prepare<Linear>(weights);
  }

  // By the backend; null after a failure.
  template <typename Prepared, typename Weights>
  std::unique_ptr<Prepared> Prepare(const Weights& weights) {
    if (!status_.ok()) return nullptr;
    auto prepared = ops_.Prepare(weights);
    Keep(prepared.status());
    return prepared.ok() ? *std::move(prepared) : nullptr;
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

  void Fail(const std::string& problem) {
    Keep(absl::InvalidArgumentError(absl::StrCat(directory_, ": ", problem)));
  }
  void Keep(const absl::Status& status) {
    if (status_.ok()) status_ = status;
  }

  const std::string& directory_;
  const SafeTensors& tensors_;
  const DType dtype_;
  const float eps_;
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

LayerWeights TakeLayer(WeightReader& read, const ModelConfig& c, int index) {
  const std::string prefix = absl::StrCat("model.layers.", index, ".");
  const std::string attention = prefix + "self_attn.", mlp = prefix + "mlp.";
  const int64_t q_width = int64_t{c.q_heads} * c.head_dim;
  const int64_t kv_width = int64_t{c.kv_heads} * c.head_dim;
  LayerWeights layer;
  layer.input_norm = read.TakeNorm(prefix + "input_layernorm", c.hidden_size);
  layer.qkv = read.TakeLinear(c.hidden_size, {{attention + "q_proj", q_width, c.attention_bias},
                                              {attention + "k_proj", kv_width, c.attention_bias},
                                              {attention + "v_proj", kv_width, c.attention_bias}});
  layer.o = read.TakeLinear(q_width, {{attention + "o_proj", c.hidden_size, c.attention_bias}});
  layer.post_attention_norm = read.TakeNorm(prefix + "post_attention_layernorm", c.hidden_size);
  layer.gate_up =
      read.TakeLinear(c.hidden_size, {{mlp + "gate_proj", c.intermediate_size, c.mlp_bias},
                                      {mlp + "up_proj", c.intermediate_size, c.mlp_bias}});
  layer.down =
      read.TakeLinear(c.intermediate_size, {{mlp + "down_proj", c.hidden_size, c.mlp_bias}});
  return layer;
}

}  // namespace

absl::StatusOr<Checkpoint> Checkpoint::Load(const std::string& directory, Ops& ops) {
  const std::string config_path = directory + "/config.json";
  absl::StatusOr<std::string> text = ReadConfigFile(config_path);
  if (!text.ok()) return text.status();
  absl::StatusOr<ModelConfig> config = ParseModelConfig(*text, config_path);
  if (!config.ok()) return config.status();
  absl::StatusOr<SafeTensors> tensors = SafeTensors::Open(directory);
  if (!tensors.ok()) return tensors.status();
  absl::StatusOr<DType> dtype = CheckpointDType(*config, *tensors, directory);
  if (!dtype.ok()) return dtype.status();

  Checkpoint out{.config = *std::move(config), .dtype = *dtype, .tensors = *std::move(tensors)};
  const ModelConfig& c = out.config;
  WeightReader read(directory, out, ops);
  out.rotary = read.Prepare<Rotary>(
      RotaryFrequencies{.inverse = InverseFrequencies(c.rope, c.head_dim), .head_dim = c.head_dim});
  out.embedding = read.TakeEmbedding("model.embed_tokens", c.vocab_size, c.hidden_size);
  for (int i = 0; i < c.layers; ++i) out.layers.push_back(TakeLayer(read, c, i));
  out.final_norm = read.TakeNorm("model.norm", c.hidden_size);
  out.lm_head = read.TakeLinear(
      c.hidden_size, {{c.tie_word_embeddings ? "model.embed_tokens" : "lm_head", c.vocab_size,
                       /*has_bias=*/false}});
  if (absl::Status status = read.Finish(); !status.ok()) return status;
  out.fingerprint = Fingerprint(c, out.dtype, out.tensors);
  return out;
}

}  // namespace prefilld

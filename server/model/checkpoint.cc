#include "server/model/checkpoint.h"

#include <filesystem>
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
bool Ignored(std::string_view name) { return name.ends_with(kIgnoredSuffix); }

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
  WeightReader(const std::string& directory, const Checkpoint& checkpoint, Ops& ops,
               const LoadProgress& progress)
      : directory_(directory),
        tensors_(checkpoint.tensors),
        dtype_(checkpoint.dtype),
        eps_(checkpoint.config.rms_norm_eps),
        ops_(ops),
        progress_(progress) {
    for (const auto& [name, tensor] : tensors_.tensors())
      bytes_ += Ignored(name) ? 0 : tensor.bytes;
  }

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

  // Maps of `in` features that are read together, each a tensor of its own, or all their rows in
  // the tensor `fused`.
  struct Part {
    std::string name;
    int64_t out;
  };
  struct Maps {
    int64_t in;
    bool has_bias;
    std::vector<Part> parts;
    std::string fused;
    const Embedding* tied = nullptr;
  };
  std::unique_ptr<Linear> TakeLinear(const Maps& maps) {
    LinearWeights weights{.dtype = dtype_, .in_features = maps.in, .tied = maps.tied};
    if (maps.fused.empty()) {
      for (const Part& part : maps.parts) {
        weights.parts.push_back(TakePart(part, maps.in, maps.has_bias));
      }
    } else {
      int64_t rows = 0;
      for (const Part& part : maps.parts) rows += part.out;
      LinearPart all = TakePart({maps.fused, rows}, maps.in, maps.has_bias);
      if (!status_.ok()) return nullptr;
      const char* weight = static_cast<const char*>(all.weight);
      const char* bias = static_cast<const char*>(all.bias);
      for (const Part& part : maps.parts) {
        weights.parts.push_back({.weight = weight, .bias = bias, .out_features = part.out});
        const int64_t bytes = part.out * static_cast<int64_t>(SizeOf(dtype_));
        weight += bytes * maps.in;
        if (bias != nullptr) bias += bytes;
      }
    }
    return Prepare<Linear>(weights);
  }

  // By the backend; null after a failure.
  template <typename Prepared, typename Weights>
  std::unique_ptr<Prepared> Prepare(const Weights& weights) {
    if (!status_.ok()) return nullptr;
    auto prepared = ops_.Prepare(weights);
    Keep(prepared.status());
    if (progress_) progress_(taken_bytes_, bytes_);
    return prepared.ok() ? *std::move(prepared) : nullptr;
  }

  uint64_t taken_bytes() const { return taken_bytes_; }
  // The first failure, or a tensor that nobody took.
  absl::Status Finish() {
    for (const auto& [name, tensor] : tensors_.tensors()) {
      if (!status_.ok()) break;
      if (taken_.count(name) == 0 && !Ignored(name)) {
        Fail(absl::StrCat("tensor '", absl::CHexEscape(name),
                          "' is not one that config.json accounts for"));
      }
    }
    return status_;
  }

 private:
  LinearPart TakePart(const Part& part, int64_t in, bool has_bias) {
    const void* weight = Take(part.name + ".weight", {part.out, in});
    const void* bias = has_bias ? Take(part.name + ".bias", {part.out}) : nullptr;
    return {.weight = weight, .bias = bias, .out_features = part.out};
  }

  const void* Take(const std::string& name, const std::vector<int64_t>& shape) {
    const auto it = tensors_.tensors().find(name);
    if (it == tensors_.tensors().end()) {
      Fail(absl::StrCat("tensor '", name, "' is missing"));
      return nullptr;
    }
    const SafeTensor& tensor = it->second;
    if (taken_.insert(name).second) taken_bytes_ += tensor.bytes;
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
  const LoadProgress& progress_;
  std::set<std::string> taken_;
  uint64_t bytes_ = 0, taken_bytes_ = 0;
  absl::Status status_;
};

// The config's dtype, else that of the embedding.
absl::StatusOr<DType> CheckpointDType(const ModelConfig& config, const SafeTensors& tensors,
                                      const std::string& directory) {
  if (config.dtype.has_value()) return *config.dtype;
  const std::string embedding = std::string(config.family->tensors.embedding) + ".weight";
  const auto it = tensors.tensors().find(embedding);
  const std::string name = it == tensors.tensors().end() ? "" : it->second.dtype;
  for (const DType dtype : {DType::kF32, DType::kBF16, DType::kF16}) {
    if (name == Name(dtype)) return dtype;
  }
  return absl::InvalidArgumentError(absl::StrCat(directory, ": neither config.json nor ", embedding,
                                                 " gives a dtype of F32, BF16, F16"));
}

LayerWeights TakeLayer(WeightReader& read, const ModelConfig& c, int index) {
  const TensorNames& names = c.family->tensors;
  const std::string prefix = absl::StrCat(std::string(names.layers), index, ".");
  const auto at = [&](std::string_view name) {
    return name.empty() ? std::string() : prefix + std::string(name);
  };
  const int64_t q_width = int64_t{c.q_heads} * c.head_dim;
  const int64_t kv_width = int64_t{c.kv_heads} * c.head_dim;
  LayerWeights layer;
  layer.input_norm = read.TakeNorm(at(names.input_norm), c.hidden_size);
  layer.qkv =
      read.TakeLinear({c.hidden_size,
                       c.qkv_bias,
                       {{at(names.q), q_width}, {at(names.k), kv_width}, {at(names.v), kv_width}},
                       at(names.qkv)});
  if (!names.q_norm.empty()) layer.q_norm = read.TakeNorm(at(names.q_norm), c.head_dim);
  if (!names.k_norm.empty()) layer.k_norm = read.TakeNorm(at(names.k_norm), c.head_dim);
  layer.o = read.TakeLinear({q_width, c.o_bias, {{at(names.o), c.hidden_size}}, ""});
  layer.post_attention_norm = read.TakeNorm(at(names.post_attention_norm), c.hidden_size);
  layer.gate_up =
      read.TakeLinear({c.hidden_size,
                       c.mlp_bias,
                       {{at(names.gate), c.intermediate_size}, {at(names.up), c.intermediate_size}},
                       at(names.gate_up)});
  layer.down =
      read.TakeLinear({c.intermediate_size, c.mlp_bias, {{at(names.down), c.hidden_size}}, ""});
  return layer;
}

}  // namespace

absl::StatusOr<Checkpoint> Checkpoint::Load(const std::string& directory, Ops& ops,
                                            const LoadProgress& progress) {
  std::error_code unknown;
  if (!std::filesystem::is_directory(directory, unknown)) {
    return absl::NotFoundError(directory +
                               ": is no directory here; a model of the Hugging Face hub is to be "
                               "downloaded first, and named by where it lies");
  }
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
  WeightReader read(directory, out, ops, progress);
  const TensorNames& names = c.family->tensors;
  const std::string embedding(names.embedding);
  out.rotary =
      read.Prepare<Rotary>(RotaryFrequencies{.inverse = InverseFrequencies(c.rope, c.head_dim),
                                             .pairing = c.rope.pairing,
                                             .head_dim = c.head_dim,
                                             .scale = c.rope.attention_factor});
  out.embedding = read.TakeEmbedding(embedding, c.vocab_size, c.hidden_size);
  for (int i = 0; i < c.layers; ++i) out.layers.push_back(TakeLayer(read, c, i));
  out.final_norm = read.TakeNorm(std::string(names.final_norm), c.hidden_size);
  const bool tied = c.tie_word_embeddings;
  const std::string head = tied ? embedding : std::string(names.lm_head);
  out.lm_head = read.TakeLinear({.in = c.hidden_size,
                                 .has_bias = false,
                                 .parts = {{head, c.vocab_size}},
                                 .fused = "",
                                 .tied = tied ? out.embedding.get() : nullptr});
  if (absl::Status status = read.Finish(); !status.ok()) return status;
  out.bytes = read.taken_bytes();
  out.fingerprint = Fingerprint(c, out.dtype, out.tensors);
  // Else the fingerprint might be of other weights than those that were prepared.
  if (absl::Status status = out.tensors.CheckFiles(); !status.ok()) return status;
  return out;
}

}  // namespace prefilld

// A transformer of the llama family, written over kernels/ops.h: everything of a layer but
// attention, which the engine runs between ProjectQkv and FinishLayer.
//
// Activations are F32. Hidden widths are walked in tiles of tokens, so that what a layer needs
// beyond LayerScratch does not grow with the prompt. The engine thread alone calls it; calls
// enqueue on the stream and do not wait for it.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/backend.h"
#include "kernels/ops.h"
#include "kernels/tensor.h"
#include "server/model/config.h"
#include "server/model/safetensors.h"

namespace prefilld {

struct ModelInfo {
  std::string name;  // the operator's
  std::string model_type;
  std::string revision;  // of the checkpoint, empty when it does not say
  int layers = 0;
  int q_heads = 0;
  int kv_heads = 0;
  int head_dim = 0;
  int hidden_size = 0;
  int vocab_size = 0;
  int64_t max_positions = 0;
  int64_t layer_weights = 0;  // elements of one layer's linear maps, for cost estimates
  DType dtype = DType::kF32;  // of the checkpoint, and of KV unless another is asked for
  double rope_theta = 0;
  std::string rope_scaling;  // none | linear | llama3
  std::string fingerprint;   // SHA-256 in hex; equal exactly for the same weights and mathematics
};

// Prompts that go through the model together, ragged: prompt i is tokens [cu_seqlens[i],
// cu_seqlens[i + 1]), and its positions start at 0.
struct PrefillBatch {
  std::vector<uint32_t> token_ids;  // [tokens]
  std::vector<int64_t> cu_seqlens;  // [prompts + 1], from 0
  std::vector<int32_t> positions;   // [tokens], set by Transformer::Begin
  Buffer residual;                  // [tokens, hidden_size] F32, set by Transformer::Begin

  int64_t tokens() const { return static_cast<int64_t>(token_ids.size()); }
};

// What attention reads and writes in one layer. Contiguous F32; owned by the engine, shared by all
// batches.
struct LayerScratch {
  float* q = nullptr;  // [tokens, q_heads, head_dim], after RoPE
  float* k = nullptr;  // [tokens, kv_heads, head_dim], after RoPE
  float* v = nullptr;  // [tokens, kv_heads, head_dim]
  float* o = nullptr;  // [tokens, q_heads, head_dim], attention's output
};
int64_t LayerScratchBytes(const ModelInfo& info, int64_t tokens);
// Splits LayerScratchBytes(info, tokens) bytes at `memory`.
LayerScratch SplitLayerScratch(const ModelInfo& info, int64_t tokens, void* memory);

class Transformer {
 public:
  // Reads the Hugging Face directory and checks all of it: INVALID_ARGUMENT or NOT_FOUND, in one
  // line that names the file and the key or tensor. `backend` outlives the model.
  static absl::StatusOr<std::unique_ptr<Transformer>> Load(const std::string& name,
                                                           const std::string& directory,
                                                           Backend& backend);

  const ModelInfo& info() const { return info_; }

  // Checks the batch's token IDs and lengths, allocates its residual and embeds.
  absl::Status Begin(PrefillBatch& batch, Stream stream);
  // Writes q, k and v of `layer` from the residual.
  absl::Status ProjectQkv(int layer, const PrefillBatch& batch, const LayerScratch& scratch,
                          Stream stream);
  // Adds the output projection of scratch.o and then the MLP to the residual.
  absl::Status FinishLayer(int layer, PrefillBatch& batch, const LayerScratch& scratch,
                           Stream stream);
  // out[rows, vocab_size]: logits of tokens [row, row + rows) after the last layer.
  absl::Status Logits(const PrefillBatch& batch, int64_t row, int64_t rows, float* out,
                      Stream stream);

 private:
  struct Layer {
    std::vector<float> input_norm, post_attention_norm;  // [hidden_size]
    std::unique_ptr<Linear> q, k, v, o, gate, up, down;
  };

  Transformer(ModelConfig config, SafeTensors tensors, Backend& backend)
      : config_(std::move(config)), tensors_(std::move(tensors)), backend_(backend) {}
  absl::Status LoadWeights(const std::string& directory);
  absl::Status AllocateTiles();

  // normed_ = the norm of `tokens` rows of the residual, from `begin`.
  absl::Status Normalize(const std::vector<float>& weight, const PrefillBatch& batch, int64_t begin,
                         int64_t tokens, Stream stream);
  // Contiguous rows: y[tokens, out] (+)= x[tokens, in] W^T + bias.
  absl::Status Multiply(const Linear& linear, const float* x, float* y, int64_t tokens,
                        bool accumulate, Stream stream);
  absl::Status Rotate(float* x, int heads, const int32_t* positions, int64_t tokens, Stream stream);

  ModelConfig config_;
  SafeTensors tensors_;  // the mapping that prepared weights may point into
  Backend& backend_;
  ModelInfo info_;
  std::vector<float> inverse_frequency_;  // [head_dim / 2]
  const void* embedding_ = nullptr;       // [vocab_size, hidden_size] of info_.dtype
  std::vector<Layer> layers_;
  std::vector<float> final_norm_;  // [hidden_size]
  std::unique_ptr<Linear> lm_head_;
  Buffer normed_;     // [kTileTokens, hidden_size] F32
  Buffer gate_, up_;  // [kTileTokens, intermediate_size] F32
};

}  // namespace prefilld

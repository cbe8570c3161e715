// config.json of a Hugging Face model directory. A closed reading: keys that change the mathematics
// are understood or refused, and a key that is neither known nor known to be harmless is refused by
// name.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "absl/status/statusor.h"
#include "kernels/tensor.h"
#include "server/model/family.h"
#include "server/model/rope.h"

namespace prefilld {

struct ModelConfig {
  const Family* family = nullptr;  // the row that the file was read by
  std::string model_type;
  std::string model_id;  // _name_or_path, may be empty
  std::string revision;  // _commit_hash, may be empty
  int vocab_size = 0;
  int hidden_size = 0;
  int intermediate_size = 0;
  int layers = 0;
  int q_heads = 0;
  int kv_heads = 0;
  int head_dim = 0;
  int64_t max_positions = 0;   // tokens of a prompt: what rope and a sliding window allow
  int64_t sliding_window = 0;  // 0: none
  float rms_norm_eps = 1e-6f;
  RopeConfig rope;
  bool tie_word_embeddings = false;
  bool qkv_bias = false, o_bias = false;
  bool mlp_bias = false;       // on gate, up and down
  std::optional<DType> dtype;  // dtype or torch_dtype; the tensors' own when the config has none
};

// Every size is positive and so bounded that the products of any three fit in 63 bits.
// INVALID_ARGUMENT names `source` and the key.
absl::StatusOr<ModelConfig> ParseModelConfig(std::string_view json, std::string_view source);

}  // namespace prefilld

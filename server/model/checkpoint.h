// The weights of a Hugging Face directory, read, checked, and prepared by a backend.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/ops.h"
#include "kernels/tensor.h"
#include "server/model/config.h"
#include "server/model/safetensors.h"

namespace prefilld {

// Told as weights are prepared, on the thread that loads: bytes of the checkpoint that are, of all.
using LoadProgress = std::function<void(uint64_t bytes, uint64_t of_bytes)>;

struct LayerWeights {
  std::unique_ptr<Norm> input_norm, post_attention_norm;  // [hidden_size]
  std::unique_ptr<Norm> q_norm, k_norm;                   // [head_dim], or null
  std::unique_ptr<Linear> qkv, o, gate_up, down;
};

struct Checkpoint {
  ModelConfig config;
  DType dtype = DType::kF32;
  SafeTensors tensors;  // the mapping that prepared weights may point into
  std::unique_ptr<Embedding> embedding;
  std::unique_ptr<Rotary> rotary;
  std::vector<LayerWeights> layers;
  std::unique_ptr<Norm> final_norm;
  std::unique_ptr<Linear> lm_head;
  uint64_t bytes = 0;  // of all that was prepared, as the files have it
  std::string fingerprint;

  // Reads the directory and checks all of it: INVALID_ARGUMENT or NOT_FOUND, in one line that names
  // the file and the key or tensor. What is prepared belongs to `ops`.
  static absl::StatusOr<Checkpoint> Load(const std::string& directory, Ops& ops,
                                         const LoadProgress& progress = nullptr);
};

}  // namespace prefilld

// What differs between families of models, as data: the reading of config.json, the loading of
// weights and the fingerprint are driven by a row, and a new family is a new row.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>

#include "kernels/ops.h"

namespace prefilld {

// A yes or no of config.json, and what it is when left out. Without a key it is fixed.
struct FlagKey {
  std::string_view key;
  bool absent = false;
};

// A key that would change the mathematics, and the one value (JSON) at which it does not. Null is
// taken for every key.
struct NeutralKey {
  std::string_view key;
  std::string_view value;
};

// Names of tensors, without ".weight" and ".bias". Of a layer's, what follows "layers.{i}.".
struct TensorNames {
  std::string_view embedding, final_norm, lm_head, layers;
  std::string_view input_norm, post_attention_norm;
  std::string_view q_norm, k_norm;  // norms of [head_dim] over each head; empty: none
  std::string_view q, k, v;         // three tensors,
  std::string_view qkv;             // or one of all their rows, in this order
  std::string_view o;
  std::string_view gate, up;  // two tensors,
  std::string_view gate_up;   // or one, gate's rows first
  std::string_view down;
};

struct Family {
  std::string_view model_type;  // of config.json
  FlagKey qkv_bias, o_bias, mlp_bias;
  FlagKey tie_word_embeddings;
  double rms_norm_eps = 0;  // when left out
  double rope_theta = 0;    // when left out
  // sliding_window when left out, where the family reads it: a prompt that fits is attended in
  // full, a longer one is not taken. Elsewhere 0, and the key lists say at what it is taken.
  int64_t sliding_window = 0;
  // The share of a head's channels that turn; partial_rotary_factor may say another one where the
  // family reads it, else only this.
  double rotary_share = 1;
  bool reads_rotary_share = false;
  RotaryPairing pairing = RotaryPairing::kHalf;
  TensorNames tensors;
  std::span<const std::string_view> harmless_keys;  // without an effect on a prefill
  std::span<const NeutralKey> neutral_keys;         // among them how a sliding window is not in use
};

// The table. Null for a type that it lacks; FamilyNames lists those it has.
const Family* FindFamily(std::string_view model_type);
std::string FamilyNames();

}  // namespace prefilld

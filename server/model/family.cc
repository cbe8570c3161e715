#include "server/model/family.h"

#include <algorithm>
#include <array>
#include <cstddef>

#include "absl/strings/str_join.h"

namespace prefilld {
namespace {

// Tokens, sampling, training, and what older versions of transformers wrote into every file.
constexpr std::string_view kHarmlessKeys[] = {
    "architectures",
    "attention_dropout",
    "bad_words_ids",
    "begin_suppress_tokens",
    "bos_token_id",
    "decoder_start_token_id",
    "diversity_penalty",
    "do_sample",
    "early_stopping",
    "encoder_no_repeat_ngram_size",
    "eos_token_id",
    "exponential_decay_length_penalty",
    "finetuning_task",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "id2label",
    "initializer_range",
    "is_decoder",
    "is_llama_config",
    "label2id",
    "length_penalty",
    "max_length",
    "min_length",
    "no_repeat_ngram_size",
    "num_beam_groups",
    "num_beams",
    "num_return_sequences",
    "output_attentions",
    "output_hidden_states",
    "output_scores",
    "pad_token_id",
    "prefix",
    "problem_type",
    "remove_invalid_values",
    "repetition_penalty",
    "return_dict",
    "return_dict_in_generate",
    "sep_token_id",
    "suppress_tokens",
    "task_specific_params",
    "temperature",
    "tf_legacy_loss",
    "tokenizer_class",
    "top_k",
    "top_p",
    "torchscript",
    "transformers.js_config",
    "transformers_version",
    "typical_p",
    "unsloth_version",
    "use_cache",
};

template <size_t kSome, size_t kMore>
constexpr std::array<std::string_view, kSome + kMore> Both(const std::string_view (&some)[kSome],
                                                           const std::string_view (&more)[kMore]) {
  std::array<std::string_view, kSome + kMore> both;
  std::copy(more, more + kMore, std::copy(some, some + kSome, both.begin()));
  return both;
}

// Qwen's files say which window which layers would have, and with use_sliding_window that none has.
constexpr std::string_view kUnusedWindow[] = {"max_window_layers", "sliding_window"};
constexpr auto kQwenHarmlessKeys = Both(kHarmlessKeys, kUnusedWindow);

constexpr NeutralKey kNeutralKeys[] = {
    {"add_cross_attention", "false"},
    {"attention_bias", "false"},  // where the family reads none
    {"attn_logit_softcapping", "null"},
    {"chunk_size_feed_forward", "0"},
    {"cross_attention_hidden_size", "null"},
    {"final_logit_softcapping", "null"},
    {"hidden_act", "\"silu\""},
    {"is_encoder_decoder", "false"},
    {"mlp_bias", "false"},  // likewise
    {"num_local_experts", "null"},
    {"pretraining_tp", "1"},
    {"pruned_heads", "{}"},
    {"quantization_config", "null"},
    {"rope_interleaved", "false"},
    {"sliding_window", "null"},
    {"tie_encoder_decoder", "false"},
    {"use_bfloat16", "false"},
    {"use_sliding_window", "false"},
};

constexpr TensorNames kLlamaTensors = {
    .embedding = "model.embed_tokens",
    .final_norm = "model.norm",
    .lm_head = "lm_head",
    .layers = "model.layers.",
    .input_norm = "input_layernorm",
    .post_attention_norm = "post_attention_layernorm",
    .q = "self_attn.q_proj",
    .k = "self_attn.k_proj",
    .v = "self_attn.v_proj",
    .o = "self_attn.o_proj",
    .gate = "mlp.gate_proj",
    .up = "mlp.up_proj",
    .down = "mlp.down_proj",
};

constexpr TensorNames WithHeadNorms(TensorNames names) {
  names.q_norm = "self_attn.q_norm";
  names.k_norm = "self_attn.k_norm";
  return names;
}

constexpr TensorNames WithGateAndUpInOne(TensorNames names) {
  names.gate = names.up = "";
  names.gate_up = "mlp.gate_up_proj";
  return names;
}

constexpr Family kFamilies[] = {
    {.model_type = "llama",
     .qkv_bias = {"attention_bias"},
     .o_bias = {"attention_bias"},
     .mlp_bias = {"mlp_bias"},
     .tie_word_embeddings = {"tie_word_embeddings"},
     .rms_norm_eps = 1e-6,
     .rope_theta = 10000,
     .tensors = kLlamaTensors,
     .harmless_keys = kHarmlessKeys,
     .neutral_keys = kNeutralKeys},
    {.model_type = "mistral",
     .tie_word_embeddings = {"tie_word_embeddings"},
     .rms_norm_eps = 1e-6,
     .rope_theta = 10000,
     .sliding_window = 4096,
     .tensors = kLlamaTensors,
     .harmless_keys = kHarmlessKeys,
     .neutral_keys = kNeutralKeys},
    {.model_type = "qwen2",
     .qkv_bias = {.key = "", .absent = true},
     .tie_word_embeddings = {"tie_word_embeddings"},
     .rms_norm_eps = 1e-6,
     .rope_theta = 10000,
     .tensors = kLlamaTensors,
     .harmless_keys = kQwenHarmlessKeys,
     .neutral_keys = kNeutralKeys},
    {.model_type = "qwen3",
     .qkv_bias = {"attention_bias"},
     .o_bias = {"attention_bias"},
     .tie_word_embeddings = {"tie_word_embeddings"},
     .rms_norm_eps = 1e-6,
     .rope_theta = 10000,
     .tensors = WithHeadNorms(kLlamaTensors),
     .harmless_keys = kQwenHarmlessKeys,
     .neutral_keys = kNeutralKeys},
    {.model_type = "glm",
     .qkv_bias = {.key = "attention_bias", .absent = true},
     .tie_word_embeddings = {"tie_word_embeddings"},
     .rms_norm_eps = 1.5625e-07,
     .rope_theta = 10000,
     .rotary_share = 0.5,
     .reads_rotary_share = true,
     .pairing = RotaryPairing::kInterleaved,
     .tensors = WithGateAndUpInOne(kLlamaTensors),
     .harmless_keys = kHarmlessKeys,
     .neutral_keys = kNeutralKeys},
};

}  // namespace

const Family* FindFamily(std::string_view model_type) {
  for (const Family& family : kFamilies) {
    if (family.model_type == model_type) return &family;
  }
  return nullptr;
}

std::string FamilyNames() {
  return absl::StrJoin(kFamilies, ", ", [](std::string* out, const Family& family) {
    out->append(family.model_type);
  });
}

}  // namespace prefilld

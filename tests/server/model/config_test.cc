#include "server/model/config.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <string>
#include <vector>

namespace prefilld {
namespace {

using testing::HasSubstr;

constexpr char kSizes[] =
    R"("model_type": "llama", "vocab_size": 96, "hidden_size": 64, "intermediate_size": 80,
       "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 1024)";

absl::StatusOr<ModelConfig> Parse(const std::string& more) {
  return ParseModelConfig("{" + std::string(kSizes) + (more.empty() ? "" : ", ") + more + "}",
                          "config.json");
}
// Of another family.
absl::StatusOr<ModelConfig> As(const std::string& model_type, const std::string& more) {
  std::string text = "{" + std::string(kSizes) + (more.empty() ? "" : ", ") + more + "}";
  return ParseModelConfig(text.replace(text.find("llama"), 5, model_type), "config.json");
}
std::string Error(const std::string& more) { return std::string(Parse(more).status().message()); }

TEST(ModelConfig, WhatIsLeftOutHasTheDefaultsOfTransformers) {
  const ModelConfig config = *Parse("");
  EXPECT_EQ(config.vocab_size, 96);
  EXPECT_EQ(config.hidden_size, 64);
  EXPECT_EQ(config.intermediate_size, 80);
  EXPECT_EQ(config.layers, 2);
  EXPECT_EQ(config.q_heads, 4);
  EXPECT_EQ(config.kv_heads, 4);
  EXPECT_EQ(config.head_dim, 16);
  EXPECT_EQ(config.max_positions, 1024);
  EXPECT_EQ(config.rms_norm_eps, 1e-6f);
  EXPECT_EQ(config.rope.theta, 10000);
  EXPECT_EQ(config.rope.scaling, RopeScaling::kNone);
  EXPECT_FALSE(config.tie_word_embeddings);
  EXPECT_FALSE(config.qkv_bias);
  EXPECT_FALSE(config.mlp_bias);
  EXPECT_FALSE(config.dtype.has_value());
}

TEST(ModelConfig, NullIsAsIfLeftOut) {
  const ModelConfig config = *Parse(
      R"("num_key_value_heads": null, "head_dim": null, "rope_scaling": null, "dtype": null,
         "sliding_window": null, "quantization_config": null)");
  EXPECT_EQ(config.kv_heads, 4);
  EXPECT_EQ(config.head_dim, 16);
}

TEST(ModelConfig, ReadsEveryKeyItKnows) {
  const ModelConfig config = *Parse(
      R"("num_key_value_heads": 2, "head_dim": 96, "rms_norm_eps": 1e-5, "rope_theta": 5e5,
         "tie_word_embeddings": true, "attention_bias": true, "mlp_bias": true,
         "torch_dtype": "bfloat16", "_name_or_path": "org/model", "_commit_hash": "abc")");
  EXPECT_EQ(config.kv_heads, 2);
  EXPECT_EQ(config.head_dim, 96);
  EXPECT_EQ(config.rms_norm_eps, 1e-5f);
  EXPECT_EQ(config.rope.theta, 5e5);
  EXPECT_TRUE(config.tie_word_embeddings);
  EXPECT_TRUE(config.qkv_bias);
  EXPECT_TRUE(config.mlp_bias);
  EXPECT_EQ(config.dtype, DType::kBF16);
  EXPECT_EQ(config.model_id, "org/model");
  EXPECT_EQ(config.revision, "abc");
  EXPECT_EQ(Parse(R"("dtype": "float16")")->dtype, DType::kF16);
}

TEST(ModelConfig, RopeIsReadInAllItsSpellings) {
  constexpr char kLlama3[] =
      R"("factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 512)";
  const std::string fields = kLlama3;
  for (const std::string& text :
       {R"("rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", )" + fields + "}",
        R"("rope_theta": 5e5, "rope_scaling": {"type": "llama3", )" + fields + "}",
        R"("rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, )" + fields + "}"}) {
    const auto config = Parse(text);
    ASSERT_TRUE(config.ok()) << config.status();
    EXPECT_EQ(config->rope.theta, 5e5);
    EXPECT_EQ(config->rope.scaling, RopeScaling::kLlama3);
    EXPECT_EQ(config->rope.factor, 8);
    EXPECT_EQ(config->rope.low_freq_factor, 1);
    EXPECT_EQ(config->rope.high_freq_factor, 4);
    EXPECT_EQ(config->rope.original_max_positions, 512);
  }
  const ModelConfig linear = *Parse(R"("rope_scaling": {"type": "linear", "factor": 4})");
  EXPECT_EQ(linear.rope.scaling, RopeScaling::kLinear);
  EXPECT_EQ(linear.rope.factor, 4);
  EXPECT_EQ(Parse(R"("rope_parameters": {"rope_type": "default", "rope_theta": 2e4})")->rope.theta,
            2e4);
}

TEST(ModelConfig, YarnIsReadWithWhatFollowsFromTheRest) {
  const RopeConfig plain = Parse(R"("rope_scaling": {"type": "yarn", "factor": 4,
                                    "original_max_position_embeddings": 512})")
                               ->rope;
  EXPECT_EQ(plain.scaling, RopeScaling::kYarn);
  EXPECT_EQ(plain.factor, 4);
  EXPECT_EQ(plain.original_max_positions, 512);
  EXPECT_EQ(plain.beta_fast, 32);
  EXPECT_EQ(plain.beta_slow, 1);
  EXPECT_TRUE(plain.truncate);
  EXPECT_NEAR(plain.attention_factor, 0.1 * std::log(4) + 1, 1e-6);

  const std::string start = R"("rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, )";
  const RopeConfig all = Parse(start + R"("factor": 8, "beta_fast": 16, "beta_slow": 2,
                                          "truncate": false, "mscale": 2, "mscale_all_dim": 0.5})")
                             ->rope;
  EXPECT_EQ(all.original_max_positions, 1024) << "max_position_embeddings";
  EXPECT_EQ(all.beta_fast, 16);
  EXPECT_EQ(all.beta_slow, 2);
  EXPECT_FALSE(all.truncate);
  EXPECT_NEAR(all.attention_factor, (0.2 * std::log(8) + 1) / (0.05 * std::log(8) + 1), 1e-6);

  const RopeConfig given = Parse(start + R"("factor": null, "attention_factor": 0.75, "mscale": 2,
                                            "original_max_position_embeddings": 512})")
                               ->rope;
  EXPECT_EQ(given.factor, 2) << "max_position_embeddings over the original ones";
  EXPECT_EQ(given.attention_factor, 0.75f);
  EXPECT_THAT(Error(start + R"("factor": 2, "low_freq_factor": 1})"), HasSubstr("low_freq_factor"));
}

TEST(ModelConfig, DynamicScalingStartsAtTheOriginalLength) {
  const ModelConfig config = *Parse(R"("rope_scaling": {"type": "dynamic", "factor": 2})");
  EXPECT_EQ(config.rope.scaling, RopeScaling::kDynamic);
  EXPECT_EQ(config.rope.factor, 2);
  EXPECT_EQ(config.rope.original_max_positions, 1024);
}

TEST(ModelConfig, PromptsAreAsLongAsTheScalingStretches) {
  const auto positions = [](const std::string& rope) {
    return Parse("\"rope_scaling\": {" + rope + "}")->max_positions;
  };
  EXPECT_EQ(positions(R"("type": "linear", "factor": 4)"), 4096);
  EXPECT_EQ(positions(R"("type": "dynamic", "factor": 2.5)"), 2560);
  EXPECT_EQ(positions(R"("type": "yarn", "factor": 4, "original_max_position_embeddings": 512)"),
            2048);
  EXPECT_EQ(positions(R"("type": "yarn", "factor": 4, "original_max_position_embeddings": 64)"),
            1024);
  EXPECT_EQ(positions(R"("type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4,
                         "original_max_position_embeddings": 512)"),
            1024);
  EXPECT_EQ(positions(R"("type": "linear", "factor": 1e30)"), 1 << 24);
}

TEST(ModelConfig, OtherRopesAreRefusedByName) {
  for (const char* type : {"longrope", "su", "mrope", "proportional"}) {
    EXPECT_THAT(
        Error(std::string(R"("rope_scaling": {"rope_type": ")") + type + R"(", "factor": 2.0})"),
        HasSubstr(std::string("rope_scaling rope_type = \"") + type +
                  "\" is not supported (default, linear, llama3, dynamic, yarn)"));
  }
  EXPECT_THAT(Error(R"("rope_scaling": {"type": "linear"})"), HasSubstr("factor is missing"));
  EXPECT_THAT(Error(R"("rope_scaling": {"type": "linear", "factor": 0})"),
              HasSubstr("factor is 0, not a positive number"));
  EXPECT_THAT(Error(R"("rope_scaling": {"type": "linear", "factor": 2, "attention_factor": 3})"),
              HasSubstr("\"attention_factor\" = 3 is not supported with rope_type \"linear\""));
  EXPECT_THAT(Error(R"("rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5})"),
              HasSubstr("partial_rotary_factor"));
  EXPECT_THAT(Error(R"("rope_scaling": 3)"), HasSubstr("rope_scaling is 3, not an object"));
}

TEST(ModelConfig, RopesThatGiveNoNumbersAreRefused) {
  for (const char* fields : {
           R"("rope_theta": 1e-30)",
           R"("rope_scaling": {"rope_type": "linear", "factor": 1e-40})",
           R"("rope_scaling": {"rope_type": "linear", "factor": 1e300})",
           R"("rope_scaling": {"rope_type": "dynamic", "factor": 1e17})",
           R"("rope_theta": 1, "rope_scaling": {"rope_type": "yarn", "factor": 4})",
           R"("rope_scaling": {"rope_type": "yarn", "factor": 4, "attention_factor": 1e300})",
       }) {
    const auto config = Parse(fields);
    EXPECT_EQ(config.status().code(), absl::StatusCode::kInvalidArgument) << fields;
    EXPECT_NE(config.status().message().find("frequencies"), absl::string_view::npos)
        << config.status();
  }
}

TEST(ModelConfig, KeysThatChangeTheMathematicsAreRefusedByName) {
  const std::pair<const char*, const char*> kKeys[] = {
      {"sliding_window", "4096"},
      {"use_sliding_window", "true"},
      {"partial_rotary_factor", "0.5"},
      {"hidden_act", "\"gelu\""},
      {"pretraining_tp", "2"},
      {"rope_interleaved", "true"},
      {"quantization_config", "{\"bits\": 4}"},
      {"attn_logit_softcapping", "50.0"},
      {"final_logit_softcapping", "30.0"},
      {"num_local_experts", "8"},
      {"layer_types", "[\"full_attention\", \"sliding_attention\"]"},
      {"num_experts_per_tok", "2"},
      {"qk_norm", "true"},
      {"embedding_multiplier", "12"},
      {"auto_map", "{}"},
  };
  for (const auto& [key, value] : kKeys) {
    EXPECT_THAT(Error(std::string("\"") + key + "\": " + value), HasSubstr(key)) << key;
  }
}

TEST(ModelConfig, KeysWithoutEffectPass) {
  EXPECT_EQ(Error(R"("bos_token_id": 1, "eos_token_id": [2, 3], "use_cache": true,
                     "transformers_version": "4.40", "initializer_range": 0.02,
                     "pretraining_tp": 1, "hidden_act": "silu", "rope_interleaved": false,
                     "partial_rotary_factor": 1, "is_llama_config": true,
                     "layer_types": ["full_attention", "full_attention"])"),
            "");
}

TEST(ModelConfig, OtherModelTypesAreRefusedByName) {
  EXPECT_EQ(ParseModelConfig(R"({"model_type": "mixtral"})", "dir/config.json").status().message(),
            "dir/config.json: model_type = \"mixtral\" is not supported (" + FamilyNames() + ")");
  for (const char* other : {"qwen2_moe", "qwen3_moe", "chatglm", "glm4", "mistral3"}) {
    EXPECT_THAT(As(other, "").status().message(), HasSubstr(other));
  }
  EXPECT_THAT(ParseModelConfig("{}", "c").status().message(), HasSubstr("model_type = \"\""));
}

TEST(ModelConfig, QwensWindowIsTakenWhereItIsNotInUse) {
  for (const char* family : {"qwen2", "qwen3"}) {
    // As Qwen2-7B-Instruct and Qwen3-8B have it, and as transformers 5 writes it.
    for (const char* unused : {R"("use_sliding_window": false, "sliding_window": 131072,
                                  "max_window_layers": 28)",
                               R"("use_sliding_window": false, "sliding_window": null,
                                  "max_window_layers": 36)",
                               R"("use_sliding_window": false, "sliding_window": null,
                                  "layer_types": ["full_attention", "full_attention"])"}) {
      const auto config = As(family, unused);
      ASSERT_TRUE(config.ok()) << config.status();
      EXPECT_EQ(config->max_positions, 1024);
      EXPECT_EQ(config->sliding_window, 0);
    }
    EXPECT_THAT(
        As(family, R"("use_sliding_window": true, "sliding_window": 512)").status().message(),
        HasSubstr("use_sliding_window = true is not supported, only false"));
    EXPECT_THAT(
        As(family, R"("layer_types": ["full_attention", "sliding_attention"])").status().message(),
        HasSubstr("layer_types"));
  }
}

TEST(ModelConfig, AMistralsWindowBoundsItsPrompts) {
  EXPECT_EQ(As("mistral", R"("sliding_window": null)")->max_positions, 1024);
  EXPECT_EQ(As("mistral", R"("sliding_window": null)")->sliding_window, 0);
  EXPECT_EQ(As("mistral", R"("sliding_window": 512)")->max_positions, 512);
  EXPECT_EQ(As("mistral", R"("sliding_window": 2048)")->max_positions, 1024);
  EXPECT_EQ(As("mistral", "")->sliding_window, 4096) << "transformers' own when left out";
  EXPECT_THAT(As("mistral", R"("sliding_window": 0)").status().message(),
              HasSubstr("sliding_window is 0"));
  EXPECT_THAT(As("mistral", R"("attention_bias": true)").status().message(),
              HasSubstr("attention_bias"));
}

TEST(ModelConfig, EveryFamilyHasItsBiases) {
  const auto biases = [](const char* family, const std::string& more) {
    const ModelConfig config = *As(family, more);
    return std::vector<bool>{config.qkv_bias, config.o_bias, config.mlp_bias};
  };
  using Biases = std::vector<bool>;
  EXPECT_EQ(biases("mistral", ""), (Biases{false, false, false}));
  EXPECT_EQ(biases("qwen2", ""), (Biases{true, false, false}));
  EXPECT_EQ(biases("qwen3", ""), (Biases{false, false, false}));
  EXPECT_EQ(biases("qwen3", R"("attention_bias": true)"), (Biases{true, true, false}));
  EXPECT_EQ(biases("glm", ""), (Biases{true, false, false}));
  EXPECT_EQ(biases("glm", R"("attention_bias": false)"), (Biases{false, false, false}));
}

TEST(ModelConfig, GlmTurnsAShareOfAHeadInNeighbours) {
  const ModelConfig left_out = *As("glm", "");
  EXPECT_EQ(left_out.rope.rotary_share, 0.5);
  EXPECT_EQ(left_out.rope.pairing, RotaryPairing::kInterleaved);
  EXPECT_EQ(left_out.rms_norm_eps, 1.5625e-07f);
  EXPECT_EQ(As("glm", R"("partial_rotary_factor": 0.25)")->rope.rotary_share, 0.25);
  EXPECT_EQ(As("glm", R"("rope_parameters": {"rope_type": "default", "rope_theta": 1e4,
                                             "partial_rotary_factor": 0.25})")
                ->rope.rotary_share,
            0.25);
  EXPECT_THAT(As("glm", R"("partial_rotary_factor": 1.5)").status().message(),
              HasSubstr("partial_rotary_factor = 1.5 is not supported, not above 1"));
  EXPECT_THAT(As("glm", R"("partial_rotary_factor": 1e300)").status().message(),
              HasSubstr("partial_rotary_factor = 1e+300 is not supported, not above 1"));
  EXPECT_THAT(As("glm", R"("partial_rotary_factor": 0.2)").status().message(),
              HasSubstr("partial_rotary_factor leaves an odd number of the 16 channels"));
}

TEST(ModelConfig, SizesOutsideTheirBoundsAreRefused) {
  const auto with = [](const std::string& key, const std::string& value) {
    std::string text = "{" + std::string(kSizes) + "}";
    const size_t at = text.find(":", text.find("\"" + key + "\"")) + 1;
    text.replace(at, text.find_first_of(",}", at) - at, value);
    return std::string(ParseModelConfig(text, "c").status().message());
  };
  EXPECT_EQ(with("vocab_size", "96"), "");
  for (const char* key : {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                          "num_attention_heads", "max_position_embeddings"}) {
    for (const char* value : {"0", "-1", "4611686018427387904", "18446744073709551615", "1e3",
                              "\"64\"", "[]", "2147483648"}) {
      EXPECT_THAT(with(key, value), HasSubstr(key)) << value;
    }
    EXPECT_THAT(with(key, "null"), HasSubstr(std::string(key) + " is missing"));
  }
  EXPECT_THAT(Error(R"("num_key_value_heads": 3)"),
              HasSubstr("num_key_value_heads = 3 does not divide num_attention_heads = 4"));
  EXPECT_THAT(Error(R"("num_key_value_heads": 8)"), HasSubstr("num_key_value_heads is 8"));
  EXPECT_THAT(Error(R"("head_dim": 63)"), HasSubstr("head_dim = 63 is not even"));
  EXPECT_THAT(Error(R"("head_dim": 512)"), HasSubstr("head_dim is 512"));
  EXPECT_THAT(Error(R"("rms_norm_eps": -1)"), HasSubstr("rms_norm_eps is -1"));
  EXPECT_THAT(Error(R"("rope_theta": "x")"), HasSubstr("rope_theta"));
  EXPECT_THAT(Error(R"("tie_word_embeddings": 1)"), HasSubstr("tie_word_embeddings is 1"));
  EXPECT_THAT(Error(R"("torch_dtype": "float8")"), HasSubstr("torch_dtype = \"float8\""));
}

TEST(ModelConfig, ValuesInEachOtherHaveABound) {
  const auto nested = [](size_t depth) {
    return Parse("\"foo\": " + std::string(depth, '[') + std::string(depth, ']')).status();
  };
  EXPECT_NE(nested(32).message().find("foo"), absl::string_view::npos) << nested(32);
  EXPECT_NE(nested(33).message().find("32 deep"), absl::string_view::npos) << nested(33);
  EXPECT_NE(nested(300'000).message().find("32 deep"), absl::string_view::npos);
}

TEST(ModelConfig, TextThatIsNotAnObjectIsRefused) {
  for (const std::string& text :
       {std::string(), std::string("{"), std::string("[]"), std::string("null"),
        std::string("{\"a\": \"\xff\"}"), std::string(100000, '[')}) {
    EXPECT_EQ(ParseModelConfig(text, "c").status().message(), "c: not a JSON object");
  }
}

}  // namespace
}  // namespace prefilld

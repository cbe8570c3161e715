#include "server/model/config.h"

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"

namespace prefilld {
namespace {

using nlohmann::json;

constexpr int kMaxSize = 1 << 20;  // of a side of any tensor; the largest vocabularies have 2^18
constexpr int64_t kMaxPositions = int64_t{1} << 24;  // positions are exact in F32 up to here
constexpr int kMaxLayers = 1024;
constexpr int kMaxHeadDim = 256;
constexpr int kMaxDepth = 32;          // of objects and lists in each other
constexpr size_t kMaxShownBytes = 80;  // of a value in an error message

std::string Show(const json& value) {
  std::string text = value.dump(-1, ' ', false, json::error_handler_t::replace);
  if (text.size() > kMaxShownBytes) text = text.substr(0, kMaxShownBytes) + "...";
  return text;
}

// Reads keys of one JSON object. The first failure is kept and later reads return defaults, so that
// a caller checks once.
class ObjectReader {
 public:
  ObjectReader(const json& object, std::string where) : object_(object), where_(std::move(where)) {}

  // Null counts as absent.
  const json* Find(std::string_view key) {
    read_.emplace_back(key);
    const auto it = object_.find(std::string(key));
    return it == object_.end() || it->is_null() ? nullptr : &*it;
  }

  int64_t Integer(std::string_view key, int64_t min, int64_t max,
                  std::optional<int64_t> absent = std::nullopt) {
    const json* value = Find(key);
    if (value == nullptr) {
      if (!absent.has_value()) Fail(key, "is missing");
      return absent.value_or(min);
    }
    // An unsigned value beyond int64_t turns negative here, and is refused like any other.
    const bool in_range =
        value->is_number_integer() && value->get<int64_t>() >= min && value->get<int64_t>() <= max;
    if (!in_range) {
      Fail(key, absl::StrCat("is ", Show(*value), ", not an integer from ", min, " to ", max));
      return min;
    }
    return value->get<int64_t>();
  }

  // Finite and greater than zero.
  double Positive(std::string_view key, std::optional<double> absent = std::nullopt) {
    const json* value = Find(key);
    if (value == nullptr) {
      if (!absent.has_value()) Fail(key, "is missing");
      return absent.value_or(1);
    }
    const double number = value->is_number() ? value->get<double>() : 0;
    if (!std::isfinite(number) || number <= 0) {
      Fail(key, absl::StrCat("is ", Show(*value), ", not a positive number"));
      return 1;
    }
    return number;
  }

  bool Bool(std::string_view key, bool absent) {
    const json* value = Find(key);
    if (value == nullptr) return absent;
    if (!value->is_boolean()) Fail(key, absl::StrCat("is ", Show(*value), ", not true or false"));
    return value->is_boolean() && value->get<bool>();
  }

  std::string String(std::string_view key, std::string_view absent) {
    const json* value = Find(key);
    if (value == nullptr) return std::string(absent);
    if (!value->is_string()) {
      Fail(key, absl::StrCat("is ", Show(*value), ", not a string"));
      return std::string(absent);
    }
    return value->get<std::string>();
  }

  void Fail(std::string_view key, std::string_view problem) {
    if (!status_.ok()) return;
    status_ =
        absl::InvalidArgumentError(where_ + " " + std::string(key) + " " + std::string(problem));
  }

  bool WasRead(std::string_view key) const {
    return std::find(read_.begin(), read_.end(), key) != read_.end();
  }
  const absl::Status& status() const { return status_; }

 private:
  const json& object_;
  const std::string where_;
  std::vector<std::string> read_;
  absl::Status status_;
};

std::optional<DType> ReadDType(ObjectReader& reader) {
  const std::string_view key = reader.Find("dtype") != nullptr ? "dtype" : "torch_dtype";
  reader.Find("torch_dtype");
  const std::string name = reader.String(key, "");
  if (name.empty()) return std::nullopt;
  if (name == "float32") return DType::kF32;
  if (name == "bfloat16") return DType::kBF16;
  if (name == "float16") return DType::kF16;
  reader.Fail(key, "= " + Show(name) + " is not supported (float32, bfloat16, float16)");
  return std::nullopt;
}

// At the top of the file or among the parameters of rope.
void ReadRotaryShare(ObjectReader& reader, const Family& family, RopeConfig* rope) {
  constexpr std::string_view kKey = "partial_rotary_factor";
  rope->rotary_share = reader.Positive(kKey, rope->rotary_share);
  if (family.reads_rotary_share ? rope->rotary_share > 1
                                : rope->rotary_share != family.rotary_share) {
    const std::string allowed = family.reads_rotary_share
                                    ? "not above 1"
                                    : absl::StrCat("only ", Show(json(family.rotary_share)));
    reader.Fail(kKey,
                absl::StrCat("= ", Show(json(rope->rotary_share)), " is not supported, ", allowed));
  }
}

void ReadLlama3(ObjectReader& fields, RopeConfig* rope) {
  rope->factor = fields.Positive("factor");
  rope->low_freq_factor = fields.Positive("low_freq_factor");
  rope->high_freq_factor = fields.Positive("high_freq_factor");
  rope->original_max_positions =
      fields.Integer("original_max_position_embeddings", 1, kMaxPositions);
  if (rope->low_freq_factor >= rope->high_freq_factor) {
    fields.Fail("low_freq_factor", "is not below high_freq_factor");
  }
}

// What is left out follows from the rest as in transformers.
void ReadYarn(ObjectReader& fields, int64_t max_positions, RopeConfig* rope) {
  rope->original_max_positions =
      fields.Integer("original_max_position_embeddings", 1, kMaxPositions, max_positions);
  rope->factor =
      fields.Positive("factor", static_cast<double>(max_positions) / rope->original_max_positions);
  rope->beta_fast = fields.Positive("beta_fast", rope->beta_fast);
  rope->beta_slow = fields.Positive("beta_slow", rope->beta_slow);
  rope->truncate = fields.Bool("truncate", rope->truncate);
  const auto of_scale = [&](double mscale) {
    return rope->factor <= 1 ? 1.0 : 0.1 * mscale * std::log(rope->factor) + 1.0;
  };
  const bool both = fields.Find("mscale") != nullptr && fields.Find("mscale_all_dim") != nullptr;
  const double mscale = fields.Positive("mscale", 1), all = fields.Positive("mscale_all_dim", 1);
  rope->attention_factor = static_cast<float>(
      fields.Positive("attention_factor", both ? of_scale(mscale) / of_scale(all) : of_scale(1)));
}

void ReadScaling(ObjectReader& fields, const std::string& type, int64_t max_positions,
                 RopeConfig* rope) {
  if (type == Name(RopeScaling::kLinear)) {
    rope->scaling = RopeScaling::kLinear;
    rope->factor = fields.Positive("factor");
  } else if (type == Name(RopeScaling::kLlama3)) {
    rope->scaling = RopeScaling::kLlama3;
    ReadLlama3(fields, rope);
  } else if (type == Name(RopeScaling::kDynamic)) {
    rope->scaling = RopeScaling::kDynamic;
    rope->factor = fields.Positive("factor");
    rope->original_max_positions = max_positions;
  } else if (type == Name(RopeScaling::kYarn)) {
    rope->scaling = RopeScaling::kYarn;
    ReadYarn(fields, max_positions, rope);
  } else if (type != "default") {
    fields.Fail("rope_type",
                "= " + Show(type) + " is not supported (default, linear, llama3, dynamic, yarn)");
  }
}

// rope_scaling as transformers 4 writes it, or rope_parameters of transformers 5, where theta is
// inside.
absl::Status ReadRope(ObjectReader& reader, const std::string& source, const Family& family,
                      int64_t max_positions, RopeConfig* rope) {
  rope->theta = reader.Positive("rope_theta", family.rope_theta);
  rope->pairing = family.pairing;
  rope->rotary_share = family.rotary_share;
  ReadRotaryShare(reader, family, rope);
  const json* old_form = reader.Find("rope_scaling");
  const json* new_form = reader.Find("rope_parameters");
  const std::string key = new_form != nullptr ? "rope_parameters" : "rope_scaling";
  const json* object = new_form != nullptr ? new_form : old_form;
  if (object == nullptr) return absl::OkStatus();
  if (new_form != nullptr && old_form != nullptr) {
    return absl::InvalidArgumentError(source + ": both rope_scaling and rope_parameters are given");
  }
  if (!object->is_object()) {
    return absl::InvalidArgumentError(source + ": " + key + " is " + Show(*object) +
                                      ", not an object");
  }
  ObjectReader fields(*object, source + ": " + key);
  const std::string old_type = fields.String("type", "default");
  const std::string type = fields.String("rope_type", old_type);
  ReadRotaryShare(fields, family, rope);
  rope->theta = fields.Positive("rope_theta", rope->theta);
  ReadScaling(fields, type, max_positions, rope);
  for (const auto& [name, value] : object->items()) {
    if (!fields.WasRead(name)) {
      fields.Fail(Show(name),
                  "= " + Show(value) + " is not supported with rope_type " + Show(type));
    }
  }
  return fields.status();
}

absl::Status CheckOtherKeys(const json& config, const ObjectReader& reader, const Family& family,
                            const std::string& source) {
  const auto harmless = family.harmless_keys;
  for (const auto& [key, value] : config.items()) {
    if (reader.WasRead(key)) continue;
    if (std::find(harmless.begin(), harmless.end(), key) != harmless.end()) continue;
    const auto neutral = std::find_if(family.neutral_keys.begin(), family.neutral_keys.end(),
                                      [&key = key](const NeutralKey& k) { return k.key == key; });
    if (neutral != family.neutral_keys.end()) {
      if (value.is_null() || value == json::parse(neutral->value)) continue;
      return absl::InvalidArgumentError(source + ": " + key + " = " + Show(value) +
                                        " is not supported, only " + std::string(neutral->value));
    }
    return absl::InvalidArgumentError(source + ": " + Show(key) + ": " + Show(value) +
                                      " is not a key this server knows; it may change the results");
  }
  return absl::OkStatus();
}

// The lengths that vLLM takes; transformers takes any. To linear and dynamic scaling
// max_position_embeddings is the length before it, to llama3 and yarn the one after it; but files
// whose owner has added yarn (Qwen's cards tell how) often keep the one before.
int64_t MaxPositions(int64_t max_position_embeddings, const RopeConfig& rope) {
  double positions = static_cast<double>(max_position_embeddings);
  switch (rope.scaling) {
    case RopeScaling::kNone:
    case RopeScaling::kLlama3:
      break;
    case RopeScaling::kLinear:
    case RopeScaling::kDynamic:
      positions *= rope.factor;
      break;
    case RopeScaling::kYarn:
      positions = std::max(positions, rope.original_max_positions * rope.factor);
      break;
  }
  return static_cast<int64_t>(std::clamp(positions, 1.0, static_cast<double>(kMaxPositions)));
}

// Null is not as if left out: it says that there is none.
int64_t ReadWindow(ObjectReader& reader, const json& config, const Family& family) {
  constexpr char kKey[] = "sliding_window";
  if (family.sliding_window == 0) return 0;
  const auto it = config.find(kKey);
  const bool none = it != config.end() && it->is_null();
  return reader.Integer(kKey, 1, kMaxPositions, none ? 0 : family.sliding_window);
}

void CheckLayerTypes(ObjectReader& reader) {
  const json* types = reader.Find("layer_types");
  if (types == nullptr) return;
  const bool all_full = types->is_array() && std::all_of(types->begin(), types->end(), [](auto& t) {
                          return t == "full_attention";
                        });
  if (!all_full) reader.Fail("layer_types", "has other values than full_attention");
}

absl::StatusOr<json> ParseObject(std::string_view text, const std::string& source) {
  bool deep = false;  // what is deeper is left out: it would be walked through recursively
  const auto keep = [&](int depth, json::parse_event_t, json&) {
    deep |= depth > kMaxDepth;
    return depth <= kMaxDepth;
  };
  json config = json::parse(text, keep, /*allow_exceptions=*/false);
  if (!config.is_object()) return absl::InvalidArgumentError(source + ": not a JSON object");
  if (deep) {
    return absl::InvalidArgumentError(
        absl::StrCat(source, ": values lie in each other more than ", kMaxDepth, " deep"));
  }
  return config;
}

absl::Status CheckTurns(const ModelConfig& config, const std::string& source) {
  if (RotaryDim(config.rope, config.head_dim) % 2 != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat(source, ": partial_rotary_factor leaves an odd number of the ",
                     config.head_dim, " channels of a head to turn"));
  }
  for (const int64_t tokens : {int64_t{1}, config.max_positions}) {
    if (CanTurn(config.rope, config.head_dim, tokens)) continue;
    return absl::InvalidArgumentError(
        absl::StrCat(source, ": rope_theta and the scaling give frequencies of which F32 makes no ",
                     "angles, for a prompt of ", tokens, " tokens"));
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<ModelConfig> ParseModelConfig(std::string_view text, std::string_view source_name) {
  const std::string source(source_name);
  absl::StatusOr<json> parsed = ParseObject(text, source);
  if (!parsed.ok()) return parsed.status();
  const json& config = *parsed;

  ModelConfig out;
  ObjectReader reader(config, source + ":");
  out.model_type = reader.String("model_type", "");
  out.family = FindFamily(out.model_type);
  if (out.family == nullptr) {
    return absl::InvalidArgumentError(source + ": model_type = " + Show(out.model_type) +
                                      " is not supported (" + FamilyNames() + ")");
  }
  const Family& family = *out.family;
  out.model_id = reader.String("_name_or_path", "");
  out.revision = reader.String("_commit_hash", "");
  out.vocab_size = reader.Integer("vocab_size", 1, kMaxSize);
  out.hidden_size = reader.Integer("hidden_size", 1, kMaxSize);
  out.intermediate_size = reader.Integer("intermediate_size", 1, kMaxSize);
  out.layers = reader.Integer("num_hidden_layers", 1, kMaxLayers);
  out.q_heads = reader.Integer("num_attention_heads", 1, kMaxSize);
  out.kv_heads = reader.Integer("num_key_value_heads", 1, out.q_heads, out.q_heads);
  const int64_t default_head_dim = std::max(1, out.hidden_size / out.q_heads);
  out.head_dim = reader.Integer("head_dim", 1, kMaxHeadDim, default_head_dim);
  out.max_positions = reader.Integer("max_position_embeddings", 1, kMaxPositions);
  out.rms_norm_eps = static_cast<float>(reader.Positive("rms_norm_eps", family.rms_norm_eps));
  const auto choose = [&](const FlagKey& choice) {
    return choice.key.empty() ? choice.absent : reader.Bool(choice.key, choice.absent);
  };
  out.tie_word_embeddings = choose(family.tie_word_embeddings);
  out.qkv_bias = choose(family.qkv_bias);
  out.o_bias = choose(family.o_bias);
  out.mlp_bias = choose(family.mlp_bias);
  out.dtype = ReadDType(reader);
  CheckLayerTypes(reader);
  if (out.q_heads % out.kv_heads != 0) {
    reader.Fail(
        "num_key_value_heads",
        absl::StrCat("= ", out.kv_heads, " does not divide num_attention_heads = ", out.q_heads));
  }
  if (out.head_dim > kMaxHeadDim || out.head_dim % 2 != 0) {
    reader.Fail("head_dim",
                absl::StrCat("= ", out.head_dim, " is not even and at most ", kMaxHeadDim));
  }
  if (int64_t{out.q_heads} * out.head_dim > kMaxSize) {
    reader.Fail("num_attention_heads", absl::StrCat("* head_dim = ", out.q_heads, " * ",
                                                    out.head_dim, " is above ", kMaxSize));
  }
  const absl::Status rope = ReadRope(reader, source, family, out.max_positions, &out.rope);
  out.max_positions = MaxPositions(out.max_positions, out.rope);
  out.sliding_window = ReadWindow(reader, config, family);
  if (out.sliding_window > 0) out.max_positions = std::min(out.max_positions, out.sliding_window);
  if (!reader.status().ok()) return reader.status();
  if (!rope.ok()) return rope;
  if (absl::Status turns = CheckTurns(out, source); !turns.ok()) return turns;
  const absl::Status others = CheckOtherKeys(config, reader, family, source);
  if (!others.ok()) return others;
  return out;
}

}  // namespace prefilld

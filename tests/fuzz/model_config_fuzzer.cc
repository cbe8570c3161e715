// Any bytes as a config.json: a model that is read has sizes whose products fit, and rotations that
// F32 can compute.
#include <cmath>
#include <string>

#include "server/model/config.h"
#include "tests/fuzz/property.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace prefilld;  // NOLINT
  const std::string text(reinterpret_cast<const char*>(data), size);
  const auto config = ParseModelConfig(text, "config.json");
  if (!config.ok()) {
    const std::string message(config.status().message());
    Promise(absl::IsInvalidArgument(config.status()) && message.rfind("config.json", 0) == 0,
            "a refusal names the file", config.status().ToString());
    Promise(message.find('\n') == std::string::npos && message.size() < 1024,
            "a refusal is one line", message);
    return 0;
  }
  constexpr int kSide = 1 << 20;
  for (const int side : {config->vocab_size, config->hidden_size, config->intermediate_size,
                         config->layers, config->q_heads, config->kv_heads, config->head_dim}) {
    Promise(side >= 1 && side <= kSide, "sizes are positive and bounded", text);
  }
  Promise(config->q_heads % config->kv_heads == 0, "query heads share kv heads evenly", text);
  Promise(config->head_dim % 2 == 0 && config->q_heads * config->head_dim <= kSide,
          "heads are even and fit a row", text);
  Promise(config->max_positions >= 1 && config->max_positions <= 1 << 24, "positions", text);
  Promise(config->sliding_window == 0 || config->max_positions <= config->sliding_window,
          "no prompt is longer than the window", text);
  Promise(config->rms_norm_eps > 0 && std::isfinite(config->rms_norm_eps),
          "rms_norm_eps is a number above 0 in F32", text);
  const int turned = RotaryDim(config->rope, config->head_dim);
  Promise(turned % 2 == 0 && turned <= config->head_dim, "channels turn in pairs", text);
  for (const int64_t tokens : {int64_t{1}, config->max_positions}) {
    const auto frequencies = InverseFrequencies(config->rope, config->head_dim, tokens);
    Promise(frequencies.size() == static_cast<size_t>(turned) / 2, "a frequency a pair", text);
    for (const float frequency : frequencies) {
      Promise(frequency > 0 && std::isfinite(frequency), "frequencies are positive numbers", text);
    }
  }
  Promise(std::isfinite(config->rope.attention_factor) && config->rope.attention_factor > 0,
          "attention_factor is a positive number", text);
  return 0;
}

#include "server/model/rope.h"

#include <algorithm>
#include <cmath>
#include <numbers>

namespace prefilld {
namespace {

// Llama 3: wavelengths that fit often into the original context stay, those that do not are
// stretched by `factor`, and between the two the frequencies are interpolated.
float ScaleAsLlama3(float frequency, const RopeConfig& rope) {
  const float factor = static_cast<float>(rope.factor);
  const float original = static_cast<float>(rope.original_max_positions);
  const float low = static_cast<float>(rope.low_freq_factor);
  const float longest_kept =
      static_cast<float>(rope.original_max_positions / rope.high_freq_factor);
  const float shortest_stretched =
      static_cast<float>(rope.original_max_positions / rope.low_freq_factor);
  const float wavelength = static_cast<float>(2 * std::numbers::pi) / frequency;
  if (wavelength < longest_kept) return frequency;
  if (wavelength > shortest_stretched) return frequency / factor;
  const float smooth = (original / wavelength - low) /
                       static_cast<float>(rope.high_freq_factor - rope.low_freq_factor);
  return (1.0f - smooth) * frequency / factor + smooth * frequency;
}

// The base at which dynamic NTK scaling turns a prompt: in double for the original length, as
// transformers prepares it, and in F32 for what is longer, as it then computes it.
float DynamicBase(const RopeConfig& rope, int rotary_dim, int64_t tokens) {
  const double exponent = static_cast<double>(rotary_dim) / (rotary_dim - 2);
  const double original = static_cast<double>(rope.original_max_positions);
  if (tokens <= rope.original_max_positions) {
    const double stretch = rope.factor * original / original - (rope.factor - 1);
    return static_cast<float>(rope.theta * std::pow(stretch, exponent));
  }
  const float stretch =
      static_cast<float>(rope.factor) * static_cast<float>(tokens) / static_cast<float>(original) -
      static_cast<float>(rope.factor - 1);
  return static_cast<float>(rope.theta) * std::pow(stretch, static_cast<float>(exponent));
}

// YaRN: pairs that turn often in the original context stay, those that turn seldom are stretched by
// `factor`, and from pair `low` to pair `high` one goes over into the other. The wavelength is that
// of `pair`, over 2 pi.
float ScaleAsYarn(int pair, float wavelength, const RopeConfig& rope, int rotary_dim) {
  const auto pair_that_turns = [&](double times) {
    const double longest = rope.original_max_positions / (times * 2 * std::numbers::pi);
    return rotary_dim * std::log(longest) / (2 * std::log(rope.theta));
  };
  double low = pair_that_turns(rope.beta_fast), high = pair_that_turns(rope.beta_slow);
  if (rope.truncate) {
    low = std::floor(low);
    high = std::ceil(high);
  }
  low = std::max(low, 0.0);
  high = std::min(high, rotary_dim - 1.0);
  if (low == high) high += 0.001;
  const float along =
      (static_cast<float>(pair) - static_cast<float>(low)) / static_cast<float>(high - low);
  const float kept = 1 - std::clamp(along, 0.0f, 1.0f);
  const float stretched = 1 / (static_cast<float>(rope.factor) * wavelength);
  return stretched * (1 - kept) + 1 / wavelength * kept;
}

}  // namespace

int RotaryDim(const RopeConfig& rope, int head_dim) {
  return rope.rotary_share > 0 ? static_cast<int>(head_dim * rope.rotary_share) : head_dim;
}

std::vector<float> InverseFrequencies(const RopeConfig& rope, int head_dim, int64_t tokens) {
  const int rotary_dim = RotaryDim(rope, head_dim);
  const float base = rope.scaling == RopeScaling::kDynamic ? DynamicBase(rope, rotary_dim, tokens)
                                                           : static_cast<float>(rope.theta);
  std::vector<float> frequencies(rotary_dim / 2);
  for (int i = 0; i < rotary_dim / 2; ++i) {
    const float exponent = static_cast<float>(2 * i) / static_cast<float>(rotary_dim);
    const float wavelength = std::pow(base, exponent);  // over 2 pi
    const float frequency = 1.0f / wavelength;
    switch (rope.scaling) {
      case RopeScaling::kNone:
      case RopeScaling::kDynamic:
        frequencies[i] = frequency;
        break;
      case RopeScaling::kLinear:
        frequencies[i] = frequency / static_cast<float>(rope.factor);
        break;
      case RopeScaling::kLlama3:
        frequencies[i] = ScaleAsLlama3(frequency, rope);
        break;
      case RopeScaling::kYarn:
        frequencies[i] = ScaleAsYarn(i, wavelength, rope, rotary_dim);
        break;
    }
  }
  return frequencies;
}

bool CanTurn(const RopeConfig& rope, int head_dim, int64_t tokens) {
  constexpr float kWhole = 1 << 24;  // from there on F32 has no fraction of an angle
  const auto turns = [&](float x) { return x > 0 && x * static_cast<float>(tokens) <= kWhole; };
  const std::vector<float> frequencies = InverseFrequencies(rope, head_dim, tokens);
  return std::isfinite(rope.attention_factor) && rope.attention_factor > 0 &&
         std::all_of(frequencies.begin(), frequencies.end(), turns);
}

}  // namespace prefilld

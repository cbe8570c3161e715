#include "server/model/rope.h"

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

}  // namespace

int RotaryDim(const RopeConfig& rope, int head_dim) {
  return rope.rotary_share > 0 ? static_cast<int>(head_dim * rope.rotary_share) : head_dim;
}

std::vector<float> InverseFrequencies(const RopeConfig& rope, int head_dim) {
  const int rotary_dim = RotaryDim(rope, head_dim);
  std::vector<float> frequencies(rotary_dim / 2);
  for (int i = 0; i < rotary_dim / 2; ++i) {
    const float exponent = static_cast<float>(2 * i) / static_cast<float>(rotary_dim);
    const float frequency = 1.0f / std::pow(static_cast<float>(rope.theta), exponent);
    switch (rope.scaling) {
      case RopeScaling::kNone:
        frequencies[i] = frequency;
        break;
      case RopeScaling::kLinear:
        frequencies[i] = frequency / static_cast<float>(rope.factor);
        break;
      case RopeScaling::kLlama3:
        frequencies[i] = ScaleAsLlama3(frequency, rope);
        break;
    }
  }
  return frequencies;
}

}  // namespace prefilld

// Inverse frequencies of rotary position embedding, computed in F32 step by step as transformers
// does, so that positions in the tens of thousands still turn by the same angle.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/ops.h"

namespace prefilld {

enum class RopeScaling : uint8_t { kNone, kLinear, kLlama3, kDynamic, kYarn };
constexpr const char* Name(RopeScaling scaling) {
  constexpr const char* kNames[] = {"none", "linear", "llama3", "dynamic", "yarn"};
  return kNames[static_cast<int>(scaling)];
}

struct RopeConfig {
  double theta = 10000;
  RopeScaling scaling = RopeScaling::kNone;
  double factor = 1;                                 // linear, llama3, dynamic, yarn
  double low_freq_factor = 1, high_freq_factor = 4;  // llama3
  int64_t original_max_positions = 8192;             // llama3, dynamic, yarn
  double beta_fast = 32, beta_slow = 1;              // yarn
  bool truncate = true;                              // yarn
  float attention_factor = 1;                        // yarn: of cosines and sines
  double rotary_share = 0;                           // of a head's channels; 0: not said, all
  RotaryPairing pairing = RotaryPairing::kHalf;
};

// The channels of a head that turn, from the first.
int RotaryDim(const RopeConfig& rope, int head_dim);
// [RotaryDim / 2]. Those of `dynamic` are of a prompt of so many tokens; up to the original length
// they are all the same.
std::vector<float> InverseFrequencies(const RopeConfig& rope, int head_dim, int64_t tokens = 0);
// Whether those and attention_factor are positive numbers of which F32 can make angles: of others K
// becomes noise or NaN.
bool CanTurn(const RopeConfig& rope, int head_dim, int64_t tokens);

}  // namespace prefilld

#include "server/model/rope.h"

#include <gtest/gtest.h>

#include <cmath>

namespace prefilld {
namespace {

TEST(InverseFrequencies, PlainOnesFallGeometrically) {
  const std::vector<float> frequencies = InverseFrequencies({.theta = 10000}, 64);
  ASSERT_EQ(frequencies.size(), 32u);
  EXPECT_EQ(frequencies[0], 1.0f);
  for (int i = 0; i < 32; ++i) {
    EXPECT_NEAR(frequencies[i] * std::pow(10000.0, i / 32.0), 1, 2e-7) << i;
  }
}

TEST(InverseFrequencies, LinearDividesAllByTheFactor) {
  const std::vector<float> plain = InverseFrequencies({.theta = 10000}, 96);
  const std::vector<float> linear =
      InverseFrequencies({.theta = 10000, .scaling = RopeScaling::kLinear, .factor = 4}, 96);
  for (size_t i = 0; i < plain.size(); ++i) EXPECT_EQ(linear[i], plain[i] / 4) << i;
}

TEST(InverseFrequencies, OfAShareOfTheHeadAreThoseOfASmallerHead) {
  const RopeConfig rope{.theta = 10000, .rotary_share = 0.5};
  EXPECT_EQ(RotaryDim(rope, 128), 64);
  EXPECT_EQ(InverseFrequencies(rope, 128), InverseFrequencies({.theta = 10000}, 64));
  EXPECT_EQ(RotaryDim({}, 96), 96);
}

// Llama 3.1's own parameters, against the published formula in double.
// double.
TEST(InverseFrequencies, Llama3KeepsTheFastStretchesTheSlowAndBlendsBetween) {
  const RopeConfig rope{.theta = 5e5, .scaling = RopeScaling::kLlama3, .factor = 8};
  const std::vector<float> scaled = InverseFrequencies(rope, 128);
  int kept = 0, blended = 0, stretched = 0;
  for (int i = 0; i < 64; ++i) {
    const double frequency = std::pow(5e5, -i / 64.0);
    const double turns = 8192 * frequency / (2 * M_PI);  // in the original context
    double expected = frequency;
    if (turns < 1) {
      expected = frequency / 8;
      ++stretched;
    } else if (turns <= 4) {
      const double smooth = (turns - 1) / 3;
      expected = (1 - smooth) * frequency / 8 + smooth * frequency;
      ++blended;
    } else {
      ++kept;
    }
    EXPECT_NEAR(scaled[i] / expected, 1, 1e-6) << i;
  }
  EXPECT_EQ(kept, 29);
  EXPECT_EQ(blended, 6);
  EXPECT_EQ(stretched, 29);
}

}  // namespace
}  // namespace prefilld

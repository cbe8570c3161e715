#include "server/model/rope.h"

#include <gtest/gtest.h>

#include <cmath>
#include <utility>

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

// Some of the pairs, as transformers 5.23 has them.
void ExpectPairs(const std::vector<float>& got, const std::vector<std::pair<int, float>>& want) {
  for (const auto& [pair, frequency] : want) {
    EXPECT_NEAR(got[pair] / frequency, 1, 3e-7) << "pair " << pair;
  }
}

// Qwen's own parameters: pairs 24 to 39 go over.
TEST(InverseFrequencies, YarnKeepsTheFastStretchesTheSlowAndBlendsBetween) {
  RopeConfig rope{
      .theta = 1e6, .scaling = RopeScaling::kYarn, .factor = 4, .original_max_positions = 32768};
  ExpectPairs(InverseFrequencies(rope, 128), {{0, 1.0f},
                                              {20, 0.0133352149f},
                                              {24, 0.00537532149f},
                                              {30, 0.00106436096f},
                                              {35, 0.000246258394f},
                                              {39, 6.4903943e-05f},
                                              {45, 1.51074091e-05f},
                                              {63, 3.10234441e-07f}});
  rope = {.theta = 1e4,
          .scaling = RopeScaling::kYarn,
          .factor = 4,
          .original_max_positions = 64,
          .beta_fast = 8,
          .beta_slow = 0.5,
          .truncate = false};
  ExpectPairs(InverseFrequencies(rope, 64), {{1, 0.740510643f},
                                             {3, 0.350755095f},
                                             {9, 0.0273430385f},
                                             {10, 0.0161261279f},
                                             {31, 3.33380376e-05f}});
}

TEST(InverseFrequencies, DynamicOnesFallWithTheLengthBeyondTheOriginal) {
  const RopeConfig rope{
      .theta = 1e4, .scaling = RopeScaling::kDynamic, .factor = 4, .original_max_positions = 2048};
  const std::vector<float> plain = InverseFrequencies({.theta = 1e4}, 64);
  EXPECT_EQ(InverseFrequencies(rope, 64), plain);
  EXPECT_EQ(InverseFrequencies(rope, 64, 2048), plain);
  ExpectPairs(InverseFrequencies(rope, 64, 2049),
              {{1, 0.749846995f}, {8, 0.0999496654f}, {31, 0.000133092195f}});
  ExpectPairs(InverseFrequencies(rope, 64, 3000),
              {{1, 0.724905849f}, {16, 0.00581440423f}, {31, 4.66368147e-05f}});
  ExpectPairs(InverseFrequencies(rope, 64, 8192),
              {{1, 0.690345228f}, {24, 0.000137275245f}, {31, 1.0257857e-05f}});
}

}  // namespace
}  // namespace prefilld

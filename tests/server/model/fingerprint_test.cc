#include "server/model/fingerprint.h"

#include <gtest/gtest.h>

#include <functional>
#include <iterator>
#include <set>
#include <string>
#include <utility>

#include "tests/server/model/model_directory.h"

namespace prefilld {
namespace {

struct Loaded {
  ModelConfig config;
  SafeTensors tensors;
  DType dtype;
};

Loaded Load(const std::string& fixture) {
  const ModelDirectory directory(fixture);
  const ModelConfig config = *ParseModelConfig(directory.Read("config.json"), "config.json");
  return {config, *SafeTensors::Open(directory.path()), config.dtype.value_or(DType::kF32)};
}

// As decode engines hold them: an upgrade that changed one would refuse every connector. The same
// in tests/client/python/test_fingerprint.py.
TEST(Fingerprint, StaysWhatItWas) {
  const std::pair<const char*, const char*> kGolden[] = {
      {"base", "9352059f8e1e73b4a2115ea4ef28fe1b6a48bb66b30e74b3a13b3f4d22107000"},
      {"bf16", "e06b2ecb80a914533ab593524e07bc08e872a0fddcbaad990d0e95b4bf6fed91"},
      {"biases", "a1d6637e1a8e2ca22dc1fc7cc165fcfeab889ebe5a468314ff4664d5ef09857a"},
      {"dynamic", "3e6adf865c7ab9625dfa9eb9983fc22137e951e254a8ccb322fccee42b04c5c4"},
      {"f16", "3f02ecc348f2d6e5a869c797c4286465ab068f8ed2ee1ec72657ab3827fe8029"},
      {"glm", "33df4f4f7b86f3eddf494478fa2279987442c4ebaa787d915515d2656e39b525"},
      {"glm_bf16", "cf0e9f3b7ba70ed68e396575199c8ab6be12d79e82d63df0f0cb2119b5d0d3af"},
      {"head_dim128", "c25a492ee8daa751bafe3bafd895e943878030bfb72bc3a18e135d3f88343e60"},
      {"head_dim96", "ff0d2d0aafa774410dcd4b1b2c38ad476b3cc1cdce1bbc3aed9c00de01c2af0b"},
      {"linear", "3b7b7be770c5f7e0b95446482fc233969da60369cbc8b7c43e127dc29c7430bb"},
      {"llama3", "d07e367ca3e8db0be78b2285980160251e4a7329ddb2f9889ce5cfbed0f8406c"},
      {"mistral", "21b09a209283ccbf7a2a852faf2bb92ffb4dd2bf3ce07659920c028b8b39ecb2"},
      {"mistral_dynamic_bf16", "c1b6d06881bfa9ca6cddd301be431826e821d0b5c597edba372c178145befcd1"},
      {"qwen2", "0adb1f846fc1c8d75769d757e31d01beba00e1905d74d5415191de336a1ab701"},
      {"qwen2_yarn_bf16", "50733281cd586a0f9e9a7db2ca4d30cecbf3b887c1e7c5fc7ae75a3a58185aca"},
      {"qwen3", "18ac7ec58423be67f93a174e3fd92a35707d94e5e25d0297e742003cec095134"},
      {"qwen3_bf16", "14ad75b7827ce86e3d7436b0e21773f0cca2e108631f2e917db629324d987b99"},
      {"sharded", "c2da635403af88cd2e22a02854029ce8b9b8a058cdcd3c48bb8644815380c65b"},
      {"tied", "8c6960f9533fb088b3f340a3b0f97c11694866f7ba1fc074e51117cf8bfb02dd"},
      {"yarn", "2a172ecfb7a3cff0fe4df257365fac4dd434dc1c6c2dc2d5950c537017e99ce5"},
  };
  for (const auto& [fixture, golden] : kGolden) {
    const Loaded model = Load(fixture);
    EXPECT_EQ(Fingerprint(model.config, model.dtype, model.tensors), golden) << fixture;
  }
}

TEST(Fingerprint, TellsPartialAndInterleavedRotationsApart) {
  Loaded model = Load("base");
  const auto with = [&](double share, RotaryPairing pairing) {
    model.config.rope.rotary_share = share;
    model.config.rope.pairing = pairing;
    return Fingerprint(model.config, model.dtype, model.tensors);
  };
  EXPECT_EQ(with(0.5, RotaryPairing::kInterleaved),
            "2f6a3368e5e8c898c78133f4d74173cf087cf87cf9b2fe2108dea22f09c490a4");
  EXPECT_EQ(with(0.5, RotaryPairing::kHalf),
            "3b9f7e76eb6962995e304a4a102ad604c894b23bbf9d9414873bb2df3d43824e");
  EXPECT_EQ(with(1, RotaryPairing::kInterleaved),
            "861e5b9f07b6302438d3b2815666cbb66c4256bf55e49556f3d57dda74e0f18c");
}

TEST(Fingerprint, TellsEveryParameterOfAScalingApart) {
  Loaded model = Load("yarn");
  const RopeConfig as_loaded = model.config.rope;
  std::set<std::string> seen = {Fingerprint(model.config, model.dtype, model.tensors)};
  const std::function<void(RopeConfig&)> changes[] = {
      [](RopeConfig& rope) { rope.scaling = RopeScaling::kDynamic; },
      [](RopeConfig& rope) { rope.scaling = RopeScaling::kNone; },
      [](RopeConfig& rope) { rope.factor = 5; },
      [](RopeConfig& rope) { rope.original_max_positions = 65; },
      [](RopeConfig& rope) { rope.beta_fast = 31; },
      [](RopeConfig& rope) { rope.beta_slow = 2; },
      [](RopeConfig& rope) { rope.truncate = false; },
      [](RopeConfig& rope) { rope.attention_factor = 1; },
  };
  for (const auto& change : changes) {
    model.config.rope = as_loaded;
    change(model.config.rope);
    seen.insert(Fingerprint(model.config, model.dtype, model.tensors));
  }
  EXPECT_EQ(seen.size(), 1 + std::size(changes));
}

}  // namespace
}  // namespace prefilld

#include "server/model/family.h"

#include <gtest/gtest.h>

namespace prefilld {
namespace {

TEST(Family, IsFoundByItsTypeAndByNothingElse) {
  const Family* llama = FindFamily("llama");
  ASSERT_NE(llama, nullptr);
  EXPECT_EQ(llama->model_type, "llama");
  for (const char* other : {"", "llam", "llama4", "gpt2"}) EXPECT_EQ(FindFamily(other), nullptr);
  EXPECT_NE(FamilyNames().find("llama"), std::string::npos);
}

TEST(Family, OfLlamaTurnsAllOfAHeadInHalves) {
  const Family& llama = *FindFamily("llama");
  EXPECT_EQ(llama.rotary_share, 1);
  EXPECT_FALSE(llama.reads_rotary_share);
  EXPECT_EQ(llama.pairing, RotaryPairing::kHalf);
  EXPECT_TRUE(llama.tensors.q_norm.empty());
  EXPECT_TRUE(llama.tensors.qkv.empty());
  EXPECT_TRUE(llama.tensors.gate_up.empty());
}

TEST(Family, OthersDifferFromLlamaInWhatTheirRowsSay) {
  EXPECT_EQ(FamilyNames(), "llama, mistral, qwen2, qwen3, glm");
  const Family& qwen3 = *FindFamily("qwen3");
  EXPECT_EQ(qwen3.tensors.q_norm, "self_attn.q_norm");
  EXPECT_EQ(qwen3.tensors.k_norm, "self_attn.k_norm");
  const Family& glm = *FindFamily("glm");
  EXPECT_EQ(glm.pairing, RotaryPairing::kInterleaved);
  EXPECT_EQ(glm.tensors.gate_up, "mlp.gate_up_proj");
  EXPECT_TRUE(glm.tensors.gate.empty() && glm.tensors.up.empty());
  for (const char* plain : {"mistral", "qwen2"}) {
    EXPECT_TRUE(FindFamily(plain)->tensors.q_norm.empty()) << plain;
    EXPECT_EQ(FindFamily(plain)->pairing, RotaryPairing::kHalf) << plain;
  }
}

}  // namespace
}  // namespace prefilld

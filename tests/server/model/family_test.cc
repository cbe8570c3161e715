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

}  // namespace
}  // namespace prefilld

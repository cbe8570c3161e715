#include "server/model/checkpoint.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>

#include "kernels/backend.h"
#include "tests/server/model/model_directory.h"

namespace prefilld {
namespace {

class CheckpointTest : public testing::Test {
 protected:
  std::unique_ptr<Backend> backend_ = *CreateBackend("cpu", 1);
};

TEST_F(CheckpointTest, HasAllThatTheConfigAsksForPrepared) {
  const auto checkpoint = Checkpoint::Load(FixtureModel("bf16"), **backend_->ops());
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  EXPECT_EQ(checkpoint->dtype, DType::kBF16);
  EXPECT_EQ(checkpoint->config.family->model_type, "llama");
  EXPECT_EQ(checkpoint->fingerprint.size(), 64u);
  ASSERT_EQ(checkpoint->layers.size(), static_cast<size_t>(checkpoint->config.layers));
  for (const LayerWeights& layer : checkpoint->layers) {
    EXPECT_TRUE(layer.input_norm && layer.qkv && layer.o && layer.gate_up && layer.down);
    EXPECT_FALSE(layer.q_norm || layer.k_norm) << "llama has no norms of heads";
  }
  EXPECT_TRUE(checkpoint->embedding && checkpoint->rotary && checkpoint->final_norm);
  EXPECT_TRUE(checkpoint->lm_head);
}

TEST_F(CheckpointTest, HasTheNormsOfHeadsThatItsFamilyHas) {
  const auto checkpoint = Checkpoint::Load(FixtureModel("qwen3"), **backend_->ops());
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  for (const LayerWeights& layer : checkpoint->layers) EXPECT_TRUE(layer.q_norm && layer.k_norm);
}

TEST_F(CheckpointTest, TellsHowFarItIs) {
  for (const char* fixture : {"base", "tied"}) {  // a tensor that is read twice counts once
    uint64_t last = 0, all = 0;
    const LoadProgress progress = [&](uint64_t bytes, uint64_t of_bytes) {
      EXPECT_GE(bytes, last);
      last = bytes;
      all = of_bytes;
    };
    ASSERT_TRUE(Checkpoint::Load(FixtureModel(fixture), **backend_->ops(), progress).ok());
    EXPECT_GT(all, 0u);
    EXPECT_EQ(last, all) << fixture;
  }
}

TEST_F(CheckpointTest, AConfigThatIsNoObjectIsNamed) {
  const ModelDirectory model("base");
  model.Write("config.json", "[]");
  const absl::Status status = Checkpoint::Load(model.path(), **backend_->ops()).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(status.message(), testing::HasSubstr(model.path() + "/config.json"));
}

}  // namespace
}  // namespace prefilld

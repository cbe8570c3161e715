#include "server/engine/fit.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <list>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "server/engine/engine.h"
#include "tests/server/fake_device.h"
#include "tests/server/prompts.h"
#include "tests/server/run_attend.h"

namespace prefilld {
namespace {

constexpr auto kDevice = FakeDevice::Kind::kDevice;

class FitTest : public testing::Test {
 protected:
  FitTest() { model_ = prompts_.New(1, 0)->prefill->model; }

  MemoryPlan Plan(int64_t prompt_tokens) {
    return PlanMemory({.backend = fake_,
                       .models = {model_},
                       .prompt_tokens = prompt_tokens,
                       .batch_tokens = 256,
                       .batch_jobs = 8,
                       .batches = 1,
                       .free = fake_.device().free_bytes()});
  }
  void LeaveFree(uint64_t bytes) {
    fake_.device().Limit(kDevice, fake_.device().live_bytes(kDevice) + bytes);
  }
  // With exactly so much to spare: the device has no margin either.
  void Reserve(int64_t prompt_tokens, uint64_t spare) {
    LeaveFree(Plan(prompt_tokens).needs() + spare);
    const MemoryPlan plan = Plan(prompt_tokens);
    ASSERT_EQ(plan.spare, spare);
    ASSERT_TRUE(engine_.Reserve(plan).ok());
    LeaveFree(spare);
  }
  // What the plan of the longest prompt has not.
  uint64_t Beyond(const HeldBytes& needs) {
    const HeldBytes held = ReservedBy(Plan(longest())).held;
    uint64_t more = 0;
    for (size_t i = 0; i < kHeldCount; ++i) more += needs[i] - std::min(needs[i], held[i]);
    return more;
  }
  std::shared_ptr<Job> InSmallBlocks(int64_t tokens) const {
    auto job = prompts_.New(tokens, 3);
    job->policy.block_size = 64;
    return job;
  }
  // Of one head, in memory of nobody's device.
  std::shared_ptr<Job> NewAttend(int64_t tokens) {
    auto job = std::make_shared<Job>();
    job->policy.method = Method::kJoint;
    job->attend = std::make_unique<AttendWork>();
    job->attend->shape = {DType::kF32, 1, 1, 64, {0, tokens}, {0, tokens}};
    job->attend->softmax_scale = 0.125;
    for (Buffer* tensor : {&job->attend->q, &job->attend->k, &job->attend->v, &job->attend->o}) {
      std::vector<float>& values = tensors_.emplace_back(static_cast<size_t>(tokens) * 64);
      *tensor = Buffer(values.data(), values.size() * sizeof(float), nullptr);
    }
    return job;
  }
  absl::StatusOr<std::unique_ptr<Batch>> Begin(const std::shared_ptr<Job>& job) {
    return engine_.Begin({job});
  }
  int64_t longest() const { return prompts_.info().max_positions; }

  FakeBackend fake_;
  Prompts prompts_{fake_};
  const Transformer* model_ = nullptr;
  Metrics metrics_;
  std::list<std::vector<float>> tensors_;
  Engine engine_{fake_, metrics_};
};

// One grows the index, the other the workspace, and there is room for one at a time: what the one
// before it grew goes, also where a layer of it is on its way.
TEST_F(FitTest, ShapesThatNobodyPlannedRunInTurn) {
  const auto job = InSmallBlocks(longest()), alone = InSmallBlocks(longest());
  const uint64_t spare = Beyond(HeldBy(fake_, *model_, {longest()}, job->policy));
  ASSERT_GT(spare, 0u);
  const auto attend = NewAttend(longest() + static_cast<int64_t>(spare) / 8);
  ASSERT_EQ(Beyond(HeldBy(fake_, attend->attend->shape, attend->policy)), spare);
  Reserve(longest(), spare);
  ASSERT_TRUE(engine_.CheckFits(*job).ok());
  ASSERT_TRUE(engine_.CheckFits(*attend).ok());
  for (const auto& each : {job, alone}) {
    auto batch = Begin(each);
    ASSERT_TRUE(batch.ok()) << batch.status();
    while (!(*batch)->done()) {
      const absl::Status layer = engine_.RunStep(**batch);
      ASSERT_TRUE(layer.ok()) << layer;
      if (each == alone) continue;
      const absl::Status attended = RunAttend(engine_, attend);
      ASSERT_TRUE(attended.ok()) << attended;
    }
    ASSERT_TRUE(engine_.Finish(**batch).ok());
    engine_.completions().Flush();
  }
  EXPECT_EQ(job->prefill->logits, alone->prefill->logits);
}

// What is spare is no help to a prompt whose residual stream is longer than all batches together
// may have: it would wait for ever.
TEST_F(FitTest, WhatWouldNeverFindRoomIsRefusedWithWhatWould) {
  Reserve(longest() / 4, uint64_t{1} << 30);
  const absl::Status refused = engine_.CheckFits(*prompts_.New(longest(), 1));
  ASSERT_EQ(refused.code(), absl::StatusCode::kInvalidArgument) << refused;
  const std::string text(refused.message());
  const size_t at = text.find("at most ");
  ASSERT_NE(at, std::string::npos) << text;
  const int64_t most = std::stoll(text.substr(at + 8));
  EXPECT_GE(most, longest() / 4);
  EXPECT_TRUE(engine_.CheckFits(*prompts_.New(most, 1)).ok());
  EXPECT_TRUE(engine_.HasRoom(*model_, most));
  EXPECT_FALSE(engine_.CheckFits(*prompts_.New(most + 1, 1)).ok());
  EXPECT_FALSE(engine_.HasRoom(*model_, most + 1));
}

TEST_F(FitTest, APromptInSmallBlocksIsToldHowManyTokensFit) {
  const uint64_t spare = Beyond(HeldBy(fake_, *model_, {longest()}, InSmallBlocks(1)->policy)) / 2;
  Reserve(longest(), spare);
  const absl::Status refused = engine_.CheckFits(*InSmallBlocks(longest()));
  ASSERT_EQ(refused.code(), absl::StatusCode::kInvalidArgument) << refused;
  const std::string text(refused.message());
  const int64_t most = std::stoll(text.substr(text.find("at most ") + 8));
  EXPECT_TRUE(engine_.CheckFits(*InSmallBlocks(most)).ok()) << text;
  EXPECT_FALSE(engine_.CheckFits(*InSmallBlocks(most + 1)).ok()) << text;
}

// Reports are the host's: they are neither checked nor told.
TEST_F(FitTest, OnlyTheDevicesMemoryCounts) {
  const auto job = prompts_.New(128, 1);
  Reserved reserved{.held = HeldBy(fake_, *model_, {128}, job->policy)};
  const size_t reports = std::exchange(Of(reserved.held, Holding::kReports), 0);
  ASSERT_GT(reports, 0u);
  EXPECT_TRUE(CheckFits(fake_, reserved, *job).ok());
  uint64_t device = 0;
  for (const size_t bytes : reserved.held) device += bytes;
  Of(reserved.held, Holding::kKvOut) -= 1;
  const absl::Status refused = CheckFits(fake_, reserved, *job);
  EXPECT_THAT(std::string(refused.message()),
              testing::HasSubstr(absl::StrCat(" need ", device, " bytes of the device's memory, 1 ",
                                              "more than is reserved; 0 are spare")));
}

TEST_F(FitTest, AnAttendThatNoMemoryHoldsIsRefused) {
  Reserve(longest(), 800);
  EXPECT_TRUE(engine_.CheckFits(*NewAttend(longest() + 100)).ok());
  const absl::Status refused = engine_.CheckFits(*NewAttend(longest() + 101));
  EXPECT_EQ(refused.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(refused.message()), testing::HasSubstr("808 more than is reserved"));
}

}  // namespace
}  // namespace prefilld

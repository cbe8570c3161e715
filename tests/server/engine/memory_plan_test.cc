#include "server/engine/memory_plan.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <string>
#include <vector>

#include "server/engine/arena.h"
#include "server/engine/engine.h"
#include "tests/server/fake_device.h"
#include "tests/server/prompts.h"
#include "tests/server/run_attend.h"

namespace prefilld {
namespace {

constexpr auto kDevice = FakeDevice::Kind::kDevice;
constexpr uint64_t kMiB = uint64_t{1} << 20;
constexpr uint64_t kMargin = 512 * kMiB;

TEST(Arena, GivesTheFirstHoleThatIsLargeEnough) {
  FakeDevice device;
  Arena arena(*device.Allocate(4096));
  auto one = *arena.Take(1000), two = *arena.Take(2000), three = *arena.Take(500);
  EXPECT_EQ(static_cast<char*>(two.data()) - static_cast<char*>(one.data()), 1024);
  EXPECT_FALSE(arena.Fits(1000));
  EXPECT_EQ(arena.Take(1000).status().code(), absl::StatusCode::kResourceExhausted);
  void* const begin = one.data();
  one = Buffer();
  EXPECT_TRUE(arena.Fits(1000));
  EXPECT_FALSE(arena.Fits(1025));
  EXPECT_EQ(arena.Take(1000)->data(), begin);
  two = Buffer();
  three = Buffer();
  EXPECT_TRUE(arena.Fits(4096));
  EXPECT_FALSE(arena.Fits(4097));
}

TEST(Arena, GivesTheEndOfTheLastHoleToWhoAsksForThat) {
  FakeDevice device;
  Arena arena(*device.Allocate(4096));
  const auto offset = [&, base = arena.Take(1)->as<char>()](const Buffer& part) {
    return part.as<char>() - base;
  };
  auto last = *arena.Take(1024, Arena::From::kEnd), before = *arena.Take(512, Arena::From::kEnd);
  EXPECT_EQ(offset(last), 3072);
  EXPECT_EQ(offset(before), 2560);
  auto first = *arena.Take(2560);
  EXPECT_EQ(offset(first), 0);
  EXPECT_FALSE(arena.Take(1, Arena::From::kEnd).ok());
  last = Buffer();
  EXPECT_EQ(offset(*arena.Take(300, Arena::From::kEnd)), 3584) << "a multiple of 256";
  EXPECT_EQ(offset(*arena.Take(1024, Arena::From::kEnd)), 3072);
  first = Buffer();
  auto hole = *arena.Take(1024, Arena::From::kEnd);
  EXPECT_EQ(offset(hole), 3072);
  EXPECT_EQ(offset(*arena.Take(1500, Arena::From::kEnd)), 1024) << "in the hole before it";
  EXPECT_FALSE(arena.Take(2561, Arena::From::kEnd).ok());
}

TEST(Arena, IsOutlivedByItsParts) {
  FakeDevice device;
  {
    Buffer part;
    {
      Arena arena(*device.Allocate(4096));
      part = *arena.Take(100);
    }
    std::memset(part.data(), 1, part.bytes());
    EXPECT_EQ(device.live_bytes(kDevice), 4096u);
  }
  EXPECT_EQ(device.live_bytes(kDevice), 0u);
}

class MemoryPlanTest : public testing::Test {
 protected:
  MemoryPlanTest() { model_ = prompts_.New(1, 0)->prefill->model; }

  PlanInputs Inputs(int64_t prompt_tokens) {
    return {.backend = fake_,
            .models = {model_},
            .prompt_tokens = prompt_tokens,
            .batch_tokens = 256,
            .batch_jobs = 8,
            .batches = 3,
            .attend_bytes = kMiB,
            .kv_block_bytes = kMiB,
            .kv_segment_bytes = 2 * kMiB,
            .free = fake_.device().free_bytes()};
  }
  void LeaveFree(uint64_t bytes) {
    fake_.device().Limit(kDevice, fake_.device().live_bytes(kDevice) + bytes);
  }
  int64_t longest() const { return prompts_.info().max_positions; }

  FakeBackend fake_;
  Prompts prompts_{fake_};
  const Transformer* model_ = nullptr;
  Metrics metrics_;
};

TEST_F(MemoryPlanTest, SaysWhatEachIsAndIsTheirSum) {
  const auto plan = PlanMemory(Inputs(longest()));
  std::vector<std::string> names;
  uint64_t device = 0;
  for (const MemoryPlan::Row& row : plan.rows) {
    names.push_back(row.what);
    EXPECT_FALSE(row.by.empty());
    EXPECT_GT(row.bytes, 0u) << row.what;
    if (row.device && row.when != MemoryPlan::When::kLoaded) device += row.bytes;
  }
  EXPECT_THAT(names,
              testing::IsSupersetOf({"weights", "tiles", "short_activations", "block_counts",
                                     "block_index", "workspace", "kv_out", "reports", "batches",
                                     "kv_blocks", "kv_segments", "attend_tensors", "margin"}));
  EXPECT_EQ(plan.needs(), device);
  EXPECT_GT(Of(plan.held, Holding::kWorkspace), 0u) << "of a sparse method";
  const size_t one = model_->BatchBytes(longest()), few = model_->BatchBytes(256);
  EXPECT_EQ(plan.batches, one + 2 * few);
}

TEST_F(MemoryPlanTest, CachesOnTheDeviceAreARowOfIt) {
  PlanInputs inputs = Inputs(longest());
  const uint64_t without = PlanMemory(inputs).needs();
  inputs.kv_device_bytes = 3 * kMiB;
  const MemoryPlan plan = PlanMemory(inputs);
  EXPECT_EQ(plan.needs(), without + 3 * kMiB);
  const auto row = std::find_if(plan.rows.begin(), plan.rows.end(),
                                [](const auto& r) { return r.what == "kv_device_segments"; });
  ASSERT_NE(row, plan.rows.end());
  EXPECT_TRUE(row->device);
  EXPECT_EQ(row->bytes, 3 * kMiB);
}

TEST_F(MemoryPlanTest, CachesOnTheDeviceHaveAQuarterOfWhatIsSpareWhereNobodySays) {
  LeaveFree(PlanMemory(Inputs(longest())).needs() + 1000 * kMiB);
  PlanInputs inputs = Inputs(longest());
  const uint64_t spare = PlanMemory(inputs).spare;
  EXPECT_EQ(KvDeviceBytes(PlanMemory(inputs)), spare / 4);
  inputs.kv_device_bytes = spare / 4;
  EXPECT_EQ(PlanMemory(inputs).fits, longest()) << "no prompt is shorter for it";
  MemoryPlan much;
  much.spare = uint64_t{100} << 30;
  EXPECT_EQ(KvDeviceBytes(much), uint64_t{8} << 30);
  EXPECT_EQ(KvDeviceBytes({}), 0u);
}

TEST_F(MemoryPlanTest, WhatIsFreeBeyondItIsForMoreLongPromptsAndSpare) {
  const uint64_t needs = PlanMemory(Inputs(longest())).needs();
  LeaveFree(needs + 100'000);
  const auto plan = PlanMemory(Inputs(longest()));
  EXPECT_EQ(plan.needs() + plan.spare, needs + 100'000);
  EXPECT_EQ(plan.spare, 50'000u);
  LeaveFree(needs + 1000 * kMiB);
  EXPECT_EQ(PlanMemory(Inputs(longest())).batches, 3 * model_->BatchBytes(longest()));
}

// The number that is named fits, and one token more does not.
TEST_F(MemoryPlanTest, WhatDoesNotFitIsToldWithTheLongestThatDoes) {
  const uint64_t needs = PlanMemory(Inputs(longest())).needs();
  LeaveFree(needs - 1000);
  const MemoryPlan plan = PlanMemory(Inputs(longest()));
  EXPECT_EQ(plan.prompt_tokens, longest());
  EXPECT_EQ(plan.needs(), needs) << "what would be needed";
  EXPECT_EQ(plan.free, needs - 1000);
  EXPECT_GT(plan.fits, 0);
  EXPECT_LT(plan.fits, longest());
  const MemoryPlan less = PlanMemory(Inputs(plan.fits));
  EXPECT_EQ(less.fits, plan.fits);
  EXPECT_LE(less.needs(), needs - 1000);
  EXPECT_LT(PlanMemory(Inputs(plan.fits + 1)).fits, plan.fits + 1);
}

// Whatever somebody else takes between the two plans.
TEST_F(MemoryPlanTest, APlanOfWhatFitsFits) {
  LeaveFree(PlanMemory(Inputs(longest())).needs() - 1000);
  PlanInputs inputs = Inputs(longest());
  inputs.prompt_tokens = PlanMemory(inputs).fits;
  LeaveFree(1000);
  EXPECT_EQ(PlanMemory(inputs).fits, inputs.prompt_tokens);
}

// Attends are checked on a server that has no models too.
TEST_F(MemoryPlanTest, WithoutModelsItIsWhatAttendsNeedAndTheRestIsSpare) {
  PlanInputs inputs = Inputs(0);
  inputs.models.clear();
  inputs.free = kMargin + kMiB + 1000;
  const MemoryPlan plan = PlanMemory(inputs);
  EXPECT_EQ(plan.needs(), kMargin + kMiB);
  EXPECT_EQ(plan.spare, 1000u);
  EXPECT_EQ(plan.batches, 0u);
  Engine engine(fake_, metrics_);
  const int taken = fake_.device().taken();
  ASSERT_TRUE(engine.Reserve(plan).ok());
  EXPECT_EQ(fake_.device().taken(), taken);
  Job attend;
  attend.policy.method = Method::kDense;
  attend.attend = std::make_unique<AttendWork>();
  attend.attend->shape = {DType::kF32, 1, 1, 64, {0, 256}, {0, 256}};
  EXPECT_TRUE(engine.CheckFits(attend).ok());
  attend.attend->shape = {DType::kF32, 1, 1, 64, {0, 25'600}, {0, 25'600}};
  EXPECT_EQ(engine.CheckFits(attend).code(), absl::StatusCode::kInvalidArgument);
  inputs.free = kMargin;
  EXPECT_EQ(PlanMemory(inputs).spare, 0u);
  inputs.free.reset();
  ASSERT_TRUE(engine.Reserve(PlanMemory(inputs)).ok());
  EXPECT_TRUE(engine.CheckFits(attend).ok()) << "nothing is known of what is free";
}

TEST_F(MemoryPlanTest, WhereNoPromptFitsThatIsSaid) {
  LeaveFree(kMargin);
  EXPECT_EQ(PlanMemory(Inputs(longest())).fits, 0);
}

TEST(MemoryPlan, OnACpuNothingIsTakenAndEveryLengthFits) {
  const auto cpu = *CreateBackend("cpu", 1);
  Prompts prompts(*cpu);
  const MemoryPlan plan = PlanMemory({.backend = *cpu,
                                      .models = {prompts.New(1, 0)->prefill->model},
                                      .prompt_tokens = 1000,
                                      .batch_tokens = 256,
                                      .batch_jobs = 8,
                                      .batches = 3,
                                      .attend_bytes = kMiB,
                                      .kv_block_bytes = kMiB});
  EXPECT_EQ(plan.fits, 1000);
  EXPECT_FALSE(plan.free.has_value());
  for (const MemoryPlan::Row& row : plan.rows) {
    EXPECT_FALSE(row.device) << row.what;
    EXPECT_GT(row.bytes, 0u) << row.what;
    EXPECT_EQ(row.when,
              row.what == "weights" ? MemoryPlan::When::kMapped : MemoryPlan::When::kLater)
        << row.what;
  }
}

// With all of it taken, prompts of every length and method ask the device for nothing, and have
// their memory from what was reserved.
TEST_F(MemoryPlanTest, ReservedMemoryIsAllThatPromptsNeed) {
  LeaveFree(PlanMemory(Inputs(longest())).needs());
  Engine engine(fake_, metrics_);
  const auto plan = PlanMemory(Inputs(longest()));
  ASSERT_TRUE(engine.Reserve(plan).ok());
  const auto run = [&](const std::vector<std::shared_ptr<Job>>& jobs) {
    for (const auto& job : jobs) EXPECT_TRUE(engine.CheckFits(*job).ok());
    auto batch = engine.Begin(jobs);
    ASSERT_TRUE(batch.ok()) << batch.status();
    while (!(*batch)->done()) ASSERT_TRUE(engine.RunStep(**batch).ok());
    ASSERT_TRUE(engine.Finish(**batch).ok());
    engine.completions().Flush();
  };
  const size_t live = fake_.device().live_bytes(kDevice);
  for (const Method method : {Method::kDense, Method::kJoint, Method::kFlexPrefill}) {
    for (const int64_t tokens : {longest(), int64_t{1}, longest() / 3}) {
      auto job = prompts_.New(tokens, 3);
      job->policy.method = method;
      const int taken = fake_.device().taken();
      run({job});
      EXPECT_EQ(fake_.device().taken(), taken) << tokens;
    }
  }
  std::vector<std::shared_ptr<Job>> several;
  for (int i = 0; i < 8; ++i) several.push_back(prompts_.New(i == 0 ? 249 : 1, i));
  const int taken = fake_.device().taken();
  run(several);
  EXPECT_EQ(fake_.device().taken(), taken);
  EXPECT_EQ(fake_.device().live_bytes(kDevice), live);
}

TEST_F(MemoryPlanTest, WhoFindsNoRoomIsToldAndOthersGoOn) {
  LeaveFree(PlanMemory(Inputs(longest())).needs());
  Engine engine(fake_, metrics_);
  ASSERT_TRUE(engine.Reserve(PlanMemory(Inputs(longest()))).ok());
  auto first = engine.Begin({prompts_.New(longest(), 1)});
  ASSERT_TRUE(first.ok());
  EXPECT_TRUE(engine.HasRoom(*model_, 256));
  EXPECT_FALSE(engine.HasRoom(*model_, longest()));
  EXPECT_EQ(engine.Begin({prompts_.New(longest(), 2)}).status().code(),
            absl::StatusCode::kResourceExhausted);
  ASSERT_TRUE(engine.Begin({prompts_.New(200, 3)}).ok());
  while (!(*first)->done()) ASSERT_TRUE(engine.RunStep(**first).ok());
  ASSERT_TRUE(engine.Finish(**first).ok());
  first->reset();
  engine.completions().Flush();
  EXPECT_TRUE(engine.HasRoom(*model_, longest()));
}

// A shape that nobody planned for may take what is spare, and fails alone where that is too little.
TEST_F(MemoryPlanTest, AnAttendBeyondThePlanFailsAlone) {
  LeaveFree(PlanMemory(Inputs(longest())).needs());
  Engine engine(fake_, metrics_, /*step_seconds=*/1e9);  // the Attend as a whole
  ASSERT_TRUE(engine.Reserve(PlanMemory(Inputs(longest()))).ok());
  const auto attend = std::make_shared<Job>();
  attend->policy = {.method = Method::kDense, .block_size = 64};
  attend->attend = std::make_unique<AttendWork>();
  const int64_t tokens = 300'000;
  attend->attend->shape = {DType::kF32, 16, 1, 64, {0, tokens}, {0, tokens}};
  attend->attend->softmax_scale = 0.125;
  EXPECT_EQ(RunAttend(engine, attend).code(), absl::StatusCode::kResourceExhausted);
  auto batch = engine.Begin({prompts_.New(longest(), 3)});
  ASSERT_TRUE(batch.ok()) << batch.status();
  while (!(*batch)->done()) ASSERT_TRUE(engine.RunStep(**batch).ok());
  EXPECT_TRUE(engine.Finish(**batch).ok());
}

// Blocks of 64 have four times the index.
TEST_F(MemoryPlanTest, APromptThatNoMemoryHoldsIsRefusedWithItsNumber) {
  LeaveFree(PlanMemory(Inputs(longest())).needs());
  Engine engine(fake_, metrics_);
  ASSERT_TRUE(engine.Reserve(PlanMemory(Inputs(longest()))).ok());
  auto job = prompts_.New(longest(), 1);
  EXPECT_TRUE(engine.CheckFits(*job).ok());
  job->policy.block_size = 64;
  const absl::Status refused = engine.CheckFits(*job);
  EXPECT_EQ(refused.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(refused.message()), testing::HasSubstr("in blocks of 64 need"));
  job = prompts_.New(longest() / 2, 1);
  job->policy.block_size = 64;
  EXPECT_TRUE(engine.CheckFits(*job).ok());
}

}  // namespace
}  // namespace prefilld

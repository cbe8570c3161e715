#include "server/scheduler/admission.h"

#include <gtest/gtest.h>

#include "server/kv/kv_cache.h"
#include "server/record/errors.h"

namespace prefilld {
namespace {

class AdmissionTest : public testing::Test {
 protected:
  static std::shared_ptr<Job> NewAttend(const std::string& peer, double deadline = 0) {
    auto job = std::make_shared<Job>();
    job->peer = peer;
    if (deadline > 0) job->deadline = SteadyNow() + absl::Seconds(deadline);
    job->attend = std::make_unique<AttendWork>();
    job->attend->shape = {DType::kF32, 1, 1, 64, {0, 100}, {0, 100}};
    return job;
  }
  std::shared_ptr<Job> NewPrefill(const std::string& peer, int64_t tokens) {
    auto job = std::make_shared<Job>();
    job->peer = peer;
    job->prefill = std::make_unique<PrefillWork>();
    job->prefill->token_ids.resize(static_cast<size_t>(tokens));
    job->prefill->cache = KvCache::CreateWaiting(
        *pool_, {.layers = 2, .kv_heads = 1, .head_dim = 64, .tokens = tokens}, true);
    return job;
  }
  // Admitted, all here, and waiting.
  absl::Status Wait(Admission& admission, const std::shared_ptr<Job>& job, double seconds) {
    absl::Status status = admission.Take(*job, absl::Seconds(seconds));
    if (status.ok() && job->attend) admission.Uploaded(*job, absl::Seconds(seconds));
    if (status.ok()) jobs_.push_back(job);
    return status;
  }

  Metrics metrics_;
  const std::unique_ptr<Backend> backend_ = *CreateBackend("cpu", 1);
  // 32 blocks.
  const std::unique_ptr<BlockPool> pool_ =
      *BlockPool::Create(backend_->device(), size_t{2} << 20, size_t{64} << 10);
  std::vector<std::shared_ptr<Job>> jobs_;
};

TEST_F(AdmissionTest, OnePeerLeavesPlacesToOthers) {
  Admission admission({.waiting_jobs_max = 16}, metrics_);
  for (int i = 0; i < 14; ++i) ASSERT_TRUE(Wait(admission, NewAttend("many"), 1).ok());
  const absl::Status full = Wait(admission, NewAttend("many"), 1);
  EXPECT_EQ(FactsOf(full).reason, "queue_full");
  EXPECT_TRUE(FactsOf(full).retry_after.has_value());
  EXPECT_TRUE(Wait(admission, NewAttend("other"), 1).ok());
  admission.Started(*jobs_[0]);
  admission.Ended(*jobs_[0]);
  EXPECT_FALSE(Wait(admission, NewAttend("many"), 1).ok()) << "a place is the other's now";
  EXPECT_TRUE(Wait(admission, NewAttend("other"), 1).ok());
}

TEST_F(AdmissionTest, AnUploadHoldsNoPlace) {
  Admission admission({.waiting_jobs_max = 1, .uploads_max = 2}, metrics_);
  const auto first = NewAttend("a"), second = NewAttend("a"), third = NewAttend("a");
  ASSERT_TRUE(admission.Take(*first, absl::Seconds(1)).ok());
  ASSERT_TRUE(admission.Take(*second, absl::Seconds(1)).ok());
  EXPECT_EQ(FactsOf(admission.Take(*third, absl::Seconds(1))).reason, "uploads");
  admission.Uploaded(*first, absl::Seconds(1));
  EXPECT_EQ(FactsOf(admission.Take(*third, absl::Seconds(1))).reason, "queue_full");
}

TEST_F(AdmissionTest, ADeadlineIsMissedByTheWorkOrByTheBacklog) {
  Admission admission({}, metrics_);
  const absl::Status never = Wait(admission, NewAttend("a", 10), 11);
  EXPECT_EQ(never.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(FactsOf(never).reason, kDeadlineInfeasible);
  EXPECT_FALSE(FactsOf(never).retry_after.has_value());
  for (int i = 0; i < 4; ++i) ASSERT_TRUE(Wait(admission, NewAttend("a", 10), 2).ok()) << i;
  const absl::Status later = Wait(admission, NewAttend("a", 10), 2);
  EXPECT_EQ(later.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(FactsOf(later).reason, "backlog") << later;
  EXPECT_GE(FactsOf(later).retry_after, absl::Seconds(0.5));
  EXPECT_TRUE(Wait(admission, NewAttend("b", 10), 2).ok()) << "it has a share of its own";
  for (const auto& job : jobs_) admission.Progressed(*job, absl::ZeroDuration());
  EXPECT_TRUE(Wait(admission, NewAttend("a", 10), 2).ok()) << "all of it is done";
}

TEST_F(AdmissionTest, AnUploadThatDoesNotMoveIsNotWaitedFor) {
  Admission admission({}, metrics_);
  const auto moves = NewAttend("a", 10), stands = NewAttend("a", 10);
  ASSERT_TRUE(admission.Take(*moves, absl::Seconds(4)).ok());
  ASSERT_TRUE(admission.Take(*stands, absl::Seconds(4)).ok());
  EXPECT_EQ(FactsOf(Wait(admission, NewAttend("a", 10), 4)).reason, "backlog");
  stands->moved = SteadyNow() - absl::Minutes(1);
  EXPECT_TRUE(Wait(admission, NewAttend("a", 10), 4).ok());
}

TEST_F(AdmissionTest, TheTimeOfAnUploadIsNotPartOfAPromise) {
  Admission admission({}, metrics_);
  const auto job = NewAttend("a");
  ASSERT_TRUE(admission.Take(*job, absl::Seconds(1)).ok());
  const SteadyTime promised = job->promise;
  const SteadyTime before = SteadyNow();
  absl::SleepFor(absl::Milliseconds(20));
  admission.Uploaded(*job, absl::Seconds(1));
  EXPECT_GE(job->promise - promised, absl::Milliseconds(20));
  EXPECT_LE(job->promise - promised, Since(before) + absl::Milliseconds(20));
}

TEST_F(AdmissionTest, WaitingPromptsMayNeedMoreBlocksThanThereAreUpToALimit) {
  Admission admission({.waiting_blocks_max = 64}, metrics_);
  for (int i = 0; i < 4; ++i) ASSERT_TRUE(Wait(admission, NewPrefill("a", 7 * 128), 1).ok());
  EXPECT_EQ(pool_->free(), 32) << "none of them has any";
  const absl::Status full = Wait(admission, NewPrefill("a", 128), 1);
  EXPECT_EQ(FactsOf(full).reason, "kv_memory") << full;
  EXPECT_TRUE(FactsOf(full).retry_after.has_value());
  EXPECT_TRUE(Wait(admission, NewPrefill("b", 128), 1).ok()) << "an eighth is for others";
  admission.Started(*jobs_[0]);
  EXPECT_TRUE(Wait(admission, NewPrefill("a", 128), 1).ok());
}

TEST_F(AdmissionTest, BlocksThatCallersLeaseAreNotWaitedFor) {
  Admission admission({}, metrics_);
  const auto running = NewPrefill("a", 8 * 128);
  ASSERT_TRUE(Wait(admission, running, 1).ok());
  ASSERT_TRUE(running->prefill->cache->TakeBlocks().ok());
  admission.Started(*running);
  EXPECT_TRUE(Wait(admission, NewPrefill("b", 16 * 128), 1).ok()) << "it will end";
  admission.Ended(*running);
  const absl::Status leased = Wait(admission, NewPrefill("b", 16 * 128), 1);
  EXPECT_EQ(FactsOf(leased).reason, "kv_memory") << leased;
  EXPECT_TRUE(Wait(admission, NewPrefill("b", 8 * 128), 1).ok());
}

TEST_F(AdmissionTest, WhatIsLargerThanAllBlocksIsNoQuestionOfTime) {
  Admission admission({}, metrics_);
  const absl::Status never = Wait(admission, NewPrefill("a", 17 * 128), 1);
  EXPECT_EQ(never.code(), absl::StatusCode::kInvalidArgument) << never;
  EXPECT_EQ(FactsOf(never).field, "token_ids");
}

}  // namespace
}  // namespace prefilld

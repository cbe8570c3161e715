#include "server/scheduler/scheduler.h"

#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <new>
#include <thread>

#include "absl/synchronization/notification.h"
#include "server/record/errors.h"
#include "server/transport/shm_memory.h"
#include "tests/server/fake_device.h"
#include "tests/server/prompts.h"

namespace prefilld {
namespace {

// The CPU backend with a gate in stage 3: an Attend stays on the device until the test opens it.
class GatedBackend : public Backend {
 public:
  std::string_view name() const override { return "gated"; }
  Device& device() override { return cpu_->device(); }
  absl::StatusOr<Ops*> ops() override { return cpu_->ops(); }
  absl::Status Supports(const AttentionShape& shape, const SparsityPolicy& policy) const override {
    return cpu_->Supports(shape, policy);
  }
  absl::Status EstimatePattern(const AttentionArgs& args, Stream stream) override {
    return cpu_->EstimatePattern(args, stream);
  }
  absl::Status SelectBlocks(const AttentionArgs& args, Stream stream) override {
    return cpu_->SelectBlocks(args, stream);
  }
  absl::Status MeasureCapturedMass(const AttentionArgs& args, Stream stream) override {
    return cpu_->MeasureCapturedMass(args, stream);
  }
  absl::Status Attend(const AttentionArgs& args, Stream stream) override {
    absl::MutexLock lock(&mutex_);
    ++entered_;
    mutex_.Await(absl::Condition(&open_));
    if (!fault_.ok()) return fault_;
    return cpu_->Attend(args, stream);
  }

  void Open(absl::Status fault = absl::OkStatus()) {
    absl::MutexLock lock(&mutex_);
    fault_ = std::move(fault);
    open_ = true;
  }
  void AwaitEntered() {
    absl::MutexLock lock(&mutex_);
    const auto entered = [this] { return entered_ > 0; };
    mutex_.Await(absl::Condition(&entered));
  }

 private:
  std::unique_ptr<Backend> cpu_ = *CreateBackend("cpu", 1);
  absl::Mutex mutex_;
  int entered_ = 0;
  bool open_ = false;
  absl::Status fault_;
};

class Recorder : public JobSink {
 public:
  void OnLayerReady(int, double, double) override {}
  void OnFinished(const absl::Status& status) override {
    ASSERT_FALSE(finished_.HasBeenNotified()) << "OnFinished came twice";
    status_ = status;
    finished_.Notify();
  }
  absl::Status Wait() {
    return finished_.WaitForNotificationWithTimeout(absl::Seconds(20))
               ? status_
               : absl::UnknownError("OnFinished did not come");
  }
  bool finished() const { return finished_.HasBeenNotified(); }

 private:
  absl::Notification finished_;
  absl::Status status_;
};

// Tells whose layers and ends came, in their order.
class OrderSink : public JobSink {
 public:
  OrderSink(std::string name, std::vector<std::string>& order)
      : name_(std::move(name)), order_(order) {}
  void OnLayerReady(int layer, double, double) override {
    order_.push_back(name_ + " " + std::to_string(layer));
  }
  void OnFinished(const absl::Status&) override {
    order_.push_back(name_ + " ends");
    finished.Notify();
  }
  absl::Notification finished;

 private:
  const std::string name_;
  std::vector<std::string>& order_;  // the completion thread's
};

class SchedulerTest : public testing::Test {
 protected:
  std::shared_ptr<Job> NewAttend(int64_t tokens = 64, int heads = 1) {
    auto job = std::make_shared<Job>();
    job->request_id = "r";
    job->policy.method = Method::kDense;
    job->policy.measure_captured_mass = false;
    job->attend = std::make_unique<AttendWork>();
    job->attend->shape = {DType::kF32, heads, heads, 64, {0, tokens}, {0, tokens}};
    job->attend->softmax_scale = 0.125;
    for (Buffer* buffer : {&job->attend->q, &job->attend->k, &job->attend->v, &job->attend->o}) {
      *buffer = *backend_.device().Allocate(tokens * heads * 64 * sizeof(float));
    }
    job->held_bytes = 4 * tokens * heads * 64 * sizeof(float);
    job->sink = std::make_shared<Recorder>();
    return job;
  }
  static Recorder& SinkOf(const std::shared_ptr<Job>& job) {
    return static_cast<Recorder&>(*job->sink);
  }

  GatedBackend backend_;
  Metrics metrics_;
  Engine engine_{backend_, metrics_};
};

TEST_F(SchedulerTest, AnAttendRunsOnlyAfterItsUpload) {
  Scheduler scheduler(engine_, metrics_, {});
  backend_.Open();
  auto job = NewAttend();
  ASSERT_TRUE(scheduler.Admit(job).ok());
  EXPECT_FALSE(scheduler.WaitIdle(SteadyNow() + absl::Milliseconds(100)));
  scheduler.UploadDone(job);
  EXPECT_TRUE(SinkOf(job).Wait().ok());
  EXPECT_TRUE(scheduler.WaitIdle(SteadyNow() + absl::Seconds(10)));
  EXPECT_GT(job->phases[static_cast<int>(Phase::kAttention)], 0);
}

TEST_F(SchedulerTest, RejectsWhenFullAndTakesAgainWhenNot) {
  Scheduler scheduler(engine_, metrics_, {.waiting_jobs_max = 1});
  auto running = NewAttend();
  ASSERT_TRUE(scheduler.Admit(running).ok());
  scheduler.UploadDone(running);
  backend_.AwaitEntered();
  auto waiting = NewAttend();
  ASSERT_TRUE(scheduler.Admit(waiting).ok());
  EXPECT_EQ(waiting->queue_position, 1);
  EXPECT_TRUE(scheduler.CheckOpen(*NewAttend()).ok()) << "an upload holds no place";
  scheduler.UploadDone(waiting);
  EXPECT_EQ(FactsOf(scheduler.CheckOpen(*NewAttend())).reason, "queue_full");
  auto refused = scheduler.Admit(NewAttend());
  EXPECT_EQ(refused.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(FactsOf(refused).reason, "queue_full");
  EXPECT_TRUE(FactsOf(refused).retry_after.has_value());
  backend_.Open();
  EXPECT_TRUE(SinkOf(waiting).Wait().ok());
  EXPECT_TRUE(scheduler.Admit(NewAttend()).ok());
}

TEST_F(SchedulerTest, RejectsMoreAttendBytesThanAllowed) {
  Scheduler scheduler(engine_, metrics_, {.attend_bytes_max = 100000});
  auto first = NewAttend();  // 64 tokens x 64 x 4 tensors x 4 bytes = 65536
  ASSERT_TRUE(scheduler.Admit(first).ok());
  EXPECT_EQ(FactsOf(scheduler.Admit(NewAttend())).reason, "attend_memory");
  scheduler.Cancel(first);
  EXPECT_EQ(SinkOf(first).Wait().code(), absl::StatusCode::kCancelled);
  EXPECT_TRUE(scheduler.WaitIdle(SteadyNow() + absl::Seconds(10)));
  EXPECT_EQ(FactsOf(scheduler.Admit(NewAttend())).reason, "attend_memory")
      << "its tensors still live";
  first.reset();
  // The scheduler's thread drops its own share a moment after it has ended the job.
  const absl::Time deadline = SteadyNow() + absl::Seconds(10);
  absl::Status again = absl::UnknownError("not asked");
  while (!again.ok() && SteadyNow() < deadline) again = scheduler.Admit(NewAttend());
  EXPECT_TRUE(again.ok()) << again;
}

TEST_F(SchedulerTest, ADeadlineThatPassesInTheQueueEndsTheJob) {
  Scheduler scheduler(engine_, metrics_, {});
  auto job = NewAttend();
  job->deadline = SteadyNow() + absl::Milliseconds(100);
  ASSERT_TRUE(scheduler.Admit(job).ok());
  EXPECT_EQ(SinkOf(job).Wait().code(), absl::StatusCode::kDeadlineExceeded);
}

TEST_F(SchedulerTest, RefusesADeadlineThatIsPastOrCannotBeMet) {
  Scheduler scheduler(engine_, metrics_, {});
  auto late = NewAttend();
  late->deadline = SteadyNow() - absl::Seconds(1);
  EXPECT_EQ(scheduler.Admit(late).code(), absl::StatusCode::kDeadlineExceeded);
  auto hopeless = NewAttend();
  hopeless->attend->shape.cu_seqlens_q = hopeless->attend->shape.cu_seqlens_k = {0, 1 << 17};
  hopeless->deadline = SteadyNow() + absl::Milliseconds(50);
  const absl::Status refused = scheduler.Admit(hopeless);
  EXPECT_EQ(FactsOf(refused).reason, "deadline_infeasible") << refused;
  EXPECT_FALSE(FactsOf(refused).retry_after.has_value());
}

// What has become hopeless in the queue ends there, before its deadline.
TEST_F(SchedulerTest, WhatCannotBeDoneInTimeAnyMoreIsNotBegun) {
  Scheduler scheduler(engine_, metrics_, {});
  auto running = NewAttend(), hopeless = NewAttend(/*tokens=*/20000);
  ASSERT_TRUE(scheduler.Admit(running).ok());
  scheduler.UploadDone(running);
  backend_.AwaitEntered();
  const absl::Duration work = absl::Seconds(engine_.PredictSeconds(*hopeless));
  const SteadyTime deadline = SteadyNow() + 1000 * work;
  hopeless->deadline = deadline;
  ASSERT_TRUE(scheduler.Admit(hopeless).ok());
  scheduler.UploadDone(hopeless);
  hopeless->deadline = SteadyNow() + work / 2;
  backend_.Open();
  EXPECT_EQ(SinkOf(hopeless).Wait().code(), absl::StatusCode::kDeadlineExceeded);
  EXPECT_EQ(hopeless->phases[static_cast<int>(Phase::kAttention)], 0);
}

// Of two peers the one that was served less is next, whatever waits of the other.
TEST_F(SchedulerTest, AnotherPeersJobsDoNotWaitForAFlood) {
  std::vector<std::string> order;
  Scheduler scheduler(engine_, metrics_, {});
  std::vector<std::shared_ptr<Job>> jobs;
  std::vector<std::shared_ptr<OrderSink>> sinks;
  const auto come = [&](const char* peer) {
    jobs.push_back(NewAttend(/*tokens=*/500));
    sinks.push_back(std::make_shared<OrderSink>(peer, order));
    jobs.back()->peer = peer;
    jobs.back()->sink = sinks.back();
    ASSERT_TRUE(scheduler.Admit(jobs.back()).ok());
    scheduler.UploadDone(jobs.back());
  };
  come("many");
  backend_.AwaitEntered();
  for (int i = 0; i < 8; ++i) come("many");
  for (int i = 0; i < 2; ++i) come("few");
  backend_.Open();
  for (const auto& sink : sinks) sink->finished.WaitForNotification();
  ASSERT_EQ(order.size(), 11u);
  EXPECT_EQ(order[1], "few ends");
  EXPECT_EQ(std::count(order.begin(), order.begin() + 5, "few ends"), 2);
}

TEST_F(SchedulerTest, DrainingRefusesNewWorkAndFinishesOld) {
  Scheduler scheduler(engine_, metrics_, {});
  auto job = NewAttend();
  ASSERT_TRUE(scheduler.Admit(job).ok());
  scheduler.Drain();
  EXPECT_EQ(scheduler.Admit(NewAttend()).code(), absl::StatusCode::kUnavailable);
  backend_.Open();
  scheduler.UploadDone(job);
  EXPECT_TRUE(SinkOf(job).Wait().ok());
}

TEST_F(SchedulerTest, ADeviceErrorReachesTheJobAndTheNextOneRuns) {
  Scheduler scheduler(engine_, metrics_, {});
  auto job = NewAttend();
  ASSERT_TRUE(scheduler.Admit(job).ok());
  backend_.Open(absl::InternalError("fault"));
  scheduler.UploadDone(job);
  EXPECT_EQ(SinkOf(job).Wait().code(), absl::StatusCode::kInternal);
  backend_.Open();
  auto next = NewAttend();
  ASSERT_TRUE(scheduler.Admit(next).ok());
  scheduler.UploadDone(next);
  EXPECT_TRUE(SinkOf(next).Wait().ok());
}

TEST_F(SchedulerTest, AStepWithoutProgressIsNoticed) {
  Scheduler scheduler(engine_, metrics_, {});
  auto job = NewAttend();
  ASSERT_TRUE(scheduler.Admit(job).ok());
  EXPECT_FALSE(scheduler.Stalled(absl::Hours(1), absl::Seconds(1)));
  const SteadyTime before = SteadyNow();
  scheduler.UploadDone(job);
  backend_.AwaitEntered();
  EXPECT_FALSE(scheduler.Stalled(absl::Hours(1), absl::Seconds(1)));
  while (!scheduler.Stalled(absl::ZeroDuration(), absl::Seconds(1)))
    absl::SleepFor(absl::Milliseconds(1));
  EXPECT_GE(Since(before), 19 * absl::Seconds(engine_.PredictSeconds(*job))) << "not at once";
  const auto stalled = scheduler.Stalled(absl::ZeroDuration(), absl::Seconds(1));
  ASSERT_TRUE(stalled && stalled->parts.size() == 1);
  EXPECT_EQ(stalled->parts[0].request_ids, std::vector<std::string>{"r"});
  EXPECT_EQ(stalled->parts[0].model, kAttendModel);
  EXPECT_FALSE(stalled->parts[0].layer);
  EXPECT_EQ(stalled->predicted, absl::Seconds(engine_.PredictSeconds(*job)));
  EXPECT_GT(stalled->waited, stalled->predicted);
  backend_.Open();
  EXPECT_TRUE(SinkOf(job).Wait().ok());
}

TEST_F(SchedulerTest, StoppingEndsWhatIsLeft) {
  auto job = NewAttend();
  {
    Scheduler scheduler(engine_, metrics_, {});
    ASSERT_TRUE(scheduler.Admit(job).ok());
  }
  EXPECT_EQ(SinkOf(job).Wait().code(), absl::StatusCode::kUnavailable);
}

// It need not wait for the end of the layer.
TEST_F(SchedulerTest, AShortPromptPassesALongOneInTheMiddleOfALayer) {
  constexpr int64_t kLong = kShortBatchTokens + 100;
  Prompts prompts(backend_, kLong);
  std::vector<std::string> order;
  const auto longer = prompts.New(kLong, 5), shorter = prompts.New(100, 9);
  const auto long_sink = std::make_shared<OrderSink>("long", order);
  const auto short_sink = std::make_shared<OrderSink>("short", order);
  longer->sink = long_sink;
  longer->policy = {.method = Method::kDense, .measure_captured_mass = false};
  shorter->sink = short_sink;
  Engine engine(backend_, metrics_, /*step_seconds=*/0);
  Scheduler scheduler(engine, metrics_, {});
  ASSERT_TRUE(scheduler.Admit(longer).ok());
  backend_.AwaitEntered();  // its first head
  ASSERT_TRUE(scheduler.Admit(shorter).ok());
  backend_.Open();
  short_sink->finished.WaitForNotification();
  long_sink->finished.WaitForNotification();
  ASSERT_EQ(order.size(), 2u * (Prompts::kLayers + 1));
  EXPECT_EQ(order[Prompts::kLayers], "short ends");
  EXPECT_EQ(order[Prompts::kLayers + 1], "long 0");
}

// Nor for the end of an Attend.
TEST_F(SchedulerTest, APromptPassesAnAttendBetweenItsParts) {
  Prompts prompts(backend_);
  std::vector<std::string> order;
  const auto attend = NewAttend(/*tokens=*/1500, /*heads=*/8);
  const auto prompt = prompts.New(20, 9);
  const auto attend_sink = std::make_shared<OrderSink>("attend", order);
  const auto prompt_sink = std::make_shared<OrderSink>("prompt", order);
  attend->sink = attend_sink;
  prompt->sink = prompt_sink;
  Engine engine(backend_, metrics_, /*step_seconds=*/0);
  Scheduler scheduler(engine, metrics_, {});
  ASSERT_TRUE(scheduler.Admit(attend).ok());
  scheduler.UploadDone(attend);
  backend_.AwaitEntered();  // its first head
  ASSERT_TRUE(scheduler.Admit(prompt).ok());
  backend_.Open();
  attend_sink->finished.WaitForNotification();
  prompt_sink->finished.WaitForNotification();
  EXPECT_EQ(order.back(), "attend ends");
}

// Prompts on a device whose work ends when the test says so.
class PrefillTest : public testing::Test {
 protected:
  bool InOrder(const LayerSink& sink) const {
    for (size_t i = 0; i < sink.layers.size(); ++i) {
      if (sink.layers[i] != static_cast<int>(i)) return false;
    }
    return !sink.after_the_end;
  }
  static constexpr int layers() { return Prompts::kLayers; }
  // Takes the layers of a cache of two slots one by one; `between` is called where both are full.
  template <typename Between>
  static void Stream(KvCache& cache, Between&& between) {
    auto transfer = *cache.Open([] {});
    absl::Notification computed[Prompts::kLayers];
    for (int layer = 0; layer < layers(); ++layer) {
      transfer->WhenReady(layer, [&done = computed[layer]](auto) { done.Notify(); });
      ASSERT_TRUE(computed[layer].WaitForNotificationWithTimeout(absl::Seconds(20))) << layer;
      if (layer == 1) {
        between();
        cache.Delivered(0);
      }
      if (layer > 0) cache.Delivered(layer);
    }
  }

  FakeBackend backend_;
  Prompts prompts_{backend_};
  Metrics metrics_;
  Engine engine_{backend_, metrics_};
};

TEST_F(PrefillTest, AJobEndsBehindTheCommitOfItsLastLayer) {
  Scheduler scheduler(engine_, metrics_, {});
  auto job = prompts_.New(150, 5), other = prompts_.New(140, 9);
  backend_.device().HoldMarks();
  ASSERT_TRUE(scheduler.Admit(job).ok());
  ASSERT_TRUE(scheduler.Admit(other).ok());
  backend_.device().AwaitHeldMark();
  EXPECT_FALSE(scheduler.WaitIdle(SteadyNow() + absl::Milliseconds(100)));
  EXPECT_FALSE(Prompts::SinkOf(job).finished());
  backend_.device().ReleaseMarks();
  for (const auto& each : {job, other}) {
    EXPECT_TRUE(Prompts::SinkOf(each).Wait().ok());
    EXPECT_EQ(Prompts::SinkOf(each).layers.size(), static_cast<size_t>(layers()));
    EXPECT_TRUE(InOrder(Prompts::SinkOf(each)));
    EXPECT_TRUE(each->prefill->cache->complete());
  }
  EXPECT_TRUE(scheduler.WaitIdle(SteadyNow() + absl::Seconds(10)));
}

// Two layers' worth of blocks: each next layer waits for the delivery of one that a ticket commits.
TEST_F(PrefillTest, AStreamedCachePassesThroughTwoSlots) {
  absl::Notification ready[Prompts::kLayers];
  Scheduler scheduler(engine_, metrics_, {});
  auto job = prompts_.New(150, 5, /*retain=*/false);
  const std::shared_ptr<KvCache> cache = job->prefill->cache;
  ASSERT_TRUE(scheduler.Admit(job).ok());
  auto transfer = *cache->Open([] {});
  for (int layer = 0; layer < layers(); ++layer) {
    transfer->WhenReady(layer, [&ready = ready[layer]](auto pin) {
      EXPECT_TRUE(pin.ok());
      ready.Notify();
    });
    ASSERT_TRUE(ready[layer].WaitForNotificationWithTimeout(absl::Seconds(20))) << layer;
    cache->Delivered(layer);
  }
  EXPECT_TRUE(Prompts::SinkOf(job).Wait().ok());
  EXPECT_TRUE(InOrder(Prompts::SinkOf(job)));
}

// A long prompt begins when its memory is there; a short one has room beside the first.
TEST_F(PrefillTest, APromptWaitsForRoomAndAShortOnePassesIt) {
  const int64_t longest = prompts_.info().max_positions;
  auto first = prompts_.New(longest, 5, /*retain=*/false);  // two layers, then it waits
  const auto plan = PlanMemory({.backend = backend_,
                                .models = {first->prefill->model},
                                .prompt_tokens = longest,
                                .batch_tokens = 256,
                                .batch_jobs = 8,
                                .batches = 2});
  ASSERT_TRUE(engine_.Reserve(plan).ok());
  Scheduler scheduler(engine_, metrics_, {});
  auto second = prompts_.New(longest, 7), third = prompts_.New(140, 9);
  ASSERT_TRUE(scheduler.Admit(first).ok());
  Stream(*first->prefill->cache, [&] {
    ASSERT_TRUE(scheduler.Admit(second).ok());
    ASSERT_TRUE(scheduler.Admit(third).ok());
    EXPECT_TRUE(Prompts::SinkOf(third).Wait().ok());
    EXPECT_TRUE(Prompts::SinkOf(second).layers.empty());
  });
  EXPECT_TRUE(Prompts::SinkOf(first).Wait().ok());
  EXPECT_TRUE(Prompts::SinkOf(second).Wait().ok());
}

// And waits for those of one that runs.
TEST_F(PrefillTest, APromptTakesItsBlocksWhenItStarts) {
  Scheduler scheduler(engine_, metrics_, {});
  BlockPool& pool = prompts_.pool();
  auto first = prompts_.New(150, 5, /*retain=*/false, /*waiting=*/true);  // four blocks
  auto second = prompts_.New(150, 7, /*retain=*/false, /*waiting=*/true);
  const auto taken = *pool.Take(pool.free() - 4);
  ASSERT_TRUE(scheduler.Admit(first).ok());
  Stream(*first->prefill->cache, [&] {
    EXPECT_EQ(pool.free(), 0);
    ASSERT_TRUE(scheduler.Admit(second).ok());
    EXPECT_EQ(second->prefill->cache->blocks_awaited(), 4);
  });
  EXPECT_TRUE(Prompts::SinkOf(first).Wait().ok());
  EXPECT_EQ(second->prefill->cache->blocks_held(), 0);
  first->prefill->cache->Close(absl::FailedPreconditionError("released"));
  Stream(*second->prefill->cache, [] {});
  EXPECT_TRUE(Prompts::SinkOf(second).Wait().ok());
  pool.GiveBack(taken, BlockState::kComputing);
}

// Who ends a job waits for its layer on the device: that too is noticed when it does not end.
TEST_F(PrefillTest, ALayerThatDoesNotEndIsNoticedWhenItsJobIsLate) {
  FakeDevice& device = backend_.device();
  Scheduler scheduler(engine_, metrics_, {});
  auto job = prompts_.New(150, 5);
  device.HoldSteps();
  ASSERT_TRUE(scheduler.Admit(job).ok());
  device.AwaitHeldStep();                // for layer 0, and layer 1 is enqueued
  job->deadline = absl::InfinitePast();  // nobody reads it now
  const int waits = device.waits();
  device.ReleaseOneStep();
  while (device.waits() == waits) absl::SleepFor(absl::Milliseconds(1));
  device.AwaitHeldStep();  // for layer 1
  const SteadyTime held = SteadyNow();
  while (!scheduler.Stalled(absl::ZeroDuration(), absl::Seconds(1)) &&
         Since(held) < absl::Seconds(20)) {
    absl::SleepFor(absl::Milliseconds(1));
  }
  const auto stalled = scheduler.Stalled(absl::ZeroDuration(), absl::Seconds(1));
  EXPECT_TRUE(stalled && stalled->parts.size() == 1 && stalled->parts[0].layer == 1);
  device.ReleaseSteps();
  EXPECT_EQ(Prompts::SinkOf(job).Wait().code(), absl::StatusCode::kDeadlineExceeded);
}

TEST_F(PrefillTest, AStalledStepNamesTheLayerThatIsWaitedForAndWhatIsBehindIt) {
  FakeDevice& device = backend_.device();
  Scheduler scheduler(engine_, metrics_, {});
  auto job = prompts_.New(150, 5);
  job->request_id = "stalls";
  device.HoldSteps();
  ASSERT_TRUE(scheduler.Admit(job).ok());
  device.AwaitHeldStep();  // for layer 0, and layer 1 is enqueued
  while (!scheduler.Stalled(absl::ZeroDuration(), absl::Seconds(1)))
    absl::SleepFor(absl::Milliseconds(1));
  const StalledStep stalled = *scheduler.Stalled(absl::ZeroDuration(), absl::Seconds(1));
  device.ReleaseSteps();
  EXPECT_TRUE(Prompts::SinkOf(job).Wait().ok());
  ASSERT_EQ(stalled.parts.size(), 2u);
  for (int layer : {0, 1}) {
    EXPECT_EQ(stalled.parts[layer].request_ids, std::vector<std::string>{"stalls"});
    EXPECT_EQ(stalled.parts[layer].model, prompts_.info().name);
    EXPECT_EQ(stalled.parts[layer].layer, layer);
  }
}

// Who needs memory that the device has not got fails for that, and says when to come again.
TEST_F(PrefillTest, WhoseMemoryIsMissingFailsAlone) {
  Scheduler scheduler(engine_, metrics_, {});
  auto first = prompts_.New(150, 5, /*retain=*/false);
  ASSERT_TRUE(scheduler.Admit(first).ok());
  Stream(*first->prefill->cache, [&] {
    FakeDevice& device = backend_.device();
    device.Limit(FakeDevice::Kind::kDevice, device.live_bytes(FakeDevice::Kind::kDevice));
    auto second = prompts_.New(1000, 7);
    ASSERT_TRUE(scheduler.Admit(second).ok());
    const absl::Status missing = Prompts::SinkOf(second).Wait();
    EXPECT_EQ(missing.code(), absl::StatusCode::kResourceExhausted);
    EXPECT_EQ(FactsOf(missing).reason, "device_memory");
  });
  EXPECT_TRUE(Prompts::SinkOf(first).Wait().ok());
  EXPECT_TRUE(InOrder(Prompts::SinkOf(first)));
}

TEST_F(PrefillTest, AFailedTicketEndsTheJobThoughItWasComputed) {
  std::vector<absl::StatusCode> told;
  absl::Notification all_told;
  Scheduler scheduler(engine_, metrics_, {});
  auto job = prompts_.New(150, 5);
  std::vector<std::unique_ptr<KvCache::Transfer>> transfers;
  for (int layer = 0; layer < layers(); ++layer) {
    transfers.push_back(*job->prefill->cache->Open([] {}));
    transfers.back()->WhenReady(layer, [&](auto pin) {
      told.push_back(pin.status().code());
      if (told.size() == static_cast<size_t>(layers())) all_told.Notify();
    });
  }
  backend_.device().HoldMarks();
  ASSERT_TRUE(scheduler.Admit(job).ok());
  backend_.device().AwaitHeldMark();
  backend_.device().FailMarks();
  backend_.device().ReleaseMarks();
  EXPECT_EQ(Prompts::SinkOf(job).Wait().code(), absl::StatusCode::kInternal);
  EXPECT_TRUE(Prompts::SinkOf(job).layers.empty());
  EXPECT_FALSE(Prompts::SinkOf(job).after_the_end);
  ASSERT_TRUE(all_told.WaitForNotificationWithTimeout(absl::Seconds(20)));
  for (const absl::StatusCode code : told) EXPECT_EQ(code, absl::StatusCode::kInternal);
}

// Where the job waits for its consumer, nothing but the ticket can tell the scheduler.
TEST_F(PrefillTest, AFailedTicketEndsAJobThatWaitsForItsConsumer) {
  Scheduler scheduler(engine_, metrics_, {});
  auto job = prompts_.New(150, 5, /*retain=*/false);
  backend_.device().FailMarks();
  ASSERT_TRUE(scheduler.Admit(job).ok());
  EXPECT_EQ(Prompts::SinkOf(job).Wait().code(), absl::StatusCode::kInternal);
}

TEST_F(PrefillTest, ACancelledJobEndsBehindItsLayersOnTheirWay) {
  Scheduler scheduler(engine_, metrics_, {});
  auto job = prompts_.New(150, 5, /*retain=*/false);  // two layers, then it waits
  backend_.device().HoldMarks();
  ASSERT_TRUE(scheduler.Admit(job).ok());
  backend_.device().AwaitHeldMark();
  scheduler.Cancel(job);
  EXPECT_FALSE(Prompts::SinkOf(job).finished());
  backend_.device().ReleaseMarks();
  EXPECT_EQ(Prompts::SinkOf(job).Wait().code(), absl::StatusCode::kCancelled);
  EXPECT_GE(Prompts::SinkOf(job).layers.size(), 1u);
  EXPECT_TRUE(InOrder(Prompts::SinkOf(job)));
}

// Memory of its own, which nobody may touch when it is gone.
struct Unmap {
  void operator()(Scheduler* scheduler) const {
    scheduler->~Scheduler();
    munmap(scheduler, sizeof *scheduler);
  }
};

class HeldAtTheLastLayer : public LayerSink {
 public:
  void OnLayerReady(int layer, double density, double captured_mass) override {
    LayerSink::OnLayerReady(layer, density, captured_mass);
    if (layer != Prompts::kLayers - 1) return;
    reached.Notify();
    go_on.WaitForNotification();
  }
  absl::Notification reached, go_on;
};

// Who drops the last slice of a streamed layer tells the scheduler so, which may have gone since
// the cache was asked whom to tell. Between the two the cache gives its memory back: there it goes.
TEST_F(PrefillTest, ACacheMayOutliveTheScheduler) {
  void* memory =
      mmap(nullptr, sizeof(Scheduler), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  ASSERT_NE(memory, MAP_FAILED);
  std::unique_ptr<Scheduler, Unmap> scheduler(new (memory) Scheduler(engine_, metrics_, {}));
  auto job = prompts_.New(150, 5, /*retain=*/false);
  const auto sink = std::make_shared<HeldAtTheLastLayer>();
  job->sink = sink;
  const std::shared_ptr<KvCache> cache = job->prefill->cache;
  auto shm = *PosixShm::Open(std::make_shared<RegionNames>());
  cache->LieIn(*shm->Create(cache->geometry().region_bytes(), PeerAccess::kRead),
               [&](std::function<void()> work) {
                 sink->go_on.Notify();
                 scheduler.reset();
                 work();
               });
  ASSERT_TRUE(scheduler->Admit(job).ok());
  std::shared_ptr<const KvCache::Pin> last;
  {
    auto transfer = *cache->Open([] {});
    for (int layer = 0; layer < layers(); ++layer) {
      absl::Notification ready;
      transfer->WhenReady(layer, [&](auto pin) {
        last = *std::move(pin);
        ready.Notify();
      });
      ready.WaitForNotification();
      cache->Delivered(layer);
      if (layer < layers() - 1) last.reset();
    }
  }
  sink->reached.WaitForNotification();
  cache->Close(absl::FailedPreconditionError("released"));
  last.reset();
  EXPECT_EQ(scheduler, nullptr);
  EXPECT_TRUE(sink->Wait().ok());
}

TEST_F(PrefillTest, StoppingWaitsForWhatIsOnItsWay) {
  auto job = prompts_.New(150, 5), waiting = prompts_.New(140, 9);
  std::thread device;
  {
    Scheduler scheduler(engine_, metrics_, {});
    backend_.device().HoldMarks();
    ASSERT_TRUE(scheduler.Admit(job).ok());
    backend_.device().AwaitHeldMark();
    ASSERT_TRUE(scheduler.Admit(waiting).ok());
    device = std::thread([this] {
      absl::SleepFor(absl::Milliseconds(50));
      backend_.device().ReleaseMarks();
    });
  }
  for (const auto& each : {job, waiting}) {
    EXPECT_TRUE(Prompts::SinkOf(each).finished()) << "nobody would tell it now";
    EXPECT_TRUE(InOrder(Prompts::SinkOf(each)));
  }
  EXPECT_GE(Prompts::SinkOf(job).layers.size(), 1u);
  device.join();
}

}  // namespace
}  // namespace prefilld

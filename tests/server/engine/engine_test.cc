#include "server/engine/engine.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <random>
#include <thread>

#include "kernels/faulty_backend.h"
#include "server/record/errors.h"
#include "tests/server/fake_device.h"
#include "tests/server/prompts.h"
#include "tests/server/run_attend.h"

namespace prefilld {
namespace {

class EngineTest : public testing::Test {
 protected:
  std::shared_ptr<Job> NewAttend(int64_t tokens, SparsityPolicy policy) {
    auto job = std::make_shared<Job>();
    job->policy = policy;
    job->attend = std::make_unique<AttendWork>();
    AttendWork& work = *job->attend;
    work.shape = {DType::kF32, 2, 1, 64, {0, tokens}, {0, tokens}};
    work.softmax_scale = 0.125;
    work.q = *backend_->device().Allocate(tokens * 128 * sizeof(float));
    work.k = *backend_->device().Allocate(tokens * 64 * sizeof(float));
    work.v = *backend_->device().Allocate(tokens * 64 * sizeof(float));
    work.o = *backend_->device().Allocate(tokens * 128 * sizeof(float));
    std::mt19937 random(7);
    std::normal_distribution<float> normal;
    for (int64_t i = 0; i < tokens * 128; ++i) work.q.as<float>()[i] = normal(random);
    for (int64_t i = 0; i < tokens * 64; ++i) work.k.as<float>()[i] = normal(random);
    for (int64_t i = 0; i < tokens * 64; ++i) work.v.as<float>()[i] = normal(random);
    return job;
  }

  // The job's block index is asked for.
  void ReturnIndex(AttendWork& work) {
    const auto sequences = SplitIntoBlocks(work.shape, 128);
    const size_t rows = 2 * TotalRows(sequences);
    work.host_count = *backend_->device().AllocateHost(rows * sizeof(int32_t));
    work.host_index =
        *backend_->device().AllocateHost(rows * MaxKeyBlocks(sequences) * sizeof(uint16_t));
  }

  std::unique_ptr<Backend> backend_ = *CreateBackend("cpu", 2);
  Metrics metrics_;
  Engine engine_{*backend_, metrics_};
};

TEST_F(EngineTest, CalibratesToPlausibleRates) {
  ASSERT_TRUE(engine_.Calibrate(/*models=*/true).ok());
  auto job = NewAttend(1024, {.method = Method::kDense, .measure_captured_mass = false});
  const double predicted = engine_.PredictSeconds(*job);
  EXPECT_GT(predicted, 1e-6);
  EXPECT_LT(predicted, 10);
}

TEST_F(EngineTest, AttendReturnsWhatWasAskedFor) {
  auto job = NewAttend(1000, {.method = Method::kJoint});
  ReturnIndex(*job->attend);
  job->attend->lse = *backend_->device().Allocate(2000 * sizeof(float));
  ASSERT_TRUE(RunAttend(engine_, job).ok());
  const AttendWork& work = *job->attend;
  for (int i = 0; i < 2000; ++i) ASSERT_NE(work.lse.as<float>()[i], 0) << i;
  for (int row = 0; row < 16; ++row) {
    const int count = work.host_count.as<int32_t>()[row];
    const uint16_t* blocks = work.host_index.as<uint16_t>() + row * 8;
    ASSERT_GE(count, 1);
    ASSERT_LE(count, row % 8 + 1);
    EXPECT_EQ(blocks[count - 1], row % 8) << "its diagonal is the last";
    EXPECT_TRUE(std::is_sorted(blocks, blocks + count));
  }
  EXPECT_TRUE(job->report.captured_mass_measured);
  EXPECT_EQ(job->report.entries.size(), 2u);
  EXPECT_EQ(job->report.entries[0].pattern, Pattern::kJoint);
}

TEST_F(EngineTest, AnOpenMethodRunsDenseWhereThatIsFasterAndSaysSo) {
  auto job = NewAttend(128, {.method = Method::kJoint});
  job->method_unspecified = true;
  ASSERT_TRUE(RunAttend(engine_, job).ok());
  EXPECT_EQ(job->report.entries[0].pattern, Pattern::kDense);
  EXPECT_EQ(job->report.entries[0].dense_reason, DenseReason::kBelowCrossover);
  EXPECT_FALSE(job->report.captured_mass_measured);
}

TEST_F(EngineTest, ANamedMethodAlwaysRuns) {
  auto job = NewAttend(128, {.method = Method::kJoint});
  ASSERT_TRUE(RunAttend(engine_, job).ok());
  EXPECT_EQ(job->report.entries[0].pattern, Pattern::kJoint);
}

TEST_F(EngineTest, ACancelledAttendStopsWithinItsStep) {
  auto job = NewAttend(1000, {.method = Method::kDense});
  job->cancelled = true;
  EXPECT_EQ(RunAttend(engine_, job).code(), absl::StatusCode::kCancelled);
  const float* o = job->attend->o.as<float>();
  for (int64_t i = 0; i < 1000 * 128; ++i) ASSERT_EQ(o[i], 0) << "a block was computed";
}

TEST_F(EngineTest, HeadsBelowTheMinimumMassRunDense) {
  auto job = NewAttend(2000, {.method = Method::kJoint, .gamma = 0.3, .min_captured_mass = 0.999});
  ASSERT_TRUE(RunAttend(engine_, job).ok());
  for (const HeadReport& head : job->report.entries) {
    EXPECT_EQ(head.pattern, Pattern::kDense);
    EXPECT_EQ(head.dense_reason, DenseReason::kMinCapturedMass);
    EXPECT_EQ(head.density, 1);
  }
}

// On a device with memory of its own outputs are copied to where the caller wants them, and only
// there.
TEST_F(EngineTest, OutputsFollowToTheHost) {
  FakeBackend fake;
  Engine engine(fake, metrics_);
  auto plain = NewAttend(300, {.method = Method::kJoint}), job = NewAttend(300, plain->policy);
  ASSERT_TRUE(RunAttend(engine_, plain).ok());
  AttendWork& work = *job->attend;
  ReturnIndex(work);
  work.host_o = *fake.device().AllocateHost(work.o.bytes());
  work.lse = *fake.device().Allocate(600 * sizeof(float));
  ASSERT_TRUE(RunAttend(engine, job).ok());
  EXPECT_EQ(std::memcmp(work.host_o.data(), plain->attend->o.data(), work.o.bytes()), 0);
  for (const FakeDevice::Copied& copy : fake.device().copied()) {
    EXPECT_NE(copy.src, work.lse.data()) << "nobody asked for it on the host";
  }
  for (int row = 0; row < 6; ++row) {
    ASSERT_EQ(work.host_count.as<int32_t>()[row], row % 3 + 1);
    for (int i = 0; i <= row % 3; ++i) EXPECT_EQ(work.host_index.as<uint16_t>()[row * 3 + i], i);
  }
  EXPECT_EQ(job->report.entries[1].density, 1);
}

double Faults(Metrics& metrics) {
  double faults = 0;
  for (const auto& family : metrics.Collect()) {
    if (family.name != "prefilld_gpu_faults_total") continue;
    for (const auto& metric : family.metric) faults += metric.counter.value;
  }
  return faults;
}

TEST_F(EngineTest, ALostDeviceFailsEveryJobAndIsCountedOnce) {
  auto fake = std::make_unique<FakeBackend>();
  FakeDevice& device = fake->device();
  FaultyBackend faulty(std::move(fake), [&] {
    device.Lose();
    return absl::OkStatus();
  });
  Engine engine(faulty, metrics_);
  faulty.Arm(2);
  EXPECT_TRUE(RunAttend(engine, NewAttend(100, {})).ok());
  EXPECT_TRUE(engine.CheckDevice().ok());
  EXPECT_EQ(RunAttend(engine, NewAttend(100, {})).code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(RunAttend(engine, NewAttend(100, {})).code(), absl::StatusCode::kUnavailable);
  const absl::Status lost = engine.CheckDevice();
  EXPECT_EQ(FactsOf(lost).reason, "device_lost");
  EXPECT_TRUE(FactsOf(lost).retry_after.has_value());
  EXPECT_EQ(Faults(metrics_), 1);
}

// A batch meets it too, whether it is to begin or has begun.
TEST_F(EngineTest, ALostDeviceFailsBatches) {
  FakeBackend fake;
  Engine engine(fake, metrics_);
  Prompts prompts(fake);
  auto job = prompts.New(200, 5), next = prompts.New(200, 9);
  auto batch = *engine.Begin({job});
  ASSERT_TRUE(engine.RunStep(*batch).ok());
  fake.device().Lose();
  EXPECT_EQ(FactsOf(engine.RunStep(*batch)).reason, "device_lost");
  EXPECT_EQ(FactsOf(engine.Begin({next}).status()).reason, "device_lost");
  EXPECT_EQ(Faults(metrics_), 1);
}

TEST_F(EngineTest, NoDeviceMemoryIsSaidAndTheNextJobRuns) {
  FakeBackend fake;
  Engine engine(fake, metrics_);
  fake.device().Limit(FakeDevice::Kind::kDevice, 1000);
  EXPECT_EQ(RunAttend(engine, NewAttend(3000, {})).code(), absl::StatusCode::kResourceExhausted);
  EXPECT_TRUE(RunAttend(engine, NewAttend(100, {})).ok());
}

// The phases of a layer lie between marks: the device is waited for once a layer, for the one
// before, when the next is enqueued. A short layer that is like one before it has one mark, and its
// time is divided as that one's was.
TEST_F(EngineTest, ALayerIsOneWaitAndItsPhasesComeFromMarks) {
  FakeBackend fake;
  Engine engine(fake, metrics_);
  Prompts prompts(fake);
  auto batch = *engine.Begin({prompts.New(200, 5)});
  ASSERT_TRUE(engine.RunStep(*batch).ok());
  for (int layer = 0; layer < prompts.info().layers; ++layer) {
    const PhaseSeconds before = batch->phases;
    const int waits = fake.device().waits();
    EXPECT_EQ(batch->layers_done, layer);
    if (batch->done()) {
      EXPECT_TRUE(engine.Settle());
    } else {
      ASSERT_TRUE(engine.RunStep(*batch).ok());
    }
    EXPECT_EQ(batch->layers_done, layer + 1);
    EXPECT_EQ(fake.device().waits() - waits, 1);
    const bool whole = layer >= 2 && layer + 1 < prompts.info().layers;
    const auto marks = [&](Phase phase) {
      const size_t p = static_cast<size_t>(phase);
      const double own = (batch->phases[p] - before[p]) / FakeDevice::kSecondsBetweenMarks;
      return std::lround(whole ? 5 * own : own);
    };
    EXPECT_EQ(marks(Phase::kLinear), 2) << "before attention and after it";
    EXPECT_EQ(marks(Phase::kEstimate), 1);
    EXPECT_EQ(marks(Phase::kSelect), 1);
    EXPECT_EQ(marks(Phase::kAttention), 1);
    EXPECT_EQ(marks(Phase::kHandoff), 0) << "K and V leave beside the layer";
    EXPECT_EQ(marks(Phase::kQueue) + marks(Phase::kUpload), 0);
  }
  EXPECT_FALSE(engine.Settle());
}

// The device gets the next layer while it still computes the last one.
TEST_F(EngineTest, TheNextLayerIsEnqueuedBeforeTheLastOneIsWaitedFor) {
  FakeBackend fake;
  Engine engine(fake, metrics_);
  Prompts prompts(fake);
  auto batch = *engine.Begin({prompts.New(200, 5)});
  ASSERT_TRUE(engine.RunStep(*batch).ok()) << "and nothing was waited for";
  fake.device().HoldSteps();
  std::thread stepping([&] { EXPECT_TRUE(engine.RunStep(*batch).ok()); });
  fake.device().AwaitHeldStep();
  EXPECT_EQ(batch->next_layer, 2);
  EXPECT_EQ(batch->layers_done, 0);
  fake.device().ReleaseSteps();
  stepping.join();
  EXPECT_TRUE(engine.Settle());
}

// What an Attend between two layers overwrites is nothing that the layer before it still needs.
TEST_F(EngineTest, AnAttendMayComeBetweenLayersOnTheirWay) {
  FakeBackend fake;
  Engine engine(fake, metrics_);
  Prompts prompts(fake);
  auto alone = prompts.New(300, 5), between = prompts.New(300, 5);
  for (const auto& job : {alone, between}) {
    auto batch = *engine.Begin({job});
    while (!batch->done()) {
      ASSERT_TRUE(engine.RunStep(*batch).ok());
      if (job == between) {
        ASSERT_TRUE(RunAttend(engine, NewAttend(700, {.method = Method::kDense})).ok());
      }
    }
    ASSERT_TRUE(engine.Finish(*batch).ok());
  }
  engine.completions().Flush();
  EXPECT_EQ(alone->prefill->logits, between->prefill->logits);
  ASSERT_EQ(alone->report.entries.size(), between->report.entries.size());
  for (size_t i = 0; i < alone->report.entries.size(); ++i) {
    EXPECT_EQ(alone->report.entries[i].pattern, between->report.entries[i].pattern) << i;
    EXPECT_EQ(alone->report.entries[i].density, between->report.entries[i].density) << i;
  }
}

// All bytes of a cache in the order of its layers.
std::string BytesOf(const std::shared_ptr<KvCache>& cache) {
  std::string bytes;
  auto transfer = *cache->Open([] {});
  const KvGeometry& geometry = cache->geometry();
  const int64_t rows = geometry.tokens % kKvBlockTokens;  // of the last block
  for (int layer = 0; layer < geometry.layers; ++layer) {
    transfer->WhenReady(layer, [&](auto pin) {
      ASSERT_TRUE(pin.ok()) << pin.status();
      for (int64_t b = 0; b < geometry.blocks_per_layer(); ++b) {
        const bool whole = b + 1 < geometry.blocks_per_layer() || rows == 0;
        const size_t size = geometry.tile_bytes() / kKvBlockTokens * (whole ? 128 : rows);
        for (int tile = 0; tile < 2 * geometry.kv_heads; ++tile) {
          const std::byte* data = (*pin)->tile(b, tile / 2, tile % 2 != 0);
          bytes.append(reinterpret_cast<const char*>(data), size);
        }
      }
    });
  }
  return bytes;
}

// K and V leave beside the next layers; who is told of a layer finds it whole.
TEST_F(EngineTest, ALayerIsCommittedWhenItsCopiesAreDone) {
  FakeBackend fake;
  Prompts prompts(fake), plain_prompts(*backend_);
  Engine engine(fake, metrics_);
  auto job = prompts.New(150, 5), plain = plain_prompts.New(150, 5);
  fake.device().HoldMarks();
  auto batch = *engine.Begin({job});
  while (!batch->done()) ASSERT_TRUE(engine.RunStep(*batch).ok());
  ASSERT_TRUE(engine.Finish(*batch).ok());
  EXPECT_GT(fake.device().pending(), 0u) << "computed, and not copied";
  fake.device().AwaitHeldMark();
  EXPECT_TRUE(Prompts::SinkOf(job).layers.empty());
  fake.device().ReleaseMarks();
  engine.completions().Flush();
  auto on_host = *engine_.Begin({plain});
  while (!on_host->done()) ASSERT_TRUE(engine_.RunStep(*on_host).ok());
  engine_.completions().Flush();
  const std::string bytes = BytesOf(job->prefill->cache);
  EXPECT_EQ(bytes.size(), job->prefill->cache->geometry().total_bytes());
  EXPECT_TRUE(bytes == BytesOf(plain->prefill->cache));
}

// And not for the copies of the next layer, which is enqueued by then.
TEST_F(EngineTest, ALayerIsCommittedBeforeTheCopiesOfTheNext) {
  FakeBackend fake;
  Engine engine(fake, metrics_);
  Prompts prompts(fake);
  auto job = prompts.New(150, 5);
  auto batch = *engine.Begin({job});
  ASSERT_TRUE(engine.RunStep(*batch).ok());
  ASSERT_TRUE(engine.RunStep(*batch).ok());
  engine.completions().Flush();
  EXPECT_EQ(Prompts::SinkOf(job).layers, std::vector<int>{0});
  EXPECT_EQ(fake.device().pending(), 1u) << "those of layer 1";
  EXPECT_TRUE(engine.Settle());
}

// The blocks of a job that failed are given back only when nothing writes to them any more.
TEST_F(EngineTest, AfterAFailureNothingIsOnItsWay) {
  auto owned = std::make_unique<FakeBackend>();
  FakeBackend& fake = *owned;
  FaultyBackend faulty(std::move(owned), [] { return absl::InternalError("no attention"); });
  Prompts prompts(fake);
  Engine engine(faulty, metrics_);
  auto batch = *engine.Begin({prompts.New(150, 5)});
  ASSERT_TRUE(engine.RunStep(*batch).ok());
  faulty.Arm(1);
  EXPECT_EQ(engine.RunStep(*batch).message(), "no attention");
  EXPECT_FALSE(engine.Settle());
  engine.completions().Flush();
  EXPECT_EQ(fake.device().pending(), 0u);
  EXPECT_EQ(batch->layers_done, 1) << "the layer before it was whole";
}

TEST_F(EngineTest, TheUploadAndTheCopyOfOutputsArePhasesOfAnAttend) {
  FakeBackend fake;
  Engine engine(fake, metrics_);
  auto job = NewAttend(300, {.method = Method::kJoint});
  ReturnIndex(*job->attend);
  ASSERT_TRUE(RunAttend(engine, job).ok());
  const auto marks = [&](Phase phase) {
    return std::lround(job->phases[static_cast<size_t>(phase)] / FakeDevice::kSecondsBetweenMarks);
  };
  EXPECT_EQ(marks(Phase::kUpload), 1);
  EXPECT_EQ(marks(Phase::kEstimate), 1);
  EXPECT_EQ(marks(Phase::kSelect), 1);
  EXPECT_EQ(marks(Phase::kAttention), 1);
  EXPECT_EQ(marks(Phase::kHandoff), 1);
}

// Two prompts in one ragged batch, one of them taken out half way: the other's K, V and logits are
// those of a run alone.
TEST_F(EngineTest, ABatchGivesEachPromptWhatItGetsAlone) {
  Prompts prompts(*backend_);
  const ModelInfo& info = prompts.info();
  const auto prompt = [&](int64_t tokens, int salt) { return prompts.New(tokens, salt); };
  auto alone = prompt(200, 5), together = prompt(200, 5), leaving = prompt(150, 9);
  auto single = *engine_.Begin({alone});
  while (!single->done()) ASSERT_TRUE(engine_.RunStep(*single).ok());
  ASSERT_TRUE(engine_.Finish(*single).ok());

  auto batch = *engine_.Begin({leaving, together});
  ASSERT_TRUE(engine_.RunStep(*batch).ok());
  engine_.Remove(*batch, 0);
  engine_.completions().Flush();
  leaving->prefill->cache->Fail(absl::CancelledError("test"));
  while (!batch->done()) ASSERT_TRUE(engine_.RunStep(*batch).ok());
  ASSERT_TRUE(engine_.Finish(*batch).ok());
  engine_.completions().Flush();

  ASSERT_EQ(alone->prefill->logits.size(), static_cast<size_t>(info.vocab_size));
  double difference = 0, norm = 0;
  for (int i = 0; i < info.vocab_size; ++i) {
    difference += std::pow(alone->prefill->logits[i] - together->prefill->logits[i], 2);
    norm += std::pow(alone->prefill->logits[i], 2);
  }
  EXPECT_LT(std::sqrt(difference / norm), 1e-5);
  EXPECT_EQ(Prompts::SinkOf(together).layers.size(), static_cast<size_t>(info.layers));
  EXPECT_EQ(Prompts::SinkOf(leaving).layers.size(), 1u);
}

std::vector<int> FirstLayers(int count) {
  std::vector<int> layers(count);
  std::iota(layers.begin(), layers.end(), 0);
  return layers;
}

// Who reads a layer may take long over it: the engine goes on, and the others hear in order.
TEST_F(EngineTest, ASlowReaderDelaysNoLayer) {
  Prompts prompts(*backend_);
  auto slow = prompts.New(150, 5), other = prompts.New(150, 9);
  absl::Notification read_on;
  auto transfer = *slow->prefill->cache->Open([] {});
  transfer->WhenReady(0, [&](auto pin) {
    EXPECT_TRUE(pin.ok());
    read_on.WaitForNotification();
  });
  auto batch = *engine_.Begin({slow, other});
  while (!batch->done()) ASSERT_TRUE(engine_.RunStep(*batch).ok());
  ASSERT_TRUE(engine_.Finish(*batch).ok());
  read_on.Notify();
  engine_.completions().Flush();
  for (const auto& job : {slow, other}) {
    EXPECT_EQ(Prompts::SinkOf(job).layers, FirstLayers(prompts.info().layers));
    EXPECT_TRUE(job->prefill->cache->complete());
    for (const std::thread::id thread : Prompts::SinkOf(job).threads) {
      EXPECT_NE(thread, std::this_thread::get_id());
    }
  }
}

// A layer is committed when its ticket says so, not when it was computed, and its batch may be
// gone.
TEST_F(EngineTest, ALayerIsCommittedByItsTicket) {
  FakeBackend fake;
  Prompts prompts(fake);
  Engine engine(fake, metrics_);
  auto job = prompts.New(150, 5);
  const std::weak_ptr<KvCache> cache = job->prefill->cache;
  auto sink = std::static_pointer_cast<LayerSink>(job->sink);
  fake.device().HoldMarks();
  auto batch = *engine.Begin({std::move(job)});
  while (!batch->done()) ASSERT_TRUE(engine.RunStep(*batch).ok());
  ASSERT_TRUE(engine.Finish(*batch).ok());
  batch.reset();
  ASSERT_FALSE(cache.expired()) << "its tickets own it";
  EXPECT_FALSE(cache.lock()->complete());
  fake.device().AwaitHeldMark();
  fake.device().ReleaseMarks();
  engine.completions().Flush();
  EXPECT_EQ(sink->layers, FirstLayers(prompts.info().layers));
  EXPECT_TRUE(cache.expired());
}

// A stream that fails behind the stages: what had arrived stays, and nothing after it comes.
TEST_F(EngineTest, ATicketThatFailsFailsItsJobsOnce) {
  FakeBackend fake;
  Prompts prompts(fake);
  std::vector<absl::Status> failed;
  Engine engine(fake, metrics_);
  auto one = prompts.New(150, 5), two = prompts.New(140, 9);
  auto batch = *engine.Begin({one, two});
  batch->on_failed = [&](const std::shared_ptr<Job>&, const absl::Status& why) {
    failed.push_back(why);
  };
  ASSERT_TRUE(engine.RunStep(*batch).ok());
  EXPECT_TRUE(engine.Settle());
  engine.completions().Flush();
  EXPECT_TRUE(failed.empty());
  fake.device().HoldMarks();
  ASSERT_TRUE(engine.RunStep(*batch).ok());
  EXPECT_TRUE(engine.Settle());
  fake.device().AwaitHeldMark();
  fake.device().Lose();
  fake.device().ReleaseMarks();
  engine.completions().Flush();
  EXPECT_EQ(failed.size(), 2u);
  for (const auto& job : {one, two}) {
    EXPECT_EQ(job->prefill->committed.code(), absl::StatusCode::kInternal);
    EXPECT_EQ(Prompts::SinkOf(job).layers, FirstLayers(1));
    EXPECT_FALSE(job->prefill->cache->complete());
  }
  EXPECT_FALSE(engine.RunStep(*batch).ok());
}

}  // namespace
}  // namespace prefilld

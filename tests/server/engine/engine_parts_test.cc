// Layers that are computed in parts.
#include <gtest/gtest.h>

#include <cstring>
#include <random>
#include <string>
#include <utility>

#include "server/engine/engine.h"
#include "tests/server/fake_device.h"
#include "tests/server/prompts.h"
#include "tests/server/run_attend.h"

namespace prefilld {
namespace {

constexpr double kPieceByPiece = 0;

class EnginePartsTest : public testing::Test {
 protected:
  absl::Status Run(Engine& engine, const std::shared_ptr<Job>& job, int* steps = nullptr) {
    auto batch = engine.Begin({job});
    if (!batch.ok()) return batch.status();
    while (!(*batch)->done()) {
      if (absl::Status status = engine.RunStep(**batch); !status.ok()) return status;
      if (steps != nullptr) ++*steps;
    }
    const absl::Status status = engine.Finish(**batch);
    engine.completions().Flush();
    return status;
  }

  // Until so many layers are enqueued and collected.
  std::unique_ptr<Batch> RunLayers(Engine& engine, const std::shared_ptr<Job>& job, int layers) {
    auto batch = *engine.Begin({job});
    while (batch->next_layer < layers) EXPECT_TRUE(engine.RunStep(*batch).ok());
    EXPECT_TRUE(engine.Settle() || layers == 0);
    engine.completions().Flush();
    return batch;
  }

  // K and V of the first layers, and the logits.
  static std::string BytesOf(const std::shared_ptr<Job>& job, int layers = Prompts::kLayers) {
    const PrefillWork& work = *job->prefill;
    std::string bytes(reinterpret_cast<const char*>(work.logits.data()),
                      work.logits.size() * sizeof(float));
    const KvGeometry& geometry = work.cache->geometry();
    auto transfer = *work.cache->Open([] {});
    for (int layer = 0; layer < layers; ++layer) {
      transfer->WhenReady(
          layer, [&](const absl::StatusOr<std::shared_ptr<const KvCache::Pin>>& pin) {
            ASSERT_TRUE(pin.ok()) << pin.status();
            for (int64_t b = 0; b < geometry.blocks_per_layer(); ++b) {
              for (int head = 0; head < geometry.kv_heads; ++head) {
                const int64_t tokens =
                    std::min<int64_t>(kKvBlockTokens, geometry.tokens - b * kKvBlockTokens);
                for (const bool value : {false, true}) {
                  bytes.append(reinterpret_cast<const char*>((*pin)->tile(b, head, value)),
                               tokens * geometry.head_dim * SizeOf(geometry.dtype));
                }
              }
            }
          });
    }
    return bytes;
  }

  Metrics metrics_;
};

TEST_F(EnginePartsTest, PartsGiveTheBitsOfTheWhole) {
  for (const bool own_memory : {false, true}) {
    std::unique_ptr<Backend> backend = *CreateBackend("cpu", 2);
    FakeBackend fake;
    Backend& device = own_memory ? static_cast<Backend&>(fake) : *backend;
    Prompts prompts(device);
    Engine whole(device, metrics_), divided(device, metrics_, kPieceByPiece);
    for (const Method method : {Method::kDense, Method::kJoint, Method::kFlexPrefill}) {
      if (!own_memory && method != Method::kJoint) continue;
      auto one = prompts.New(700, 5), other = prompts.New(700, 5);
      one->policy.method = other->policy.method = method;
      int steps = 0, parts = 0;
      ASSERT_TRUE(Run(whole, one, &steps).ok());
      ASSERT_TRUE(Run(divided, other, &parts).ok());
      EXPECT_EQ(steps, Prompts::kLayers);
      // q, k and v in tiles; heads, or queries of each; the rest in tiles, but of the last layer.
      const int64_t tile = one->prefill->model->tile_tokens(), tiles = (700 + tile - 1) / tile;
      const AttentionWork attention = {.q_heads = prompts.info().q_heads,
                                       .kv_heads = prompts.info().kv_heads,
                                       .seconds = 1,
                                       .by_queries = method == Method::kDense ? 700 : 0};
      const auto pieces = static_cast<int64_t>(DivideAttention(attention, 0).size());
      EXPECT_EQ(pieces > prompts.info().q_heads, method == Method::kDense);
      EXPECT_EQ(parts, steps * (2 * tiles + pieces) - tiles);
      EXPECT_TRUE(BytesOf(one) == BytesOf(other)) << Name(method);
      EXPECT_EQ(Prompts::SinkOf(one).densities, Prompts::SinkOf(other).densities);
      EXPECT_EQ(Prompts::SinkOf(other).layers, Prompts::SinkOf(one).layers);
      ASSERT_EQ(one->report.entries.size(), other->report.entries.size());
      for (size_t i = 0; i < one->report.entries.size(); ++i) {
        EXPECT_EQ(one->report.entries[i].density, other->report.entries[i].density) << i;
        EXPECT_EQ(one->report.entries[i].pattern, other->report.entries[i].pattern) << i;
        EXPECT_EQ(one->report.entries[i].captured_mass, other->report.entries[i].captured_mass);
        EXPECT_EQ(one->report.entries[i].dense_reason, other->report.entries[i].dense_reason);
      }
    }
  }
}

// Copies that nobody waits for read their rows late.
TEST_F(EnginePartsTest, KAndVHaveLeftWhenTheirRowsAreWrittenAgain) {
  FakeBackend fake;
  Prompts prompts(fake);
  for (const double step_seconds : {kStepSeconds, kPieceByPiece}) {
    Engine engine(fake, metrics_, step_seconds);
    auto one = prompts.New(150, 5), other = prompts.New(150, 5);
    ASSERT_TRUE(Run(engine, one).ok());
    fake.device().HoldMarks();
    auto batch = *engine.Begin({other});
    while (!batch->done()) ASSERT_TRUE(engine.RunStep(*batch).ok());
    ASSERT_TRUE(engine.Finish(*batch).ok());
    fake.device().ReleaseMarks();
    engine.completions().Flush();
    EXPECT_TRUE(BytesOf(one) == BytesOf(other));
    EXPECT_FALSE(fake.device().read_too_early());
  }
}

// An Attend of 4 query heads in 2 groups, with all outputs.
std::shared_ptr<Job> NewAttend(Backend& backend, std::vector<int64_t> ends,
                               const SparsityPolicy& policy) {
  constexpr int kHeads = 4, kKvHeads = 2, kDim = 64;
  Device& device = backend.device();
  auto job = std::make_shared<Job>();
  job->policy = policy;
  job->attend = std::make_unique<AttendWork>();
  AttendWork& work = *job->attend;
  const int64_t tokens = ends.back();
  work.shape = {DType::kF32, kHeads, kKvHeads, kDim, ends, ends};
  work.softmax_scale = 0.125;
  std::mt19937 random(7);
  std::normal_distribution<float> normal;
  for (auto [buffer, heads] : {std::pair(&work.q, kHeads), std::pair(&work.k, kKvHeads),
                               std::pair(&work.v, kKvHeads), std::pair(&work.o, kHeads)}) {
    *buffer = *device.Allocate(static_cast<size_t>(tokens * heads * kDim) * sizeof(float));
    for (int64_t i = 0; buffer != &work.o && i < tokens * heads * kDim; ++i) {
      buffer->as<float>()[i] = normal(random);
    }
  }
  const size_t rows = kHeads * TotalRows(SplitIntoBlocks(work.shape, policy.block_size));
  const auto blocks = static_cast<size_t>(MaxKeyBlocks(SplitIntoBlocks(work.shape, 128)));
  work.lse = *device.Allocate(static_cast<size_t>(kHeads * tokens) * sizeof(float));
  work.host_o = *device.AllocateHost(work.o.bytes());
  work.host_lse = *device.AllocateHost(work.lse.bytes());
  work.host_count = *device.AllocateHost(rows * sizeof(int32_t));
  work.host_index = *device.AllocateHost(rows * blocks * sizeof(uint16_t));
  std::memset(work.host_index.data(), 0, work.host_index.bytes());
  return job;
}

// Where nobody wants its index, and with keys before the queries.
TEST_F(EnginePartsTest, ADenseAttendInQueriesIsTheWhole) {
  FakeBackend fake;
  Engine whole(fake, metrics_), divided(fake, metrics_, kPieceByPiece);
  for (const int64_t queries : {900, 333}) {
    std::shared_ptr<Job> jobs[2];
    for (auto& job : jobs) {
      job = NewAttend(fake, {0, 900}, {.method = Method::kDense});
      job->attend->shape.cu_seqlens_q = {0, queries};
      job->attend->host_count = Buffer();
      job->attend->host_index = Buffer();
    }
    ASSERT_TRUE(RunAttend(whole, jobs[0]).ok());
    const auto run = divided.BeginAttend(jobs[1]);
    EXPECT_GT(run->parts.size(), 4u);
    while (!run->done()) ASSERT_TRUE(divided.RunStep(*run).ok());
    const AttendWork &want = *jobs[0]->attend, &got = *jobs[1]->attend;
    EXPECT_EQ(std::memcmp(want.host_o.data(), got.host_o.data(), want.host_o.bytes()), 0);
    EXPECT_EQ(std::memcmp(want.host_lse.data(), got.host_lse.data(), want.host_lse.bytes()), 0);
    for (const HeadReport& head : jobs[1]->report.entries) EXPECT_EQ(head.density, 1);
  }
}

// Outputs, block index and reports.
void ExpectSame(const Job& one, const Job& other) {
  const AttendWork &want = *one.attend, &got = *other.attend;
  for (const auto& [a, b] :
       {std::pair(&want.host_o, &got.host_o), std::pair(&want.host_lse, &got.host_lse),
        std::pair(&want.host_count, &got.host_count)}) {
    EXPECT_EQ(std::memcmp(a->data(), b->data(), a->bytes()), 0);
  }
  const auto sequences = SplitIntoBlocks(want.shape, 128);
  const int64_t rows = TotalRows(sequences), stride = MaxKeyBlocks(sequences);
  for (int64_t row = 0; row < 4 * rows; ++row) {
    EXPECT_EQ(std::memcmp(want.host_index.as<uint16_t>() + row * stride,
                          got.host_index.as<uint16_t>() + row * stride,
                          want.host_count.as<int32_t>()[row] * sizeof(uint16_t)),
              0);
  }
  ASSERT_EQ(other.report.entries.size(), 4 * sequences.size());
  EXPECT_EQ(other.report.captured_mass_measured, one.report.captured_mass_measured);
  for (size_t i = 0; i < other.report.entries.size(); ++i) {
    const HeadReport &a = one.report.entries[i], &b = other.report.entries[i];
    EXPECT_EQ(a.density, b.density) << i;
    EXPECT_EQ(a.captured_mass, b.captured_mass) << i;
    EXPECT_EQ(a.pattern, b.pattern) << i;
  }
  EXPECT_GT(other.phases[static_cast<size_t>(Phase::kAttention)], 0);
}

struct AttendCase {
  Method method;
  std::vector<int64_t> ends;
};
const AttendCase kAttendCases[] = {{Method::kDense, {0, 900}},
                                   {Method::kJoint, {0, 900}},
                                   {Method::kFlexPrefill, {0, 900}},
                                   {Method::kJoint, {0, 10, 500, 900}}};

TEST_F(EnginePartsTest, AnAttendInPartsIsTheWhole) {
  FakeBackend fake;
  Engine whole(fake, metrics_), divided(fake, metrics_, kPieceByPiece);
  for (const auto& [method, ends] : kAttendCases) {
    SCOPED_TRACE(Name(method));
    const auto one = NewAttend(fake, ends, {.method = method});
    const auto other = NewAttend(fake, ends, {.method = method});
    ASSERT_TRUE(RunAttend(whole, one).ok());
    const auto run = divided.BeginAttend(other);
    EXPECT_EQ(run->parts.size(), 4u);
    while (!run->done()) ASSERT_TRUE(divided.RunStep(*run).ok());
    ExpectSame(*one, *other);
  }
}

// On a CPU stage 3 of a head that takes long is divided too, and what others select between two of
// its parts is theirs.
TEST_F(EnginePartsTest, AHeadInRowsIsTheWhole) {
  const auto cpu = *CreateBackend("cpu", 2);
  Engine whole(*cpu, metrics_), divided(*cpu, metrics_, kPieceByPiece, kPieceByPiece);
  for (const auto& [method, ends] : kAttendCases) {
    SCOPED_TRACE(Name(method));
    const auto one = NewAttend(*cpu, ends, {.method = method});
    const auto other = NewAttend(*cpu, ends, {.method = method});
    ASSERT_TRUE(RunAttend(whole, one).ok());
    const auto run = divided.BeginAttend(other);
    const auto rows = TotalRows(SplitIntoBlocks(one->attend->shape, 128));
    EXPECT_EQ(run->parts.size(), static_cast<size_t>(4 * (1 + rows)));
    for (int step = 0; !run->done(); ++step) {
      ASSERT_TRUE(divided.RunStep(*run).ok());
      if (step % 10 != 0) continue;
      const auto meanwhile = NewAttend(*cpu, {0, 700}, {.method = Method::kDense});
      const auto passing = divided.BeginAttend(meanwhile);
      ASSERT_TRUE(divided.RunStep(*passing).ok());
    }
    ExpectSame(*one, *other);
  }
}

// A batch of another size passes in the middle of a layer, one of the same waits for its end.
TEST_F(EnginePartsTest, AShortPromptPassesInTheMiddleOfALayer) {
  FakeBackend fake;
  constexpr int64_t kLong = kShortBatchTokens + 100;
  Prompts prompts(fake, kLong);
  Engine whole(fake, metrics_), engine(fake, metrics_, kPieceByPiece);
  const auto dense = [&] {
    auto job = prompts.New(kLong, 5);
    job->policy = {.method = Method::kDense, .measure_captured_mass = false};
    return job;
  };
  auto long_alone = dense(), longer = dense();
  auto short_alone = prompts.New(300, 9), shorter = prompts.New(300, 9);
  whole.Leave(RunLayers(whole, long_alone, 2));
  ASSERT_TRUE(Run(whole, short_alone).ok());

  auto batch = *engine.Begin({longer});
  for (int step = 0; step < 3; ++step) ASSERT_TRUE(engine.RunStep(*batch).ok());
  EXPECT_EQ(batch->next_layer, 0);
  EXPECT_TRUE(engine.CanStep(*batch));
  EXPECT_FALSE(engine.CanStep(kLong));
  EXPECT_TRUE(engine.CanStep(300));
  ASSERT_TRUE(Run(engine, shorter).ok());
  EXPECT_EQ(batch->next_layer, 0);
  EXPECT_TRUE(Prompts::SinkOf(longer).layers.empty());
  while (batch->next_layer == 0) ASSERT_TRUE(engine.RunStep(*batch).ok());
  EXPECT_TRUE(engine.CanStep(kLong)) << "between two layers another may have its turn";
  while (batch->next_layer == 1) ASSERT_TRUE(engine.RunStep(*batch).ok());
  engine.Leave(std::move(batch));
  engine.completions().Flush();
  EXPECT_TRUE(BytesOf(short_alone) == BytesOf(shorter));
  EXPECT_TRUE(BytesOf(long_alone, 2) == BytesOf(longer, 2));
  for (const auto& job : {long_alone, longer}) {
    job->prefill->cache->Fail(absl::CancelledError("test"));
  }
}

// A job that ends in the middle of a layer lets the next have q, k, v and o, and its end is told
// behind its copies: until then they write into its cache.
TEST_F(EnginePartsTest, ABatchThatGoesInTheMiddleOfALayerKeepsNobody) {
  FakeBackend fake;
  Prompts prompts(fake);
  Engine engine(fake, metrics_, kPieceByPiece);
  auto leaving = prompts.New(300, 5), next = prompts.New(300, 9);
  auto batch = *engine.Begin({leaving});
  for (int step = 0; step < 3; ++step) ASSERT_TRUE(engine.RunStep(*batch).ok());
  EXPECT_FALSE(engine.CanStep(300));
  fake.device().HoldMarks();
  engine.Leave(std::move(batch));
  EXPECT_TRUE(engine.CanStep(300));
  bool told = false;
  engine.completions().Post(nullptr, [&](const absl::Status&) {
    EXPECT_EQ(fake.device().pending(), 0u);
    told = true;
  });
  fake.device().AwaitHeldMark();
  EXPECT_GT(fake.device().pending(), 0u);
  EXPECT_FALSE(told);
  fake.device().ReleaseMarks();
  engine.completions().Flush();
  EXPECT_TRUE(told);
  leaving->prefill->cache->Fail(absl::CancelledError("test"));
  ASSERT_TRUE(Run(engine, next).ok());
  EXPECT_TRUE(next->prefill->cache->complete());
}

}  // namespace
}  // namespace prefilld

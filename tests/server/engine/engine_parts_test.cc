// Layers that are computed in parts.
#include <gtest/gtest.h>

#include <cstring>
#include <string>

#include "server/engine/engine.h"
#include "tests/server/fake_device.h"
#include "tests/server/prompts.h"

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

  // K and V of all layers, and the logits.
  static std::string BytesOf(const std::shared_ptr<Job>& job) {
    const PrefillWork& work = *job->prefill;
    std::string bytes(reinterpret_cast<const char*>(work.logits.data()),
                      work.logits.size() * sizeof(float));
    const KvGeometry& geometry = work.cache->geometry();
    auto transfer = *work.cache->Open([] {});
    for (int layer = 0; layer < geometry.layers; ++layer) {
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
      auto one = prompts.New(700, 5), other = prompts.New(700, 5);
      one->policy.method = other->policy.method = method;
      int steps = 0, parts = 0;
      ASSERT_TRUE(Run(whole, one, &steps).ok());
      ASSERT_TRUE(Run(divided, other, &parts).ok());
      EXPECT_EQ(steps, Prompts::kLayers);
      EXPECT_GE(parts, steps * (2 + prompts.info().q_heads) - 1) << "the last finishes no rows";
      EXPECT_TRUE(BytesOf(one) == BytesOf(other)) << Name(method);
      EXPECT_EQ(Prompts::SinkOf(one).densities, Prompts::SinkOf(other).densities);
      EXPECT_EQ(Prompts::SinkOf(other).layers, Prompts::SinkOf(one).layers);
      ASSERT_EQ(one->report.entries.size(), other->report.entries.size());
      for (size_t i = 0; i < one->report.entries.size(); ++i) {
        EXPECT_EQ(one->report.entries[i].density, other->report.entries[i].density) << i;
        EXPECT_EQ(one->report.entries[i].pattern, other->report.entries[i].pattern) << i;
      }
    }
  }
}

// A batch of another size passes in the middle of a layer, one of the same waits for its end.
TEST_F(EnginePartsTest, AShortPromptPassesInTheMiddleOfALayer) {
  FakeBackend fake;
  constexpr int64_t kLong = kShortBatchTokens + 100;
  Prompts prompts(fake, kLong);
  Engine whole(fake, metrics_), engine(fake, metrics_, kPieceByPiece);
  auto long_alone = prompts.New(kLong, 5), short_alone = prompts.New(300, 9);
  ASSERT_TRUE(Run(whole, long_alone).ok());
  ASSERT_TRUE(Run(whole, short_alone).ok());

  auto longer = prompts.New(kLong, 5), shorter = prompts.New(300, 9);
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
  while (!batch->done()) ASSERT_TRUE(engine.RunStep(*batch).ok());
  ASSERT_TRUE(engine.Finish(*batch).ok());
  engine.completions().Flush();
  EXPECT_TRUE(BytesOf(short_alone) == BytesOf(shorter));
  EXPECT_TRUE(BytesOf(long_alone) == BytesOf(longer));
}

// A job that ends in the middle of a layer lets the next have q, k, v and o.
TEST_F(EnginePartsTest, ABatchThatGoesInTheMiddleOfALayerKeepsNobody) {
  FakeBackend fake;
  Prompts prompts(fake);
  Engine engine(fake, metrics_, kPieceByPiece);
  auto leaving = prompts.New(300, 5), next = prompts.New(300, 9);
  {
    auto batch = *engine.Begin({leaving});
    for (int step = 0; step < 3; ++step) ASSERT_TRUE(engine.RunStep(*batch).ok());
    EXPECT_FALSE(engine.CanStep(300));
    EXPECT_TRUE(engine.Settle());
  }
  leaving->prefill->cache->Fail(absl::CancelledError("test"));
  EXPECT_TRUE(engine.CanStep(300));
  ASSERT_TRUE(Run(engine, next).ok());
  EXPECT_TRUE(next->prefill->cache->complete());
}

}  // namespace
}  // namespace prefilld

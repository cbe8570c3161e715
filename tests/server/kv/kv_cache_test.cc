#include "server/kv/kv_cache.h"

#include <gtest/gtest.h>

#include <cstring>
#include <fstream>
#include <thread>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/notification.h"
#include "server/kv/layout.h"
#include "server/record/errors.h"
#include "server/transport/shm_memory.h"
#include "tests/server/importer.h"
#include "tests/server/kv/compute_tile.h"
#include "tests/server/memory_socket.h"
#include "tests/server/waits.h"

namespace prefilld {
namespace {

using PinOr = absl::StatusOr<std::shared_ptr<const KvCache::Pin>>;

class KvCacheTest : public testing::Test {
 protected:
  void SetUp() override {
    backend_ = *CreateBackend("cpu", 1);
    pool_ = *BlockPool::Create(backend_->device(), 64 * geometry_.block_bytes(),
                               geometry_.block_bytes());
  }
  std::array<int64_t, 4> Counts() { return pool_->CountByState(); }
  int64_t Free() { return Counts()[0]; }
  static PinOr Wait(KvCache& cache, int layer) {
    PinOr got = absl::UnknownError("not called");
    (*cache.Open([] {}))->WhenReady(layer, [&](PinOr pin) { got = std::move(pin); });
    return got;
  }

  const KvGeometry geometry_{
      .layers = 4, .kv_heads = 2, .head_dim = 64, .dtype = DType::kF32, .tokens = 300};
  std::unique_ptr<Backend> backend_;
  std::unique_ptr<BlockPool> pool_;
};

TEST_F(KvCacheTest, RetainedCacheTakesEveryLayerAtOnce) {
  auto cache = *KvCache::Create(*pool_, geometry_, true);
  EXPECT_EQ(Counts(), (std::array<int64_t, 4>{64 - 12, 12, 0, 0}));
  cache.reset();
  EXPECT_EQ(Free(), 64);
}

TEST_F(KvCacheTest, StreamedCacheTakesTwoLayersAndReusesThem) {
  auto cache = *KvCache::Create(*pool_, geometry_, false);
  EXPECT_EQ(Free(), 64 - 6);
  int freed = 0;
  cache->SetOnSlotFree([&] { ++freed; });
  cache->Commit(0);
  cache->Commit(1);
  EXPECT_FALSE(cache->CanCompute(2));
  EXPECT_FALSE(cache->computing()) << "it waits for its consumer";
  {
    auto pin = *Wait(*cache, 0);
    cache->Delivered(0);
    EXPECT_FALSE(cache->CanCompute(2)) << "the layer is still read";
    EXPECT_EQ(freed, 0);
  }
  EXPECT_EQ(freed, 1);
  EXPECT_TRUE(cache->CanCompute(2));
  EXPECT_FALSE(cache->CanCompute(3));
  EXPECT_EQ(Wait(*cache, 0).status().code(), absl::StatusCode::kFailedPrecondition);
}

TEST_F(KvCacheTest, WaiterGetsTheLayerWhenItIsCommitted) {
  auto cache = *KvCache::Create(*pool_, geometry_, true);
  std::byte* tile = ComputeTile(*cache, 1, 2, 1, true);
  std::memset(tile, 7, 16);
  int calls = 0;
  auto transfer = *cache->Open([] {});
  transfer->WhenReady(1, [&](PinOr pin) {
    ++calls;
    ASSERT_TRUE(pin.ok());
    EXPECT_EQ((*pin)->tile(2, 1, true), tile);
    EXPECT_EQ(static_cast<int>(*(*pin)->tile(2, 1, true)), 7);
  });
  cache->Commit(0);
  EXPECT_EQ(calls, 0);
  cache->Commit(1);
  EXPECT_EQ(calls, 1);
}

TEST_F(KvCacheTest, FailureReachesWaitersAndKeepsCommittedLayers) {
  auto cache = *KvCache::Create(*pool_, geometry_, true);
  cache->Commit(0);
  absl::Status seen;
  auto transfer = *cache->Open([] {});
  transfer->WhenReady(1, [&](PinOr pin) { seen = pin.status(); });
  cache->Fail(absl::CancelledError("gone"));
  EXPECT_EQ(seen.code(), absl::StatusCode::kCancelled);
  EXPECT_TRUE(Wait(*cache, 0).ok());
  EXPECT_EQ(Wait(*cache, 3).status().code(), absl::StatusCode::kCancelled);
}

TEST_F(KvCacheTest, APullThatGoesWaitsNoLonger) {
  auto cache = *KvCache::Create(*pool_, geometry_, true);
  const auto calls = std::make_shared<int>(0);
  auto gone = *cache->Open([] {}), stays = *cache->Open([] {});
  for (KvCache::Transfer* transfer : {gone.get(), stays.get()}) {
    transfer->WhenReady(1, [calls](PinOr pin) {
      EXPECT_TRUE(pin.ok());
      ++*calls;
    });
  }
  EXPECT_EQ(calls.use_count(), 3);
  gone.reset();
  EXPECT_EQ(calls.use_count(), 2) << "what waited is still held";
  cache->Commit(0);
  EXPECT_EQ(*calls, 0);
  cache->Commit(1);
  EXPECT_EQ(*calls, 1);
}

// A pin of freed blocks would count them among the leased ones.
TEST_F(KvCacheTest, WhoMayAskForALayerKeepsTheBlocks) {
  auto cache = *KvCache::Create(*pool_, geometry_, true);
  auto transfer = *cache->Open([] {});
  for (int layer = 0; layer < geometry_.layers; ++layer) cache->Commit(layer);
  cache->Close(absl::FailedPreconditionError("released"));
  EXPECT_EQ(Free(), 64 - 12);
  transfer->WhenReady(0, [&](PinOr pin) { EXPECT_TRUE(pin.ok()); });
  EXPECT_EQ(Counts(), (std::array<int64_t, 4>{64 - 12, 0, 12, 0}));
  transfer.reset();
  EXPECT_EQ(Counts(), (std::array<int64_t, 4>{64, 0, 0, 0}));
}

TEST_F(KvCacheTest, ClosedCacheIsFreedOnlyWhenNobodyReadsOrWrites) {
  auto cache = *KvCache::Create(*pool_, geometry_, true);
  auto transfer = *cache->Open([] {});
  cache->Commit(0);
  auto pin = *Wait(*cache, 0);
  EXPECT_EQ(Counts()[static_cast<int>(BlockState::kTransferring)], 3);
  cache->Close(absl::FailedPreconditionError("released"));
  EXPECT_EQ(cache->Open([] {}).status().code(), absl::StatusCode::kFailedPrecondition);
  cache->Fail(absl::CancelledError("released"));
  EXPECT_EQ(Free(), 64 - 12);
  transfer.reset();
  EXPECT_EQ(Free(), 64 - 12) << "a slice still points into the blocks";
  pin.reset();
  EXPECT_EQ(Free(), 64);
  cache.reset();
  EXPECT_EQ(Free(), 64) << "given back twice";
}

TEST_F(KvCacheTest, ClosedCacheWaitsForTheEngine) {
  auto cache = *KvCache::Create(*pool_, geometry_, true);
  cache->Close(absl::FailedPreconditionError("released"));
  EXPECT_EQ(Free(), 64 - 12) << "the engine may be writing";
  cache->Fail(absl::CancelledError("released"));
  EXPECT_EQ(Free(), 64);
}

TEST_F(KvCacheTest, OnlyStalledTransfersOfAClosedCacheAreAborted) {
  auto cache = *KvCache::Create(*pool_, geometry_, true);
  int aborted = 0;
  auto stalled = *cache->Open([&] { ++aborted; });
  cache->AbortStalled(absl::ZeroDuration());
  EXPECT_EQ(aborted, 0) << "it is not closed";
  cache->Close(absl::FailedPreconditionError("released"));
  stalled->Progress();
  cache->AbortStalled(absl::Hours(1));
  EXPECT_EQ(aborted, 0) << "it made progress";
  cache->AbortStalled(absl::ZeroDuration());
  cache->AbortStalled(absl::ZeroDuration());
  EXPECT_EQ(aborted, 1);
}

TEST_F(KvCacheTest, TooLargeForTheRestOfThePoolTakesNothing) {
  auto taken = *pool_->Take(60);
  EXPECT_FALSE(KvCache::Create(*pool_, geometry_, true).ok());
  EXPECT_EQ(Free(), 4);
  pool_->GiveBack(taken, BlockState::kComputing);
}

// A prompt that waits owns nothing, and takes all that it needs or none of it.
TEST_F(KvCacheTest, OneThatWaitsTakesItsBlocksWhenItIsToldTo) {
  int given_back = 0;
  pool_->SetOnGiveBack([&] { ++given_back; });
  auto cache = KvCache::CreateWaiting(*pool_, geometry_, true);
  EXPECT_EQ(Free(), 64);
  EXPECT_EQ(cache->blocks_awaited(), 12);
  EXPECT_EQ(cache->blocks_held(), 0);
  auto taken = *pool_->Take(60);
  EXPECT_EQ(FactsOf(cache->TakeBlocks()).reason, "kv_memory");
  EXPECT_EQ(cache->blocks_awaited(), 12);
  pool_->GiveBack(taken, BlockState::kComputing);
  EXPECT_EQ(given_back, 1);
  ASSERT_TRUE(cache->TakeBlocks().ok());
  EXPECT_EQ(Free(), 64 - 12);
  EXPECT_EQ(cache->blocks_awaited(), 0);
  EXPECT_EQ(cache->blocks_held(), 12);
  ASSERT_TRUE(cache->TakeBlocks().ok()) << "it has them";
  EXPECT_EQ(Free(), 64 - 12);
  cache->Commit(0);
  cache.reset();
  EXPECT_EQ(Free(), 64);
  EXPECT_EQ(given_back, 5) << "of every layer";
  pool_->SetOnGiveBack(nullptr);
}

TEST_F(KvCacheTest, OneThatNeverGotItsBlocksGivesNoneBack) {
  auto cache = KvCache::CreateWaiting(*pool_, geometry_, false);
  EXPECT_EQ(cache->blocks_awaited(), 6) << "two layers in turn";
  cache->Fail(absl::CancelledError("test"));
  cache->Close(absl::FailedPreconditionError("released"));
  EXPECT_EQ(cache->blocks_held(), 0);
  EXPECT_EQ(Free(), 64);
}

// --- in a segment ---

class SegmentCacheTest : public KvCacheTest {
 protected:
  void SetUp() override {
    KvCacheTest::SetUp();
    shm_ = *PosixShm::Open(socket_.names, segments_);
  }
  // A cache in a region of ours.
  absl::StatusOr<std::shared_ptr<KvCache>> CreateIn(BlockPool& pool, const KvGeometry& geometry,
                                                    KvCache::Later later = nullptr) {
    auto cache = KvCache::Create(pool, geometry, true);
    if (!cache.ok()) return cache;
    auto region = shm_->Create(geometry.region_bytes(), PeerAccess::kRead);
    if (!region.ok()) return region.status();
    (*cache)->LieIn(Region::Link(*std::move(region)), std::move(later));
    return cache;
  }
  // A row of the cache as the engine writes it: every float is its own number.
  void Fill(KvCache& cache) {
    for (int layer = 0; layer < geometry_.layers; ++layer) {
      for (bool value : {false, true}) {
        for (int g = 0; g < geometry_.kv_heads; ++g) {
          for (int64_t t = 0; t < geometry_.tokens; ++t) {
            auto* row = reinterpret_cast<float*>(
                ComputeTile(cache, layer, t / kKvBlockTokens, g, value) +
                static_cast<size_t>(t % kKvBlockTokens) * geometry_.head_dim * sizeof(float));
            for (int d = 0; d < geometry_.head_dim; ++d) row[d] = Number(layer, value, g, t, d);
          }
        }
      }
      cache.Commit(layer);
    }
  }
  float Number(int layer, bool value, int g, int64_t t, int d) const {
    return static_cast<float>(
        (((layer * 2 + value) * geometry_.kv_heads + g) * geometry_.tokens + t) *
            geometry_.head_dim +
        d);
  }
  bool InASegment() const { return segments_.used() == 2; }  // beside the probe

  DescriptorShare segments_;
  MemorySocket socket_;
  std::unique_ptr<PosixShm> shm_;
};

TEST_F(SegmentCacheTest, LayersAreDenseTensorsThatReadAsThoseInBlocks) {
  auto cache = *CreateIn(*pool_, geometry_);
  auto plain = *KvCache::Create(*pool_, geometry_, true);
  EXPECT_EQ(cache->transport(), Transport::kPosixShm);
  EXPECT_EQ(plain->transport(), Transport::kGrpc);
  EXPECT_EQ(Free(), 64 - 24) << "blocks stand for the segment's memory";
  Fill(*cache);
  Fill(*plain);
  for (int layer = 0; layer < geometry_.layers; ++layer) {
    auto pin = *Wait(*cache, layer), other = *Wait(*plain, layer);
    ASSERT_NE(pin->region(), nullptr);
    ASSERT_EQ(other->region(), nullptr);
    for (bool value : {false, true}) {
      const uint64_t offset = geometry_.region_offset(layer, value);
      EXPECT_EQ(offset % kRegionAlignment, 0u);
      ASSERT_LE(offset + geometry_.tensor_bytes(), pin->region()->bytes());
      const auto* dense = reinterpret_cast<const float*>(pin->region()->data() + offset);
      for (int g = 0; g < geometry_.kv_heads; ++g) {
        for (int64_t t = 0; t < geometry_.tokens; ++t) {
          for (int d = 0; d < geometry_.head_dim; ++d) {
            ASSERT_EQ(*dense++, Number(layer, value, g, t, d)) << layer << g << t << d;
          }
        }
      }
      const auto bytes = [&](const KvCache::Pin& from) {
        std::string joined;
        for (const ByteSpan& span : HfSpans(from, {value, 100, geometry_.tensor_bytes() - 100})) {
          joined.append(reinterpret_cast<const char*>(span.data), span.bytes);
        }
        return joined;
      };
      EXPECT_EQ(bytes(*pin), bytes(*other)) << "as gRPC sends them";
    }
  }
}

TEST_F(SegmentCacheTest, TheSegmentGoesWithTheBlocks) {
  auto cache = *CreateIn(*pool_, geometry_);
  Fill(*cache);
  auto pin = *Wait(*cache, 0);
  cache->Close(absl::FailedPreconditionError("released"));
  EXPECT_TRUE(InASegment()) << "a slice points into it";
  pin.reset();
  EXPECT_FALSE(InASegment());
  EXPECT_EQ(Free(), 64);
}

TEST_F(SegmentCacheTest, WithoutBlocksItLiesThereFromTheStart) {
  bool later = false;
  auto cache = KvCache::CreateIn(
      Region::Link(*shm_->Create(geometry_.region_bytes() + 4096,
                                 PeerAccess::kRead)),  // of a pool, so larger
      [&](std::function<void()> work) { later = (work(), true); }, *pool_, geometry_);
  EXPECT_EQ(cache->transport(), Transport::kPosixShm);
  EXPECT_TRUE(cache->retain());
  EXPECT_EQ(Free(), 64);
  Fill(*cache);
  auto pin = *Wait(*cache, 1);
  const auto* dense =
      reinterpret_cast<const float*>(pin->region()->data() + geometry_.region_offset(1, true));
  EXPECT_EQ(dense[geometry_.head_dim], Number(1, true, 0, 1, 0));
  cache->Close(absl::FailedPreconditionError("released"));
  EXPECT_TRUE(InASegment()) << "a slice points into it";
  pin.reset();
  EXPECT_TRUE(later);
  EXPECT_FALSE(InASegment());
  EXPECT_EQ(Free(), 64);
}

TEST_F(SegmentCacheTest, BlocksCountForItsMemoryUntilPeersHaveHungUp) {
  for (const bool lease_first : {true, false}) {
    auto cache = *CreateIn(*pool_, geometry_);
    Fill(*cache);
    Importer importer(socket_.address());
    const std::byte* const mapped = importer.Map(cache->address().name, PROT_READ);
    ASSERT_NE(mapped, nullptr);
    if (!lease_first) importer.HangUp();
    cache->Close(absl::FailedPreconditionError("released"));
    cache.reset();
    if (lease_first) {
      EXPECT_TRUE(InASegment());
      EXPECT_EQ(Free(), 64 - 12);
      importer.HangUp();
    }
    EXPECT_TRUE(Becomes([&] { return Free() == 64; }));
    EXPECT_FALSE(InASegment());
  }
}

TEST_F(SegmentCacheTest, BlocksAreFreeOnceTheRegionWasLetGoOfLater) {
  std::vector<std::function<void()>> later;
  auto cache = *CreateIn(*pool_, geometry_,
                         [&](std::function<void()> work) { later.push_back(std::move(work)); });
  Fill(*cache);
  cache->Close(absl::FailedPreconditionError("released"));
  cache.reset();
  EXPECT_TRUE(InASegment());
  EXPECT_EQ(Free(), 64 - 12) << "its memory is not back yet";
  ASSERT_EQ(later.size(), 1u);
  later.front()();
  EXPECT_FALSE(InASegment());
  EXPECT_EQ(Free(), 64);
}

// Whoever is last lets go of the region, which may take long: not while it keeps others from the
// cache.
TEST_F(SegmentCacheTest, NobodyWaitsForARegionThatGoes) {
  for (const bool close_is_last : {true, false}) {
    auto cache = *KvCache::Create(*pool_, geometry_, true);
    absl::Notification answered;
    bool gone = false;
    std::thread asks;
    auto region = *shm_->Create(geometry_.region_bytes(), PeerAccess::kRead);
    // Its own owner holds it to the end, so that the cache's share is all that goes.
    cache->LieIn({region.get(), [&](Region*) {
                    asks = std::thread([&] {
                      cache->running_transfers();
                      answered.Notify();
                    });
                    gone = answered.WaitForNotificationWithTimeout(absl::Seconds(5));
                  }});
    Fill(*cache);
    auto pin = *Wait(*cache, 0);
    if (close_is_last) pin.reset();
    cache->Close(absl::FailedPreconditionError("released"));
    pin.reset();
    EXPECT_TRUE(gone);
    asks.join();
    region.reset();
    EXPECT_EQ(Free(), 64);
  }
}

TEST_F(SegmentCacheTest, NoRoomTakesNothing) {
  shm_->Close();  // makes no more
  const absl::Status status = CreateIn(*pool_, geometry_).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted) << status;
  EXPECT_EQ(Free(), 64);
}

// Resident memory, that of segments included, stays within the pool's whatever the mix.
TEST_F(SegmentCacheTest, BlocksThatStandForASegmentHoldNoMemory) {
  const auto resident = [] {
    int64_t size = 0, pages = 0;
    std::ifstream("/proc/self/statm") >> size >> pages;
    return pages * sysconf(_SC_PAGESIZE);
  };
  constexpr int64_t kMiB = 1 << 20;
  const KvGeometry large{
      .layers = 8, .kv_heads = 8, .head_dim = 128, .dtype = DType::kF32, .tokens = 1024};
  auto pool = *BlockPool::Create(backend_->device(), 64 * large.block_bytes(), large.block_bytes());
  const auto touch = [&](KvCache& cache) {
    for (int layer = 0; layer < large.layers; ++layer) {
      for (int64_t b = 0; b < large.blocks_per_layer(); ++b) {
        for (int g = 0; g < large.kv_heads; ++g) {
          for (bool value : {false, true}) {
            std::memset(ComputeTile(cache, layer, b, g, value), 1, large.tile_bytes());
          }
        }
      }
    }
  };
  touch(**KvCache::Create(*pool, large, true));
  const int64_t used = resident();
  auto cache = *CreateIn(*pool, large);
  EXPECT_LT(resident(), used - 60 * kMiB) << "the arena's pages have gone back";
  touch(*cache);
  EXPECT_LT(resident(), used + 4 * kMiB);
}

}  // namespace
}  // namespace prefilld

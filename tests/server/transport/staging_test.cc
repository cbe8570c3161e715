#include "server/transport/staging.h"

#include <gtest/gtest.h>

#include <cstring>
#include <numeric>

#include "tests/server/fake_device.h"

namespace prefilld {
namespace {

constexpr uint64_t kGroup = Staging::kGroupBytes;
using Kind = FakeDevice::Kind;

class StagingTest : public testing::Test {
 protected:
  ~StagingTest() override { EXPECT_FALSE(device_.freed_under_a_copy()); }

  // The device's side of tensors of these sizes.
  std::vector<Staging::Tensor> OnDevice(std::initializer_list<uint64_t> sizes) {
    std::vector<Staging::Tensor> tensors;
    for (uint64_t bytes : sizes) {
      buffers_.push_back(*device_.Allocate(bytes));
      tensors.push_back({buffers_.back().data(), bytes});
    }
    return tensors;
  }
  static void Fill(const Staging::Tensor& tensor, uint8_t first) {
    auto* bytes = static_cast<uint8_t*>(tensor.host);
    std::iota(bytes, bytes + tensor.bytes, first);
  }
  std::vector<size_t> Copies() const {
    std::vector<size_t> sizes;
    for (const FakeDevice::Copied& copy : device_.copied()) sizes.push_back(copy.bytes);
    return sizes;
  }
  void ExpectAllThere(const Staging& staging) {
    ASSERT_TRUE(device_.Synchronize(device_.upload_stream()).ok());
    for (const Staging::Tensor& tensor : staging.tensors()) {
      EXPECT_EQ(std::memcmp(tensor.device, tensor.host, tensor.bytes), 0);
    }
  }

  FakeDevice device_;
  std::vector<Buffer> buffers_;
};

TEST_F(StagingTest, GroupsLeaveAsSoonAsTheyAreThere) {
  auto staging = *Staging::Create(device_, OnDevice({2 * kGroup + 5, 3}));
  Fill(staging->tensors()[0], 1);
  Fill(staging->tensors()[1], 77);
  ASSERT_TRUE(staging->Arrived(0, kGroup - 1).ok());
  EXPECT_TRUE(Copies().empty());
  ASSERT_TRUE(staging->Arrived(0, kGroup + 1).ok());
  EXPECT_EQ(Copies(), std::vector<size_t>({kGroup}));
  ASSERT_TRUE(staging->Arrived(0, 2 * kGroup + 5).ok());
  EXPECT_EQ(Copies(), std::vector<size_t>({kGroup, kGroup, 5}));
  ASSERT_TRUE(staging->Arrived(1, 2).ok());
  ASSERT_TRUE(staging->Arrived(1, 3).ok());
  EXPECT_EQ(Copies(), std::vector<size_t>({kGroup, kGroup, 5, 3}));
  for (const FakeDevice::Copied& copy : device_.copied()) EXPECT_TRUE(copy.upload);
  ExpectAllThere(*staging);
}

TEST_F(StagingTest, ATensorOfWholeGroupsHasNoRest) {
  auto staging = *Staging::Create(device_, OnDevice({kGroup, kGroup}));
  for (size_t i : {0, 1}) ASSERT_TRUE(staging->Arrived(i, kGroup).ok());
  EXPECT_EQ(Copies(), std::vector<size_t>({kGroup, kGroup}));
}

TEST_F(StagingTest, NoPinnedMemory) {
  device_.Limit(Kind::kHost, 100);
  EXPECT_TRUE(absl::IsResourceExhausted(Staging::Create(device_, OnDevice({101})).status()));
  EXPECT_EQ(device_.live_bytes(Kind::kHost), 0u);
}

TEST_F(StagingTest, WhoGivesUpHalfwayWaitsForCopiesBeforeItFrees) {
  auto staging = *Staging::Create(device_, OnDevice({4 * kGroup}));
  ASSERT_TRUE(staging->Arrived(0, 2 * kGroup).ok());
  ASSERT_EQ(device_.pending(), 2u);
  staging.reset();
  EXPECT_EQ(device_.pending(), 0u);
  EXPECT_EQ(device_.live_bytes(Kind::kHost), 0u);
}

TEST_F(StagingTest, WhatWasComputedIsNotWaitedFor) {
  auto staging = *Staging::Create(device_, OnDevice({8}));
  ASSERT_TRUE(staging->Arrived(0, 8).ok());
  ASSERT_TRUE(device_.Synchronize(device_.upload_stream()).ok());
  Buffer other_to = *device_.Allocate(8), other_from = *device_.AllocateHost(8);
  ASSERT_TRUE(device_.Copy(other_to.data(), other_from.data(), 8, device_.upload_stream()).ok());
  staging->Computed();
  staging.reset();
  EXPECT_EQ(device_.pending(), 1u) << "another job's";
  ASSERT_TRUE(device_.Synchronize(device_.upload_stream()).ok());
}

TEST_F(StagingTest, WhatLiesElsewhereIsCopiedAGroupAtATime) {
  auto staging = *Staging::Create(device_, OnDevice({kGroup + 1, 64}));
  std::vector<uint8_t> q(kGroup + 1), k(64, 5);
  std::iota(q.begin(), q.end(), uint8_t{9});
  ASSERT_TRUE(staging->CopyFrom(0, q.data()).ok());
  EXPECT_EQ(Copies(), std::vector<size_t>({kGroup, 1}));
  ASSERT_TRUE(staging->CopyFrom(1, k.data()).ok());
  EXPECT_EQ(Copies(), std::vector<size_t>({kGroup, 1, 64}));
  ExpectAllThere(*staging);
  EXPECT_EQ(std::memcmp(staging->tensors()[0].device, q.data(), q.size()), 0);
  EXPECT_EQ(std::memcmp(staging->tensors()[1].device, k.data(), k.size()), 0);
}

}  // namespace
}  // namespace prefilld

#include "server/engine/completion_queue.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <thread>
#include <utility>
#include <vector>

#include "absl/synchronization/notification.h"
#include "tests/server/fake_device.h"

namespace prefilld {
namespace {

using testing::ElementsAre;

TEST(CompletionQueue, RunsInOrderOnAThreadOfItsOwn) {
  std::vector<int> order;
  std::vector<std::thread::id> threads;
  CompletionQueue queue;
  for (int i = 0; i < 3; ++i) {
    queue.Post(nullptr, [&, i](const absl::Status& work) {
      EXPECT_TRUE(work.ok());
      order.push_back(i);
      threads.push_back(std::this_thread::get_id());
    });
  }
  queue.Flush();
  EXPECT_THAT(order, ElementsAre(0, 1, 2));
  for (const std::thread::id id : threads) {
    EXPECT_NE(id, std::this_thread::get_id());
    EXPECT_EQ(id, threads[0]);
  }
}

TEST(CompletionQueue, WaitsForTheMarkAndLetsNothingPass) {
  FakeDevice device;
  std::vector<int> order;
  CompletionQueue queue;
  device.HoldMarks();
  auto mark = *device.NewMark();
  ASSERT_TRUE(mark->Record(device.download_stream()).ok());
  queue.Post(std::move(mark), [&](const absl::Status&) { order.push_back(0); });
  queue.Post(nullptr, [&](const absl::Status&) { order.push_back(1); });
  device.AwaitHeldMark();
  EXPECT_TRUE(order.empty());
  device.ReleaseMarks();
  queue.Flush();
  EXPECT_THAT(order, ElementsAre(0, 1));
}

TEST(CompletionQueue, TellsHowTheWorkWent) {
  FakeDevice device;
  absl::Status told;
  CompletionQueue queue;
  auto mark = *device.NewMark();
  ASSERT_TRUE(mark->Record({}).ok());
  device.Lose();
  queue.Post(std::move(mark), [&](const absl::Status& work) { told = work; });
  queue.Flush();
  EXPECT_EQ(told.code(), absl::StatusCode::kInternal);
}

TEST(CompletionQueue, HoldsNoMoreTicketsThanAllowed) {
  absl::Notification open, third;
  CompletionQueue queue(/*tickets_max=*/2);
  queue.Post(nullptr, [&](const absl::Status&) { open.WaitForNotification(); });
  queue.Post(nullptr, [](const absl::Status&) {});
  std::thread poster([&] {
    queue.Post(nullptr, [](const absl::Status&) {});
    third.Notify();
  });
  EXPECT_FALSE(third.WaitForNotificationWithTimeout(absl::Milliseconds(50)));
  open.Notify();
  third.WaitForNotification();
  poster.join();
}

TEST(CompletionQueue, EndsWhenAllHasRunAndWhatItOwnedIsGone) {
  auto owned = std::make_shared<int>(0);
  int ran = 0;
  {
    CompletionQueue queue;
    for (int i = 0; i < 100; ++i) queue.Post(nullptr, [&, owned](const absl::Status&) { ++ran; });
  }
  EXPECT_EQ(ran, 100);
  EXPECT_EQ(owned.use_count(), 1);
}

}  // namespace
}  // namespace prefilld

#include "server/clock.h"

#include <gtest/gtest.h>

#include <thread>

namespace prefilld {
namespace {

TEST(SteadyCondition, WaitsUntilItHoldsOrTheDeadline) {
  absl::Mutex mutex;
  SteadyCondition condition;
  bool so = false;
  {
    absl::MutexLock lock(&mutex);
    const SteadyTime begin = SteadyNow();
    EXPECT_FALSE(condition.AwaitUntil(begin + absl::Milliseconds(20), mutex, [&] { return so; }));
    EXPECT_GE(Since(begin), absl::Milliseconds(20));
    EXPECT_FALSE(condition.AwaitUntil(absl::InfinitePast(), mutex, [&] { return so; }));
  }
  std::thread other([&] {
    absl::MutexLock lock(&mutex);
    so = true;
    condition.SignalAll();
  });
  absl::MutexLock lock(&mutex);
  EXPECT_TRUE(condition.AwaitUntil(absl::InfiniteFuture(), mutex, [&] { return so; }));
  EXPECT_TRUE(condition.AwaitUntil(absl::InfinitePast(), mutex, [&] { return so; }));
  other.join();
}

TEST(Bell, IsHeardOnce) {
  Bell bell;
  bell.Ring();
  bell.Ring();
  EXPECT_TRUE(bell.Await(absl::InfiniteFuture()));
  EXPECT_FALSE(bell.Await(SteadyNow() + absl::Milliseconds(1)));
}

}  // namespace
}  // namespace prefilld

#include "server/work_pool.h"

#include <gtest/gtest.h>

#include <atomic>
#include <memory>
#include <string>
#include <thread>

#include "absl/synchronization/notification.h"

namespace prefilld {
namespace {

TEST(WorkPool, RunsInOrderButForWhatGoesFirst) {
  std::string order;
  absl::Notification held;
  WorkPool pool(1);
  pool.Post([&] { held.WaitForNotification(); });
  for (char c : {'a', 'b'}) pool.Post([&order, c] { order += c; });
  pool.PostFirst([&] { order += '!'; });
  held.Notify();
  pool.Stop();
  EXPECT_EQ(order, "!ab");
}

TEST(WorkPool, StopRunsWhatWasPostedAndWhatThatPosts) {
  std::atomic<int> ran{0};
  WorkPool pool(2);
  for (int i = 0; i < 100; ++i) {
    pool.Post([&] {
      ++ran;
      pool.Post([&] { ++ran; });
    });
  }
  pool.Stop();
  EXPECT_EQ(ran, 200);
  pool.Post([&] { ++ran; });
  EXPECT_EQ(ran, 201) << "on this thread";
}

TEST(WorkPool, WorkIsDestroyedOnItsThreads) {
  std::thread::id ended;
  struct Tells {
    ~Tells() { *where = std::this_thread::get_id(); }
    std::thread::id* where;
  };
  auto tells = std::make_shared<Tells>(Tells{&ended});
  ended = {};
  absl::Notification held;
  WorkPool pool(1);
  pool.Post([&] { held.WaitForNotification(); });
  pool.Post([tells = std::move(tells)] {});
  held.Notify();
  pool.Stop();
  EXPECT_NE(ended, std::thread::id());
  EXPECT_NE(ended, std::this_thread::get_id());
}

}  // namespace
}  // namespace prefilld

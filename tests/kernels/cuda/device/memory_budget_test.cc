#include "kernels/cuda/device/memory_budget.h"

#include <gtest/gtest.h>

#include <thread>
#include <vector>

namespace prefilld::cuda {
namespace {

TEST(MemoryBudget, GivesNoMoreThanItHas) {
  MemoryBudget budget(100);
  EXPECT_TRUE(budget.Take(60));
  EXPECT_FALSE(budget.Take(41)) << "and nothing is taken";
  EXPECT_EQ(budget.left(), 40u);
  EXPECT_TRUE(budget.Take(40));
  EXPECT_FALSE(budget.Take(1));
  EXPECT_FALSE(budget.Take(MemoryBudget::kAll)) << "a sum that wraps around is too much";
  budget.Give(60);
  EXPECT_EQ(budget.left(), 60u);
}

TEST(MemoryBudget, ThreadsShareIt) {
  MemoryBudget budget(1000);
  std::atomic<int> taken{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&] {
      for (int i = 0; i < 1000; ++i) taken += budget.Take(3) ? 1 : 0;
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(taken, 333);
  EXPECT_EQ(budget.left(), 1u);
}

}  // namespace
}  // namespace prefilld::cuda

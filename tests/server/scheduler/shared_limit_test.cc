#include "server/scheduler/shared_limit.h"

#include <gtest/gtest.h>

namespace prefilld {
namespace {

TEST(SharedLimit, OnePeerLeavesAnEighthToOthers) {
  SharedLimit limit(16);
  for (int i = 0; i < 14; ++i) {
    ASSERT_TRUE(limit.HasRoom("many", 1)) << i;
    limit.Take("many", 1);
  }
  EXPECT_FALSE(limit.HasRoom("many", 1));
  for (const char* peer : {"a", "b"}) {
    ASSERT_TRUE(limit.HasRoom(peer, 1));
    limit.Take(peer, 1);
  }
  EXPECT_FALSE(limit.HasRoom("c", 1)) << "there is no more";
  limit.GiveBack("many", 1);
  EXPECT_FALSE(limit.HasRoom("many", 1));
  EXPECT_TRUE(limit.HasRoom("c", 1));
}

TEST(SharedLimit, ASmallOneHasNothingToReserve) {
  SharedLimit limit(2);
  limit.Take("a", 1);
  EXPECT_TRUE(limit.HasRoom("a", 1));
}

TEST(SharedLimit, TheFirstMayHaveMoreThanThereIs) {
  SharedLimit limit(10);
  EXPECT_TRUE(limit.HasRoom("a", 100));
  limit.Take("a", 100);
  EXPECT_FALSE(limit.HasRoom("b", 1));
  limit.GiveBack("a", 100);
  EXPECT_TRUE(limit.HasRoom("b", 1));
}

}  // namespace
}  // namespace prefilld

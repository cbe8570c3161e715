#include "server/descriptors.h"

#include <gtest/gtest.h>

namespace prefilld {
namespace {

TEST(DescriptorShare, NoMoreThanThereAreAndBackWhenTheLastHolderGoes) {
  const DescriptorShare share(2);
  auto first = share.Take(), second = share.Take();
  ASSERT_TRUE(first && second);
  EXPECT_EQ(share.Take(), nullptr);
  auto copy = second;
  second.reset();
  EXPECT_EQ(share.Take(), nullptr);
  copy.reset();
  EXPECT_EQ(share.used(), 1);
  EXPECT_NE(share.Take(), nullptr);
}

TEST(ShareDescriptors, SharesAreWithinTheLimitAndNoneIsEmpty) {
  for (const int limit : {64, 256, 1024, 20000, 1 << 20}) {
    const auto shares = ShareDescriptors(limit, std::nullopt);
    ASSERT_TRUE(shares.ok());
    EXPECT_GT(shares->connections, 0);
    EXPECT_GT(shares->segments.limit(), 0);
    EXPECT_GT(shares->memory.limit(), 0);
    EXPECT_LT(shares->connections + shares->segments.limit() + shares->memory.limit(), limit);
  }
}

TEST(ShareDescriptors, MoreThanThereAreIsRefusedWithHowManyAre) {
  EXPECT_EQ(ShareDescriptors(1024, 100)->connections, 100);
  EXPECT_EQ(ShareDescriptors(1024, 900).status().message(),
            "900 are more than the 384 that the limit of descriptors (ulimit -Hn: 1024) allows");
}

}  // namespace
}  // namespace prefilld

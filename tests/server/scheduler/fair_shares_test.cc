#include "server/scheduler/fair_shares.h"

#include <gtest/gtest.h>

namespace prefilld {
namespace {

TEST(FairShares, WhoHasBeenServedIsBehind) {
  FairShares shares;
  shares.SetBusy({"a", "b"});
  EXPECT_EQ(shares.Served("a"), shares.Served("b"));
  shares.Serve("a", 2);
  shares.SetBusy({"a", "b"});
  EXPECT_EQ(shares.Served("a") - shares.Served("b"), 2);
}

TEST(FairShares, WhoHadNoWorkGainsNothing) {
  FairShares shares;
  shares.SetBusy({"a"});
  shares.Serve("a", 100);
  shares.SetBusy({"a", "b"});
  EXPECT_EQ(shares.Served("b"), shares.Served("a"));
}

TEST(FairShares, WhoTookMoreThanItsShareCannotLeaveThatBehind) {
  FairShares shares;
  shares.SetBusy({"a", "b"});
  shares.Serve("b", 3);
  shares.SetBusy({"a"});
  shares.Serve("a", 1);
  shares.SetBusy({"a", "b"});
  EXPECT_EQ(shares.Served("b") - shares.Served("a"), 2);
  shares.SetBusy({"a"});
  shares.Serve("a", 10);
  shares.SetBusy({"a", "b"});
  EXPECT_EQ(shares.Served("b"), shares.Served("a"));
}

TEST(FairShares, NobodyOwesWhatNobodyWaitedFor) {
  FairShares shares;
  shares.SetBusy({"a"});
  shares.Serve("a", 100);
  shares.SetBusy({});
  shares.SetBusy({"a", "b"});
  EXPECT_EQ(shares.Served("b"), shares.Served("a"));
}

}  // namespace
}  // namespace prefilld

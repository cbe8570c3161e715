#include "server/rpc/peer.h"

#include <gtest/gtest.h>

namespace prefilld {
namespace {

TEST(Peer, IsAnAddressWithoutItsPort) {
  EXPECT_EQ(PeerOfAddress("ipv4:127.0.0.1:4711"), "127.0.0.1");
  EXPECT_EQ(PeerOfAddress("ipv4:127.0.0.1:4712"), PeerOfAddress("ipv4:127.0.0.1:4711"));
  EXPECT_NE(PeerOfAddress("ipv4:127.0.0.2:4711"), PeerOfAddress("ipv4:127.0.0.1:4711"));
  EXPECT_EQ(PeerOfAddress("unix:/run/prefilld"), "unix");
  EXPECT_EQ(PeerOfAddress("unix-abstract:prefilld"), "unix");
}

TEST(Peer, HasOneShareForItsIPv6Network) {
  const std::string one = PeerOfAddress("ipv6:%5B2001:db8:1:2:3:4:5:6%5D:4711");
  EXPECT_EQ(one, "2001:db8:1:2::");
  EXPECT_EQ(PeerOfAddress("ipv6:[2001:db8:1:2::1]:4711"), one);
  EXPECT_NE(PeerOfAddress("ipv6:%5B2001:db8:1:3::1%5D:4711"), one);
  EXPECT_EQ(PeerOfAddress("ipv6:%5B::ffff:10.0.0.1%5D:4711"), "10.0.0.1");
  EXPECT_EQ(PeerOfAddress("ipv6:%5B::1%5D:4711"), "::");
}

TEST(Peer, WhatIsNoAddressIsOneAllTheSame) {
  for (const char* odd : {"", "ipv4:", "ipv6:%5B", ":", "x"}) (void)PeerOfAddress(odd);
  EXPECT_EQ(PeerOfAddress("x"), "x");
}

}  // namespace
}  // namespace prefilld

#include "server/health.h"

#include <gtest/gtest.h>

#include <utility>
#include <vector>

namespace prefilld {
namespace {

TEST(Health, IsReadyWhenNothingSpeaksAgainstIt) {
  Health health;
  std::vector<std::pair<bool, bool>> told;
  health.Tell([&](bool alive, bool ready) { told.emplace_back(alive, ready); });
  health.Set(Health::kStarting, "");
  health.Set(Health::kUnreachable, "deaf");
  EXPECT_EQ(health.alive().message(), "deaf");
  health.Set(Health::kDraining, "draining");
  health.Set(Health::kUnreachable, "");
  EXPECT_TRUE(health.alive().ok());
  EXPECT_EQ(health.ready().message(), "draining");
  using Told = std::pair<bool, bool>;
  EXPECT_EQ(told, (std::vector<Told>{
                      {true, false}, {true, true}, {false, false}, {false, false}, {true, false}}));
}

TEST(Health, WhatOneTakesBackIsNotAnothers) {
  Health health;
  health.Set(Health::kStarting, "");
  health.Set(Health::kModelChanged, "changed");
  health.Set(Health::kUnreachable, "deaf");
  health.Set(Health::kUnreachable, "");
  EXPECT_EQ(health.alive().message(), "changed");
  EXPECT_EQ(health.ready().message(), "changed");
}

}  // namespace
}  // namespace prefilld

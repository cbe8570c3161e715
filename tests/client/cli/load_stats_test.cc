#include "client/cli/load_stats.h"

#include <gtest/gtest.h>

#include "absl/strings/cord.h"
#include "google/rpc/error_details.pb.h"

namespace prefilld::cli {
namespace {

absl::Status Refusal(const char* reason) {
  google::rpc::ErrorInfo info;
  info.set_reason(reason);
  absl::Status status = absl::ResourceExhaustedError("full");
  status.SetPayload("type.googleapis.com/google.rpc.ErrorInfo",
                    absl::Cord(info.SerializeAsString()));
  return status;
}

TEST(Percentile, IsTheLeastValueThatTheFractionDoesNotExceed) {
  EXPECT_EQ(Percentile({}, .99), 0);
  EXPECT_EQ(Percentile({7}, .5), 7);
  EXPECT_EQ(Percentile({1, 2}, .5), 1);
  EXPECT_EQ(Percentile({1, 2, 3}, .5), 2);
  std::vector<double> hundred;
  for (int i = 1; i <= 100; ++i) hundred.push_back(i);
  EXPECT_EQ(Percentile(hundred, .5), 50);
  EXPECT_EQ(Percentile(hundred, .95), 95);
  EXPECT_EQ(Percentile(hundred, .99), 99);
  EXPECT_EQ(Percentile(hundred, 1), 100);
  hundred.push_back(101);
  EXPECT_EQ(Percentile(hundred, .99), 100);
}

TEST(LoadStats, WhatIsLateIsNotGood) {
  const std::vector<Outcome> outcomes = {
      {.tokens = 10, .seconds = 2, .ttft_seconds = 1, .density = .5},
      {.peer = 1, .tokens = 20, .seconds = 1, .ttft_seconds = .5, .density = 1},
      {.peer = 1, .tokens = 40, .seconds = 2.1, .ttft_seconds = 2, .density = .75}};
  const LoadStats stats = Summarize(outcomes, absl::Seconds(2));
  EXPECT_EQ(stats.sent, 3u);
  EXPECT_EQ(stats.succeeded(), 3u);
  EXPECT_EQ(stats.good, 2u);
  EXPECT_EQ(stats.tokens, 70u);
  EXPECT_EQ(stats.good_tokens, 30u);
  EXPECT_EQ(stats.density, .75);
  EXPECT_EQ(stats.latency, (std::vector<double>{1, 2, 2.1}));
  EXPECT_EQ(stats.ttft, (std::vector<double>{.5, 1, 2}));
  const LoadStats peer = SummarizePeer(outcomes, absl::Seconds(2), 1);
  EXPECT_EQ(peer.sent, 2u);
  EXPECT_EQ(peer.good_tokens, 20u);
  EXPECT_EQ(Summarize(outcomes, absl::InfiniteDuration()).good, 3u);
}

TEST(LoadStats, FailuresAreCountedByCodeAndReason) {
  const std::vector<Outcome> outcomes = {{.status = Refusal("QUEUE_FULL"), .seconds = .2},
                                         {.status = absl::UnavailableError("gone"), .seconds = 3},
                                         {.status = Refusal("QUEUE_FULL"), .seconds = .1},
                                         {.status = Refusal("BACKLOG"), .seconds = .3}};
  const LoadStats stats = Summarize(outcomes, absl::InfiniteDuration());
  EXPECT_EQ(stats.succeeded(), 0u);
  EXPECT_EQ(stats.density, 0);
  EXPECT_EQ(stats.failures,
            (std::map<std::string, std::vector<double>>{{"RESOURCE_EXHAUSTED QUEUE_FULL", {.1, .2}},
                                                        {"RESOURCE_EXHAUSTED BACKLOG", {.3}},
                                                        {"UNAVAILABLE", {3}}}));
  EXPECT_EQ(stats.last_failure, outcomes.back().status);
}

}  // namespace
}  // namespace prefilld::cli

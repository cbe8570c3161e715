#include "server/record/log.h"

#include <gtest/gtest.h>

#include <sstream>
#include <string>
#include <thread>
#include <vector>

namespace prefilld {
namespace {

std::vector<nlohmann::json> Lines(const std::string& text) {
  std::vector<nlohmann::json> lines;
  std::istringstream stream(text);
  for (std::string line; std::getline(stream, line);) lines.push_back(nlohmann::json::parse(line));
  return lines;
}

TEST(Log, WritesOneJsonObjectALine) {
  testing::internal::CaptureStderr();
  Log(Level::kInfo, "first", {{"request_id", "a\nb"}, {"tokens", 7600}});
  Log(Level::kError, "second");
  const auto lines = Lines(testing::internal::GetCapturedStderr());
  ASSERT_EQ(lines.size(), 2u);
  EXPECT_EQ(lines[0]["event"], "first");
  EXPECT_EQ(lines[0]["level"], "info");
  EXPECT_EQ(lines[0]["request_id"], "a\nb");
  EXPECT_EQ(lines[0]["tokens"], 7600);
  EXPECT_EQ(lines[0]["ts"].get<std::string>().size(), sizeof("2026-01-01T00:00:00.000000Z") - 1);
  EXPECT_EQ(lines[1]["level"], "error");
}

TEST(Log, SurvivesBytesThatAreNoUtf8) {
  testing::internal::CaptureStderr();
  Log(Level::kInfo, "event", {{"message", "\xff\xfe"}});
  EXPECT_EQ(Lines(testing::internal::GetCapturedStderr()).size(), 1u);
}

TEST(Log, LinesOfThreadsDoNotMix) {
  testing::internal::CaptureStderr();
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([] {
      for (int i = 0; i < 200; ++i) Log(Level::kInfo, "event", {{"text", std::string(300, 'x')}});
    });
  }
  for (auto& thread : threads) thread.join();
  EXPECT_EQ(Lines(testing::internal::GetCapturedStderr()).size(), 800u);
}

}  // namespace
}  // namespace prefilld

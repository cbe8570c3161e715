#include "server/record/log.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

namespace prefilld {
namespace {

// What others have logged is not of this test.
void Capture() {
  EXPECT_TRUE(FlushLog());
  testing::internal::CaptureStderr();
}

std::string Captured() {
  EXPECT_TRUE(FlushLog());
  return testing::internal::GetCapturedStderr();
}

std::vector<nlohmann::json> Lines(const std::string& text) {
  std::vector<nlohmann::json> lines;
  std::istringstream stream(text);
  for (std::string line; std::getline(stream, line);) lines.push_back(nlohmann::json::parse(line));
  return lines;
}

TEST(Log, WritesOneJsonObjectALine) {
  Capture();
  Log(Level::kInfo, "first", {{"request_id", "a\nb"}, {"tokens", 7600}});
  Log(Level::kError, "second");
  const auto lines = Lines(Captured());
  ASSERT_EQ(lines.size(), 2u);
  EXPECT_EQ(lines[0]["event"], "first");
  EXPECT_EQ(lines[0]["level"], "info");
  EXPECT_EQ(lines[0]["request_id"], "a\nb");
  EXPECT_EQ(lines[0]["tokens"], 7600);
  EXPECT_EQ(lines[0]["ts"].get<std::string>().size(), sizeof("2026-01-01T00:00:00.000000Z") - 1);
  EXPECT_EQ(lines[1]["level"], "error");
}

TEST(Log, SurvivesBytesThatAreNoUtf8) {
  Capture();
  Log(Level::kInfo, "event", {{"message", "\xff\xfe"}});
  EXPECT_EQ(Lines(Captured()).size(), 1u);
}

// A terminal or a viewer would act on C1 controls, U+2028 and marks that turn the direction.
TEST(Log, EscapesWhatIsNotAscii) {
  Capture();
  const std::string message = "a\u009b31mb\u2028c\u202ed\x7f";
  Log(Level::kInfo, "event", {{"message", message}});
  const std::string text = Captured();
  EXPECT_TRUE(std::all_of(text.begin(), text.end(), [](char c) {
    return c == '\n' || (c >= ' ' && c < 0x7f);
  })) << text;
  EXPECT_EQ(Lines(text)[0]["message"], message);
}

TEST(Log, LinesOfThreadsDoNotMix) {
  Capture();
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([] {
      for (int i = 0; i < 200; ++i) Log(Level::kInfo, "event", {{"text", std::string(300, 'x')}});
    });
  }
  for (auto& thread : threads) thread.join();
  EXPECT_EQ(Lines(Captured()).size(), 800u);
}

// stderr is a pipe that nobody reads: whoever logs goes on, and in the end the lines are there, but
// for those that the queue had no room for, which are counted.
TEST(Log, WaitsForNoReader) {
  int pipe_ends[2];
  ASSERT_EQ(pipe(pipe_ends), 0);
  const int before = dup(STDERR_FILENO);
  dup2(pipe_ends[1], STDERR_FILENO);
  close(pipe_ends[1]);
  const uint64_t dropped_before = LogLinesDropped();
  constexpr int kLines = 3000;
  for (int i = 0; i < kLines; ++i) {
    Log(Level::kInfo, "event", {{"number", i}, {"text", std::string(2000, 'x')}});
  }
  EXPECT_FALSE(FlushLog(absl::Milliseconds(10)));
  const uint64_t dropped = LogLinesDropped() - dropped_before;
  EXPECT_GT(dropped, 0u);
  EXPECT_LT(dropped, kLines / 2u) << "the queue holds more than that";

  std::string text;
  std::thread reader([&] {
    char some[1 << 16];
    for (ssize_t n; (n = read(pipe_ends[0], some, sizeof some)) > 0;) text.append(some, n);
  });
  EXPECT_TRUE(FlushLog(absl::Seconds(20)));
  dup2(before, STDERR_FILENO);  // the last writing end: the reader ends
  close(before);
  reader.join();
  close(pipe_ends[0]);
  const auto lines = Lines(text);
  ASSERT_EQ(lines.size(), kLines - dropped + 1);
  for (size_t i = 0; i + 1 < lines.size(); ++i) ASSERT_EQ(lines[i]["number"], i);
  EXPECT_EQ(lines.back()["event"], "log_lines_dropped");
  EXPECT_EQ(lines.back()["lines"], dropped);
}

}  // namespace
}  // namespace prefilld

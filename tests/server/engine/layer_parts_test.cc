#include "server/engine/layer_parts.h"

#include <gtest/gtest.h>

#include <cmath>
#include <numeric>
#include <utility>

#include "server/kv/block_pool.h"

namespace prefilld {
namespace {

constexpr int64_t kTile = 4096;

ModelInfo Info(int q_heads, int kv_heads) {
  ModelInfo info;
  info.q_heads = q_heads;
  info.kv_heads = kv_heads;
  return info;
}

// Of the pairs of a query and a key that it sees.
double ShareOf(const RowRange& queries, int64_t tokens, int64_t prefix) {
  const auto pairs = [&](int64_t end) {
    const auto count = static_cast<double>(end);
    return count * static_cast<double>(prefix) + count * count / 2;
  };
  return (pairs(queries.first + queries.count) - pairs(queries.first)) / pairs(tokens);
}

// What a part takes, by the shares that its ranges are of the layer.
double SecondsOf(const LayerPart& part, const LayerWork& all) {
  const auto rows = [&](const RowRange& range) {
    return static_cast<double>(range.count) / static_cast<double>(all.tokens);
  };
  return all.project * rows(part.project) + all.finish * rows(part.finish) +
         all.attend * part.attend.count / all.info.q_heads *
             (part.attend.queries.count == 0 ? 1 : ShareOf(part.attend.queries, all.tokens, 0));
}

// Rows and heads follow each other without gaps, in the order in which they depend on each other.
void ExpectWhole(const std::vector<LayerPart>& parts, const LayerWork& work) {
  const ModelInfo& info = work.info;
  const int64_t tokens = work.tokens;
  int64_t projected = 0, finished = 0, queried = 0;
  int attended = 0;
  bool stored = false;
  for (const LayerPart& part : parts) {
    if (part.project.count > 0) {
      EXPECT_EQ(part.project.first, projected);
      EXPECT_EQ(projected % kTile, 0);
      EXPECT_FALSE(stored);
      projected += part.project.count;
    }
    if (part.store) {
      EXPECT_FALSE(std::exchange(stored, true));
      EXPECT_EQ(projected, tokens);
    }
    if (part.attend.count > 0) {
      EXPECT_EQ(part.attend.first, attended);
      EXPECT_TRUE(stored);
      EXPECT_EQ(finished, 0);
      const int group = info.q_heads / info.kv_heads;
      const bool groups = part.attend.first % group == 0 && part.attend.count % group == 0;
      const int last = part.attend.first + part.attend.count - 1;
      EXPECT_TRUE(groups || part.attend.first / group == last / group);
      const RowRange& queries = part.attend.queries;
      EXPECT_EQ(queries.first, queried);
      EXPECT_EQ(queries.first % kKvBlockTokens, 0);
      queried = (queries.first + queries.count) % tokens;
      if (queried == 0) attended += part.attend.count;
    }
    if (part.finish.count > 0) {
      EXPECT_EQ(part.finish.first, finished);
      EXPECT_EQ(finished % kTile, 0);
      EXPECT_EQ(attended, info.q_heads);
      finished += part.finish.count;
    }
  }
  EXPECT_EQ(projected, tokens);
  EXPECT_EQ(attended, info.q_heads);
  EXPECT_EQ(queried, 0);
  EXPECT_EQ(finished, work.last ? 0 : tokens);
  EXPECT_TRUE(stored);
}

TEST(LayerPartsTest, AShortLayerIsOneStep) {
  const ModelInfo info = Info(32, 8);
  const LayerWork work = {.info = info,
                          .tokens = 32768,
                          .tile_tokens = kTile,
                          .project = .003,
                          .attend = .014,
                          .finish = .018};
  const auto parts = DivideLayer(work, .1);
  ASSERT_EQ(parts.size(), 1u);
  ExpectWhole(parts, work);
}

TEST(LayerPartsTest, NoPartIsLongerThanItMayBe) {
  struct Case {
    int q_heads, kv_heads;
    int64_t tokens;
    double project, attend, finish;
    size_t parts_max;
  };
  const Case cases[] = {
      {32, 8, 131072, .011, .21, .074, 4},  // dense
      {32, 8, 131072, .011, .03, .074, 2},  // sparse
      {32, 8, 524288, .044, 3.2, .3, 40},   // a group takes .4 s
      {28, 4, 1000000, .05, 2.2, .5, 35},   // seven heads a group
      {8, 8, 100000, .2, .7, .2, 14},       // no groups
      {6, 1, 200001, .0, .55, .05, 8},      // one kv head
      {4, 2, 5000, .05, .01, .07, 3},       // rows alone
  };
  for (const Case& each : cases) {
    for (const bool last : {false, true}) {
      SCOPED_TRACE(each.tokens);
      const ModelInfo info = Info(each.q_heads, each.kv_heads);
      const LayerWork work = {.info = info,
                              .tokens = each.tokens,
                              .tile_tokens = kTile,
                              .last = last,
                              .project = each.project,
                              .attend = each.attend,
                              .finish = last ? 0 : each.finish};
      const auto parts = DivideLayer(work, .1);
      ExpectWhole(parts, work);
      EXPECT_TRUE(last || parts.size() > 1);
      EXPECT_LE(parts.size(), each.parts_max);
      for (const LayerPart& part : parts) EXPECT_LE(SecondsOf(part, work), .1 + 1e-9);
    }
  }
}

// What cannot be divided further is a part of its own, and none is empty.
TEST(LayerPartsTest, APieceMayBeTooLong) {
  const ModelInfo info = Info(4, 2);
  for (const bool last : {false, true}) {
    const LayerWork work = {.info = info,
                            .tokens = 3 * kTile,
                            .tile_tokens = kTile,
                            .last = last,
                            .project = 3,
                            .attend = 8,
                            .finish = last ? 0.0 : 3.0};
    const auto parts = DivideLayer(work, .1);
    ExpectWhole(parts, work);
    EXPECT_EQ(parts.size(), last ? 3u + 4 : 3u + 4 + 3);
  }
}

// Without a selection, which sees all queries, a head can be divided.
TEST(LayerPartsTest, AHeadThatTakesTooLongIsDividedByItsQueries) {
  for (const int64_t tokens : {int64_t{1} << 20, (int64_t{1} << 20) + 77, int64_t{524288}}) {
    for (const double attend : {2.4, .9, 8.5}) {
      SCOPED_TRACE(attend);
      const ModelInfo info = Info(8, 2);
      const LayerWork work = {.info = info,
                              .tokens = tokens,
                              .tile_tokens = kTile,
                              .by_queries = true,
                              .project = .05,
                              .attend = attend,
                              .finish = .11};
      const auto parts = DivideLayer(work, .1);
      ExpectWhole(parts, work);
      for (const LayerPart& part : parts) EXPECT_LE(SecondsOf(part, work), .102);
      EXPECT_LE(parts.size(), 3 + 8 * std::ceil(attend / 8 / .1));
    }
  }
}

TEST(LayerPartsTest, QueriesBehindAPrefixAreDividedByTheKeysTheySee) {
  const AttentionWork work = {
      .q_heads = 1, .kv_heads = 1, .seconds = 1, .by_queries = 100'000, .prefix = 1'000'000};
  int64_t next = 0;
  for (const AttendRange& range : DivideAttention(work, .1)) {
    EXPECT_EQ(range.queries.first, next);
    EXPECT_NEAR(ShareOf(range.queries, 100'000, 1'000'000), .1, .002);
    next += range.queries.count;
  }
  EXPECT_EQ(next, 100'000);
}

TEST(LayerPartsTest, AttentionAloneIsDividedLikewise) {
  const auto divide = [](int heads, int kv_heads, double seconds) {
    return DivideAttention({.q_heads = heads, .kv_heads = kv_heads, .seconds = seconds}, .1);
  };
  EXPECT_EQ(divide(32, 8, .09).size(), 1u);
  for (const double seconds : {.3, 1.0, 5.0}) {
    int next = 0;
    for (const AttendRange& range : divide(12, 3, seconds)) {
      EXPECT_EQ(range.first, next);
      const bool groups = range.first % 4 == 0 && range.count % 4 == 0;
      EXPECT_TRUE(groups || range.first / 4 == (range.first + range.count - 1) / 4);
      EXPECT_TRUE(range.count == 1 || seconds * range.count / 12 <= .1);
      next += range.count;
    }
    EXPECT_EQ(next, 12);
  }
}

}  // namespace
}  // namespace prefilld

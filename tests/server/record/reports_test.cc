#include "server/record/reports.h"

#include <gtest/gtest.h>

namespace prefilld {
namespace {

RequestReport Report(const std::string& id, size_t entries = 1, int64_t tokens = 0) {
  RequestReport report{.request_id = id, .tokens = tokens};
  report.report.entries.resize(entries);
  return report;
}

TEST(ReportTable, FindsTheNewestOfAnId) {
  ReportTable table;
  table.Add(Report("a", 1, 10));
  table.Add(Report("b"));
  table.Add(Report("a", 1, 20));
  ASSERT_TRUE(table.Find("a", {}));
  EXPECT_EQ(table.Find("a", {})->tokens, 20);
  EXPECT_FALSE(table.Find("c", {}));
  EXPECT_EQ(table.All({}).front()->tokens, 20) << "newest first";
}

TEST(ReportTable, AReaderSeesItsOwnTenantsOrAll) {
  ReportTable table;
  for (const char* tenant : {"one", "other"}) {
    RequestReport report = Report("a");
    report.tenant = tenant;
    table.Add(std::move(report));
  }
  Caller reader{.tenant = "one", .may = std::make_shared<Permissions>()};
  ASSERT_TRUE(table.Find("a", reader));
  EXPECT_EQ(table.Find("a", reader)->tenant, "one");
  EXPECT_EQ(table.All(reader).size(), 1u);
  reader.may = std::make_shared<Permissions>(Permissions{.all_reports = true});
  EXPECT_EQ(table.All(reader).size(), 2u);
  reader = {.tenant = "third", .may = std::make_shared<Permissions>()};
  EXPECT_FALSE(table.Find("a", reader));
}

TEST(ReportTable, KeepsTheLast256) {
  ReportTable table;
  for (int i = 0; i < 300; ++i) table.Add(Report(std::to_string(i)));
  EXPECT_EQ(table.All({}).size(), 256u);
  EXPECT_FALSE(table.Find("43", {}));
  EXPECT_TRUE(table.Find("44", {}));
}

TEST(ReportTable, IsBoundedInMemory) {
  ReportTable table;
  for (int i = 0; i < 10; ++i) table.Add(Report(std::to_string(i), ReportTable::kEntriesMax / 4));
  EXPECT_EQ(table.All({}).size(), 4u);
  table.Add(Report("huge", 2 * ReportTable::kEntriesMax));
  EXPECT_EQ(table.All({}).size(), 1u) << "the newest stays, whatever its size";
  table.Add(Report("small"));
  EXPECT_EQ(table.All({}).size(), 1u);
  EXPECT_TRUE(table.Find("small", {}));
}

}  // namespace
}  // namespace prefilld

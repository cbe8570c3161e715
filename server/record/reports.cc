#include "server/record/reports.h"

#include <utility>

namespace prefilld {

void ReportTable::Add(RequestReport report) {
  auto shared = std::make_shared<const RequestReport>(std::move(report));
  absl::MutexLock lock(&mutex_);
  entries_ += shared->report.entries.size();
  reports_.push_front(std::move(shared));
  while (reports_.size() > kReportsMax || (entries_ > kEntriesMax && reports_.size() > 1)) {
    entries_ -= reports_.back()->report.entries.size();
    reports_.pop_back();
  }
}

std::shared_ptr<const RequestReport> ReportTable::Find(absl::string_view request_id,
                                                       const Caller& reader) const {
  absl::MutexLock lock(&mutex_);
  for (const auto& report : reports_) {
    if (report->request_id == request_id && reader.MayReadReportsOf(report->tenant)) return report;
  }
  return nullptr;
}

std::vector<std::shared_ptr<const RequestReport>> ReportTable::All(const Caller& reader) const {
  absl::MutexLock lock(&mutex_);
  std::vector<std::shared_ptr<const RequestReport>> all;
  for (const auto& report : reports_) {
    if (reader.MayReadReportsOf(report->tenant)) all.push_back(report);
  }
  return all;
}

}  // namespace prefilld

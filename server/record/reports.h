// The reports of the last requests, for GetSparsityReport and /debug/sparsity. Bounded in number
// and in memory; the oldest goes first. Thread-safe; never blocks longer than a copy of pointers.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/strings/string_view.h"
#include "absl/synchronization/mutex.h"
#include "server/caller.h"
#include "server/job.h"

namespace prefilld {

struct RequestReport {
  std::string tenant;  // whose request it was, see Caller
  std::string request_id;
  std::string model;  // kAttendModel for an Attend
  Method method = Method::kDense;
  double gamma = 0;
  int64_t tokens = 0;
  JobReport report;
};

class ReportTable {
 public:
  static constexpr size_t kReportsMax = 256;
  static constexpr size_t kEntriesMax = 1 << 20;  // heads of all reports: 20 MiB

  void Add(RequestReport report);
  // The newest report of that request that the reader may see, or null.
  std::shared_ptr<const RequestReport> Find(absl::string_view request_id,
                                            const Caller& reader) const;
  // All that it may see, newest first.
  std::vector<std::shared_ptr<const RequestReport>> All(const Caller& reader) const;

 private:
  mutable absl::Mutex mutex_;
  std::deque<std::shared_ptr<const RequestReport>> reports_
      ABSL_GUARDED_BY(mutex_);  // newest first
  size_t entries_ ABSL_GUARDED_BY(mutex_) = 0;
};

}  // namespace prefilld

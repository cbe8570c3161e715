// A progress bar on a terminal, for what takes longer than a second.
#pragma once

#include <ostream>
#include <string>

#include "absl/base/thread_annotations.h"
#include "absl/strings/string_view.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "client/cpp/call.h"

namespace prefilld::cli {

// Any thread. Its line is removed when it is destroyed.
class Progress {
 public:
  // Draws nothing where `terminal` is false.
  Progress(std::ostream& stream, bool terminal) : stream_(stream), terminal_(terminal) {}
  ~Progress();
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  void Update(absl::string_view what, double done, double total) ABSL_LOCKS_EXCLUDED(mutex_);

 private:
  absl::Mutex mutex_;
  std::ostream& stream_;
  const bool terminal_;
  absl::Time next_draw_ ABSL_GUARDED_BY(mutex_) = client::SteadyNow() + absl::Seconds(1);
  bool drawn_ ABSL_GUARDED_BY(mutex_) = false;
};

}  // namespace prefilld::cli

// What a load showed: requests as they ended, and the figures made of them. Pure functions.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"

namespace prefilld::cli {

// One request. Seconds count from when it was to be sent, which in an open loop is before it was
// sent where the sender was late: waiting for slow answers does not make them look fast.
struct Outcome {
  size_t peer = 0;
  uint32_t tokens = 0;
  absl::Status status;
  double seconds = 0;       // until it ended
  double ttft_seconds = 0;  // until its first result; of one that succeeded
  double density = 0;       // likewise
};

struct LoadStats {
  size_t sent = 0;
  size_t good = 0;  // succeeded within the deadline
  uint64_t tokens = 0, good_tokens = 0;
  double density = 0;                 // mean of those that succeeded
  std::vector<double> ttft, latency;  // seconds, ascending, of those that succeeded
  // By code and the server's reason ("RESOURCE_EXHAUSTED QUEUE_FULL"): seconds until each failed,
  // ascending.
  std::map<std::string, std::vector<double>> failures;
  absl::Status last_failure;

  size_t succeeded() const { return latency.size(); }
};

LoadStats Summarize(const std::vector<Outcome>& outcomes, absl::Duration deadline);
// Of the requests of one peer.
LoadStats SummarizePeer(const std::vector<Outcome>& outcomes, absl::Duration deadline, size_t peer);

// The least of the values that `fraction` of them do not exceed; 0 where there are none.
double Percentile(const std::vector<double>& ascending, double fraction);

}  // namespace prefilld::cli

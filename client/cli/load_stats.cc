#include "client/cli/load_stats.h"

#include <algorithm>
#include <cmath>

#include "absl/strings/str_cat.h"
#include "client/cpp/errors.h"

namespace prefilld::cli {
namespace {

std::string FailureName(const absl::Status& status) {
  const std::string reason = client::ErrorReason(status);
  return absl::StrCat(absl::StatusCodeToString(status.code()), reason.empty() ? "" : " ", reason);
}

void Add(const Outcome& outcome, absl::Duration deadline, LoadStats* stats) {
  ++stats->sent;
  if (!outcome.status.ok()) {
    stats->failures[FailureName(outcome.status)].push_back(outcome.seconds);
    stats->last_failure = outcome.status;
    return;
  }
  stats->ttft.push_back(outcome.ttft_seconds);
  stats->latency.push_back(outcome.seconds);
  stats->density += outcome.density;
  stats->tokens += outcome.tokens;
  if (outcome.seconds > absl::ToDoubleSeconds(deadline)) return;
  ++stats->good;
  stats->good_tokens += outcome.tokens;
}

LoadStats Finish(LoadStats stats) {
  std::sort(stats.ttft.begin(), stats.ttft.end());
  std::sort(stats.latency.begin(), stats.latency.end());
  for (auto& [name, seconds] : stats.failures) std::sort(seconds.begin(), seconds.end());
  if (stats.succeeded() > 0) stats.density /= static_cast<double>(stats.succeeded());
  return stats;
}

}  // namespace

LoadStats Summarize(const std::vector<Outcome>& outcomes, absl::Duration deadline) {
  LoadStats stats;
  for (const Outcome& outcome : outcomes) Add(outcome, deadline, &stats);
  return Finish(std::move(stats));
}

LoadStats SummarizePeer(const std::vector<Outcome>& outcomes, absl::Duration deadline,
                        size_t peer) {
  LoadStats stats;
  for (const Outcome& outcome : outcomes) {
    if (outcome.peer == peer) Add(outcome, deadline, &stats);
  }
  return Finish(std::move(stats));
}

double Percentile(const std::vector<double>& ascending, double fraction) {
  if (ascending.empty()) return 0;
  const auto count = static_cast<double>(ascending.size());
  // What a product of doubles is above the whole number that it means is no value more.
  const double rank = std::ceil(fraction * count - 1e-9 * count);
  return ascending[static_cast<size_t>(std::clamp(rank, 1.0, count)) - 1];
}

}  // namespace prefilld::cli

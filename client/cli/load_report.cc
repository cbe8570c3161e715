#include "client/cli/load_report.h"

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"

namespace prefilld::cli {
namespace {

nlohmann::ordered_json FailuresJson(const LoadStats& stats) {
  auto failures = nlohmann::ordered_json::object();
  for (const auto& [name, seconds] : stats.failures) {
    failures[name] = {{"count", seconds.size()}, {"p99_seconds", Percentile(seconds, .99)}};
  }
  return failures;
}

nlohmann::ordered_json LatencyJson(const std::vector<double>& seconds) {
  return {{"p50", Percentile(seconds, .5)},
          {"p95", Percentile(seconds, .95)},
          {"p99", Percentile(seconds, .99)}};
}

// "RESOURCE_EXHAUSTED QUEUE_FULL=12 (p99 0.0031 s)"
std::string FailuresText(const LoadStats& stats) {
  if (stats.failures.empty()) return "-";
  return absl::StrJoin(stats.failures, ", ", [](std::string* out, const auto& failure) {
    absl::StrAppendFormat(out, "%s=%d (p99 %.4f s)", failure.first, failure.second.size(),
                          Percentile(failure.second, .99));
  });
}

void PrintLine(const std::string& tokens, const std::string& load, double seconds,
               const LoadStats& stats, std::ostream& out) {
  out << absl::StrFormat("%14s %9s %6d %6d %9.2f %9.0f %9.4f %9.4f %9.4f %9.4f %8.4f  %s\n", tokens,
                         load, stats.sent, stats.good, static_cast<double>(stats.good) / seconds,
                         static_cast<double>(stats.good_tokens) / seconds,
                         Percentile(stats.ttft, .5), Percentile(stats.ttft, .99),
                         Percentile(stats.latency, .5), Percentile(stats.latency, .99),
                         stats.density, FailuresText(stats));
}

}  // namespace

std::string LoadText(const LoadRow& row) {
  return row.rate > 0 ? absl::StrCat(row.rate, "/s") : absl::StrCat(row.concurrency);
}

nlohmann::ordered_json ToJson(const LoadRow& row) {
  const LoadStats& stats = row.stats;
  nlohmann::ordered_json json = {{"tokens", row.tokens}};
  uint32_t tokens = 0;
  if (absl::SimpleAtoi(row.tokens, &tokens)) json["tokens"] = tokens;
  if (row.rate > 0) {
    json["rate"] = row.rate;
  } else {
    json["concurrency"] = row.concurrency;
  }
  json["sent"] = stats.sent;
  json["requests"] = stats.succeeded();
  json["seconds"] = row.seconds;
  json["requests_per_second"] = row.PerSecond(static_cast<double>(stats.succeeded()));
  json["tokens_per_second"] = row.PerSecond(static_cast<double>(stats.tokens));
  json["goodput"] = {{"requests", stats.good},
                     {"requests_per_second", row.PerSecond(static_cast<double>(stats.good))},
                     {"tokens_per_second", row.PerSecond(static_cast<double>(stats.good_tokens))}};
  json["ttft_seconds"] = LatencyJson(stats.ttft);
  json["latency_seconds"] = LatencyJson(stats.latency);
  json["density"] = stats.density;
  json["failures"] = FailuresJson(stats);
  for (const auto& [source, peer] : row.peers) {
    json["peers"].push_back({{"source", source},
                             {"sent", peer.sent},
                             {"good", peer.good},
                             {"latency_seconds", LatencyJson(peer.latency)},
                             {"failures", FailuresJson(peer)}});
  }
  return json;
}

void PrintHeader(std::ostream& out) {
  out << absl::StrFormat("%14s %9s %6s %6s %9s %9s %9s %9s %9s %9s %8s  %s\n", "tokens", "load",
                         "sent", "good", "good/s", "tokens/s", "TTFT p50", "p99 (s)", "end p50",
                         "p99 (s)", "density", "failures");
}

void PrintRow(const LoadRow& row, std::ostream& out) {
  PrintLine(row.tokens, LoadText(row), row.seconds, row.stats, out);
  for (const auto& [source, stats] : row.peers) {
    PrintLine("", source.empty() ? "peer" : source, row.seconds, stats, out);
  }
  out << std::flush;
}

}  // namespace prefilld::cli

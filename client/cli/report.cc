#include "client/cli/report.h"

#include <algorithm>
#include <array>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/strings/strip.h"

namespace prefilld::cli {
namespace {

using nlohmann::ordered_json;

double Seconds(const google::protobuf::Duration& duration) {
  return static_cast<double>(duration.seconds()) + 1e-9 * duration.nanos();
}

std::array<std::pair<const char*, double>, 7> Phases(const v1::Summary& summary) {
  return {{{"queue", Seconds(summary.queue())},
           {"upload", Seconds(summary.upload())},
           {"estimate", Seconds(summary.estimate())},
           {"select", Seconds(summary.select())},
           {"attention", Seconds(summary.attention())},
           {"linear", Seconds(summary.linear())},
           {"handoff", Seconds(summary.handoff())}}};
}

// How many heads of all layers ran with which pattern, most first.
std::vector<std::pair<std::string, int>> HeadsByPattern(const v1::SparsityReport& sparsity) {
  std::map<std::string, int> heads;
  for (const char pattern : sparsity.pattern_u8()) ++heads[PatternName(pattern)];
  std::vector<std::pair<std::string, int>> sorted(heads.begin(), heads.end());
  std::stable_sort(sorted.begin(), sorted.end(),
                   [](const auto& a, const auto& b) { return a.second > b.second; });
  return sorted;
}

}  // namespace

std::string ShortName(absl::string_view value, absl::string_view prefix) {
  return absl::AsciiStrToLower(absl::StripPrefix(value, prefix));
}

std::string PatternName(uint8_t pattern) {
  if (!v1::Pattern_IsValid(pattern)) return "unknown";
  return ShortName(v1::Pattern_Name(static_cast<v1::Pattern>(pattern)), "PATTERN_");
}

std::string DescribeRan(const v1::SparsityReport& sparsity) {
  std::string text =
      absl::StrJoin(HeadsByPattern(sparsity), ", ", [](std::string* out, const auto& row) {
        absl::StrAppend(out, row.first, " x ", row.second);
      });
  if (sparsity.reasons_size() > 0) {
    absl::StrAppend(&text, " (", absl::StrJoin(sparsity.reasons(), ", "), ")");
  }
  return text;
}

void PrintJson(const ordered_json& object, std::ostream& out) {
  out << object.dump(-1, ' ', false, ordered_json::error_handler_t::replace) << "\n";
}

ordered_json SparsityFields(const v1::SparsityReport& sparsity) {
  ordered_json fields = {
      {"density", sparsity.mean_density()},
      {"captured_mass", nullptr},
      {"ran", ordered_json::object()},
      {"dense_fallback_heads", sparsity.dense_fallback_heads()},
      {"reasons", std::vector<std::string>(sparsity.reasons().begin(), sparsity.reasons().end())}};
  if (sparsity.captured_mass_measured()) fields["captured_mass"] = sparsity.mean_captured_mass();
  for (const auto& [name, heads] : HeadsByPattern(sparsity)) fields["ran"][name] = heads;
  return fields;
}

void PrintReport(const RequestReport& report, bool json, std::ostream& out) {
  const v1::Summary& summary = report.summary;
  const v1::SparsityReport& sparsity = summary.sparsity();
  if (json) {
    ordered_json phases;
    for (const auto& [name, seconds] : Phases(summary)) phases[name] = seconds;
    ordered_json object = {
        {"request_id", summary.request_id()},    {"tokens", summary.tokens()},
        {"transport", report.transport},         {"phase_seconds", phases},
        {"bytes_in", summary.bytes_in()},        {"bytes_out", summary.bytes_out()},
        {"total_seconds", report.total_seconds}, {"ttft_seconds", nullptr}};
    if (report.ttft_seconds) object["ttft_seconds"] = *report.ttft_seconds;
    object.update(SparsityFields(sparsity));
    PrintJson(object, out);
    return;
  }
  const double rate = report.total_seconds > 0 ? summary.tokens() / report.total_seconds : 0;
  out << absl::StrFormat("request   %s over %s\n", summary.request_id(), report.transport)
      << absl::StrFormat("tokens    %d in %.3f s (%.0f/s)", summary.tokens(), report.total_seconds,
                         rate);
  if (report.ttft_seconds) out << absl::StrFormat(", KV ready after %.3f s", *report.ttft_seconds);
  out << "\nran       " << DescribeRan(sparsity)
      << absl::StrFormat("\ndensity   %.4f", sparsity.mean_density());
  if (sparsity.captured_mass_measured()) {
    out << absl::StrFormat(", captured mass %.4f", sparsity.mean_captured_mass());
  }
  out << "\nseconds  ";
  for (const auto& [name, seconds] : Phases(summary)) {
    out << absl::StrFormat(" %s %.3f", name, seconds);
  }
  out << absl::StrFormat("\nbytes     in %d, out %d\n", summary.bytes_in(), summary.bytes_out());
}

}  // namespace prefilld::cli

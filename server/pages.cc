#include "server/pages.h"

#include <map>
#include <nlohmann/json.hpp>
#include <utility>

#include "absl/strings/str_split.h"
#include "prometheus/text_serializer.h"

namespace prefilld {
namespace {

nlohmann::ordered_json ToJson(const RequestReport& request) {
  const JobReport& report = request.report;
  nlohmann::ordered_json json;
  json["request_id"] = request.request_id;
  json["model"] = request.model;
  json["method"] = Name(request.method);
  json["gamma"] = request.gamma;
  json["tokens"] = request.tokens;
  json["layers"] = report.layers;
  json["heads"] = report.heads;
  json["mean_density"] = report.MeanDensity();
  json["captured_mass_measured"] = report.captured_mass_measured;
  json["mean_captured_mass"] = report.MeanCapturedMass();
  auto& density = json["density"] = nlohmann::json::array();  // [layer][head]
  auto& pattern = json["pattern"] = nlohmann::json::array();
  auto& captured = json["captured_mass"] = nlohmann::json::array();
  for (int layer = 0; layer < report.layers; ++layer) {
    nlohmann::ordered_json densities, patterns, masses;
    for (int head = 0; head < report.heads; ++head) {
      const HeadReport& entry = report.entries[size_t(layer) * report.heads + head];
      densities.push_back(entry.density);
      patterns.push_back(Name(entry.pattern));
      masses.push_back(entry.captured_mass);
    }
    density.push_back(std::move(densities));
    pattern.push_back(std::move(patterns));
    if (report.captured_mass_measured) captured.push_back(std::move(masses));
  }
  return json;
}

// ?format=json is all there is; ?request=ID shows one request only.
HttpAnswer Sparsity(const ReportTable& reports, absl::string_view query, const Caller& reader) {
  std::map<std::string, std::string> asked;
  for (const absl::string_view part : absl::StrSplit(query, '&')) {
    asked.insert(absl::StrSplit(part, absl::MaxSplits('=', 1)));
  }
  if (asked.count("format") > 0 && asked["format"] != "json") {
    return {.status = "400 Bad Request", .body = "format: only json\n"};
  }
  nlohmann::ordered_json json;
  json["requests"] = nlohmann::json::array();  // newest first
  for (const auto& report : reports.All(reader)) {
    const bool shown = asked.count("request") == 0 || report->request_id == asked["request"];
    if (shown) json["requests"].push_back(ToJson(*report));
  }
  return {.type = "application/json", .body = json.dump() + "\n"};
}

HttpAnswer Tell(const absl::Status& health) {
  if (health.ok()) return {.body = "ok\n"};
  return {.status = "503 Service Unavailable", .body = std::string(health.message()) + "\n"};
}

HttpAnswer Refuse(const absl::Status& why) {
  const char* status = absl::IsUnauthenticated(why) ? "401 Unauthorized\r\nWWW-Authenticate: Bearer"
                                                    : "403 Forbidden";
  return {.status = status, .body = std::string(why.message()) + "\n"};
}

}  // namespace

HttpAnswer Show(const Pages& pages, absl::string_view target, const Credentials& credentials) {
  const std::pair<absl::string_view, absl::string_view> parts =
      absl::StrSplit(target, absl::MaxSplits('?', 1));
  const auto& [path, query] = parts;
  if (path == "/metrics") {
    return {.type = "text/plain; version=0.0.4; charset=utf-8",
            .body = prometheus::TextSerializer().Serialize(pages.metrics.Collect())};
  }
  if (path == "/debug/sparsity") {
    const auto reader = pages.access.Admit(Rpc::kGetSparsityReport, credentials);
    return reader.ok() ? Sparsity(pages.reports, query, *reader) : Refuse(reader.status());
  }
  if (path == "/healthz") return Tell(pages.health.alive());
  if (path == "/readyz") return Tell(pages.health.ready());
  return {.status = "404 Not Found", .body = "not found\n"};
}

}  // namespace prefilld

// prefillctl sparsity: what a finished request computed, layer by layer.
#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "client/cli/command.h"
#include "client/cli/report.h"

namespace prefilld::cli {
namespace {

using nlohmann::ordered_json;

// A [layers, heads] array of the report; empty when it was not measured.
using Grid = std::vector<std::vector<double>>;

absl::StatusOr<Grid> ReadU16(const v1::SparsityReport& report, const std::string& bytes) {
  const uint64_t count = uint64_t{report.layers()} * report.heads();
  if (bytes.empty()) return Grid();
  if (bytes.size() != 2 * count) {
    return absl::DataLossError(absl::StrCat("report of ", report.layers(), " x ", report.heads(),
                                            " heads with ", bytes.size(), " bytes"));
  }
  Grid grid(report.layers(), std::vector<double>(report.heads()));
  const auto* data = reinterpret_cast<const uint8_t*>(bytes.data());
  for (auto& layer : grid) {
    for (double& value : layer) {
      value = (data[0] | data[1] << 8) / 65535.0;
      data += 2;
    }
  }
  return grid;
}

absl::StatusOr<ordered_json> ReadPatterns(const v1::SparsityReport& report) {
  const std::string& bytes = report.pattern_u8();
  ordered_json layers = ordered_json::array();
  if (bytes.empty()) return layers;
  if (bytes.size() != uint64_t{report.layers()} * report.heads()) {
    return absl::DataLossError(absl::StrCat("report with ", bytes.size(), " patterns"));
  }
  for (uint32_t layer = 0; layer < report.layers(); ++layer) {
    ordered_json names = ordered_json::array();
    for (uint32_t head = 0; head < report.heads(); ++head) {
      const auto pattern = static_cast<uint8_t>(bytes[layer * report.heads() + head]);
      names.push_back(PatternName(pattern));
    }
    layers.push_back(names);
  }
  return layers;
}

double Mean(const std::vector<double>& values) {
  double sum = 0;
  for (double value : values) sum += value;
  return values.empty() ? 0 : sum / static_cast<double>(values.size());
}

void PrintText(const v1::SparsityReport& report, const Grid& density, const Grid& mass,
               const Grid& mass_min, std::ostream& out) {
  constexpr int kWidth = 40;
  out << absl::StrFormat("density %.4f over %d layers of %d heads", report.mean_density(),
                         report.layers(), report.heads());
  if (report.captured_mass_measured()) {
    out << absl::StrFormat(", captured mass %.4f", report.mean_captured_mass());
  }
  out << "\nran " << DescribeRan(report) << "\n";
  for (size_t layer = 0; layer < density.size(); ++layer) {
    const double mean = Mean(density[layer]);
    const int filled = static_cast<int>(mean * kWidth + 0.5);
    out << absl::StrFormat("layer %3d  %.4f  %s%s", layer, mean, std::string(filled, '#'),
                           std::string(kWidth - filled, '.'));
    if (!mass.empty()) out << absl::StrFormat("  mass %.4f", Mean(mass[layer]));
    if (!mass_min.empty() && !mass_min[layer].empty()) {
      out << absl::StrFormat(" (least %.4f)",
                             *std::min_element(mass_min[layer].begin(), mass_min[layer].end()));
    }
    out << "\n";
  }
}

absl::Status RunSparsity(client::PrefillClient& client, const Session& session,
                         const std::string& request_id) {
  const auto report = client.GetSparsityReport(request_id, session.Options());
  if (!report.ok()) return report.status();
  const auto density = ReadU16(*report, report->density_u16());
  if (!density.ok()) return density.status();
  const auto mass = ReadU16(*report, report->captured_mass_u16());
  if (!mass.ok()) return mass.status();
  const auto mass_min = ReadU16(*report, report->captured_mass_min_u16());
  if (!mass_min.ok()) return mass_min.status();
  const auto patterns = ReadPatterns(*report);
  if (!patterns.ok()) return patterns.status();
  if (!session.json) {
    PrintText(*report, *density, *mass, *mass_min, session.io.out);
    return absl::OkStatus();
  }
  ordered_json object = {
      {"request_id", request_id}, {"layers", report->layers()}, {"heads", report->heads()}};
  object.update(SparsityFields(*report));
  object["head_density"] = *density;
  object["head_pattern"] = *patterns;
  object["head_captured_mass"] = *mass;
  object["head_captured_mass_min"] = *mass_min;
  PrintJson(object, session.io.out);
  return absl::OkStatus();
}

}  // namespace

void AddSparsity(CLI::App& app, Session& session) {
  CLI::App* command =
      app.add_subcommand("sparsity", "Density, pattern and captured mass of a finished request");
  command->footer("Example: prefillctl sparsity --request=mine");
  const auto request_id = std::make_shared<std::string>();
  command->add_option("--request", *request_id, "Its request_id, one of the server's last 256")
      ->required();
  command->callback([&session, request_id] {
    session.action = [&session, request_id](client::PrefillClient& client) {
      return RunSparsity(client, session, *request_id);
    };
  });
}

}  // namespace prefilld::cli

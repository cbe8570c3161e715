// What `prefillctl bench` says of its runs: a table, a line each, or JSON.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <ostream>
#include <string>
#include <utility>
#include <vector>

#include "client/cli/load_stats.h"

namespace prefilld::cli {

struct LoadRow {
  std::string tokens;        // as they were asked for
  uint32_t concurrency = 0;  // or
  double rate = 0;
  double seconds = 0;
  LoadStats stats;
  std::vector<std::pair<std::string, LoadStats>> peers;  // by source address, where there are some

  double PerSecond(double count) const { return count / seconds; }
};

std::string LoadText(const LoadRow& row);  // "4", or "2.5/s"
nlohmann::ordered_json ToJson(const LoadRow& row);
void PrintHeader(std::ostream& out);
void PrintRow(const LoadRow& row, std::ostream& out);

}  // namespace prefilld::cli

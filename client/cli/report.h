// How a finished request is shown: what was computed, where the time went, what moved.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <optional>
#include <ostream>
#include <string>

#include "absl/strings/string_view.h"
#include "prefilld/v1/prefill_service.pb.h"

namespace prefilld::cli {

// What people read for a value of a proto's enum: "joint" for METHOD_JOINT, with METHOD_ the
// prefix.
std::string ShortName(absl::string_view value, absl::string_view prefix);

struct RequestReport {
  v1::Summary summary;
  std::string transport;
  double total_seconds = 0;            // as the client saw it
  std::optional<double> ttft_seconds;  // start to kv_ready
};

std::string PatternName(uint8_t pattern);  // "joint"; "unknown" for what the contract lacks

// "joint x 96, dense x 24 (below_crossover)": what the heads of all layers ran, most first, and why
// some ran dense. Of a method that was left open this says what the server made of it.
std::string DescribeRan(const v1::SparsityReport& sparsity);

// density, captured_mass (null when not measured), ran (heads by pattern), dense_fallback_heads,
// reasons.
nlohmann::ordered_json SparsityFields(const v1::SparsityReport& sparsity);

// One JSON object on one line when `json`, else a few lines for people.
void PrintReport(const RequestReport& report, bool json, std::ostream& out);

// One line. Text that is no UTF-8 is spelt with replacements.
void PrintJson(const nlohmann::ordered_json& object, std::ostream& out);

}  // namespace prefilld::cli

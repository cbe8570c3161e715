// The lines of attention_bench: what was measured of one method on one kernel set.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>

#include "tests/bench/attention/device_clock.h"

namespace prefilld::bench {

// One line of the table.
struct Record {
  std::string workload, method, kernels;
  int64_t tokens = 0;
  int sequences = 1;
  Milliseconds ms;
  double tflops = kNone, percent_of_cudnn = kNone;
  double select_us = kNone, mass_us = kNone, density = kNone;
  double error = kNone, kernel_error = kNone;
  double captured = kNone, captured_head = kNone, captured_row = kNone;
  double pipeline_ms = kNone, pipeline_mass_ms = kNone, bound_ms = kNone;
};

// Prints lines as they come and keeps them as JSON.
class Table {
 public:
  void Header() const;
  void Add(const Record& record);

  const nlohmann::json& records() const { return records_; }
  bool wrong() const { return wrong_; }  // a kernel was

 private:
  nlohmann::json records_ = nlohmann::json::array();
  bool wrong_ = false;
};

}  // namespace prefilld::bench

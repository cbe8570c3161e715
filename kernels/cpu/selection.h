// Stages 1 and 2 of the CPU backend, and the measurement between 2 and 3: which blocks of keys each
// block of queries reads. Results do not depend on the number of threads.
#pragma once

#include <memory>

#include "absl/status/status.h"
#include "kernels/attention.h"

namespace prefilld::cpu {

struct Maps;

// Keeps the maps of stage 1 for stage 2; one per backend, reused from call to call. UNIMPLEMENTED
// where a method that needs equal lengths is asked for with Sq != Sk.
class Selection {
 public:
  explicit Selection(int threads);  // >= 1
  ~Selection();

  absl::Status Estimate(const AttentionArgs& args);             // Backend::EstimatePattern
  absl::Status Select(const AttentionArgs& args);               // Backend::SelectBlocks
  absl::Status MeasureCapturedMass(const AttentionArgs& args);  // Backend::MeasureCapturedMass

 private:
  std::unique_ptr<Maps> maps_;
  int threads_;
};

}  // namespace prefilld::cpu

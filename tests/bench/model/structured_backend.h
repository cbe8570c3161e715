// A backend that attends to other q, k and v than it is given: those of attention_workload.h, whose
// heads have the structure of real ones, so that a model of random weights has a density like a
// real one's. Everything else is the backend's. On CUDA alone.
#pragma once

#include <memory>

#include "absl/status/statusor.h"
#include "kernels/backend.h"

namespace prefilld::bench {

class StructuredBackend : public Backend {
 public:
  // UNIMPLEMENTED where there is no such thing. `backend` outlives it.
  static absl::StatusOr<std::unique_ptr<StructuredBackend>> Create(Backend& backend,
                                                                   double strength);
  // What filling in has taken since the last call, on the device's clock, within the phase of the
  // estimate. After the device was waited for.
  virtual double TakeSeconds() = 0;
};

}  // namespace prefilld::bench

// Measures how fast this device is, for the cost model.
#pragma once

#include "absl/status/status.h"
#include "kernels/backend.h"
#include "server/engine/cost.h"
#include "server/engine/stages.h"

namespace prefilld {

// Times calls of a few lengths; less than two seconds. Blocks; before the first thread that asks
// the cost model.
struct Calibrated {
  Backend& backend;
  Stages& stages;
  StepClock& clock;
  bool models;  // linear layers too
};
absl::Status Calibrate(const Calibrated& of, CostModel& cost);

// Of a device that is the host: once more, in less than a tenth of a second, between two steps.
// What it was seen to do at its best it can do: a machine that was busy when the server started is
// not taken to be slow for ever.
absl::Status Recalibrate(const Calibrated& of, CostModel& cost);

}  // namespace prefilld

// Measures at start-up how fast this device is, for the cost model.
#pragma once

#include "absl/status/status.h"
#include "kernels/backend.h"
#include "server/engine/cost.h"
#include "server/engine/stages.h"

namespace prefilld {

// Times calls of a few lengths; less than two seconds. Blocks; before the first thread that asks
// the cost model.
absl::Status Calibrate(Backend& backend, Stages& stages, StepClock& clock, CostModel& cost);

}  // namespace prefilld

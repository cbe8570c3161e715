// An Attend, all of its parts.
#pragma once

#include <memory>
#include <utility>

#include "server/engine/engine.h"

namespace prefilld {

inline absl::Status RunAttend(Engine& engine, std::shared_ptr<Job> job) {
  const auto run = engine.BeginAttend(std::move(job));
  absl::Status status;
  while (status.ok() && !run->done()) status = engine.RunStep(*run);
  return status;
}

}  // namespace prefilld

// Token IDs from a file: a JSON array of integers.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"

namespace prefilld::cli {

// INVALID_ARGUMENT for anything but an array of integers from 0 to 2^32 - 1. Blocks on the disk.
absl::StatusOr<std::vector<uint32_t>> ReadTokenIds(const std::string& path);

}  // namespace prefilld::cli

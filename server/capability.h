// A name that only those have who were told it: 128 random bits, in hex. Who shows it may have what
// it stands for, so it belongs in no log, report, metric or error.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "absl/numeric/int128.h"
#include "absl/strings/string_view.h"

namespace prefilld {

// From the system's generator. Does not block once the system has started.
absl::uint128 RandomBits();

std::string CapabilityName(absl::uint128 bits);  // 32 digits
// Absent: no name of ours. A table of capabilities looks for the bits by their hash, so that the
// time that takes says nothing of a name that is nearly right.
std::optional<absl::uint128> CapabilityBits(absl::string_view name);

}  // namespace prefilld

#include "server/capability.h"

#include <sys/random.h>

#include <cstdlib>

#include "absl/strings/str_format.h"

namespace prefilld {

absl::uint128 RandomBits() {
  uint64_t bits[2];
  // So few bytes come whole; without them nothing here is safe.
  if (getrandom(bits, sizeof bits, 0) != static_cast<ssize_t>(sizeof bits)) std::abort();
  return absl::MakeUint128(bits[0], bits[1]);
}

std::string CapabilityName(absl::uint128 bits) {
  return absl::StrFormat("%016x%016x", absl::Uint128High64(bits), absl::Uint128Low64(bits));
}

std::optional<absl::uint128> CapabilityBits(absl::string_view name) {
  if (name.size() != 32) return std::nullopt;
  absl::uint128 bits = 0;
  for (const char c : name) {
    const bool digit = c >= '0' && c <= '9';
    if (!digit && (c < 'a' || c > 'f')) return std::nullopt;
    bits = bits << 4 | static_cast<unsigned>(digit ? c - '0' : c - 'a' + 10);
  }
  return bits;
}

}  // namespace prefilld

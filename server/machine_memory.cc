#include "server/machine_memory.h"

#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <limits>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"

namespace prefilld {
namespace {

constexpr uint64_t kUnlimited = std::numeric_limits<uint64_t>::max();

// "max", and what is not there, is no limit.
uint64_t LimitIn(const std::string& path) {
  std::string text;
  uint64_t bytes = 0;
  std::getline(std::ifstream(path), text);
  return absl::SimpleAtoi(text, &bytes) ? bytes : kUnlimited;
}

// Of a group and all that it lies in. A container may see its own as the topmost though it is told
// the path outside: then the files of the path are not there, and those of the top are its own.
uint64_t LimitAlong(const std::string& mount, std::string group, const std::string& file) {
  uint64_t least = LimitIn(absl::StrCat(mount, "/", file));
  while (group.size() > 1) {
    least = std::min(least, LimitIn(absl::StrCat(mount, group, "/", file)));
    group.resize(group.rfind('/'));
  }
  return least;
}

}  // namespace

uint64_t ControlGroupMemory(const std::string& root) {
  uint64_t least = kUnlimited;
  std::ifstream groups(absl::StrCat(root, "/proc/self/cgroup"));
  for (std::string line; std::getline(groups, line);) {  // ID:CONTROLLERS:PATH, version 2's 0::PATH
    const std::vector<std::string> parts = absl::StrSplit(line, absl::MaxSplits(':', 2));
    if (parts.size() != 3 || !absl::StartsWith(parts[2], "/")) continue;
    const std::vector<std::string> controllers = absl::StrSplit(parts[1], ',');
    if (parts[1].empty()) {
      least =
          std::min(least, LimitAlong(absl::StrCat(root, "/sys/fs/cgroup"), parts[2], "memory.max"));
    } else if (std::find(controllers.begin(), controllers.end(), "memory") != controllers.end()) {
      least = std::min(least, LimitAlong(absl::StrCat(root, "/sys/fs/cgroup/memory"), parts[2],
                                         "memory.limit_in_bytes"));
    }
  }
  return least;
}

uint64_t MachineMemory() {
  const uint64_t machine = static_cast<uint64_t>(sysconf(_SC_PHYS_PAGES)) *
                           static_cast<uint64_t>(sysconf(_SC_PAGE_SIZE));
  return std::min(machine, ControlGroupMemory(""));
}

}  // namespace prefilld

// How much memory this process may ever have: the machine's, or, where it is less, what its control
// group allows, as a container's is. Threads: any. Reads a few files.
#pragma once

#include <cstdint>
#include <string>

namespace prefilld {

uint64_t MachineMemory();  // bytes

// What the control groups of a process allow, or UINT64_MAX. root: of what a machine has, "/".
uint64_t ControlGroupMemory(const std::string& root);

}  // namespace prefilld

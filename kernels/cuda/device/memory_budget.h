// What this process may have of a device's memory, be it the pools' or shared with other processes.
// Taken before the driver is asked. Threads: any.
#pragma once

#include <atomic>
#include <cstdint>
#include <limits>

namespace prefilld::cuda {

class MemoryBudget {
 public:
  static constexpr uint64_t kAll = std::numeric_limits<uint64_t>::max();

  explicit MemoryBudget(uint64_t bytes = kAll) : bytes_(bytes) {}
  bool Take(uint64_t bytes) {  // false: not so many are left, and nothing was taken
    uint64_t taken = taken_;
    do {
      if (bytes > bytes_ - taken) return false;
    } while (!taken_.compare_exchange_weak(taken, taken + bytes));
    return true;
  }
  void Give(uint64_t bytes) { taken_ -= bytes; }
  uint64_t left() const { return bytes_ - taken_; }

 private:
  const uint64_t bytes_;
  std::atomic<uint64_t> taken_{0};
};

}  // namespace prefilld::cuda

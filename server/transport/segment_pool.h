// Regions for KV caches that are ready before anybody asks: taken from the system, or from a
// device, and, in the host's memory, registered with the device that copies to them. That takes
// long (a GPU's driver needs half a second a GiB), and a prompt that waits for it starts late. One
// pool a transport.
//
// The pool holds members of different sizes, as many as fit into its bytes, and no cache lies
// elsewhere. A member is made in the background, lent to one cache, and, when the last share of it
// is gone (the cache's, and those of peers that have it open), zeroed and lent again, under a new
// name: whoever has opened a region keeps what it saw, and sees nobody else's. At the start each is
// half the next one's size; from then on the pool follows what is asked for: who finds nothing
// ready gets a new member, in the place of others that nobody uses. Threads: any.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "kernels/backend.h"
#include "server/clock.h"
#include "server/transport/region.h"
#include "server/work_pool.h"

namespace prefilld {

// What the bytes of a pool are: neither of the others, which is for what is being made or will be;
// of members that nobody has; of those that caches lie in.
enum class SegmentState { kFree, kReady, kLent };
inline constexpr std::array<const char*, 3> kSegmentStateNames = {"free", "ready", "lent"};

class SegmentPool : public std::enable_shared_from_this<SegmentPool> {
 public:
  // Sizes are multiples of this, and so of a page; and of the medium's unit, if that is more.
  static constexpr uint64_t kStepBytes = uint64_t{64} << 10;
  static constexpr uint64_t WholeSteps(uint64_t bytes, uint64_t step = kStepBytes) {
    return bytes / step * step;
  }
  // A smaller region takes no time worth saving.
  static constexpr uint64_t kSmallestBytes = uint64_t{16} << 20;

  // Medium and device outlive it; what it has lent may outlive all three. Takes nothing yet.
  // busy: whether somebody computes; any thread, from Fill or Make until Stop. To register a region
  // slows that down (a driver's locks), so the background waits for a pause, but no longer than
  // `patience`: a server that never pauses has its members too. All of a region at once, as a copy
  // across two registrations may not count as pinned.
  static std::shared_ptr<SegmentPool> Create(Medium& medium, Device& device, uint64_t bytes,
                                             std::function<bool()> busy,
                                             absl::Duration patience = absl::Seconds(10));
  SegmentPool(const SegmentPool&) = delete;
  SegmentPool& operator=(const SegmentPool&) = delete;
  ~SegmentPool() { Stop(); }

  // Begins to make the first members. Once.
  void Fill();
  void Close();  // makes no more in the background, and waits for nothing
  void Stop();   // closes, and waits for what is being made there

  // Both give a zeroed region of `bytes` or more that nobody has. To let go of it may take as long
  // as to make it.
  std::shared_ptr<Region> Take(uint64_t bytes);  // ready, or null; does not wait
  // Ready, or made here and now, or waited for while it is being made or zeroed. RESOURCE_EXHAUSTED
  // when the pool's bytes are in use (reason kv_memory), never suffice (no retry), or as
  // Medium::Create.
  absl::StatusOr<std::shared_ptr<Region>> Make(uint64_t bytes);

  uint64_t bytes() const { return bytes_; }
  std::array<uint64_t, 3> CountByState() const;  // bytes, by SegmentState
  // Blocks until all that was lent is destroyed, or the deadline: false.
  bool WaitAllBack(SteadyTime deadline) const;

 private:
  // What nobody has; null: it is still to be made.
  struct Member {
    uint64_t bytes;
    std::shared_ptr<Region> region;
  };
  using Members = std::deque<Member>;

  SegmentPool(Medium& medium, Device& device, uint64_t bytes, std::function<bool()> busy,
              absl::Duration patience)
      : medium_(medium),
        device_(device),
        step_(std::max(kStepBytes, medium.Unit())),
        bytes_(WholeSteps(bytes, step_)),
        busy_(std::move(busy)),
        patience_(patience) {}
  std::shared_ptr<Region> Register(std::shared_ptr<Region> region);
  // The smallest that is ready and fits, or the end.
  Members::const_iterator Find(uint64_t bytes) const ABSL_SHARED_LOCKS_REQUIRED(mutex_);
  std::shared_ptr<Region> TakeLocked(uint64_t bytes) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  // The region, which comes back to the pool when its last owner lets go of it.
  std::shared_ptr<Region> Lend(std::shared_ptr<Region> region);
  // Takes members out until `bytes` are free, or none.
  bool MakeRoom(uint64_t bytes, std::vector<Member>* out) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void Changed(uint64_t bytes) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    changing_ -= bytes;
    moved_.SignalAll();
  }
  uint64_t Free() const ABSL_SHARED_LOCKS_REQUIRED(mutex_);
  void Renew(std::shared_ptr<Region> region);
  void Zero(std::shared_ptr<Region> region) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);
  void Zeroed(std::shared_ptr<Region> region, bool zero);
  void FillOne();
  bool AwaitQuiet();  // false: closed

  Medium& medium_;
  Device& device_;
  const uint64_t step_, bytes_;
  const std::function<bool()> busy_;
  const absl::Duration patience_;
  mutable absl::Mutex mutex_;
  SteadyCondition moved_;                          // fewer that change, more that wait, or closed
  Members idle_ ABSL_GUARDED_BY(mutex_);           // what was asked for last is last
  uint64_t lent_ ABSL_GUARDED_BY(mutex_) = 0;      // bytes
  uint64_t changing_ ABSL_GUARDED_BY(mutex_) = 0;  // being made, zeroed or destroyed
  std::multiset<uint64_t> zeroing_ ABSL_GUARDED_BY(mutex_);  // of these, by size
  int awaiting_ ABSL_GUARDED_BY(mutex_) = 0;                 // callers that wait for these
  bool closed_ ABSL_GUARDED_BY(mutex_) = false;
  SteadyTime begin_ ABSL_GUARDED_BY(mutex_);
  bool told_filled_ ABSL_GUARDED_BY(mutex_) = false, told_short_ ABSL_GUARDED_BY(mutex_) = false;
  WorkPool filler_{1};
  // Its own, as the filler may wait. One thread writes some 10 GB/s, and the next prompt waits.
  WorkPool zeroers_{4};
};

using SegmentPools = std::map<Transport, std::shared_ptr<SegmentPool>>;
inline SegmentPool* FindPool(const SegmentPools& pools, Transport transport) {  // null: none
  const auto found = pools.find(transport);
  return found == pools.end() ? nullptr : found->second.get();
}

}  // namespace prefilld

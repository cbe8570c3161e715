// Leases: who may pull which cache, and until when. A lease is its name (the request_id), a
// generation (another run of the same name has a higher one) and a time to live, counted from the
// last progress of its computation, of a pull, or its renewal. Owns one thread that expires leases.
// Thread-safe.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "server/clock.h"
#include "server/kv/kv_cache.h"

namespace prefilld {

struct LeaseInfo {
  std::string name;
  uint64_t generation = 0;
  absl::Duration ttl;
};

enum class LeaseEnd { kConsumed, kAbandoned, kExpired };

class LeaseTable {
 public:
  struct Events {
    std::function<void(const LeaseInfo&, LeaseEnd)> ended;  // any thread; log and metrics
  };
  // stalled_reader_grace: how long a pull may stand still after its lease has ended, at least; a
  // longer ttl gives it that. Shorter frees memory sooner, longer spares slow readers.
  explicit LeaseTable(Events events, absl::Duration stalled_reader_grace = absl::Seconds(30));
  ~LeaseTable();

  // `abandon` is called once if the lease ends before the cache is complete: stop the work. A lease
  // of that name that still lives is ALREADY_EXISTS.
  absl::StatusOr<LeaseInfo> Grant(absl::string_view name, std::shared_ptr<KvCache> cache,
                                  absl::Duration ttl, std::function<void()> abandon);
  // NOT_FOUND for an unknown name, FAILED_PRECONDITION for another generation.
  absl::StatusOr<std::shared_ptr<KvCache>> Find(absl::string_view name, uint64_t generation) const;
  absl::StatusOr<LeaseInfo> Renew(absl::string_view name, uint64_t generation,
                                  absl::Duration ttl /* zero: its own */);
  // Returns the number of transfers that still run.
  absl::StatusOr<int> Release(absl::string_view name, uint64_t generation, LeaseEnd why);
  void ReleaseAll(LeaseEnd why);
  // Joins the thread: what it has begun to end has ended then, and no other lease expires. To be
  // called before what `ended` and `abandon` reach into goes.
  void Stop();

  int64_t active() const;
  // Blocks until no lease is left, or the deadline: false.
  bool WaitEmpty(SteadyTime deadline);

 private:
  struct Entry {
    LeaseInfo info;
    std::shared_ptr<KvCache> cache;
    std::function<void()> abandon;
    SteadyTime renewed;
  };
  using Entries = std::map<std::string, Entry, std::less<>>;
  absl::StatusOr<Entries::const_iterator> FindLocked(absl::string_view name,
                                                     uint64_t generation) const
      ABSL_SHARED_LOCKS_REQUIRED(mutex_);
  void End(Entry entry, LeaseEnd why);
  void Expire();  // the thread
  void LookAgain() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    changed_ = true;
    signal_.SignalAll();
  }

  const Events events_;
  const absl::Duration stalled_reader_grace_;
  mutable absl::Mutex mutex_;
  SteadyCondition signal_;  // changed_, or fewer entries
  Entries entries_ ABSL_GUARDED_BY(mutex_);
  std::vector<std::pair<std::shared_ptr<KvCache>, absl::Duration>> closing_ ABSL_GUARDED_BY(mutex_);
  uint64_t next_generation_ ABSL_GUARDED_BY(mutex_) = 1;
  bool changed_ ABSL_GUARDED_BY(mutex_) = false;  // the thread must look again
  bool stop_ ABSL_GUARDED_BY(mutex_) = false;
  std::thread thread_;
};

}  // namespace prefilld

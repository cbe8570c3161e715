// Leases: who may pull which cache, and until when. A lease is its name, a capability; a
// generation, which rises from lease to lease, from a random number on; and a time to live, counted
// from the last progress of its computation, of a pull, or its renewal. Logs and reports know it by
// the request_id of its prompt. Owns one thread that expires leases. Thread-safe.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/numeric/int128.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "server/caller.h"
#include "server/clock.h"
#include "server/kv/kv_cache.h"

namespace prefilld {

struct LeaseInfo {
  std::string name;  // see server/capability.h
  uint64_t generation = 0;
  absl::Duration ttl;
  std::string request_id;
  Caller owner;
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

  // `abandon` is called once if the lease ends before the cache is complete: stop the work.
  LeaseInfo Grant(std::string request_id, Caller owner, std::shared_ptr<KvCache> cache,
                  absl::Duration ttl, std::function<void()> abandon);
  // Of a living lease, whatever its generation.
  std::optional<Caller> OwnerOf(absl::string_view name) const;
  // NOT_FOUND for an unknown name, FAILED_PRECONDITION for another generation; neither says the
  // name, nor the right generation.
  struct Found {
    std::shared_ptr<KvCache> cache;
    std::string request_id;
  };
  absl::StatusOr<Found> Find(absl::string_view name, uint64_t generation) const;
  absl::StatusOr<LeaseInfo> Renew(absl::string_view name, uint64_t generation,
                                  absl::Duration ttl /* zero: its own */);
  // Returns the number of transfers that still run.
  absl::StatusOr<int> Release(absl::string_view name, uint64_t generation, LeaseEnd why);
  // Whether somebody follows the computation, as one does from the start. Where nobody does, and
  // nobody pulls, a lease ages while the engine works on its cache, too. Harmless when it has
  // ended.
  void SetFollowed(absl::string_view name, uint64_t generation, bool followed);
  // Whether it was ever renewed: somebody wants it, whoever follows. False when it has ended.
  bool WasRenewed(absl::string_view name, uint64_t generation) const;
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
    SteadyTime renewed;  // or granted, or left by who followed it
    bool was_renewed = false;
    bool followed = true;
    SteadyTime used() const;  // it ages from then on; infinite: it does not yet
  };
  using Entries = absl::flat_hash_map<absl::uint128, Entry>;  // by the bits of the name
  // Null: there is none.
  const Entry* FindName(absl::string_view name) const ABSL_SHARED_LOCKS_REQUIRED(mutex_);
  absl::StatusOr<absl::uint128> FindLocked(absl::string_view name, uint64_t generation) const
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
  uint64_t next_generation_ ABSL_GUARDED_BY(mutex_);
  bool changed_ ABSL_GUARDED_BY(mutex_) = false;  // the thread must look again
  bool stop_ ABSL_GUARDED_BY(mutex_) = false;
  std::thread thread_;
};

}  // namespace prefilld

#include "server/kv/lease_table.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "server/record/errors.h"

namespace prefilld {

LeaseTable::LeaseTable(Events events, absl::Duration stalled_reader_grace)
    : events_(std::move(events)),
      stalled_reader_grace_(stalled_reader_grace),
      thread_([this] { Expire(); }) {}

LeaseTable::~LeaseTable() { Stop(); }

void LeaseTable::Stop() {
  if (!thread_.joinable()) return;
  {
    absl::MutexLock lock(&mutex_);
    stop_ = true;
    LookAgain();
  }
  thread_.join();
}

absl::StatusOr<LeaseInfo> LeaseTable::Grant(absl::string_view name, std::shared_ptr<KvCache> cache,
                                            absl::Duration ttl, std::function<void()> abandon) {
  absl::MutexLock lock(&mutex_);
  if (entries_.find(name) != entries_.end()) {
    return absl::AlreadyExistsError(absl::StrCat("lease '", name, "' still lives"));
  }
  Entry entry{{std::string(name), next_generation_++, ttl},
              std::move(cache),
              std::move(abandon),
              SteadyNow()};
  const LeaseInfo info = entry.info;
  entries_.emplace(info.name, std::move(entry));
  LookAgain();
  return info;
}

absl::StatusOr<LeaseTable::Entries::const_iterator> LeaseTable::FindLocked(
    absl::string_view name, uint64_t generation) const {
  auto found = entries_.find(name);
  if (found == entries_.end()) return ResourceNotFound("lease", name);
  if (found->second.info.generation != generation) {
    return absl::FailedPreconditionError(
        absl::StrCat("lease '", name, "' has generation ", found->second.info.generation,
                     ", not the generation ", generation, " that was asked for"));
  }
  return found;
}

absl::StatusOr<std::shared_ptr<KvCache>> LeaseTable::Find(absl::string_view name,
                                                          uint64_t generation) const {
  absl::MutexLock lock(&mutex_);
  auto found = FindLocked(name, generation);
  if (!found.ok()) return found.status();
  return (*found)->second.cache;
}

absl::StatusOr<LeaseInfo> LeaseTable::Renew(absl::string_view name, uint64_t generation,
                                            absl::Duration ttl) {
  absl::MutexLock lock(&mutex_);
  auto found = FindLocked(name, generation);
  if (!found.ok()) return found.status();
  Entry& entry = entries_.find(name)->second;
  if (ttl > absl::ZeroDuration()) entry.info.ttl = ttl;
  entry.renewed = SteadyNow();
  LookAgain();
  return entry.info;
}

absl::StatusOr<int> LeaseTable::Release(absl::string_view name, uint64_t generation, LeaseEnd why) {
  Entry entry;
  {
    absl::MutexLock lock(&mutex_);
    auto found = FindLocked(name, generation);
    if (!found.ok()) return found.status();
    entry = std::move(entries_.extract(*found).mapped());
    signal_.SignalAll();
  }
  const std::shared_ptr<KvCache> cache = entry.cache;
  End(std::move(entry), why);
  return cache->running_transfers();
}

void LeaseTable::ReleaseAll(LeaseEnd why) {
  Entries all;
  {
    absl::MutexLock lock(&mutex_);
    all.swap(entries_);
    signal_.SignalAll();
  }
  for (auto& [name, entry] : all) End(std::move(entry), why);
}

// New pulls stop at once; the cache frees its blocks when the running ones have ended.
void LeaseTable::End(Entry entry, LeaseEnd why) {
  const char* verb = why == LeaseEnd::kExpired ? "expired" : "was released";
  entry.cache->Close(
      absl::FailedPreconditionError(absl::StrCat("lease '", entry.info.name, "' ", verb)));
  if (events_.ended) events_.ended(entry.info, why);  // the name is free before the job hears of it
  if (!entry.cache->complete() && entry.abandon) entry.abandon();
  if (entry.cache->running_transfers() > 0) {
    absl::MutexLock lock(&mutex_);
    closing_.emplace_back(std::move(entry.cache), std::max(entry.info.ttl, stalled_reader_grace_));
    LookAgain();
  }
}

int64_t LeaseTable::active() const {
  absl::MutexLock lock(&mutex_);
  return static_cast<int64_t>(entries_.size());
}

bool LeaseTable::WaitEmpty(SteadyTime deadline) {
  absl::MutexLock lock(&mutex_);
  const auto empty = [this]() ABSL_SHARED_LOCKS_REQUIRED(mutex_) { return entries_.empty(); };
  return signal_.AwaitUntil(deadline, mutex_, empty);
}

void LeaseTable::Expire() {
  mutex_.Lock();
  while (!stop_) {
    changed_ = false;
    absl::Duration next = absl::InfiniteDuration();
    std::vector<Entry> expired;
    for (auto it = entries_.begin(); it != entries_.end();) {
      const Entry& entry = it->second;
      // While the engine works on it a lease does not age; it will have its whole ttl afterwards.
      // What is not retained waits for its consumer, with memory that others could have: pulling
      // keeps it, words do not.
      const bool retain = entry.cache->retain();
      const absl::Duration ttl =
          retain ? entry.info.ttl : std::min(entry.info.ttl, stalled_reader_grace_);
      const SteadyTime progress = entry.cache->last_progress();
      const absl::Duration idle =
          entry.cache->computing() ? absl::ZeroDuration()
                                   : Since(retain ? std::max(entry.renewed, progress) : progress);
      if (idle < ttl) {
        next = std::min(next, ttl - idle);
        ++it;
      } else {
        expired.push_back(std::move(it->second));
        it = entries_.erase(it);
      }
    }
    // Caches whose lease has ended while somebody reads them: a reader that stalls is cut off.
    std::vector<std::pair<std::shared_ptr<KvCache>, absl::Duration>> closing;
    for (const auto& [cache, grace] : closing_) {
      if (cache->running_transfers() == 0) continue;
      closing.emplace_back(cache, grace);
      next = std::min(next, grace);
    }
    closing_ = closing;
    if (!expired.empty()) signal_.SignalAll();
    mutex_.Unlock();
    for (Entry& entry : expired) End(std::move(entry), LeaseEnd::kExpired);
    for (const auto& [cache, grace] : closing) cache->AbortStalled(grace);
    closing.clear();
    mutex_.Lock();
    signal_.AwaitUntil(SteadyNow() + next, mutex_,
                       [this]() ABSL_SHARED_LOCKS_REQUIRED(mutex_) { return changed_; });
  }
  mutex_.Unlock();
}

}  // namespace prefilld

#include "server/kv/lease_table.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "server/capability.h"
#include "server/record/errors.h"

namespace prefilld {
namespace {

absl::Status NoLease() { return ResourceNotFound("lease", ""); }

// Another one in each process. Not 0, which stands for none; small enough for who reads numbers of
// JSON as doubles.
uint64_t FirstGeneration() { return 1 + (absl::Uint128Low64(RandomBits()) >> 16); }

}  // namespace

LeaseTable::LeaseTable(Events events, absl::Duration stalled_reader_grace)
    : events_(std::move(events)),
      stalled_reader_grace_(stalled_reader_grace),
      next_generation_(FirstGeneration()),
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

LeaseInfo LeaseTable::Grant(std::string request_id, Caller owner, std::shared_ptr<KvCache> cache,
                            absl::Duration ttl, std::function<void()> abandon) {
  const absl::uint128 bits = RandomBits();
  absl::MutexLock lock(&mutex_);
  Entry entry{{.name = CapabilityName(bits),
               .generation = next_generation_++,
               .ttl = ttl,
               .request_id = std::move(request_id),
               .owner = std::move(owner)},
              std::move(cache),
              std::move(abandon),
              SteadyNow()};
  LeaseInfo info = entry.info;
  entries_.emplace(bits, std::move(entry));
  LookAgain();
  return info;
}

const LeaseTable::Entry* LeaseTable::FindName(absl::string_view name) const {
  const auto bits = CapabilityBits(name);
  const auto found = bits ? entries_.find(*bits) : entries_.end();
  return found == entries_.end() ? nullptr : &found->second;
}

absl::StatusOr<absl::uint128> LeaseTable::FindLocked(absl::string_view name,
                                                     uint64_t generation) const {
  const Entry* const found = FindName(name);
  if (found == nullptr) return NoLease();
  if (found->info.generation != generation) {
    return absl::FailedPreconditionError(
        absl::StrCat("the lease is of another generation than ", generation));
  }
  return *CapabilityBits(name);
}

std::optional<Caller> LeaseTable::OwnerOf(absl::string_view name) const {
  absl::MutexLock lock(&mutex_);
  const Entry* const found = FindName(name);
  if (found == nullptr) return std::nullopt;
  return found->info.owner;
}

absl::StatusOr<LeaseTable::Found> LeaseTable::Find(absl::string_view name,
                                                   uint64_t generation) const {
  absl::MutexLock lock(&mutex_);
  auto bits = FindLocked(name, generation);
  if (!bits.ok()) return bits.status();
  const Entry& entry = entries_.at(*bits);
  return Found{entry.cache, entry.info.request_id};
}

absl::StatusOr<LeaseInfo> LeaseTable::Renew(absl::string_view name, uint64_t generation,
                                            absl::Duration ttl) {
  absl::MutexLock lock(&mutex_);
  auto bits = FindLocked(name, generation);
  if (!bits.ok()) return bits.status();
  Entry& entry = entries_.at(*bits);
  if (ttl > absl::ZeroDuration()) entry.info.ttl = ttl;
  entry.renewed = SteadyNow();
  entry.was_renewed = true;
  LookAgain();
  return entry.info;
}

void LeaseTable::SetFollowed(absl::string_view name, uint64_t generation, bool followed) {
  absl::MutexLock lock(&mutex_);
  const auto bits = FindLocked(name, generation);
  if (!bits.ok()) return;
  Entry& entry = entries_.at(*bits);
  entry.followed = followed;
  entry.renewed = SteadyNow();
  LookAgain();
}

bool LeaseTable::WasRenewed(absl::string_view name, uint64_t generation) const {
  absl::MutexLock lock(&mutex_);
  const auto bits = FindLocked(name, generation);
  return bits.ok() && entries_.at(*bits).was_renewed;
}

absl::StatusOr<int> LeaseTable::Release(absl::string_view name, uint64_t generation, LeaseEnd why) {
  Entry entry;
  {
    absl::MutexLock lock(&mutex_);
    auto bits = FindLocked(name, generation);
    if (!bits.ok()) return bits.status();
    entry = std::move(entries_.at(*bits));
    entries_.erase(*bits);
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
  for (auto& [bits, entry] : all) End(std::move(entry), why);
}

// New pulls stop at once; the cache frees its blocks when the running ones have ended.
void LeaseTable::End(Entry entry, LeaseEnd why) {
  const char* verb = why == LeaseEnd::kExpired ? "has expired" : "was released";
  entry.cache->Close(absl::FailedPreconditionError(absl::StrCat("the lease ", verb)));
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

// While the engine works on it for somebody a lease does not age; it will have its whole ttl
// afterwards. What is not retained waits for its consumer, with memory that others could have:
// pulling keeps it, words do not.
SteadyTime LeaseTable::Entry::used() const {
  const bool awaited = followed || cache->running_transfers() > 0;
  if (awaited && cache->computing()) return absl::InfiniteFuture();
  if (!cache->retain()) return cache->last_progress();
  return std::max(renewed, followed ? cache->last_progress() : cache->last_pull());
}

void LeaseTable::Expire() {
  mutex_.Lock();
  while (!stop_) {
    changed_ = false;
    absl::Duration next = absl::InfiniteDuration();
    std::vector<Entry> expired;
    for (auto it = entries_.begin(); it != entries_.end();) {
      const Entry& entry = it->second;
      const absl::Duration ttl =
          entry.cache->retain() ? entry.info.ttl : std::min(entry.info.ttl, stalled_reader_grace_);
      const absl::Duration idle = std::max(Since(entry.used()), absl::ZeroDuration());
      if (idle < ttl) {
        next = std::min(next, ttl - idle);
        ++it;
      } else {
        expired.push_back(std::move(it->second));
        entries_.erase(it++);
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

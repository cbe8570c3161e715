#include "server/transport/segment_pool.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "server/record/errors.h"
#include "server/record/log.h"
#include "server/transport/transports.h"

namespace prefilld {
namespace {

// A large member is worth more than what a small cache would wait.
constexpr uint64_t kTimesLargerMax = 4;

// Four sizes an octave, so that prompts of about one length share them.
uint64_t SizeFor(uint64_t bytes, uint64_t step) {
  while (step * 8 < bytes) step *= 2;
  return (bytes + step - 1) / step * step;
}

// The smallest of `members` that is `enough`, or their end.
template <typename Members, typename Enough>
auto Smallest(Members& members, Enough enough) {
  auto smallest = members.end();
  for (auto it = members.begin(); it != members.end(); ++it) {
    if (enough(*it) && (smallest == members.end() || it->bytes < smallest->bytes)) smallest = it;
  }
  return smallest;
}

bool OnDevice(const Region& region) { return RowOf(region.transport()).on_device; }

bool Fits(uint64_t member, uint64_t bytes) {
  return member >= bytes &&
         member / kTimesLargerMax <= std::max(bytes, SegmentPool::kSmallestBytes);
}

}  // namespace

std::shared_ptr<SegmentPool> SegmentPool::Create(Medium& medium, Device& device, uint64_t bytes,
                                                 std::function<bool()> busy,
                                                 absl::Duration patience) {
  return std::shared_ptr<SegmentPool>(
      new SegmentPool(medium, device, bytes, std::move(busy), patience));
}

void SegmentPool::Fill() {
  absl::MutexLock lock(&mutex_);
  begin_ = SteadyNow();
  for (uint64_t bytes = bytes_ / 2; bytes >= kSmallestBytes; bytes /= 2) {
    idle_.push_front({WholeSteps(bytes, step_), nullptr});
    filler_.Post([this] { FillOne(); });
  }
}

void SegmentPool::Close() {
  absl::MutexLock lock(&mutex_);
  closed_ = true;
  moved_.SignalAll();
}

void SegmentPool::Stop() {
  Close();
  filler_.Stop();
  zeroers_.Stop();
}

std::shared_ptr<Region> SegmentPool::Register(std::shared_ptr<Region> region) {
  if (OnDevice(*region)) return region;
  // Where that is not to be had the device copies all the same.
  auto registered = device_.Register(region->data(), region->bytes());
  if (!registered.ok() || registered->data() == nullptr) return region;
  const auto held = std::make_shared<Buffer>(*std::move(registered));
  Region* raw = region.get();
  return {raw, [region = std::move(region), held](Region*) mutable {
            *held = Buffer();
            region.reset();
          }};
}

std::shared_ptr<Region> SegmentPool::Take(uint64_t bytes) {
  std::shared_ptr<Region> region;
  {
    absl::MutexLock lock(&mutex_);
    region = TakeLocked(bytes);
  }
  return region == nullptr ? nullptr : Lend(std::move(region));
}

SegmentPool::Members::const_iterator SegmentPool::Find(uint64_t bytes) const {
  return Smallest(idle_, [bytes](const Member& m) { return m.region && Fits(m.bytes, bytes); });
}

std::shared_ptr<Region> SegmentPool::TakeLocked(uint64_t bytes) {
  const auto found = Find(bytes);
  if (found == idle_.end()) return nullptr;
  std::shared_ptr<Region> region = found->region;
  lent_ += found->bytes;
  idle_.erase(found);
  return region;
}

absl::StatusOr<std::shared_ptr<Region>> SegmentPool::Make(uint64_t bytes) {
  if (bytes > bytes_) {
    return absl::ResourceExhaustedError(
        absl::StrCat("the KV cache needs ", bytes, " bytes, the server has ", bytes_,
                     " for caches over this transport; ask for grpc or shorten the prompt"));
  }
  const uint64_t size = std::min(SizeFor(bytes, step_), bytes_);
  std::vector<Member> out;
  std::shared_ptr<Region> ready;
  const auto decided = [&]() ABSL_SHARED_LOCKS_REQUIRED(mutex_) {
    if (Find(bytes) != idle_.end()) return true;
    const bool soon = std::any_of(zeroing_.begin(), zeroing_.end(),
                                  [&](uint64_t member) { return Fits(member, bytes); });
    return !soon && (changing_ == 0 || bytes_ - lent_ - changing_ >= size);
  };
  {
    absl::MutexLock lock(&mutex_);
    ++awaiting_;
    moved_.SignalAll();
    mutex_.Await(absl::Condition(&decided));
    --awaiting_;
    ready = TakeLocked(bytes);
    if (ready == nullptr && !MakeRoom(size, &out)) {
      return RetryLater(absl::StatusCode::kResourceExhausted, "kv_memory",
                        absl::StrCat("the KV cache needs ", bytes, " bytes, ", bytes_ - lent_,
                                     " of ", bytes_, " for caches over this transport are free"),
                        absl::Seconds(1));
    }
    if (ready == nullptr) changing_ += size;
  }
  if (ready) return Lend(std::move(ready));
  out.clear();  // their memory is for the new one
  auto region = medium_.Create(size, PeerAccess::kRead);
  if (region.ok()) region = Register(*std::move(region));
  {
    absl::MutexLock lock(&mutex_);
    Changed(size);
    if (!region.ok()) return region;
    lent_ += size;
  }
  return Lend(*std::move(region));
}

uint64_t SegmentPool::Free() const {
  uint64_t used = lent_ + changing_;
  for (const Member& member : idle_) used += member.bytes;
  return bytes_ - used;
}

// The smallest that is enough, else those that were not asked for the longest.
bool SegmentPool::MakeRoom(uint64_t bytes, std::vector<Member>* out) {
  if (bytes_ - lent_ - changing_ < bytes) return false;
  while (Free() < bytes) {
    const uint64_t missing = bytes - Free();
    auto going = Smallest(idle_, [missing](const Member& m) { return m.bytes >= missing; });
    if (going == idle_.end()) going = idle_.begin();
    out->push_back(std::move(*going));
    idle_.erase(going);
  }
  return true;
}

std::shared_ptr<Region> SegmentPool::Lend(std::shared_ptr<Region> region) {
  Region* const raw = region.get();
  return Region::Link({raw, [pool = weak_from_this(), region = std::move(region)](Region*) mutable {
                         if (auto self = pool.lock()) self->Renew(std::move(region));
                         region.reset();
                       }});
}

void SegmentPool::Renew(std::shared_ptr<Region> region) {
  const uint64_t bytes = region->bytes();
  {
    absl::MutexLock lock(&mutex_);
    lent_ -= bytes;
    changing_ += bytes;
    if (!closed_) {
      zeroing_.insert(bytes);
      return Zero(std::move(region));
    }
  }
  region.reset();
  absl::MutexLock lock(&mutex_);
  Changed(bytes);
}

void SegmentPool::Zero(std::shared_ptr<Region> region) {
  constexpr uint64_t kPieceBytes = uint64_t{64} << 20;
  const uint64_t bytes = region->bytes();
  if (OnDevice(*region)) {
    return zeroers_.Post(
        [this, region] { Zeroed(region, device_.Zero(region->data(), region->bytes()).ok()); });
  }
  const auto left = std::make_shared<std::atomic<uint64_t>>((bytes - 1) / kPieceBytes + 1);
  for (uint64_t begin = 0; begin < bytes; begin += kPieceBytes) {
    zeroers_.Post([this, region, left, begin, size = std::min(kPieceBytes, bytes - begin)] {
      std::memset(region->data() + begin, 0, size);
      if (left->fetch_sub(1) == 1) Zeroed(region, true);
    });
  }
}

void SegmentPool::Zeroed(std::shared_ptr<Region> region, bool zero) {
  const uint64_t bytes = region->bytes();
  absl::MutexLock lock(&mutex_);
  Changed(bytes);
  zeroing_.erase(zeroing_.find(bytes));
  if (!closed_ && zero) idle_.push_back({bytes, std::move(region)});
}

bool SegmentPool::AwaitQuiet() {
  constexpr absl::Duration kLook = absl::Milliseconds(10);
  const SteadyTime begin = SteadyNow();
  const auto called = [this]()
                          ABSL_SHARED_LOCKS_REQUIRED(mutex_) { return closed_ || awaiting_ > 0; };
  while (busy_() && Since(begin) < patience_) {
    absl::MutexLock lock(&mutex_);
    if (moved_.AwaitUntil(SteadyNow() + kLook, mutex_, called)) return !closed_;
  }
  return true;
}

void SegmentPool::FillOne() {
  uint64_t bytes;
  {
    absl::MutexLock lock(&mutex_);
    const auto missing =
        std::find_if(idle_.begin(), idle_.end(), [](const Member& m) { return !m.region; });
    if (closed_ || missing == idle_.end()) return;
    bytes = missing->bytes;
    changing_ += bytes;
    idle_.erase(missing);
  }
  auto region = medium_.Create(bytes, PeerAccess::kRead);
  if (region.ok() && !OnDevice(**region) && AwaitQuiet()) region = Register(*std::move(region));
  absl::MutexLock lock(&mutex_);
  Changed(bytes);
  if (closed_) return;
  if (region.ok()) {
    idle_.push_back({bytes, *std::move(region)});
  } else if (!std::exchange(told_short_, true)) {
    Log(Level::kWarning, "segments_short",
        {{"bytes", bytes}, {"message", std::string(region.status().message())}});
  }
  const bool filled =
      std::all_of(idle_.begin(), idle_.end(), [](const Member& m) { return m.region != nullptr; });
  if (filled && !idle_.empty() && !std::exchange(told_filled_, true)) {
    Log(Level::kInfo, "segments_ready",
        {{"transport", Name(idle_.front().region->transport())},
         {"segments", idle_.size()},
         {"seconds", absl::ToDoubleSeconds(Since(begin_))}});
  }
}

std::array<uint64_t, 3> SegmentPool::CountByState() const {
  absl::MutexLock lock(&mutex_);
  uint64_t ready = 0;
  for (const Member& member : idle_) ready += member.region ? member.bytes : 0;
  return {bytes_ - ready - lent_, ready, lent_};
}

bool SegmentPool::WaitAllBack(SteadyTime deadline) const {
  absl::MutexLock lock(&mutex_);
  const auto all_back = [this]()
                            ABSL_SHARED_LOCKS_REQUIRED(mutex_) { return lent_ + changing_ == 0; };
  return moved_.AwaitUntil(deadline, mutex_, all_back);
}

}  // namespace prefilld

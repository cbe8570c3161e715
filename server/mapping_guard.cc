#include "server/mapping_guard.h"

#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdint>

#include "absl/base/const_init.h"
#include "absl/synchronization/mutex.h"

namespace prefilld {

constexpr uintptr_t kNobodys = UINTPTR_MAX;  // a range that begins there is to be had

struct MappingGuard::Range {
  std::atomic<uintptr_t> begin{kNobodys}, end{0};
  std::atomic<int> protection{0};
  std::atomic<bool> lost{false};
  Range* next = nullptr;
};

namespace {

using Range = MappingGuard::Range;

// Never freed, but used again: a handler may be walking over them.
std::atomic<Range*> ranges{nullptr};
ABSL_CONST_INIT absl::Mutex taking(absl::kConstInit);
struct sigaction before;  // of a sanitizer, say: it gets what is not ours

// Does only what a handler may. A file that has lost a page has lost all behind it: from there to
// its end the memory becomes zeros.
void OnBusError(int number, siginfo_t* info, void*) {
  const int saved = errno;
  const auto at = reinterpret_cast<uintptr_t>(info->si_addr);
  for (Range* range = ranges; range != nullptr; range = range->next) {
    const uintptr_t begin = range->begin, end = range->end;
    if (info->si_code <= 0 || at < begin || at >= end) continue;  // sent by somebody: no address
    range->lost = true;
    const uintptr_t page = at & ~(static_cast<uintptr_t>(sysconf(_SC_PAGESIZE)) - 1);
    void* zeros = mmap(reinterpret_cast<void*>(page), end - page, range->protection,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
    errno = saved;
    if (zeros != MAP_FAILED) return;
  }
  sigaction(number, &before, nullptr);
  raise(number);  // comes when we return, as the fault itself would
}

void Install() {
  struct sigaction ours = {};
  ours.sa_sigaction = OnBusError;
  ours.sa_flags = SA_SIGINFO;
  sigaction(SIGBUS, &ours, &before);
}

// Of `bytes` at `data`, from now on.
Range* Take(void* data, size_t bytes, int protection) {
  absl::MutexLock lock(&taking);
  Range* range = ranges;
  if (range == nullptr) Install();
  while (range != nullptr && range->begin != kNobodys) range = range->next;
  const bool fresh = range == nullptr;
  if (fresh) range = new Range;
  range->protection = protection;
  range->lost = false;
  range->end = reinterpret_cast<uintptr_t>(data) + bytes;
  range->begin = reinterpret_cast<uintptr_t>(data);
  if (fresh) {
    range->next = ranges;
    ranges = range;
  }
  return range;
}

}  // namespace

MappingGuard::MappingGuard(void* data, size_t bytes, int protection)
    : range_(Take(data, bytes, protection)) {}

MappingGuard::~MappingGuard() { range_->begin = kNobodys; }

bool MappingGuard::lost() const { return range_->lost; }

}  // namespace prefilld

#include "server/record/log.h"

#include <poll.h>
#include <signal.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <deque>
#include <string>
#include <thread>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "server/clock.h"

namespace prefilld {
namespace {

std::string Format(Level level, const char* event, std::initializer_list<LogField> fields) {
  constexpr const char* kLevels[] = {"info", "warning", "error"};
  nlohmann::ordered_json line;
  line["ts"] = absl::FormatTime("%Y-%m-%dT%H:%M:%E6SZ", absl::Now(), absl::UTCTimeZone());
  line["level"] = kLevels[static_cast<int>(level)];
  line["event"] = event;
  for (const auto& [name, value] : fields) line[name] = value;
  // A caller's bytes may be no UTF-8: replaced, never thrown over. What is not ASCII is escaped:
  // there are controls, ends of lines and changes of direction among it.
  return line.dump(-1, ' ', true, nlohmann::json::error_handler_t::replace) + "\n";
}

// Whole, however long that takes. A write that fails has nowhere to be reported.
void Write(const std::string& text) {
  for (size_t done = 0; done < text.size();) {
    const ssize_t written = write(STDERR_FILENO, text.data() + done, text.size() - done);
    if (written >= 0) {
      done += static_cast<size_t>(written);
    } else if (errno == EAGAIN) {
      pollfd stderr_takes = {.fd = STDERR_FILENO, .events = POLLOUT, .revents = 0};
      poll(&stderr_takes, 1, -1);
    } else if (errno != EINTR) {
      return;
    }
  }
}

class Writer {
 public:
  // Never destroyed: there are threads that log until the process is gone.
  static Writer& Get() {
    static Writer* const writer = new Writer;
    return *writer;
  }

  void Add(std::string line) {
    absl::MutexLock lock(&mutex_);
    if (bytes_ + line.size() > kLogQueueBytes) {
      ++dropped_;
      return;
    }
    bytes_ += line.size();
    lines_.push_back(std::move(line));
  }

  bool Flush(absl::Duration most) {
    absl::MutexLock lock(&mutex_);
    const auto all = [this]() ABSL_SHARED_LOCKS_REQUIRED(mutex_) { return bytes_ == 0; };
    return written_.AwaitUntil(SteadyNow() + most, mutex_, all) && dropped_ == told_;
  }

  uint64_t dropped() const {
    absl::MutexLock lock(&mutex_);
    return dropped_;
  }

 private:
  Writer() {
    std::thread([this] { Loop(); }).detach();
    std::atexit([] { FlushLog(); });
  }

  void Loop() {
    sigset_t all;  // signals are for the threads that wait for them
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, nullptr);
    const auto any = [this]() ABSL_SHARED_LOCKS_REQUIRED(mutex_) { return !lines_.empty(); };
    absl::MutexLock lock(&mutex_);
    while (true) {
      mutex_.Await(absl::Condition(&any));
      const std::string line = std::move(lines_.front());
      lines_.pop_front();
      // Those that are dropped from now on come behind the lines that fill the queue.
      const uint64_t missing = lines_.empty() ? dropped_ - told_ : 0;
      told_ += missing;
      mutex_.Unlock();
      Write(line);
      if (missing > 0) {
        Write(Format(Level::kWarning, "log_lines_dropped", {{"lines", missing}}));
      }
      mutex_.Lock();
      bytes_ -= line.size();
      if (bytes_ == 0) written_.SignalAll();
    }
  }

  mutable absl::Mutex mutex_;
  SteadyCondition written_;
  std::deque<std::string> lines_ ABSL_GUARDED_BY(mutex_);
  size_t bytes_ ABSL_GUARDED_BY(mutex_) = 0;  // of these, and of the one that is being written
  uint64_t dropped_ ABSL_GUARDED_BY(mutex_) = 0, told_ ABSL_GUARDED_BY(mutex_) = 0;
};

}  // namespace

void Log(Level level, const char* event, std::initializer_list<LogField> fields) {
  Writer::Get().Add(Format(level, event, fields));
}

void LogText(const std::string& line) { Writer::Get().Add(line + "\n"); }

bool FlushLog(absl::Duration most) { return Writer::Get().Flush(most); }

uint64_t LogLinesDropped() { return Writer::Get().dropped(); }

}  // namespace prefilld

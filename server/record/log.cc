#include "server/record/log.h"

#include <unistd.h>

#include <string>

#include "absl/time/clock.h"
#include "absl/time/time.h"

namespace prefilld {

void Log(Level level, const char* event, std::initializer_list<LogField> fields) {
  constexpr const char* kLevels[] = {"info", "warning", "error"};
  nlohmann::ordered_json line;
  line["ts"] = absl::FormatTime("%Y-%m-%dT%H:%M:%E6SZ", absl::Now(), absl::UTCTimeZone());
  line["level"] = kLevels[static_cast<int>(level)];
  line["event"] = event;
  for (const auto& [name, value] : fields) line[name] = value;
  // A caller's bytes may be no UTF-8: replaced, never thrown over.
  std::string text = line.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace) + "\n";
  // Lines up to PIPE_BUF are atomic; a short or failed write has nowhere to be reported.
  [[maybe_unused]] const ssize_t written = write(STDERR_FILENO, text.data(), text.size());
}

}  // namespace prefilld

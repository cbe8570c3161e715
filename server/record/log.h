// One JSON line per event on stderr: {"ts": ..., "level": ..., "event": ..., fields...}. An event
// that belongs to a request has the field "request_id". Thread-safe; waits for nobody: a thread of
// its own writes, from a queue that holds what a slow reader of stderr has not taken. Lines that
// find it full are dropped and counted, and a line "log_lines_dropped" in their place says so.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>

#include "absl/time/time.h"

namespace prefilld {

enum class Level { kInfo, kWarning, kError };

using LogField = std::pair<const char*, nlohmann::json>;

// Log(Level::kInfo, "prefill_finished", {{"request_id", id}, {"tokens", 7600}});
void Log(Level level, const char* event, std::initializer_list<LogField> fields = {});

// For people: a line as it is, in its turn, such as why the server does not start.
void LogText(const std::string& line);

inline constexpr size_t kLogQueueBytes = size_t{4} << 20;

// Before the end of the process: waits until what was logged is written, but no longer than this.
// False: some was not.
bool FlushLog(absl::Duration most = absl::Seconds(1));

uint64_t LogLinesDropped();  // since the start

}  // namespace prefilld

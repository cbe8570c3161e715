// One JSON line per event on stderr: {"ts": ..., "level": ..., "event": ..., fields...}. An event
// that belongs to a request has the field "request_id". Thread-safe; a line is one write and blocks
// no longer than stderr does.
#pragma once

#include <initializer_list>
#include <nlohmann/json.hpp>
#include <utility>

namespace prefilld {

enum class Level { kInfo, kWarning, kError };

using LogField = std::pair<const char*, nlohmann::json>;

// Log(Level::kInfo, "prefill_finished", {{"request_id", id}, {"tokens", 7600}});
void Log(Level level, const char* event, std::initializer_list<LogField> fields = {});

}  // namespace prefilld

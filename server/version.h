// The version of this build.
#pragma once

namespace prefilld {
extern const char* const kVersion;
}

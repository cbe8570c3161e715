#include "server/version.h"

namespace prefilld {
const char* const kVersion = PREFILLD_VERSION;
}

// Paged K and V on the CPU: gathered into rows that lie one after the other, which every stage here
// reads.
#pragma once

#include "absl/status/status.h"
#include "kernels/attention.h"
#include "kernels/backend.h"

namespace prefilld::cpu {

// Sets k and v of `args` to copies in `memory`, which grows as needed and must stay, and clears
// kv_pages. Does nothing where nothing is paged. INVALID_ARGUMENT for pages that do not exist,
// RESOURCE_EXHAUSTED when the memory cannot grow.
absl::Status GatherPages(AttentionArgs* args, Buffer* memory);

}  // namespace prefilld::cpu

// Stage 3 of the CPU backend: causal attention over the blocks of args.index, whatever method chose
// them; an index of every causal block makes it dense attention. It reads nothing else of the
// method.
#pragma once

#include <cstdint>

#include "absl/status/status.h"
#include "kernels/attention.h"
#include "kernels/backend.h"

namespace prefilld::cpu {

// Owns the workspace, which grows to the largest call and stays. One call at a time. Blocks until
// the output is written. Results do not depend on the number of threads.
class Attention {
 public:
  explicit Attention(int threads);  // > 0

  // Writes args.o and, where it is not null, args.lse. A row without any block gets 0 and
  // -infinity. RESOURCE_EXHAUSTED when the workspace cannot grow.
  absl::Status Run(const AttentionArgs& args);

 private:
  absl::Status Reserve(size_t bytes);

  int threads_;
  Buffer workspace_;
};

}  // namespace prefilld::cpu

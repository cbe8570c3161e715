// Runs a load: which requests are sent when, by whom. Blocks until all of them have ended.
#pragma once

#include <functional>
#include <memory>
#include <vector>

#include "absl/time/time.h"
#include "client/cli/load.h"
#include "client/cli/load_stats.h"
#include "client/cli/peers.h"
#include "client/cpp/call.h"

namespace prefilld::cli {

struct LoadRun {
  struct Part {
    Load* load;
    uint32_t tokens;
    double weight;  // > 0; how often it is taken beside the others
  };
  std::vector<Part> mix;
  std::vector<Peer*> peers;  // requests go to them in turn

  // Exactly one of the two. concurrency: a closed loop, so many requests at a time, the next when
  // one has ended; a request that failed is followed by the pause that the server asks for. rate:
  // an open loop, so many requests a second in the mean, at random moments (Poisson) that do not
  // depend on the answers.
  uint32_t concurrency = 0;
  double rate = 0;

  absl::Duration duration;  // in which requests are sent; each of a closed loop sends at least one
  absl::Duration deadline = absl::InfiniteDuration();  // of a request, from when it was to be sent
  client::CallOptions options;  // of every request, but for the time that it has
  uint32_t seed = 1;
  std::function<void(absl::Duration since_start)> on_progress;  // any thread
};

struct Finished {
  std::vector<Outcome> outcomes;
  double seconds = 0;  // from the start to the last end
};
Finished RunLoad(const LoadRun& run);

}  // namespace prefilld::cli

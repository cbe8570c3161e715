// The loads of `prefillctl bench`: one request after another, random but seeded.
#pragma once

#include <cstdint>
#include <memory>
#include <random>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "client/cpp/client.h"
#include "prefilld/v1/sparsity.pb.h"

namespace prefilld::cli {

// What one request showed; meaningful when its status is OK.
struct Sample {
  double ttft_seconds = 0;  // prefill: until kv_ready; attend: until the outputs are announced
  double density = 0;
};

// Requests of one kind and size. Send may be called on many threads at a time.
class Load {
 public:
  virtual ~Load() = default;
  // Blocks until the request has ended. Errors are the server's, without retries.
  virtual absl::StatusOr<Sample> Send(client::PrefillClient& client, std::mt19937& rng,
                                      const client::CallOptions& options) = 0;
};

// Prompts of `tokens` random token IDs below `vocab_size`, whose caches can be pulled by
// `transport`. Each lease is abandoned after kv_ready.
std::unique_ptr<Load> MakePrefillLoad(const v1::Model& model, uint32_t tokens,
                                      v1::Transport transport, const v1::SparsityPolicy& policy);

struct AttendLoadShape {
  uint32_t q_heads = 0, kv_heads = 0, head_dim = 0;
};

// "32/8/128". INVALID_ARGUMENT for anything else than three numbers from 1 to 4096.
absl::StatusOr<AttendLoadShape> ParseShape(const std::string& text);

// Attention of `tokens` queries over as many keys, random BF16 tensors made once.
std::unique_ptr<Load> MakeAttendLoad(const AttendLoadShape& shape, uint32_t tokens,
                                     const v1::SparsityPolicy& policy);

}  // namespace prefilld::cli

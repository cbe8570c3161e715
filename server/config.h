// What an operator can set: the command line, or the same names in a file (--config, TOML or INI).
#pragma once

#include <cstdint>
#include <limits>
#include <optional>
#include <set>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "server/transport/transports.h"

namespace prefilld {

struct Endpoint {
  std::string host;  // as given, without brackets
  int port = 0;      // 0: the system picks one

  bool loopback() const;
  std::string ToString() const;  // host:port, [host]:port
};
// INVALID_ARGUMENT when `text` is not HOST:PORT or [IPV6]:PORT.
absl::StatusOr<Endpoint> ParseEndpoint(const std::string& text);

struct ModelSource {
  std::string name;
  std::string directory;  // Hugging Face: config.json and safetensors
};

inline constexpr int64_t kPromptTokens = 131072;

struct Config {
  Endpoint listen{"127.0.0.1", 50051};
  Endpoint http{"127.0.0.1", 9464};
  std::string backend = "auto";
  int threads = 0;                    // of the CPU backend; 0: all processors
  std::string cuda_kernels = "auto";  // of the cuda backend: sm80, sm90, or the best for the device
  std::string cache_dir;  // what was measured at start, for the next start; empty: not kept
  uint64_t gpu_memory = std::numeric_limits<uint64_t>::max();  // CudaOptions::memory_bytes
  // For tests: the n-th attention breaks the device, or does not end; 0: none does. Not both.
  int inject_fault = 0, inject_hang = 0;
  std::vector<ModelSource> models;
  // Offered beside gRPC; absent: every one that is possible here.
  std::optional<std::set<Transport>> transports;
  // Where memory is handed out to those who map it: an absolute path, or "@" and an abstract name;
  // empty: one of the latter, of this process alone.
  std::string memory_socket;

  // Bytes. Touched as they are used (kv on a GPU: pinned from the start); 0: what half (kv) or a
  // quarter (attend) of the machine's memory allows, at most 8 and 4 GiB.
  uint64_t kv_memory = 0;
  uint64_t attend_memory = 0;
  // Of the device, for caches that are mapped there; absent: a quarter of what its plan leaves
  // spare, at most 8 GiB; 0: none.
  std::optional<uint64_t> kv_device_memory;

  // No flags. Threads that take memory from the system and give it back, and that do what calls do
  // beside the engine: checksums, conversion, copies.
  int memory_threads = 2;
  int transfer_threads = 2;

  std::optional<int64_t> prompt_tokens_max;  // absent: kPromptTokens, or as many as can be served
  int waiting_jobs_max = 256;
  // Connections of gRPC; absent: as many as descriptors allow, and half of all of one address.
  std::optional<int> connections_max, connections_per_address;
  int connection_rate = 200;                          // new ones a second of one address
  absl::Duration connection_age = absl::Minutes(30);  // then its client is asked to come anew
  uint64_t rpc_memory = uint64_t{512} << 20;          // bytes
  bool reflection = true;
  absl::Duration lease_ttl = absl::Minutes(1);
  absl::Duration lease_ttl_max = absl::Minutes(10);
  absl::Duration upload_timeout = absl::Seconds(30);
  uint64_t transfer_rate_min = uint64_t{256} << 10;  // RpcContext's
  absl::Duration drain_timeout = absl::Seconds(30);
  // Of one step, at least, and twenty times what it was predicted to take; then the process ends.
  absl::Duration stall_timeout = absl::Seconds(30);

  // PEM files. cert and key: TLS; client_ca too: only clients with a certificate of that CA, or,
  // with an access policy, with that or a token of it.
  std::string tls_cert, tls_key, tls_client_ca;
  std::string access_policy;  // AccessPolicy's file; empty: everybody may do everything
};

struct ParsedConfig {
  bool exit = false;  // --help or --version was answered
  Config config;
};
// Errors are one line that names the flag.
absl::StatusOr<ParsedConfig> ParseConfig(int argc, const char* const* argv);

}  // namespace prefilld

#include "server/config.h"

#include <arpa/inet.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstring>
#include <iostream>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <type_traits>

#include "absl/strings/escaping.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_replace.h"
#include "server/machine_memory.h"
#include "server/version.h"

namespace prefilld {
namespace {

constexpr uint64_t kGiB = uint64_t{1} << 30;
constexpr size_t kModelNameBytesMax = 128;

// "30s", "1m30s", as absl::ParseDuration reads them.
void AddDuration(CLI::App& app, const char* flag, absl::Duration* value, const char* help) {
  app.add_option_function<std::string>(
         flag,
         [flag, value](const std::string& text) {
           if (!absl::ParseDuration(text, value) || *value <= absl::ZeroDuration()) {
             throw CLI::ValidationError(flag, "'" + text + "' is no duration such as 30s or 2m");
           }
         },
         help)
      ->type_name("DURATION")
      ->default_str(absl::FormatDuration(*value));
}

// "8GiB", "512MiB", "1000000".
bool ParseSize(const std::string& text, uint64_t* bytes) {
  const size_t end = std::min(text.find_first_not_of("0123456789"), text.size());
  const std::string unit = text.substr(end);
  constexpr std::pair<const char*, int> kUnits[] = {
      {"", 0}, {"KiB", 10}, {"MiB", 20}, {"GiB", 30}, {"TiB", 40}};
  for (const auto& [name, shift] : kUnits) {
    if (!absl::EqualsIgnoreCase(unit, name)) continue;
    return absl::SimpleAtoi(text.substr(0, end), bytes) && *bytes > 0 &&
           *bytes <= UINT64_MAX >> shift && (*bytes <<= shift, true);
  }
  return false;
}

// standard: what it is without the flag.
template <typename Bytes>
void AddSize(CLI::App& app, const char* flag, Bytes* value, const char* standard,
             const char* help) {
  app.add_option_function<std::string>(
         flag,
         [flag, value](const std::string& text) {
           uint64_t bytes = 0;
           const bool none = std::is_same_v<Bytes, std::optional<uint64_t>> && text == "0";
           if (!none && !ParseSize(text, &bytes)) {
             throw CLI::ValidationError(flag, "'" + text + "' is no size such as 512MiB or 8GiB");
           }
           *value = bytes;
         },
         help)
      ->type_name("SIZE")
      ->default_str(standard);
}

void AddEndpoint(CLI::App& app, const char* flag, Endpoint* value, const char* help) {
  app.add_option_function<std::string>(
         flag,
         [flag, value](const std::string& text) {
           auto endpoint = ParseEndpoint(text);
           if (!endpoint.ok()) {
             throw CLI::ValidationError(flag, std::string(endpoint.status().message()));
           }
           *value = *endpoint;
         },
         help)
      ->type_name("HOST:PORT")
      ->default_str(value->ToString());
}

// What messages of the service can carry.
bool IsUtf8(const std::string& text) {
  try {
    (void)nlohmann::json(text).dump();
    return true;
  } catch (const nlohmann::json::type_error&) {
    return false;
  }
}

absl::Status AddModels(const std::vector<std::string>& texts, std::vector<ModelSource>* models) {
  std::map<std::string, bool> names;
  for (const std::string& text : texts) {
    const size_t equals = text.find('=');
    if (equals == std::string::npos || equals == 0 || equals + 1 == text.size()) {
      return absl::InvalidArgumentError(absl::StrCat("--model: '", text, "' is not NAME=DIR"));
    }
    ModelSource model{text.substr(0, equals), text.substr(equals + 1)};
    if (model.name.size() > kModelNameBytesMax) {
      return absl::InvalidArgumentError(absl::StrCat("--model: the name has ", model.name.size(),
                                                     " bytes, the limit is ", kModelNameBytesMax));
    }
    if (!IsUtf8(model.name)) {
      return absl::InvalidArgumentError(
          absl::StrCat("--model: the name '", absl::CHexEscape(model.name), "' is not UTF-8"));
    }
    if (!names.emplace(model.name, true).second) {
      return absl::InvalidArgumentError(absl::StrCat("--model: two models '", model.name, "'"));
    }
    models->push_back(std::move(model));
  }
  return absl::OkStatus();
}

// "grpc, posix_shm ..." of every row.
std::string TransportNames(const char* separator) {
  return absl::StrJoin(kTransports, separator,
                       [](std::string* out, const TransportRow& row) { out->append(row.name); });
}

// Names of what is served; gRPC always is, named or not.
void AddTransports(CLI::App& app, Config* config) {
  app.add_option_function<std::vector<std::string>>(
         "--transports",
         [config](const std::vector<std::string>& names) {
           config->transports.emplace();
           for (const std::string& name : names) {
             const TransportRow* row = FindTransport(name);
             if (row == nullptr) {
               throw CLI::ValidationError("--transports",
                                          "'" + name + "' is none of " + TransportNames(", "));
             }
             config->transports->insert(row->transport);
           }
         },
         "How tensors travel; grpc is always there, cuda_ipc needs the cuda backend")
      ->delimiter(',')
      ->take_all()
      ->type_name("NAMES")
      ->default_str(TransportNames(","));
  app.add_option(
         "--memory_socket", config->memory_socket,
         "Where posix_shm and cuda_ipc hand out descriptors of memory: the path of a Unix socket, "
         "which containers share with its directory (the server's own, nobody else's to write or "
         "lock), or @NAME, an abstract one, of the network namespace")
      ->type_name("PATH")
      ->default_str("@prefilld- and an id of the process");
}

void AddBackend(CLI::App& app, Config* config) {
  app.add_option("--backend", config->backend,
                 "cpu, cuda, or auto: cuda where there is a GPU, else cpu")
      ->capture_default_str();
  app.add_option("--threads", config->threads, "CPU threads; 0: all processors")
      ->check(CLI::Range(0, 4096))
      ->capture_default_str();
  app.add_option("--cuda_kernels", config->cuda_kernels,
                 "Kernels of the cuda backend: auto, the best for the device; sm80; sm90, Hopper "
                 "alone")
      ->check(CLI::IsMember({"auto", "sm80", "sm90"}))
      ->capture_default_str();
  app.add_option("--cache_dir", config->cache_dir,
                 "A directory that exists. A GPU's fastest algorithms of products are measured at "
                 "start and kept there for the next; none: measured at every start")
      ->check(CLI::ExistingDirectory)
      ->type_name("PATH")
      ->default_str("none");
  for (auto [name, value] : {std::pair("--inject_fault", &config->inject_fault),
                             std::pair("--inject_hang", &config->inject_hang)}) {
    app.add_option(name, *value)->check(CLI::Range(0, 1 << 20))->group("");  // not in --help
  }
}

void AddMemory(CLI::App& app, Config* config) {
  AddSize(app, "--gpu_memory", &config->gpu_memory, "all that is free",
          "What is taken of the GPU's memory at most (weights, the memory plan, --attend_memory, "
          "--kv_device_memory), beside half a GiB for the driver's own");
  AddSize(
      app, "--kv_memory", &config->kv_memory, "half of the machine's, at most 8GiB",
      "Memory of all KV caches, in bytes or as 512MiB, 8GiB. One cache may have all of it; on a "
      "GPU, where it is pinned, half: one half is for grpc, one for posix_shm. Bounds "
      "--max_prompt_tokens");
  AddSize(
      app, "--kv_device_memory", &config->kv_device_memory,
      "a quarter of what the memory plan leaves spare, at most 8GiB",
      "Device memory of the KV caches that decoders map (cuda_ipc), taken at start; 0: cuda_ipc "
      "carries no caches");
  AddSize(app, "--attend_memory", &config->attend_memory,
          "a quarter of the machine's, at most 4GiB",
          "Memory of the tensors of all Attend calls, in bytes or as 512MiB, 4GiB");
  app.add_option("--max_prompt_tokens", config->prompt_tokens_max,
                 "Tokens of the longest prompt. What cannot be served, for the models' positions, "
                 "--kv_memory or the GPU's memory, ends the start; the default is lowered instead, "
                 "with a warning. A cache that is not retained needs room for two layers only, so "
                 "it may be longer than one that is")
      ->check(CLI::Range(int64_t{1}, int64_t{1} << 20))
      ->type_name("TOKENS")
      ->default_str(std::to_string(kPromptTokens));
}

void AddAccess(CLI::App& app, Config* config) {
  const auto add = [&](const char* flag, std::string* path, const char* help) {
    app.add_option(flag, *path, help)->type_name("FILE")->default_str("none");
  };
  add("--tls_cert", &config->tls_cert,
      "PEM certificate chain: serve TLS, over HTTP too; none: plaintext. This file and the next "
      "two may change while the server runs: new connections see it");
  add("--tls_key", &config->tls_key, "PEM private key of --tls_cert, without a passphrase");
  add("--tls_client_ca", &config->tls_client_ca,
      "PEM CA that clients' certificates must be signed by; none: clients need no certificate. "
      "Over gRPC they need one, unless --access_policy says who may do what");
  add("--access_policy", &config->access_policy,
      "JSON: which certificates and bearer tokens may do what (docs/access.md); none: who "
      "connects may do everything");
}

// What peers may have of gRPC before a call is looked at.
void AddConnections(CLI::App& app, Config* config) {
  app.add_option("--max_connections", config->connections_max,
                 "gRPC connections; more are closed at once. Each takes a descriptor")
      ->check(CLI::Range(1, 1 << 20))
      ->type_name("N")
      ->default_str("what descriptors (ulimit -Hn) allow, at most 16384");
  app.add_option("--max_connections_per_address", config->connections_per_address,
                 "Of these, of one client address (of IPv6, of one /64)")
      ->check(CLI::Range(1, 1 << 20))
      ->type_name("N")
      ->default_str("half of --max_connections");
  app.add_option("--max_connection_rate", config->connection_rate,
                 "New connections a second of one address; five seconds' may come at once")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  AddDuration(app, "--max_connection_age", &config->connection_age,
              "A connection that is older takes no new calls: its client opens another. What runs "
              "on it has ten minutes to end");
  AddSize(app, "--rpc_memory", &config->rpc_memory, "512MiB",
          "Memory of messages that arrive and of calls and connections, before calls of clients "
          "that hold most are ended");
  app.add_option("--reflection", config->reflection, "Serve gRPC's reflection, for grpcurl")
      ->type_name("BOOL")
      ->capture_default_str();
}

// Open to the network only when somebody said so.
absl::Status CheckExposure(const Config& config, bool insecure_listen) {
  const bool tls = !config.tls_cert.empty();
  if (tls != !config.tls_key.empty()) {
    return absl::InvalidArgumentError("--tls_cert and --tls_key are needed together");
  }
  if (!tls && !config.tls_client_ca.empty()) {
    return absl::InvalidArgumentError("--tls_client_ca needs --tls_cert and --tls_key");
  }
  if (tls || insecure_listen) return absl::OkStatus();
  for (const auto& [flag, endpoint] :
       {std::pair("--listen=", &config.listen), std::pair("--http=", &config.http)}) {
    if (endpoint->loopback()) continue;
    return absl::InvalidArgumentError(
        absl::StrCat(flag, endpoint->ToString(),
                     " is open to the network, in the clear: give --tls_cert and --tls_key, or "
                     "allow it with --insecure_listen"));
  }
  return absl::OkStatus();
}

// Of a key in --config, from CLI11's words for it.
absl::Status NoFlag(const char* told) {
  return absl::InvalidArgumentError(absl::StrCat(
      "--config: ", absl::StrReplaceAll(told, {{"INI was not able to parse ", "there is no flag "},
                                               {".++", ""}})));  // of a section
}

}  // namespace

bool Endpoint::loopback() const {
  if (host == "localhost") return true;
  in_addr v4;
  if (inet_pton(AF_INET, host.c_str(), &v4) == 1) return ntohl(v4.s_addr) >> 24 == 127;
  in6_addr v6;
  return inet_pton(AF_INET6, host.c_str(), &v6) == 1 && IN6_IS_ADDR_LOOPBACK(&v6);
}

std::string Endpoint::ToString() const {
  return host.find(':') == std::string::npos ? absl::StrCat(host, ":", port)
                                             : absl::StrCat("[", host, "]:", port);
}

absl::StatusOr<Endpoint> ParseEndpoint(const std::string& text) {
  const size_t colon = text.rfind(':');
  Endpoint endpoint;
  const bool digits = colon != std::string::npos && colon + 1 < text.size() &&
                      text.find_first_not_of("0123456789", colon + 1) == std::string::npos;
  if (!digits || !absl::SimpleAtoi(text.substr(colon + 1), &endpoint.port) ||
      endpoint.port > 65535) {
    return absl::InvalidArgumentError(
        absl::StrCat("'", text, "' is not HOST:PORT with a port from 0 to 65535"));
  }
  endpoint.host = text.substr(0, colon);
  const bool bracketed = absl::StartsWith(endpoint.host, "[") && absl::EndsWith(endpoint.host, "]");
  if (bracketed) endpoint.host = endpoint.host.substr(1, endpoint.host.size() - 2);
  if (endpoint.host.empty() || (!bracketed && absl::StrContains(endpoint.host, ":"))) {
    return absl::InvalidArgumentError(
        absl::StrCat("'", text, "' is not HOST:PORT; an IPv6 address needs brackets"));
  }
  return endpoint;
}

absl::StatusOr<ParsedConfig> ParseConfig(int argc, const char* const* argv) {
  ParsedConfig parsed;
  Config& config = parsed.config;
  std::vector<std::string> models;
  bool insecure_listen = false;

  CLI::App app("prefilld: sparse prefill as a service");
  app.set_version_flag("--version", kVersion);
  app.set_config("--config", "", "Reads the flags below from a TOML or INI file");
  app.allow_config_extras(CLI::config_extras_mode::error);  // a misspelt key is not a default
  // Of a flag that is there twice the last one counts: who starts us with some may be given more.
  app.option_defaults()->multi_option_policy(CLI::MultiOptionPolicy::TakeLast);
  AddEndpoint(app, "--listen", &config.listen, "gRPC address; port 0 picks one");
  AddEndpoint(app, "--http", &config.http, "Address of /metrics and /debug/sparsity");
  app.add_flag("--insecure_listen", insecure_listen, "Allow addresses beyond loopback without TLS");
  AddBackend(app, &config);
  app.add_option("--model", models, "NAME=DIR of a Hugging Face model; repeatable")
      ->take_all()
      ->type_name("NAME=DIR");
  AddConnections(app, &config);
  AddTransports(app, &config);
  AddMemory(app, &config);
  app.add_option("--max_waiting_jobs", config.waiting_jobs_max,
                 "Jobs that may wait; more are refused with RESOURCE_EXHAUSTED")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  AddDuration(app, "--lease_ttl", &config.lease_ttl, "Default life of an unused lease");
  AddDuration(app, "--max_lease_ttl", &config.lease_ttl_max, "The longest a caller may ask for");
  AddDuration(app, "--upload_timeout", &config.upload_timeout,
              "An Attend whose peer moves no chunk for this long is given up");
  AddSize(app, "--min_transfer_rate", &config.transfer_rate_min, "256KiB",
          "Bytes a second of an Attend's tensors, either way; one that is slower after the first "
          "--upload_timeout is given up");
  AddDuration(app, "--drain_timeout", &config.drain_timeout,
              "How long SIGTERM waits for work and leases");
  AddDuration(app, "--stall_timeout", &config.stall_timeout,
              "A step (a layer of a batch or a part of it, or of an Attend) that runs for longer "
              "than this and than "
              "twenty times its prediction ends the process: callers see UNAVAILABLE");
  AddAccess(app, &config);

  try {
    app.parse(argc, argv);
  } catch (const CLI::Success& success) {  // --help, --version
    app.exit(success, std::cout, std::cerr);
    parsed.exit = true;
    return parsed;
  } catch (const CLI::ConfigError& error) {
    return NoFlag(error.what());
  } catch (const CLI::ParseError& error) {
    return absl::InvalidArgumentError(error.what());
  }
  if (absl::Status status = AddModels(models, &config.models); !status.ok()) return status;
  if (absl::Status status = CheckExposure(config, insecure_listen); !status.ok()) return status;
  if (config.listen.port > 0 && config.listen.ToString() == config.http.ToString()) {
    return absl::InvalidArgumentError(
        absl::StrCat("--listen and --http are both ", config.http.ToString()));
  }
  if (config.inject_fault > 0 && config.inject_hang > 0) {
    return absl::InvalidArgumentError("--inject_fault and --inject_hang exclude each other");
  }
  if (config.lease_ttl > config.lease_ttl_max) {
    return absl::InvalidArgumentError(
        absl::StrCat("--lease_ttl ", absl::FormatDuration(config.lease_ttl),
                     " is over --max_lease_ttl ", absl::FormatDuration(config.lease_ttl_max)));
  }
  if (config.kv_memory == 0) config.kv_memory = std::min(8 * kGiB, MachineMemory() / 2);
  if (config.attend_memory == 0) config.attend_memory = std::min(4 * kGiB, MachineMemory() / 4);
  return parsed;
}

}  // namespace prefilld

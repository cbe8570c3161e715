// Any bytes as a file for --config, or as arguments, one a line: a configuration that is taken is
// consistent, one that is not is refused in one line.
#include <sys/mman.h>
#include <unistd.h>

#include <iostream>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "server/config.h"
#include "tests/fuzz/property.h"

namespace prefilld {
namespace {

std::string FileOf(const std::string& text) {
  static const int fd = memfd_create("config", MFD_CLOEXEC);
  Promise(fd >= 0 && ftruncate(fd, 0) == 0 &&
              pwrite(fd, text.data(), text.size(), 0) == static_cast<ssize_t>(text.size()),
          "the file is written");
  return absl::StrCat("/proc/self/fd/", fd);
}

void CheckEndpoint(const Endpoint& endpoint) {
  Promise(endpoint.port >= 0 && endpoint.port <= 65535 && !endpoint.host.empty(), "HOST:PORT",
          endpoint.ToString());
  const auto again = ParseEndpoint(endpoint.ToString());
  Promise(again.ok() && again->host == endpoint.host && again->port == endpoint.port,
          "an address is written as it is read", endpoint.ToString());
}

void CheckConfig(const Config& config, const std::string& text) {
  CheckEndpoint(config.listen);
  CheckEndpoint(config.http);
  Promise(config.kv_memory > 0 && config.attend_memory > 0 && config.rpc_memory > 0 &&
              config.gpu_memory > 0 && config.transfer_rate_min > 0,
          "sizes are above 0", text);
  for (const absl::Duration duration :
       {config.lease_ttl, config.lease_ttl_max, config.upload_timeout, config.drain_timeout,
        config.stall_timeout, config.connection_age}) {
    Promise(duration > absl::ZeroDuration(), "durations are above 0", text);
  }
  Promise(config.lease_ttl <= config.lease_ttl_max, "lease_ttl <= max_lease_ttl", text);
  Promise(config.waiting_jobs_max >= 1 && config.connection_rate >= 1 && config.threads >= 0,
          "counts are in bounds", text);
  Promise(config.tls_cert.empty() == config.tls_key.empty(), "certificate and key together", text);
  for (const ModelSource& model : config.models) {
    Promise(!model.name.empty() && model.name.size() <= 128 && !model.directory.empty(),
            "models have names and directories", text);
  }
}

}  // namespace
}  // namespace prefilld

extern "C" int LLVMFuzzerInitialize(int*, char***) {
  std::cout.rdbuf(nullptr);  // what --help says
  return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace prefilld;  // NOLINT
  if (size == 0) return 0;
  const bool in_file = data[size - 1] % 2 == 0;  // the last byte says which
  const std::string text(reinterpret_cast<const char*>(data), size - 1);
  std::vector<std::string> arguments = {"prefilld"};
  if (in_file) {
    arguments.push_back(absl::StrCat("--config=", FileOf(text)));
  } else if (text.find("config") != std::string::npos) {
    return 0;  // would read what lies around here
  } else {
    // As a program gets them: without bytes that end them.
    for (absl::string_view line : absl::StrSplit(text, '\n')) {
      arguments.emplace_back(line.substr(0, line.find('\0')));
    }
  }
  std::vector<const char*> argv;
  for (const std::string& argument : arguments) argv.push_back(argument.c_str());
  const auto parsed = ParseConfig(static_cast<int>(argv.size()), argv.data());
  if (!parsed.ok()) {
    Promise(absl::IsInvalidArgument(parsed.status()) && !parsed.status().message().empty() &&
                parsed.status().message().find('\n') == absl::string_view::npos,
            "a refusal is one line", parsed.status().ToString());
  } else if (!parsed->exit) {
    CheckConfig(parsed->config, text);
  }
  return 0;
}

#include "server/rpc/connection_guard.h"

#include <grpc/grpc.h>
#include <grpc/support/alloc.h>
#include <malloc.h>

#include <algorithm>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>

#include "absl/strings/numbers.h"

namespace prefilld {
namespace {

constexpr int64_t kCallsBetweenLooks = 64;  // fewer cannot have done harm
constexpr int kShare = 20;  // looking takes no more than one part in so many of a processor
constexpr size_t kIdleBytes = size_t{32} << 20;  // of malloc's, that nobody uses
constexpr absl::Duration kTrimEvery = absl::Seconds(10);

// What gRPC says; takes the text over.
nlohmann::json Parse(char* text) {
  const std::unique_ptr<char, decltype(&gpr_free)> owned(text, gpr_free);
  return text == nullptr ? nlohmann::json() : nlohmann::json::parse(text, nullptr, false);
}

// Numbers are strings there, and zeros are left out.
int64_t Number(const nlohmann::json& of, const char* name) {
  int64_t number = 0;
  if (!of.is_object() || !of.contains(name)) return 0;
  const nlohmann::json& value = of[name];
  if (value.is_number()) return value.get<int64_t>();
  return value.is_string() && absl::SimpleAtoi(value.get<std::string>(), &number) ? number : 0;
}

nlohmann::json Part(const nlohmann::json& of, const char* name) {
  return of.is_object() ? of.value(name, nlohmann::json()) : nlohmann::json();
}

int64_t LastServer() {
  const nlohmann::json servers = Part(Parse(grpc_channelz_get_servers(0)), "server");
  if (!servers.is_array() || servers.empty()) return 0;
  return Number(Part(servers.back(), "ref"), "serverId");
}

}  // namespace

ConnectionGuard::ConnectionGuard(GuardOptions options, Acceptor& acceptor)
    : options_(options), acceptor_(acceptor), server_(LastServer()), thread_([this] { Loop(); }) {}

ConnectionGuard::~ConnectionGuard() {
  stopping_.Ring();
  thread_.join();
}

void ConnectionGuard::Loop() {
  absl::Duration pause = options_.every;
  while (!stopping_.Await(SteadyNow() + pause)) {
    const SteadyTime begin = SteadyNow();
    Look();
    pause = std::max(options_.every, kShare * Since(begin));
    GiveBackMemory();
  }
}

void ConnectionGuard::Look() {
  const nlohmann::json server = Part(Parse(grpc_channelz_get_server(server_)), "server");
  const int64_t begun = Number(Part(server, "data"), "callsStarted");
  if (begun - calls_looked_at_ < kCallsBetweenLooks) return;
  calls_looked_at_ = begun;
  decltype(seen_) before;
  before.swap(seen_);
  int64_t next = 0;
  for (bool more = true; more;) {
    const nlohmann::json page = Parse(grpc_channelz_get_server_sockets(server_, next, 0));
    const nlohmann::json references = Part(page, "socketRef");
    more = references.is_array() && !references.empty() && !page.value("end", false);
    for (const nlohmann::json& reference : references) {
      const int64_t socket_id = Number(reference, "socketId");
      next = socket_id + 1;
      const nlohmann::json socket = Part(Parse(grpc_channelz_get_socket(socket_id)), "socket");
      const nlohmann::json data = Part(socket, "data");
      if (const auto old = before.find(socket_id); old != before.end()) {
        seen_.emplace(socket_id, old->second);
      }
      const int64_t failed = Number(data, "streamsFailed");
      const int64_t open =
          Number(data, "streamsStarted") - Number(data, "streamsSucceeded") - failed;
      const char* why = Against(socket_id, open, failed);
      const std::string name = reference.value("name", "");
      if (why != nullptr) acceptor_.Cut(name.substr(name.find(' ') + 1), why);
    }
  }
}

const char* ConnectionGuard::Against(int64_t socket, int64_t open, int64_t failed) {
  if (open > options_.streams) return "streams";
  const double burst = options_.resets_per_second * GuardOptions::kBurst;
  Seen& seen = seen_.try_emplace(socket, Seen{0, burst, SteadyNow()}).first->second;
  const double seconds = absl::ToDoubleSeconds(Since(std::exchange(seen.at, SteadyNow())));
  seen.tokens = std::min(seen.tokens + seconds * options_.resets_per_second, burst);
  seen.tokens -= static_cast<double>(failed - std::exchange(seen.failed, failed));
  return seen.tokens < 0 ? "rapid_reset" : nullptr;
}

// malloc keeps what was freed, and what a flood took is not needed again soon.
void ConnectionGuard::GiveBackMemory() {
  if (Since(trimmed_) < kTrimEvery) return;
  trimmed_ = SteadyNow();
  if (mallinfo2().fordblks > kIdleBytes) malloc_trim(0);
}

}  // namespace prefilld

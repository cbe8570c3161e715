// The least that a gRPC server can do to stream bytes: a generic service, in a process of its own,
// whose every call answers with messages of the sizes that the request lists, from memory.
#pragma once

#include <sys/types.h>

#include <memory>
#include <string>

#include "absl/status/statusor.h"

namespace prefilld {

// The request is an array of native uint32: the bytes of each message.
inline constexpr char kBareMethod[] = "/bare.Stream/Read";
inline constexpr char kBareServerFlag[] = "--bare_server";

// Another process of this binary that runs ServeBareStream; ends with its owner.
class BareServer {
 public:
  // Blocks until the process serves. main() must call ServeBareStream when kBareServerFlag is its
  // only argument.
  static absl::StatusOr<std::unique_ptr<BareServer>> Start();
  ~BareServer();

  const std::string& target() const { return target_; }

 private:
  BareServer(pid_t process, int lifeline, std::string target)
      : process_(process), lifeline_(lifeline), target_(std::move(target)) {}

  const pid_t process_;
  const int lifeline_;  // the write end of the server's stdin, which serves until that ends
  const std::string target_;
};

// Prints the port it listens on and serves until stdin ends; the process's exit status.
int ServeBareStream();

}  // namespace prefilld

// prefillctl: SIGINT and SIGTERM stop the running command in order (its RPC is cancelled, its lease
// abandoned, its half-written files removed); a second one ends the process at once.
#include <pthread.h>
#include <signal.h>
#include <unistd.h>

#include <cstdlib>
#include <iostream>
#include <thread>

#include "client/cli/app.h"

int main(int argc, char** argv) {
  // Between two tries no call of ours polls: gRPC itself then looks every 5 s whether it is
  // connected, and so long would `health --wait` stand before a server that is up.
  setenv("GRPC_CLIENT_CHANNEL_BACKUP_POLL_INTERVAL_MS", "200", /*replace=*/0);
  // What gRPC has to say of a handshake, our errors say in words.
  setenv("GRPC_VERBOSITY", "NONE", /*replace=*/0);
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGINT);
  sigaddset(&signals, SIGTERM);
  pthread_sigmask(SIG_BLOCK, &signals, nullptr);  // before any thread starts: all inherit it

  static prefilld::client::Cancellation cancellation;  // outlives the detached thread
  std::thread([signals] {
    int signal = 0;
    sigwait(&signals, &signal);
    cancellation.Cancel();
    sigwait(&signals, &signal);
    _exit(1);
  }).detach();

  return prefilld::cli::RunApp(argc, argv,
                               {.out = std::cout,
                                .err = std::cerr,
                                .err_is_terminal = isatty(STDERR_FILENO) == 1,
                                .cancellation = cancellation});
}

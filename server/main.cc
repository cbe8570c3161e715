// prefilld: flags -> Config -> Server::Start -> wait for SIGTERM or SIGINT -> drain -> exit 0, or 1
// when a fault took the device.
#include <signal.h>
#include <unistd.h>

#include <cstdio>
#include <memory>
#include <thread>

#include "server/config.h"
#include "server/record/log.h"
#include "server/server.h"

namespace prefilld {
namespace {

int Fail(const absl::Status& status) {
  FlushLog();  // what it is about comes first
  std::fprintf(stderr, "prefilld: %s\n", std::string(status.message()).c_str());
  return 1;
}

int Run(int argc, char** argv) {
  auto parsed = ParseConfig(argc, argv);
  if (!parsed.ok()) return Fail(parsed.status());
  if (parsed->exit) return 0;

  // Before the first thread, so that every thread inherits it and only sigwait sees the signals.
  sigset_t stop;
  sigemptyset(&stop);
  sigaddset(&stop, SIGTERM);
  sigaddset(&stop, SIGINT);
  pthread_sigmask(SIG_BLOCK, &stop, nullptr);
  signal(SIGPIPE, SIG_IGN);
  signal(SIGXFSZ, SIG_IGN);  // ulimit -f: a segment over it is refused, that is all

  auto server = Server::Start(parsed->config);
  if (!server.ok()) return Fail(server.status());
  std::printf("listening on %s\nhttp on %s\n", (*server)->grpc_endpoint().ToString().c_str(),
              (*server)->http_endpoint().ToString().c_str());
  std::fflush(stdout);

  int signal_number = 0;
  sigwait(&stop, &signal_number);
  // A second signal does not wait for anybody.
  std::thread([stop, &server = **server] {
    int again = 0;
    sigwait(&stop, &again);
    server.RemoveSegments();
    Log(Level::kWarning, "killed", {{"signal", again}});
    FlushLog();
    _exit(1);
  }).detach();
  (*server)->Drain();
  Log(Level::kInfo, "stopped");
  FlushLog();
  // Nothing is left to save, and taking gRPC apart can take it ten seconds after a peer was killed.
  _exit((*server)->device_lost() ? 1 : 0);
}

}  // namespace
}  // namespace prefilld

int main(int argc, char** argv) { return prefilld::Run(argc, argv); }

// prefilld: flags -> Config -> Server::Start -> wait for a signal to stop -> drain -> exit 0, or 1
// when a fault took the device.
#include <fcntl.h>
#include <signal.h>
#include <sys/resource.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <memory>
#include <string>
#include <thread>

#include "absl/synchronization/notification.h"
#include "server/config.h"
#include "server/record/log.h"
#include "server/server.h"

namespace prefilld {
namespace {

int Fail(const absl::Status& status) {
  LogText("prefilld: " + std::string(status.message()));
  FlushLog();
  return 1;
}

// Else the number of a stream that the caller has closed goes to what is opened next, a peer's
// connection say, and our lines with it.
void KeepStandardStreams() {
  int fd;
  do {
    fd = open("/dev/null", O_RDWR);
  } while (fd >= 0 && fd <= STDERR_FILENO);
  if (fd >= 0) close(fd);
}

// A connection is a descriptor, and so is a segment: as many as may be had.
void RaiseDescriptorLimit() {
  rlimit limit{};
  if (getrlimit(RLIMIT_NOFILE, &limit) != 0) return;
  limit.rlim_cur = limit.rlim_max;
  setrlimit(RLIMIT_NOFILE, &limit);
}

int Run(int argc, char** argv) {
  KeepStandardStreams();
  auto parsed = ParseConfig(argc, argv);
  if (!parsed.ok()) return Fail(parsed.status());
  if (parsed->exit) return 0;

  // Before the first thread, so that every thread inherits it and only sigwait sees the signals.
  sigset_t stop;
  sigemptyset(&stop);
  for (const int signal_number : {SIGTERM, SIGINT, SIGHUP}) sigaddset(&stop, signal_number);
  pthread_sigmask(SIG_BLOCK, &stop, nullptr);
  RaiseDescriptorLimit();
  signal(SIGPIPE, SIG_IGN);
  signal(SIGXFSZ, SIG_IGN);  // ulimit -f: a segment over it is refused, that is all

  std::atomic<Server*> running = nullptr;
  absl::Notification stopped;
  std::thread([&] {
    int signal_number = 0;
    sigwait(&stop, &signal_number);
    if (running == nullptr) {  // nobody is served yet: nothing is left to do
      Log(Level::kInfo, "stopped", {{"signal", signal_number}, {"while", "starting"}});
      FlushLog();
      _exit(0);
    }
    stopped.Notify();
    sigwait(&stop, &signal_number);  // a second one does not wait for anybody
    running.load()->CloseMedia();
    Log(Level::kWarning, "killed", {{"signal", signal_number}});
    FlushLog();
    _exit(1);
  }).detach();

  auto server = Server::Start(parsed->config);
  if (!server.ok()) _exit(Fail(server.status()));  // the thread above has what is on this stack
  running = server->get();
  std::printf("listening on %s\nhttp on %s\n", (*server)->grpc_endpoint().ToString().c_str(),
              (*server)->http_endpoint().ToString().c_str());
  std::fflush(stdout);

  stopped.WaitForNotification();
  (*server)->Drain();
  Log(Level::kInfo, "stopped");
  FlushLog();
  // Nothing is left to save, and taking gRPC apart can take it ten seconds after a peer was killed.
  _exit((*server)->device_lost() ? 1 : 0);
}

}  // namespace
}  // namespace prefilld

int main(int argc, char** argv) { return prefilld::Run(argc, argv); }

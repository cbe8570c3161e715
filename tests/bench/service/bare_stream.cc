#include "tests/bench/service/bare_stream.h"

#include <fcntl.h>
#include <grpcpp/generic/async_generic_service.h>
#include <grpcpp/server.h>
#include <grpcpp/server_builder.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <mutex>
#include <vector>

#include "absl/strings/str_cat.h"

extern char** environ;

namespace prefilld {
namespace {

class BareService : public grpc::CallbackGenericService {
 public:
  grpc::ServerGenericBidiReactor* CreateReactor(grpc::GenericCallbackServerContext*) override {
    return new Reactor(*this);
  }

 private:
  class Reactor : public grpc::ServerGenericBidiReactor {
   public:
    explicit Reactor(BareService& service) : service_(service) { StartRead(&request_); }

    void OnReadDone(bool ok) override {
      if (!ok) return Finish(grpc::Status::CANCELLED);
      std::vector<grpc::Slice> slices;
      std::string bytes;
      if (!request_.Dump(&slices).ok()) return Finish(grpc::Status::CANCELLED);
      for (const grpc::Slice& slice : slices) {
        bytes.append(reinterpret_cast<const char*>(slice.begin()), slice.size());
      }
      sizes_.resize(bytes.size() / sizeof(uint32_t));
      std::memcpy(sizes_.data(), bytes.data(), sizes_.size() * sizeof(uint32_t));
      uint64_t total = 0;
      for (const uint32_t size : sizes_) total += size;
      data_ = service_.Memory(total);
      WriteNext();
    }
    void OnWriteDone(bool ok) override { ok ? WriteNext() : Finish(grpc::Status::CANCELLED); }
    void OnDone() override { delete this; }

   private:
    void WriteNext() {
      if (next_ == sizes_.size()) return Finish(grpc::Status::OK);
      const grpc::Slice slice(data_, sizes_[next_], grpc::Slice::STATIC_SLICE);
      message_ = grpc::ByteBuffer(&slice, 1);
      data_ += sizes_[next_++];
      StartWrite(&message_);
    }

    BareService& service_;
    grpc::ByteBuffer request_, message_;
    std::vector<uint32_t> sizes_;
    size_t next_ = 0;
    const char* data_ = nullptr;
  };

  // Bytes that were written to, and so lie in pages of their own, as a cache does.
  const char* Memory(uint64_t bytes) {
    std::lock_guard lock(mutex_);
    if (memory_.empty() || memory_.back().size() < bytes) memory_.emplace_back(bytes, 'x');
    return memory_.back().data();
  }

  std::mutex mutex_;
  std::vector<std::string> memory_;  // the last is the largest; earlier ones may still be read
};

}  // namespace

int ServeBareStream() {
  BareService service;
  grpc::ServerBuilder builder;
  int port = 0;
  builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port);
  builder.RegisterCallbackGenericService(&service);
  const std::unique_ptr<grpc::Server> server = builder.BuildAndStart();
  if (server == nullptr) return 1;
  std::printf("%d\n", port);
  std::fflush(stdout);
  while (std::getchar() != EOF) {
  }
  server->Shutdown();
  return 0;
}

absl::StatusOr<std::unique_ptr<BareServer>> BareServer::Start() {
  int in[2], out[2];  // each read end, write end
  if (pipe2(in, O_CLOEXEC) != 0) return absl::InternalError("pipe failed");
  if (pipe2(out, O_CLOEXEC) != 0) return absl::InternalError("pipe failed");
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_adddup2(&actions, in[0], STDIN_FILENO);
  posix_spawn_file_actions_adddup2(&actions, out[1], STDOUT_FILENO);
  const std::string flag = kBareServerFlag;
  char* const arguments[] = {const_cast<char*>("handoff"), const_cast<char*>(flag.c_str()),
                             nullptr};
  pid_t process = 0;
  const int failed = posix_spawn(&process, "/proc/self/exe", &actions, nullptr, arguments, environ);
  posix_spawn_file_actions_destroy(&actions);
  close(in[0]);
  close(out[1]);
  int port = 0;
  FILE* announced = fdopen(out[0], "r");
  const bool serves = failed == 0 && std::fscanf(announced, "%d", &port) == 1;
  std::fclose(announced);
  // From here on the destructor closes the lifeline and waits for the process.
  std::unique_ptr<BareServer> server(
      new BareServer(process, in[1], absl::StrCat("127.0.0.1:", port)));
  if (!serves) return absl::InternalError("the bare server did not start");
  return server;
}

BareServer::~BareServer() {
  close(lifeline_);
  if (process_ > 0) waitpid(process_, nullptr, 0);
}

}  // namespace prefilld

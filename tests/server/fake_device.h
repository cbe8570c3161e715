// A device with memory of its own, made of the host's: its stages are the CPU's and run at once.
// Copies on the upload stream and on the download stream wait until somebody waits for them, as on
// a real one, and memory that is freed under such a copy is told. Threads: any.
#pragma once

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "kernels/backend.h"

namespace prefilld {

// Who passes it waits while a test holds it.
class Gate {
 public:
  void Hold() {
    absl::MutexLock lock(&mutex_);
    held_ = true;
  }
  void Release() {
    absl::MutexLock lock(&mutex_);
    held_ = false;
  }
  void ReleaseOne() {  // who waits, or comes next
    absl::MutexLock lock(&mutex_);
    ++let_through_;
  }
  void Pass() {
    absl::MutexLock lock(&mutex_);
    const auto free = [this]()
                          ABSL_SHARED_LOCKS_REQUIRED(mutex_) { return !held_ || let_through_ > 0; };
    ++waiters_;
    mutex_.Await(absl::Condition(&free));
    --waiters_;
    if (held_) --let_through_;
  }
  void AwaitWaiter() const {  // until somebody waits
    absl::MutexLock lock(&mutex_);
    const auto waits = [this]() ABSL_SHARED_LOCKS_REQUIRED(mutex_) { return waiters_ > 0; };
    mutex_.Await(absl::Condition(&waits));
  }

 private:
  mutable absl::Mutex mutex_;
  bool held_ ABSL_GUARDED_BY(mutex_) = false;
  int waiters_ ABSL_GUARDED_BY(mutex_) = 0, let_through_ ABSL_GUARDED_BY(mutex_) = 0;
};

class FakeDevice : public Device {
 public:
  enum class Kind { kDevice, kHost };
  static constexpr double kSecondsBetweenMarks = 1e-6;
  struct Copied {
    const void* dst;
    const void* src;
    size_t bytes;
    bool upload;  // on the upload stream
  };

  std::string_view name() const override { return "fake"; }
  bool host_memory() const override { return false; }
  absl::StatusOr<Buffer> Allocate(size_t bytes) override { return Take(Kind::kDevice, bytes, 0); }
  std::optional<uint64_t> free_bytes() const override {  // where it is limited
    absl::MutexLock lock(&mutex_);
    const auto limit = limits_.find(Kind::kDevice);
    if (limit == limits_.end()) return std::nullopt;
    return limit->second - std::min(limit->second, LiveBytes(Kind::kDevice));
  }
  absl::StatusOr<Buffer> AllocateHost(size_t bytes) override {
    return Take(Kind::kHost, bytes, 0xCD);
  }
  void Discard(void*, size_t) override {}
  Stream upload_stream() const override { return {const_cast<char*>(&upload_)}; }
  Stream download_stream() const override { return {const_cast<char*>(&download_)}; }
  absl::StatusOr<Buffer> Register(void* data, size_t bytes) override {
    ++registrations_;
    ++registered_;
    return Buffer(data, bytes, [this](void*, size_t) { --registered_; });
  }
  absl::Status Copy(void* dst, const void* src, size_t bytes, Stream stream) override {
    absl::MutexLock lock(&mutex_);
    copied_.push_back({dst, src, bytes, stream.handle == &upload_});
    if (stream.handle != nullptr) {
      Push({stream.handle, {dst, src}, [=] { std::memcpy(dst, src, bytes); }});
    } else {
      std::memcpy(dst, src, bytes);
    }
    return absl::OkStatus();
  }
  // Work of a stream of copies: `run` uses memory at these places.
  void Enqueue(Stream stream, std::vector<const void*> places, std::function<void()> run) {
    absl::MutexLock lock(&mutex_);
    Push({stream.handle, std::move(places), std::move(run)});
  }
  absl::Status Wait(Stream, Stream before) override { return Reach(before); }
  absl::Status Wait(Stream stream, const Mark& mark) override {
    const auto& fake = static_cast<const FakeMark&>(mark);
    if (stream.handle != nullptr && fake.recorded() > 0) stages_waited_for_ = fake.recorded();
    return fake.Reach();
  }
  // By a copy: rows that the stages write, while nothing has waited for what they were enqueued
  // with.
  void ReadRows() { read_too_early_ = read_too_early_ || stages_waited_for_ < marks_recorded_; }
  bool read_too_early() const { return read_too_early_; }
  absl::Status Synchronize(Stream stream) override {
    if (stream.handle == nullptr) AwaitSteps();
    return Reach(stream);
  }
  absl::StatusOr<std::unique_ptr<Mark>> NewMark() override {
    return std::make_unique<FakeMark>(*this);
  }
  std::string_view fault() const override { return lost_ ? "illegal_address" : ""; }
  std::string_view uuid() const override { return "GPU-fake"; }
  // A file in memory, which other processes map as they would a real one's.
  absl::StatusOr<Buffer> AllocateShared(size_t bytes) override {
    bytes = (bytes + kSharedUnit - 1) / kSharedUnit * kSharedUnit;
    absl::MutexLock lock(&mutex_);
    if (!HasRoom(Kind::kDevice, bytes)) {
      return absl::ResourceExhaustedError(absl::StrCat("no ", bytes, " bytes"));
    }
    const int fd = memfd_create("fake", MFD_CLOEXEC);
    if (fd < 0 || ftruncate(fd, static_cast<off_t>(bytes)) != 0) std::abort();
    void* data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    live_[data] = {Kind::kDevice, bytes, fd};
    ++taken_;
    return Buffer(data, bytes, [this, fd](void* taken, size_t size) {
      frees_.Pass();
      Give(taken);
      munmap(taken, size);
      close(fd);
    });
  }
  absl::StatusOr<int> ExportShared(const Buffer& buffer) override {
    absl::MutexLock lock(&mutex_);
    const auto live = live_.find(buffer.data());
    if (live == live_.end() || live->second.fd < 0) return absl::InvalidArgumentError("not shared");
    const int fd = fcntl(live->second.fd, F_DUPFD_CLOEXEC, 0);
    if (fd < 0) return absl::InternalError(std::strerror(errno));
    return fd;
  }
  absl::Status Zero(void* data, size_t bytes) override {
    if (lost_) return absl::InternalError("an illegal memory access");
    std::memset(data, 0, bytes);
    ++zeroed_;
    return absl::OkStatus();
  }
  static constexpr size_t kSharedUnit = size_t{128} << 10;  // more than a page, and than a step

  void Lose() { lost_ = true; }
  // Who frees shared memory waits until ReleaseFrees.
  void HoldFrees() { frees_.Hold(); }
  void ReleaseFrees() { frees_.Release(); }
  void AwaitHeldFree() const { frees_.AwaitWaiter(); }
  // Who waits for a mark of another stream than the stages' waits until ReleaseMarks.
  void HoldMarks() { marks_.Hold(); }
  void ReleaseMarks() { marks_.Release(); }
  void AwaitHeldMark() const { marks_.AwaitWaiter(); }
  // And who waits for the stages' stream, or a mark of it, until ReleaseSteps.
  void HoldSteps() { steps_.Hold(); }
  void ReleaseSteps() { steps_.Release(); }
  void ReleaseOneStep() { steps_.ReleaseOne(); }
  void AwaitHeldStep() const { steps_.AwaitWaiter(); }
  // The work before such a mark will have failed, though the stages' stream has not: a copy, say.
  void FailMarks() { marks_fail_ = true; }
  int waits() const { return waits_; }  // for the stream of the stages
  // From now on no more than this of a kind at a time.
  void Limit(Kind kind, size_t bytes) {
    absl::MutexLock lock(&mutex_);
    limits_[kind] = bytes;
  }
  size_t live_bytes(Kind kind) const {
    absl::MutexLock lock(&mutex_);
    return LiveBytes(kind);
  }
  int registrations() const { return registrations_; }  // that there were
  int registered() const { return registered_; }        // that there are
  int zeroed() const { return zeroed_; }                // pieces
  int taken() const { return taken_; }  // pieces of memory of any kind, given back or not
  std::vector<Copied> copied() const {
    absl::MutexLock lock(&mutex_);
    return copied_;
  }
  void ForgetCopied() {
    absl::MutexLock lock(&mutex_);
    copied_.clear();
  }
  size_t pending() const {
    absl::MutexLock lock(&mutex_);
    return pending_.size();
  }
  bool freed_under_a_copy() const {
    absl::MutexLock lock(&mutex_);
    return freed_under_a_copy_;
  }

 private:
  struct Pending {
    const void* stream;
    std::vector<const void*> places;
    std::function<void()> run;
    uint64_t number = 0;  // in the order of all that was enqueued
  };

  void Push(Pending pending) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    pending.number = ++enqueued_;
    pending_.push_back(std::move(pending));
  }
  uint64_t enqueued() const {
    absl::MutexLock lock(&mutex_);
    return enqueued_;
  }
  // All of a stream is done, up to what was enqueued as number `last`.
  absl::Status Reach(Stream stream, uint64_t last = UINT64_MAX) {
    if (lost_) return absl::InternalError("an illegal memory access");
    std::vector<Pending> others;
    absl::MutexLock lock(&mutex_);
    for (Pending& pending : pending_) {
      if (pending.stream == stream.handle && pending.number <= last) {
        pending.run();
      } else {
        others.push_back(std::move(pending));
      }
    }
    pending_ = std::move(others);
    return absl::OkStatus();
  }
  void AwaitSteps() {
    ++waits_;
    steps_.Pass();
  }
  class FakeMark : public Mark {
   public:
    explicit FakeMark(FakeDevice& device) : device_(device) {}
    absl::Status Record(Stream stream) override {
      stream_ = stream;
      last_ = device_.enqueued();
      if (stream.handle == nullptr) recorded_ = ++device_.marks_recorded_;
      return absl::OkStatus();
    }
    absl::Status Reach() const { return device_.Reach(stream_, last_); }
    int recorded() const { return recorded_; }  // number of the mark of the stages' stream; else 0
    absl::Status Await() override {
      if (stream_.handle == nullptr) {
        device_.AwaitSteps();
        return device_.Reach(stream_);
      }
      device_.marks_.Pass();
      if (device_.marks_fail_) return absl::InternalError("a copy failed");
      return Reach();
    }
    double SecondsSince(const Mark& earlier) const override {
      return kSecondsBetweenMarks * (recorded_ - static_cast<const FakeMark&>(earlier).recorded_);
    }

   private:
    FakeDevice& device_;
    Stream stream_;
    uint64_t last_ = 0;  // that was enqueued before it
    int recorded_ = 0;
  };
  struct Live {
    Kind kind;
    size_t bytes;
    int fd = -1;
  };
  bool HasRoom(Kind kind, size_t bytes) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    const auto limit = limits_.find(kind);
    return limit == limits_.end() || LiveBytes(kind) + bytes <= limit->second;
  }

  absl::StatusOr<Buffer> Take(Kind kind, size_t bytes, int fill) {
    absl::MutexLock lock(&mutex_);
    if (!HasRoom(kind, bytes))
      return absl::ResourceExhaustedError(absl::StrCat("no ", bytes, " bytes"));
    void* data = std::aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
    std::memset(data, fill, bytes);
    live_[data] = {kind, bytes};
    ++taken_;
    return Buffer(data, bytes, [this](void* taken, size_t) {
      Give(taken);
      std::free(taken);
    });
  }

  void Give(void* data) {
    absl::MutexLock lock(&mutex_);
    const char* begin = static_cast<const char*>(data);
    const char* end = begin + live_[data].bytes;
    for (const Pending& pending : pending_) {
      for (const void* place : pending.places) {
        const char* at = static_cast<const char*>(place);
        if (at >= begin && at < end) freed_under_a_copy_ = true;
      }
    }
    live_.erase(data);
  }

  size_t LiveBytes(Kind kind) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_) {
    size_t bytes = 0;
    for (const auto& [data, live] : live_) bytes += live.kind == kind ? live.bytes : 0;
    return bytes;
  }

  std::atomic<bool> lost_{false}, marks_fail_{false}, read_too_early_{false};
  std::atomic<int> stages_waited_for_{0};
  std::atomic<int> waits_{0}, marks_recorded_{0}, taken_{0}, registrations_{0}, registered_{0};
  std::atomic<int> zeroed_{0};
  Gate marks_, steps_, frees_;
  char upload_ = 0, download_ = 0;  // their addresses name the streams
  mutable absl::Mutex mutex_;
  std::map<const void*, Live> live_ ABSL_GUARDED_BY(mutex_);
  std::map<Kind, size_t> limits_ ABSL_GUARDED_BY(mutex_);
  std::vector<Copied> copied_ ABSL_GUARDED_BY(mutex_);
  std::vector<Pending> pending_ ABSL_GUARDED_BY(mutex_);
  uint64_t enqueued_ ABSL_GUARDED_BY(mutex_) = 0;
  bool freed_under_a_copy_ ABSL_GUARDED_BY(mutex_) = false;
};

// The CPU's operations, but that K and V leave on the stream of copies.
class FakeOps : public Ops {
 public:
  FakeOps(FakeDevice& device, Ops& cpu) : device_(device), cpu_(cpu) {}

  DType activations(DType weights) const override { return cpu_.activations(weights); }
  int64_t tile_tokens() const override { return cpu_.tile_tokens(); }
  absl::StatusOr<std::unique_ptr<Linear>> Prepare(const LinearWeights& weights) override {
    return cpu_.Prepare(weights);
  }
  absl::StatusOr<std::unique_ptr<Norm>> Prepare(const NormWeights& weights) override {
    return cpu_.Prepare(weights);
  }
  absl::StatusOr<std::unique_ptr<Embedding>> Prepare(const EmbeddingWeights& weights) override {
    return cpu_.Prepare(weights);
  }
  absl::StatusOr<std::unique_ptr<Rotary>> Prepare(const RotaryFrequencies& frequencies) override {
    return cpu_.Prepare(frequencies);
  }
  absl::StatusOr<std::unique_ptr<PreparedTokens>> Prepare(BatchTokens tokens) override {
    std::memset(tokens.memory, 1, TokensBytes(static_cast<int64_t>(tokens.ids.size()), nullptr));
    return cpu_.Prepare(std::move(tokens));
  }
  size_t TokensBytes(int64_t tokens, const Rotary*) const override {
    return static_cast<size_t>(tokens) * 16;
  }
  absl::Status Embed(const EmbedArgs& args, Stream on) override { return cpu_.Embed(args, on); }
  absl::Status Normalize(const NormalizeArgs& args, Stream on) override {
    return cpu_.Normalize(args, on);
  }
  absl::Status AddProduct(const AddProductArgs& args, Stream on) override {
    return cpu_.AddProduct(args, on);
  }
  absl::Status ProjectQkv(const ProjectQkvArgs& args, Stream on) override {
    return cpu_.ProjectQkv(args, on);
  }
  absl::Status Gate(const GateArgs& args, Stream on) override { return cpu_.Gate(args, on); }
  absl::Status Logits(const LogitsArgs& args, Stream on) override { return cpu_.Logits(args, on); }
  absl::Status RemoveRows(const RemoveRowsArgs& args, Stream on) override {
    return cpu_.RemoveRows(args, on);
  }
  size_t WriteKvBytes(size_t kv_bytes) const override { return kv_bytes; }
  absl::Status ReserveWriteKv(size_t bytes) override { return Grow(device_, bytes, out_); }
  absl::Status WriteKv(const WriteKvArgs& args, Stream stream) override {
    int64_t out = 0;
    std::vector<const void*> places = {args.k.data, args.v.data};
    for (const WriteKvArgs::Part& part : args.parts) {
      out += static_cast<int64_t>(part.target.pages.size() * SizeOf(part.target.dtype)) * 2 *
             part.target.page_tokens * args.kv_heads * args.head_dim;
      places.insert(places.end(), part.target.pages.begin(), part.target.pages.end());
    }
    absl::Status status = ReserveWriteKv(static_cast<size_t>(out));
    if (!status.ok()) return status;
    device_.ReadRows();
    device_.Enqueue(stream, places, [this, args] { (void)cpu_.WriteKv(args, Stream{}); });
    return absl::OkStatus();
  }

 private:
  FakeDevice& device_;
  Ops& cpu_;
  Buffer out_;  // as large as what a real device puts together
};

// The CPU's stages on that device.
class FakeBackend : public Backend {
 public:
  std::string_view name() const override { return "fake"; }
  FakeDevice& device() override { return device_; }
  absl::StatusOr<Ops*> ops() override { return &ops_; }
  absl::Status Supports(const AttentionShape& shape, const SparsityPolicy& policy) const override {
    return cpu_->Supports(shape, policy);
  }
  size_t WorkspaceBytes(const AttentionShape& shape, const SparsityPolicy& policy) const override {
    return policy.method == Method::kDense ? 0 : static_cast<size_t>(shape.total_q()) * 8;
  }
  absl::Status ReserveWorkspace(size_t bytes) override { return Grow(device_, bytes, workspace_); }
  absl::Status ReleaseWorkspace() override { return Release(device_, workspace_); }
  absl::Status EstimatePattern(const AttentionArgs& args, Stream stream) override {
    absl::Status status = ReserveWorkspace(WorkspaceBytes(args.shape, args.policy));
    return status.ok() ? cpu_->EstimatePattern(args, stream) : status;
  }
  absl::Status SelectBlocks(const AttentionArgs& args, Stream stream) override {
    return cpu_->SelectBlocks(args, stream);
  }
  absl::Status MeasureCapturedMass(const AttentionArgs& args, Stream stream) override {
    return cpu_->MeasureCapturedMass(args, stream);
  }
  absl::Status Attend(const AttentionArgs& args, Stream stream) override {
    return cpu_->Attend(args, stream);
  }

 private:
  FakeDevice device_;
  Buffer workspace_;
  std::unique_ptr<Backend> cpu_ = *CreateBackend("cpu", 1);
  FakeOps ops_{device_, **cpu_->ops()};
};

}  // namespace prefilld

// A backend runs the stages of attention and the other operations of a transformer on one device.
// The engine thread alone calls it. Stages are enqueued on a stream and never wait for it; the CPU
// backend's only stream runs inline.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/attention.h"
#include "kernels/ops.h"

namespace prefilld {

// Memory, freed with its owner: the device's or the host's, as whoever made it says. Without a Free
// it is somebody else's.
class Buffer {
 public:
  using Free = std::function<void(void* data, size_t bytes)>;
  Buffer() = default;
  Buffer(void* data, size_t bytes, Free free)
      : data_(data), bytes_(bytes), free_(std::move(free)) {}
  Buffer(Buffer&& other) noexcept { *this = std::move(other); }
  Buffer& operator=(Buffer&& other) noexcept;
  ~Buffer();

  void* data() const { return data_; }
  size_t bytes() const { return bytes_; }
  template <typename T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  void* data_ = nullptr;
  size_t bytes_ = 0;
  Free free_;
};

// One device and its memory. Threads: any. Only Synchronize and Mark::Await wait for work on the
// device.
//
// Work is enqueued on streams. Stream{} is the one that the stages run on; beside them run, on
// upload_stream(), copies for the next job, and on download_stream() those of what is done, K and V
// of a layer on their way to its cache. On the CPU all run inline.
class Device {
 public:
  virtual ~Device() = default;
  virtual std::string_view name() const = 0;  // for logs: CPU model, GPU name
  // The stages compute in host memory, AllocateHost and Allocate give the same: nothing need be
  // copied. True of the CPU.
  virtual bool host_memory() const = 0;

  // Zeroed device memory, 64-byte aligned; RESOURCE_EXHAUSTED when there is none. On the CPU pages
  // are taken from the system at first touch.
  virtual absl::StatusOr<Buffer> Allocate(size_t bytes) = 0;
  // What Allocate can still give. Nothing where pages are taken at first touch.
  virtual std::optional<uint64_t> free_bytes() const { return std::nullopt; }
  // Host memory that the device reads and writes directly and copies at full speed; its contents
  // are unspecified. Taking more of it is slow, so what is freed is kept for the next, up to a
  // bound. Free it only when no enqueued work uses it any more.
  virtual absl::StatusOr<Buffer> AllocateHost(size_t bytes) = 0;
  // From now on host memory of somebody else's, at the begin of a page, is copied as if it were
  // AllocateHost's, until what is returned goes. Takes as long as to allocate as much. Empty where
  // nothing need be done.
  virtual absl::StatusOr<Buffer> Register(void* data, size_t bytes) = 0;
  // The contents of this part of a buffer are of no use any more: what the system can have of its
  // memory it gets, until the part is written again. Unspecified until then.
  virtual void Discard(void* data, size_t bytes) = 0;

  virtual Stream upload_stream() const = 0;
  virtual Stream download_stream() const = 0;
  // Enqueues a copy in any direction between device memory and host memory; both stay until it is
  // done. Host memory that is neither AllocateHost's nor pinned may make the caller wait for it.
  virtual absl::Status Copy(void* dst, const void* src, size_t bytes, Stream stream) = 0;
  class Mark;
  // What is enqueued on `stream` from now on starts after all that is on `before` now.
  virtual absl::Status Wait(Stream stream, Stream before) = 0;
  // And after what is before a mark that has been recorded: nothing is enqueued where that is done.
  virtual absl::Status Wait(Stream stream, const Mark& mark) = 0;
  // Blocks until all that is enqueued on the stream is done, and tells how it went.
  virtual absl::Status Synchronize(Stream stream) = 0;
  // A point in the work of a stream, and when it was reached. Recorded again and again.
  class Mark {
   public:
    virtual ~Mark() = default;
    // From now on it stands behind all that is enqueued on `stream` now. One thread.
    virtual absl::Status Record(Stream stream) = 0;
    // Blocks until it is reached, and tells how the work before it went. Any thread.
    virtual absl::Status Await() = 0;
    // From an earlier mark of this device to this one, once both are reached.
    virtual double SecondsSince(const Mark& earlier) const = 0;
  };
  // The device outlives it.
  virtual absl::StatusOr<std::unique_ptr<Mark>> NewMark() = 0;
  // Empty until something happens after which no work can run in this process any more, whatever is
  // called then fails; then its kind, one of kFaultKinds.
  virtual std::string_view fault() const { return {}; }
  static constexpr const char* kFaultKinds[] = {"illegal_address", "launch_failure", "ecc",
                                                "other"};

  // Bytes that the device's allocations hold now, by kind; empty where the system's tools tell.
  struct Memory {
    const char* kind;
    uint64_t bytes;
  };
  virtual std::vector<Memory> memory() const { return {}; }

  // Device memory shared with other processes of this host; empty and UNIMPLEMENTED where there is
  // no such thing. The uuid names the device to them ("GPU-...").
  virtual std::string_view uuid() const { return {}; }
  // As Allocate, but that other processes can map it, all of it and nothing else: rounded up to
  // what the driver has as its least, which bytes() says. Zero when it returns. Waits for the
  // driver, and to free it waits for what is enqueued now, a step it may be.
  virtual absl::StatusOr<Buffer> AllocateShared(size_t bytes);
  // A new descriptor of such a buffer, which the caller closes; with it, and with whoever has
  // mapped it, the memory lives on when the buffer is gone.
  virtual absl::StatusOr<int> ExportShared(const Buffer& buffer);
  // Device memory that no enqueued work uses is zero when it returns. Waits for that, and for no
  // work on the streams above.
  virtual absl::Status Zero(void* data, size_t bytes);
};

// At least `bytes` of the device's, or of AllocateHost's: the buffer, or a new one in its place,
// for which the old one goes first, when no enqueued work can use it any more: growing waits for
// the device. RESOURCE_EXHAUSTED.
absl::Status Grow(Device& device, size_t bytes, Buffer& buffer);
absl::Status GrowHost(Device& device, size_t bytes, Buffer& buffer);
// The buffer goes, likewise.
absl::Status Release(Device& device, Buffer& buffer);

class Backend {
 public:
  virtual ~Backend() = default;
  virtual std::string_view name() const = 0;  // "cpu"
  virtual Device& device() = 0;
  // A transformer's other operations. UNAVAILABLE, and why, where models cannot run.
  virtual absl::StatusOr<Ops*> ops() = 0;

  // The admission check: UNIMPLEMENTED, naming what was asked and what exists. Threads: any.
  virtual absl::Status Supports(const AttentionShape& shape,
                                const SparsityPolicy& policy) const = 0;
  // The same for AttentionArgs::per_head. UNIMPLEMENTED where all heads have one policy.
  virtual absl::Status SupportsPerHead(const AttentionShape& shape,
                                       const HeadPolicies& heads) const;

  // Device memory that the stages of such a call use beside its arguments. It is kept, grows to the
  // largest call, and can be taken before the first (RESOURCE_EXHAUSTED) and given back between
  // two, which waits for the device. None on the CPU. Threads of WorkspaceBytes: any.
  virtual size_t WorkspaceBytes(const AttentionShape&, const SparsityPolicy&) const { return 0; }
  virtual absl::Status ReserveWorkspace(size_t) { return absl::OkStatus(); }
  virtual absl::Status ReleaseWorkspace() { return absl::OkStatus(); }

  // Stage 1: probes rows, leaves the method's maps in the backend's workspace.
  virtual absl::Status EstimatePattern(const AttentionArgs& args, Stream stream) = 0;
  // Stage 2: writes args.index, and pattern, dense_reason and density of args.report.
  virtual absl::Status SelectBlocks(const AttentionArgs& args, Stream stream) = 0;
  // Between 2 and 3, where a policy asks for it (Measures): captured mass of its heads on rows
  // sampled for that; heads below the minimum get every causal block.
  virtual absl::Status MeasureCapturedMass(const AttentionArgs& args, Stream stream) = 0;
  // Stage 3: attention over the blocks in args.index; reads nothing else of the method.
  virtual absl::Status Attend(const AttentionArgs& args, Stream stream) = 0;
};

// The closed table of backends: "cpu", "cuda", and "auto", which is cuda where this build and
// machine have it, else cpu. threads: of the CPU, 0 means all processors. INVALID_ARGUMENT for an
// unknown name, UNAVAILABLE where there is no device for it.
struct CudaOptions {
  std::string kernels = "auto";  // which set runs: "sm80", "sm90", or the best that the device has
  std::string cache_dir;  // where what was measured is kept for the next start; empty: nowhere
  // Bytes of the device's memory that are taken at most, beside what the driver needs for itself.
  uint64_t memory_bytes = std::numeric_limits<uint64_t>::max();
};
absl::StatusOr<std::unique_ptr<Backend>> CreateBackend(std::string_view name, int threads,
                                                       const CudaOptions& cuda = {});

}  // namespace prefilld

// A job: one accepted request on its way through the server. The RPC thread makes it, the scheduler
// runs it, the sink tells the RPC side what happened. Shared by both; each field says who writes
// it.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "kernels/attention.h"
#include "kernels/backend.h"
#include "server/clock.h"

namespace prefilld {

class KvCache;
class Transformer;

enum class Phase { kQueue, kUpload, kEstimate, kSelect, kAttention, kLinear, kHandoff };
inline constexpr std::array<const char*, 7> kPhaseNames = {
    "queue", "upload", "estimate", "select", "attention", "linear", "handoff"};
using PhaseSeconds = std::array<double, kPhaseNames.size()>;

// Per layer and head what was computed; an Attend has one layer per sequence.
struct JobReport {
  int layers = 0;
  int heads = 0;
  std::vector<HeadReport> entries;  // [layers, heads]
  bool captured_mass_measured = false;

  double MeanDensity() const;
  double MeanCapturedMass() const;  // 0 when not measured
};

// Told by the completion queue's thread, in order; must not block. OnFinished comes exactly once,
// last, and after it the job's results (outputs, phases, report) are read-only for everyone.
class JobSink {
 public:
  virtual ~JobSink() = default;
  virtual void OnLayerReady(int layer, double density, double captured_mass) = 0;
  virtual void OnFinished(const absl::Status& status) = 0;
};

struct AttendWork {
  AttentionShape shape;
  double softmax_scale = 0;
  bool return_lse = false;
  bool return_block_index = false;
  // Where the stages read and write, allocated at admission; lse only when it is returned. Device
  // memory: a caller on the same device writes q, k and v there itself, else the RPC thread
  // enqueues copies on Device::upload_stream() until Scheduler::UploadDone.
  Buffer q, k, v;
  Buffer o;    // [total_q, q_heads, d]
  Buffer lse;  // F32 [q_heads, total_q]
  // Where the engine copies o and lse when they are done, pinned. Empty where they need not move:
  // the device computes in host memory, or the caller reads them on the device.
  Buffer host_o, host_lse;
  // Where it copies the block index, as BlockIndexView has it. Empty where nobody asked for it.
  Buffer host_count, host_index;
  // The Region that the caller reads and writes, and that the buffers above may point into (it
  // keeps the job's budget too, as it may outlive the job); and the Staging that copies into them,
  // which goes before them.
  std::shared_ptr<void> region, staging;
  // The index as callers read it, [q_heads, rows, longest row], -1 padding; by whoever answers.
  std::vector<int32_t> block_index;
};

struct PrefillWork {
  Transformer* model = nullptr;
  std::vector<uint32_t> token_ids;
  std::shared_ptr<KvCache> cache;
  bool return_logits = false;
  std::vector<float> logits;  // [vocab_size], by the engine
  absl::Status committed;     // by the completion thread: why the layers end where they do
};

// Until when callers wait; it only moves on, as one who attaches may wait for longer. Threads: any.
class Deadline {
 public:
  Deadline(SteadyTime at = absl::InfiniteFuture()) : nanos_(NanosOf(at)) {}  // NOLINT: it is one
  Deadline& operator=(SteadyTime at) {
    nanos_ = NanosOf(at);
    return *this;
  }
  SteadyTime at() const {
    const int64_t nanos = nanos_;
    return nanos == kNever ? absl::InfiniteFuture() : absl::FromUnixNanos(nanos);
  }
  void MoveTo(SteadyTime at) {
    const int64_t later = NanosOf(at);
    for (int64_t now = nanos_; now < later && !nanos_.compare_exchange_weak(now, later);) {
    }
  }

 private:
  static constexpr int64_t kNever = std::numeric_limits<int64_t>::max();
  static int64_t NanosOf(SteadyTime at) { return absl::ToUnixNanos(at); }  // kNever: infinite

  std::atomic<int64_t> nanos_;
};

struct Job {
  Deadline deadline;  // the latest of its callers

  // Set before admission, constant afterwards.
  std::string request_id;
  std::string peer;  // whose share of the engine its work is
  double share = 1;  // how large that is beside others'
  int priority = 0;  // higher first
  SteadyTime arrival = SteadyNow();
  SparsityPolicy policy;
  bool method_unspecified = false;  // dense may be chosen where it is faster
  uint64_t held_bytes = 0;          // host memory of an Attend: tensors, outputs, block index
  // By Scheduler::Admit: takes held_bytes back when the last that holds it goes. Before the memory
  // it stands for, so that it goes after it.
  std::shared_ptr<void> budget;
  std::unique_ptr<AttendWork> attend;  // exactly one of the two
  std::unique_ptr<PrefillWork> prefill;
  std::shared_ptr<JobSink> sink;

  // By Scheduler::Cancel: honoured between steps, and within attention over many blocks.
  std::atomic<bool> cancelled{false};

  // By who takes an Attend's tensors: when something of them last came.
  Deadline moved = SteadyNow();

  // By the scheduler, under its lock: what the job is counted among.
  enum class Place { kNone, kUploading, kWaiting } place = Place::kNone;

  // By Scheduler::Admit.
  int queue_position = 0;
  absl::Duration estimated_wait;
  // It is done by then (policy.h), later by what its caller keeps it waiting; of an Attend from
  // UploadDone on. Then the scheduler's thread's.
  SteadyTime promise = absl::InfiniteFuture();

  // By the scheduler's thread until OnFinished.
  PhaseSeconds phases{};
  JobReport report;
  SteadyTime uploaded = absl::InfiniteFuture();  // by Scheduler::UploadDone

  int64_t tokens() const {
    return attend ? attend->shape.total_q() : static_cast<int64_t>(prefill->token_ids.size());
  }
};

}  // namespace prefilld

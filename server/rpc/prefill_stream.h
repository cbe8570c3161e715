// What happened to one prompt, as events that any number of callers read from the start: the
// history that makes a request_id idempotent. It is the job's sink, lives in the registry until its
// lease ends, and ends the lease when the computation fails or its last reader takes its call back.
// Thread-safe; never blocks.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "prefilld/v1/prefill_service.pb.h"
#include "server/caller.h"
#include "server/job.h"
#include "server/kv/lease_table.h"
#include "server/transport/region.h"

namespace prefilld {

struct RpcContext;
struct ValidPrefill;

class PrefillStream final : public JobSink, public std::enable_shared_from_this<PrefillStream> {
 public:
  class Reader {
   public:
    virtual ~Reader() = default;
    virtual void OnEvents() = 0;              // more can be read; any thread
    virtual SteadyTime deadline() const = 0;  // it waits until then
    virtual bool broke() const = 0;           // it did not leave: its connection broke
  };

  // Takes blocks, a place in the queue and a lease, all or none, for `reader` of `caller`.
  // `content` is compared with that of the caller's later requests of the same id: a hash does.
  // Where the cache is to lie in a region that has to be made, which takes time, only the blocks
  // that stand for it are taken here: a thread that may wait does the rest, and readers hear how it
  // went.
  static absl::StatusOr<std::shared_ptr<PrefillStream>> Start(
      RpcContext& rpc, const Caller& caller, ValidPrefill valid, std::string content,
      const std::shared_ptr<Reader>& reader);
  static void LogRefusal(const std::string& request_id, const absl::Status& why);

  const Caller& caller() const { return caller_; }
  const std::string& content() const { return content_; }
  const std::string& request_id() const { return request_id_; }
  uint64_t generation() const;

  // The work's deadline is the latest of its readers'.
  // False: it ended before it began, or its last reader has given it up; it is of use to nobody.
  bool Attach(const std::shared_ptr<Reader>& reader);
  // Where the last reader takes its call back, the work ends: nobody waits for it. Where its
  // connection broke, or somebody has renewed the lease, it goes on while the lease lives, whose
  // ttl starts: the reader, or another, comes again.
  void Detach(const Reader* reader);

  // Event `index`, which stays where it is while the stream lives; or null when it has not
  // happened yet, or never will: then *end says how the stream ended.
  const v1::PrefillEvent* Get(size_t index, absl::Status* end, bool* ended) const;

  void OnLayerReady(int layer, double density, double captured_mass) override;
  void OnFinished(const absl::Status& status) override;

 private:
  PrefillStream(RpcContext& rpc, const Caller& caller, std::shared_ptr<Job> job,
                std::string content);
  absl::Status Begin(const ValidPrefill& valid) ABSL_LOCKS_EXCLUDED(mutex_);
  absl::Status Place(Medium& medium, const ValidPrefill& valid) ABSL_LOCKS_EXCLUDED(mutex_);
  void BeginInRegion(Medium& medium, const ValidPrefill& valid) ABSL_LOCKS_EXCLUDED(mutex_);
  bool GivenUp() const ABSL_LOCKS_EXCLUDED(mutex_);
  void WakeReaders() ABSL_LOCKS_EXCLUDED(mutex_);
  void AppendResults(const Job& job) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mutex_);

  RpcContext& rpc_;
  const Caller caller_;
  const std::string content_;
  const std::string request_id_;
  mutable absl::Mutex mutex_;
  std::shared_ptr<Job> job_ ABSL_GUARDED_BY(mutex_);  // until OnFinished
  LeaseInfo lease_ ABSL_GUARDED_BY(mutex_);           // generation 0: it has not begun
  std::deque<v1::PrefillEvent> events_ ABSL_GUARDED_BY(mutex_);
  bool ended_ ABSL_GUARDED_BY(mutex_) = false;
  bool given_up_ ABSL_GUARDED_BY(mutex_) = false;  // by its last reader
  absl::Status end_ ABSL_GUARDED_BY(mutex_);
  std::vector<std::shared_ptr<Reader>> readers_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace prefilld

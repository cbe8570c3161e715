#include "server/rpc/prefill_stream.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "server/kv/kv_cache.h"
#include "server/record/errors.h"
#include "server/record/log.h"
#include "server/rpc/context.h"
#include "server/rpc/messages.h"
#include "server/rpc/status.h"
#include "server/rpc/validate.h"

namespace prefilld {
namespace {

KvGeometry GeometryFor(const Job& job) {
  return GeometryOf(job.prefill->model->info(), job.tokens());
}

// It takes its blocks when the prompt starts.
void WaitForBlocks(RpcContext& rpc, const ValidPrefill& valid) {
  valid.job->prefill->cache =
      KvCache::CreateWaiting(*rpc.pool, GeometryFor(*valid.job), valid.retain);
}

// A region stands for blocks and is made at admission: so that waiting prompts do not have them
// all, a few have theirs. The others' caches are sent, where that is possible.
absl::Status TakeBlocksAhead(RpcContext& rpc, ValidPrefill& valid) {
  const KvGeometry geometry = GeometryFor(*valid.job);
  const int64_t blocks = geometry.layers_held(valid.retain) * geometry.blocks_per_layer();
  valid.ahead = rpc.scheduler.TakeAhead(*rpc.pool, blocks);
  if (valid.ahead == nullptr) {
    return RetryLater(absl::StatusCode::kResourceExhausted, "kv_memory",
                      absl::StrCat("the KV cache needs ", blocks, " of ", rpc.pool->total(),
                                   " blocks, waiting prompts have a quarter of them"),
                      absl::Seconds(1));
  }
  auto cache = KvCache::Create(*rpc.pool, geometry, valid.retain);
  if (cache.ok()) valid.job->prefill->cache = *std::move(cache);
  return cache.status();
}

// For a region of this size.
KvCache::Later LaterOf(const RpcContext& rpc, uint64_t bytes) {
  // What takes no time to give back is free as soon as its lease has ended.
  constexpr uint64_t kQuickBytes = uint64_t{64} << 20;
  if (bytes <= kQuickBytes && rpc.backend.device().host_memory()) return nullptr;
  return [memory = rpc.memory](std::function<void()> work) { memory->PostFirst(std::move(work)); };
}

// False: nothing of the pool is ready.
bool LieInReady(RpcContext& rpc, SegmentPool& pool, const ValidPrefill& valid) {
  const KvGeometry geometry = GeometryFor(*valid.job);
  auto region = pool.Take(geometry.region_bytes());
  if (region == nullptr) return false;
  valid.job->prefill->cache = KvCache::CreateIn(
      std::move(region), LaterOf(rpc, geometry.region_bytes()), *rpc.pool, geometry);
  return true;
}

}  // namespace

absl::StatusOr<std::shared_ptr<PrefillStream>> PrefillStream::Start(
    RpcContext& rpc, const Caller& caller, ValidPrefill valid, std::string content,
    const std::shared_ptr<Reader>& reader) {
  const std::shared_ptr<Job> job = valid.job;
  absl::Status status = rpc.scheduler.CheckOpen(*job);
  Medium* medium = FindMedium(rpc.media, valid.transport);
  SegmentPool* const pool = medium == nullptr ? nullptr : FindPool(rpc.segments, valid.transport);
  if (status.ok() && pool == nullptr && medium != nullptr) {
    status = TakeBlocksAhead(rpc, valid);
    if (FactsOf(status).retry_after && !valid.pinned) {
      status = absl::OkStatus();
      medium = nullptr;
    }
  }
  if (!status.ok()) return status;
  if (medium == nullptr) WaitForBlocks(rpc, valid);
  const bool ready = medium == nullptr || (pool != nullptr && LieInReady(rpc, *pool, valid));
  std::shared_ptr<PrefillStream> stream(new PrefillStream(rpc, caller, job, std::move(content)));
  job->sink = stream;
  stream->Attach(reader);
  if (!ready) {
    rpc.memory->Post(
        [stream, medium, valid = std::move(valid)] { stream->BeginInRegion(*medium, valid); });
    return stream;
  }
  status = stream->Begin(valid);
  if (!status.ok()) return status;
  return stream;
}

// The memory that Start could not have at once.
absl::Status PrefillStream::Place(Medium& medium, const ValidPrefill& valid) {
  std::shared_ptr<KvCache>& cache = valid.job->prefill->cache;  // null: it is the pool's to make
  const KvGeometry geometry = GeometryFor(*valid.job);
  const uint64_t bytes = geometry.region_bytes();
  auto region = cache ? medium.Create(bytes, PeerAccess::kRead)
                      : FindPool(rpc_.segments, valid.transport)->Make(bytes);
  if (!region.ok()) {
    rpc_.metrics.TransportRefused(Name(valid.transport), Metrics::kNoMemory);
    if (valid.pinned) return region.status();
    if (!cache) WaitForBlocks(rpc_, valid);  // the caller can do without
    return absl::OkStatus();
  }
  if (GivenUp()) return absl::OkStatus();
  if (cache) {
    cache->LieIn(Region::Link(*std::move(region)), LaterOf(rpc_, bytes));
  } else {
    cache = KvCache::CreateIn(*std::move(region), LaterOf(rpc_, bytes), *rpc_.pool, geometry);
  }
  return absl::OkStatus();
}

void PrefillStream::BeginInRegion(Medium& medium, const ValidPrefill& valid) {
  if (GivenUp()) return;
  absl::Status status = Place(medium, valid);
  if (GivenUp()) return;
  const bool placed = status.ok();
  if (placed) status = Begin(valid);
  if (!status.ok()) {
    if (GivenUp()) return;
    rpc_.metrics.Rejected(status);
    LogRefusal(request_id_, status);
    rpc_.prefills.Forget(*this);
    absl::MutexLock lock(&mutex_);
    if (!placed) job_.reset();
    ended_ = true;
    end_ = status;
  }
  WakeReaders();
}

bool PrefillStream::GivenUp() const {
  absl::MutexLock lock(&mutex_);
  return given_up_;
}

// A place in the queue and a lease, or neither.
absl::Status PrefillStream::Begin(const ValidPrefill& valid) {
  // The engine's events wait behind this lock, so that the admission is the first.
  absl::MutexLock lock(&mutex_);
  const std::shared_ptr<Job> job = valid.job;
  const std::shared_ptr<KvCache> cache = job->prefill->cache;
  if (given_up_) return end_;
  absl::Status status = rpc_.scheduler.Admit(job);
  if (status.ok()) {
    lease_ = rpc_.leases.Grant(job->request_id, caller_, cache, valid.lease_ttl,
                               [&rpc = rpc_, job] { rpc.scheduler.Cancel(job); });
    rpc_.metrics.leases_granted.Increment();
  } else {
    job_.reset();
    cache->Close(status);
    return status;
  }

  const ModelInfo& info = job->prefill->model->info();
  v1::Admission& admission = *events_.emplace_back().mutable_admission();
  admission.set_request_id(job->request_id);
  admission.set_queue_position(static_cast<uint32_t>(job->queue_position));
  *admission.mutable_estimated_wait() = ProtoOf(job->estimated_wait);
  *admission.mutable_lease() = ProtoOf(lease_, cache->geometry(), rpc_.boot_id);
  admission.set_fingerprint(info.fingerprint);
  admission.set_transport(ProtoOf(cache->transport()));
  if (RowOf(cache->transport()).open != nullptr) {
    *admission.add_buffers() = BufferAt(cache->address(), 0, cache->geometry().region_bytes());
  }
  rpc_.metrics.prompt_tokens.Observe(static_cast<double>(job->tokens()));
  Log(Level::kInfo, "prefill_admitted",
      {{"request_id", job->request_id},
       {"model", info.name},
       {"method", Name(job->policy.method)},
       {"tokens", job->tokens()},
       {"retain", valid.retain},
       {"transport", Name(cache->transport())},
       {"generation", lease_.generation}});
  return absl::OkStatus();
}

void PrefillStream::LogRefusal(const std::string& request_id, const absl::Status& why) {
  const grpc::Status wire = ToGrpcStatus(why);
  Log(Level::kWarning, "prefill_refused",
      {{"request_id", request_id},
       {"code", CodeName(wire.error_code())},
       {"message", wire.error_message()}});
}

PrefillStream::PrefillStream(RpcContext& rpc, const Caller& caller, std::shared_ptr<Job> job,
                             std::string content)
    : rpc_(rpc),
      caller_(caller),
      content_(std::move(content)),
      request_id_(job->request_id),
      job_(std::move(job)) {}

uint64_t PrefillStream::generation() const {
  absl::MutexLock lock(&mutex_);
  return lease_.generation;
}

bool PrefillStream::Attach(const std::shared_ptr<Reader>& reader) {
  absl::MutexLock lock(&mutex_);
  if (given_up_ || (ended_ && lease_.generation == 0)) return false;
  readers_.push_back(reader);
  if (job_) job_->deadline.MoveTo(reader->deadline());
  if (lease_.generation != 0) rpc_.leases.SetFollowed(lease_.name, lease_.generation, true);
  return true;
}

void PrefillStream::Detach(const Reader* reader) {
  std::shared_ptr<Reader> gone;
  std::shared_ptr<Job> job;
  LeaseInfo abandoned;
  {
    absl::MutexLock lock(&mutex_);
    const auto found = std::find_if(readers_.begin(), readers_.end(),
                                    [&](const auto& r) { return r.get() == reader; });
    if (found == readers_.end()) return;
    gone = std::move(*found);
    readers_.erase(found);
    if (!readers_.empty() || ended_) return;
    if (lease_.generation != 0 &&
        (reader->broke() || rpc_.leases.WasRenewed(lease_.name, lease_.generation))) {
      rpc_.leases.SetFollowed(lease_.name, lease_.generation, false);
      return;
    }
    given_up_ = true;
    abandoned = lease_;
    if (abandoned.generation == 0) {  // nothing has begun, and nothing will
      ended_ = true;
      end_ = absl::CancelledError("the caller went away");
      job.swap(job_);
    }
  }
  if (abandoned.generation == 0) return rpc_.prefills.Forget(*this);
  // Nobody waits for this any more: the lease's end cancels the work. It may have ended already.
  (void)rpc_.leases.Release(abandoned.name, abandoned.generation, LeaseEnd::kAbandoned);
}

const v1::PrefillEvent* PrefillStream::Get(size_t index, absl::Status* end, bool* ended) const {
  absl::MutexLock lock(&mutex_);
  if (index < events_.size()) return &events_[index];
  *ended = ended_;
  *end = end_;
  return nullptr;
}

void PrefillStream::OnLayerReady(int layer, double density, double captured_mass) {
  {
    absl::MutexLock lock(&mutex_);
    v1::LayerReady& ready = *events_.emplace_back().mutable_layer_ready();
    ready.set_layer(static_cast<uint32_t>(layer));
    ready.set_density(density);
    ready.set_captured_mass(captured_mass);
  }
  WakeReaders();
}

void PrefillStream::OnFinished(const absl::Status& status) {
  std::shared_ptr<Job> job;
  LeaseInfo lease;
  {
    absl::MutexLock lock(&mutex_);
    job.swap(job_);
    lease = lease_;
    if (status.ok()) AppendResults(*job);
    ended_ = true;
    end_ = status;
  }
  const ModelInfo& info = job->prefill->model->info();
  if (status.ok()) {
    rpc_.reports.Add({caller_.tenant, job->request_id, info.name, job->policy.method,
                      job->policy.gamma, job->tokens(), job->report});
  } else {
    // Layers without their successors are of no use to anybody. The lease may have ended already.
    (void)rpc_.leases.Release(lease.name, lease.generation, LeaseEnd::kAbandoned);
  }
  Log(status.ok() ? Level::kInfo : Level::kWarning, "prefill_finished",
      {{"request_id", job->request_id},
       {"model", info.name},
       {"code", CodeName(static_cast<grpc::StatusCode>(status.code()))},
       {"message", std::string(status.message())},
       {"tokens", job->tokens()},
       {"seconds", absl::ToDoubleSeconds(Since(job->arrival))},
       {"density", status.ok() ? job->report.MeanDensity() : 0},
       {"captured_mass", status.ok() && job->report.captured_mass_measured
                             ? nlohmann::json(job->report.MeanCapturedMass())
                             : nlohmann::json()}});
  WakeReaders();
}

void PrefillStream::AppendResults(const Job& job) {
  const PrefillWork& work = *job.prefill;
  if (work.return_logits) {
    v1::Logits& logits = *events_.emplace_back().mutable_logits();
    logits.set_vocab_size(static_cast<uint32_t>(work.logits.size()));
    logits.set_f32(work.logits.data(), work.logits.size() * sizeof(float));
  }
  const KvGeometry& geometry = work.cache->geometry();
  *events_.emplace_back().mutable_kv_ready() = ProtoOf(lease_, geometry, rpc_.boot_id);
  *events_.emplace_back().mutable_summary() =
      SummaryOf(job, work.token_ids.size() * sizeof(uint32_t), geometry.total_bytes());
}

void PrefillStream::WakeReaders() {
  std::vector<std::shared_ptr<Reader>> readers;
  {
    absl::MutexLock lock(&mutex_);
    readers = readers_;
  }
  for (const auto& reader : readers) reader->OnEvents();
}

}  // namespace prefilld

#include "server/rpc/attend_reactor.h"

#include <algorithm>
#include <array>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "proto/wire/chunk.h"
#include "server/record/errors.h"
#include "server/record/log.h"
#include "server/rpc/messages.h"

namespace prefilld {
namespace {

// With who uploads, or does not take the status, while the server drains.
constexpr absl::Duration kDrainPatience = absl::Seconds(1);

}  // namespace

AttendReactor* AttendReactor::Start(RpcContext& rpc, grpc::CallbackServerContext* context) {
  std::shared_ptr<AttendReactor> reactor(new AttendReactor(rpc, context));
  {
    absl::MutexLock lock(&reactor->mutex_);
    reactor->self_ = reactor;
    if (!reactor->record_.caller().ok()) {
      reactor->End(reactor->record_.caller().status());
      return reactor.get();
    }
    reactor->StartRead(&reactor->read_);
  }
  rpc.calls.Enter(reactor);
  rpc.sweeper.Add(reactor);
  return reactor.get();
}

AttendReactor::AttendReactor(RpcContext& rpc, grpc::CallbackServerContext* context)
    : rpc_(rpc),
      context_(context),
      deadline_(DeadlineOf(*context)),
      record_(rpc, *context, Rpc::kAttend) {}

void AttendReactor::OnReadDone(bool ok) {
  bool header = false;
  {
    absl::MutexLock lock(&mutex_);
    if (ended_) return;
    progress_ = SteadyNow();
    header = std::exchange(awaits_header_, false);
    if (!ok) {
      if (context_->IsCancelled()) return End(WhyCancelled(deadline_));
      if (header) return Refuse(InvalidField("header", "no header was sent"));
      if (upload_->complete()) return;  // it has closed its side, and has nothing more to say
      return End(
          absl::DataLossError(absl::StrCat("the upload ended after ", upload_->received_bytes(),
                                           " of ", upload_->total_bytes(), " bytes")));
    }
  }
  // Not under the lock: neither a cancel nor the job's end need wait for what a message takes.
  if (header) return OnHeader();
  const absl::Status status = OnTensors();
  if (!status.ok() || !upload_->complete() || !copies_region()) return OnArrived(status);
  absl::MutexLock lock(&mutex_);
  if (ended_) return;
  busy_ = true;
  // The job keeps its memory until then, also when the call has ended.
  rpc_.transfers.Post([self = shared_from_this(), job = job_] { self->CopyRegion(); });
}

// A thread that may wait takes the memory, once its bytes are in the budget; nothing of a tensor is
// read before there is a place for all of it. gRPC's threads are few: who waits here is no one.
void AttendReactor::OnHeader() {
  auto valid = Admit();
  absl::MutexLock lock(&mutex_);
  if (!valid.ok()) return Refuse(valid.status());
  if (ended_) {  // meanwhile; End did not know of the job
    rpc_.scheduler.Cancel(valid->job);
    rpc_.attends.Release(OwnId(valid->job->request_id), this);
    return;
  }
  job_ = valid->job;
  ragged_ = valid->ragged;
  busy_ = true;
  // Pages of a host buffer are taken at first touch; all else takes its time.
  const bool quick = valid->transport == Transport::kGrpc && rpc_.backend.device().host_memory();
  WorkPool& pool = quick ? rpc_.transfers : *rpc_.memory;
  pool.Post([self = shared_from_this(), valid = *std::move(valid)] { self->PlaceTensors(valid); });
}

// The job of the header, admitted.
absl::StatusOr<ValidAttend> AttendReactor::Admit() {
  if (FirstField(read_) == kAttendChunk) return absl::DataLossError("a chunk before the header");
  v1::AttendRequest request;
  if (!ParseMessage(&read_, &request) || !request.has_header()) {
    return InvalidField("header", "the first message is no AttendRequest with a header");
  }
  {
    absl::MutexLock lock(&mutex_);
    request_id_ = request.header().request_id().substr(0, kRequestIdBytesMax);
  }
  auto valid = ValidateAttend(request.header(), rpc_.limits);
  if (!valid.ok()) return valid.status();
  // It may end with whoever holds it last, a thread that must not give gigabytes back.
  valid->job = std::shared_ptr<Job>(valid->job.get(),
                                    [memory = rpc_.memory, owner = valid->job](Job*) mutable {
                                      memory->PostFirst([owner = std::move(owner)] {});
                                    });
  Job& job = *valid->job;
  absl::Status status = rpc_.backend.Supports(job.attend->shape, job.policy);
  if (!status.ok()) {
    return absl::IsInvalidArgument(status) ? InvalidField("tensors", status.message()) : status;
  }
  job.deadline = deadline_;
  job.peer = PeerOf(*record_.caller());
  job.share = record_.caller()->weight;
  job.sink = shared_from_this();
  // Who is refused takes nobody's place.
  if (status = rpc_.scheduler.CheckOpen(job); !status.ok()) return status;
  rpc_.attends.Claim(OwnId(job.request_id), this, [weak = weak_from_this()] {
    if (const auto self = weak.lock()) self->GiveWay();
  });
  if (status = rpc_.scheduler.Admit(valid->job); !status.ok()) {
    rpc_.attends.Release(OwnId(job.request_id), this);
    return status;
  }
  return valid;
}

void AttendReactor::PlaceTensors(const ValidAttend& valid) {
  {
    absl::MutexLock lock(&mutex_);
    if (ended_) return;  // nobody waits for it any more
  }
  auto memory = TakeMemory(valid, rpc_.backend.device(), FindMedium(rpc_.media, valid.transport));
  absl::MutexLock lock(&mutex_);
  if (ended_) return;  // the job takes along what it has got
  if (!memory.ok()) {
    if (valid.transport != Transport::kGrpc) {
      rpc_.metrics.TransportRefused(Name(valid.transport), Metrics::kNoMemory);
    }
    return Refuse(memory.status());
  }
  memory_ = *std::move(memory);
  upload_.emplace(memory_.upload);
  admitted_ = true;
  bytes_to_come_ = upload_->total_bytes();
  rpc_.metrics.upload_bytes_inflight.Increment(static_cast<double>(bytes_to_come_));
  Log(Level::kInfo, "attend_admitted",
      {{"request_id", job_->request_id},
       {"method", Name(job_->policy.method)},
       {"transport", Name(valid.transport)},
       {"tokens", job_->tokens()},
       {"upload_bytes", bytes_to_come_}});
  BeginTransfer(memory_.region != nullptr ? bytes_to_come_ : 0);
  Write(EncodeMessage(Admission(valid.transport)));
  StartRead(&read_);
}

v1::AttendResponse AttendReactor::Admission(Transport transport) const {
  v1::AttendResponse response;
  v1::Admission& admission = *response.mutable_admission();
  admission.set_request_id(job_->request_id);
  admission.set_queue_position(static_cast<uint32_t>(job_->queue_position));
  *admission.mutable_estimated_wait() = ProtoOf(job_->estimated_wait);
  admission.set_upload_credit_bytes(bytes_to_come_);
  for (v1::TensorSpec& spec : AnnouncedOutputs(*job_, ragged_)) {
    *admission.add_outputs() = std::move(spec);
  }
  admission.set_transport(ProtoOf(transport));
  for (size_t i = 0; i < memory_.inputs.size(); ++i) {
    *admission.add_buffers() =
        BufferAt(memory_.region->address(), memory_.inputs[i], memory_.upload[i].bytes);
  }
  return response;
}

absl::Status AttendReactor::OnTensors() {
  if (memory_.region != nullptr) {
    v1::AttendRequest request;
    if (FirstField(read_) != kAttendWritten || !ParseMessage(&read_, &request)) {
      return absl::DataLossError(absl::StrCat("over ", ProtoName(memory_.region->transport()),
                                              " only `written` follows the header"));
    }
    return upload_->Written();
  }
  if (FirstField(read_) == kAttendWritten) {
    return absl::DataLossError(
        "`written` is of memory that the server hands out; over TRANSPORT_GRPC tensors come as "
        "chunks");
  }
  auto chunk = ParseChunk(read_, kAttendChunk);
  if (!chunk.ok()) return absl::DataLossError(chunk.status().message());
  absl::Status status = upload_->Take(*chunk);
  read_.Clear();
  if (!status.ok() || memory_.staging == nullptr) return status;
  return memory_.staging->Arrived(chunk->header.tensor_index,
                                  chunk->header.byte_offset + chunk->payload_bytes);
}

// The tensors were written to a region, and are computed elsewhere.
void AttendReactor::CopyRegion() {
  absl::Status status;
  for (size_t i = 0; status.ok() && i < memory_.inputs.size(); ++i) {
    status = memory_.staging->CopyFrom(i, memory_.upload[i].data);
  }
  OnArrived(status);
}

void AttendReactor::OnArrived(const absl::Status& status) {
  absl::MutexLock lock(&mutex_);
  if (ended_) return;
  if (!status.ok()) return End(status);
  job_->moved.MoveTo(SteadyNow());
  const uint64_t to_come = upload_->total_bytes() - upload_->received_bytes();
  rpc_.metrics.upload_bytes_inflight.Decrement(static_cast<double>(bytes_to_come_ - to_come));
  bytes_to_come_ = to_come;
  moved_ = upload_->received_bytes();
  if (upload_->complete()) {
    busy_ = true;
    rpc_.scheduler.UploadDone(job_);
  }
  StartRead(&read_);
}

// Whoever computes goes on at once: memory is given back and outputs are copied elsewhere.
void AttendReactor::OnFinished(const absl::Status& status) {
  rpc_.transfers.Post([self = shared_from_this(), status] { self->Conclude(status); });
}

void AttendReactor::Conclude(const absl::Status& result) {
  std::shared_ptr<Job> job;
  {
    absl::MutexLock lock(&mutex_);
    job_ended_ = true;
    if (ended_) return;
    if (!result.ok()) return End(result);
    LetGoOfInputs();
    job = job_;
  }
  const JobReport& report = job->report;
  rpc_.reports.Add({record_.caller()->tenant, job->request_id, kAttendModel, job->policy.method,
                    job->policy.gamma, job->tokens(), report});
  for (const HeadReport& head : report.entries) {
    ObserveHead(rpc_.metrics, kAttendModel, head, report.captured_mass_measured);
  }
  const SteadyTime begin = SteadyNow();
  auto outputs = std::make_shared<AttendOutputs>(job, ragged_, memory_);
  const absl::Status status = outputs->Place(rpc_.backend.device());
  absl::MutexLock lock(&mutex_);
  if (ended_) return;
  if (!status.ok()) return End(status);
  placing_ = Since(begin);
  outputs_ = std::move(outputs);
  Answer();
}

// Only the outputs are needed until the caller has them. What the caller opened stays as a whole.
void AttendReactor::LetGoOfInputs() {
  AttendWork& work = *job_->attend;
  struct Gone {
    std::shared_ptr<void> budget;  // goes last
    Buffer q, k, v, o, lse;
    std::shared_ptr<void> staging;  // goes before them
  };
  auto gone = std::make_shared<Gone>();
  gone->budget = job_->budget;
  gone->q = std::move(work.q);
  gone->k = std::move(work.k);
  gone->v = std::move(work.v);
  if (memory_.staging != nullptr) {  // o and lse are on the host
    std::exchange(memory_.staging, nullptr)->Computed();
    gone->staging = std::move(work.staging);
    gone->o = std::move(work.o);
    gone->lse = std::move(work.lse);
  }
  rpc_.memory->PostFirst([gone = std::move(gone)] {});
}

void AttendReactor::Answer() {
  BeginTransfer(0);
  v1::AttendResponse response;
  *response.mutable_outputs() = outputs_->specs();
  next_ = EncodeMessage(response);
  WriteNext();
}

void AttendReactor::Write(const grpc::ByteBuffer& message) {
  writing_ = true;
  write_ = message;  // shares the slices
  StartWrite(&write_);
}

// One write is in flight at a time; the message after it is encoded meanwhile.
void AttendReactor::WriteNext() {
  if (writing_ || busy_ || !outputs_) return;  // or they are not in their place yet
  if (next_) {
    Write(*std::exchange(next_, std::nullopt));
  } else {
    return End(absl::OkStatus());
  }
  if (!outputs_->done()) {
    next_ = outputs_->NextChunk();
  } else if (!summary_written_) {
    summary_written_ = true;
    v1::AttendResponse response;
    *response.mutable_summary() =
        SummaryOf(*job_, upload_->total_bytes(), outputs_->total_bytes(), placing_);
    next_ = EncodeMessage(response);
  }
}

void AttendReactor::OnWriteDone(bool ok) {
  absl::MutexLock lock(&mutex_);
  writing_ = false;
  if (ended_) return;
  progress_ = SteadyNow();
  moved_ += write_.Length();
  if (!ok) return End(WhyCancelled(deadline_));
  WriteNext();
}

void AttendReactor::OnCancel() {
  absl::MutexLock lock(&mutex_);
  End(WhyCancelled(deadline_));
}

// The peer may be gone without a word: what it holds is not kept until that is noticed.
void AttendReactor::GiveWay() {
  absl::MutexLock lock(&mutex_);
  if (!self_ || ended_) return;
  End(absl::AbortedError("a later call with this request_id took its place"));
  hurries_ = true;
}

void AttendReactor::Refuse(const absl::Status& status) {
  rpc_.metrics.Rejected(status);
  End(status);
}

void AttendReactor::End(const absl::Status& status) {
  if (ended_) return;
  ended_ = true;
  rpc_.metrics.upload_bytes_inflight.Decrement(static_cast<double>(bytes_to_come_));
  bytes_to_come_ = 0;
  if (memory_.region != nullptr) memory_.region->Unlink();  // the job may still compute in it
  if (job_ && !job_ended_) rpc_.scheduler.Cancel(job_, status);
  const grpc::Status wire = record_.End(status);
  if (job_) rpc_.attends.Release(OwnId(job_->request_id), this);
  if (admitted_) {
    Log(status.ok() ? Level::kInfo : Level::kWarning, "attend_finished",
        {{"request_id", job_->request_id},
         {"code", CodeName(wire.error_code())},
         {"message", wire.error_message()},
         {"tokens", job_->tokens()},
         {"seconds", absl::ToDoubleSeconds(record_.age())},
         {"density", job_ended_ ? job_->report.MeanDensity() : 0},
         {"captured_mass", job_ended_ && job_->report.captured_mass_measured
                               ? nlohmann::json(job_->report.MeanCapturedMass())
                               : nlohmann::json()}});
  } else if (record_.caller().ok()) {  // else access has its line
    Log(Level::kWarning, "attend_refused",
        {{"request_id", request_id_},
         {"code", CodeName(wire.error_code())},
         {"message", wire.error_message()}});
  }
  progress_ = SteadyNow();  // whether the peer takes the status
  Finish(wire);
}

void AttendReactor::OnDone() {
  rpc_.calls.Leave(this);
  std::shared_ptr<AttendReactor> self;  // dropped last, after the lock
  std::shared_ptr<Job> job;
  std::optional<grpc::ByteBuffer> next;
  grpc::ByteBuffer write;
  absl::MutexLock lock(&mutex_);
  job.swap(job_);
  outputs_.reset();
  // A chunk that was not taken holds the job, whose sink is this.
  next.swap(next_);
  write.Swap(&write_);
  self.swap(self_);
}

// What has not begun to be work would be refused, and what does not move does not become any.
void AttendReactor::OnDrain() {
  absl::MutexLock lock(&mutex_);
  hurries_ = true;
  if (self_ && awaits_header_) Refuse(Draining());
}

absl::Duration AttendReactor::Patience() const {
  const bool uploads = admitted_ && bytes_to_come_ > 0;
  return hurries_ && (ended_ || uploads) ? std::min(kDrainPatience, rpc_.upload_timeout)
                                         : rpc_.upload_timeout;
}

void AttendReactor::BeginTransfer(uint64_t moved) {
  busy_ = false;
  progress_ = transfer_began_ = SteadyNow();
  moved_ = moved;
}

// A peer that stalls, or trickles, holds memory: there is a limit to that, but not while it waits
// for us.
void AttendReactor::OnSweep() {
  absl::MutexLock lock(&mutex_);
  if (!self_) return;  // the call is over, its context gone
  const absl::Duration timeout = rpc_.upload_timeout;
  const bool stalled = Since(progress_) >= Patience();
  if (ended_) {
    if (stalled) context_->TryCancel();  // the peer does not even take the status
    return;
  }
  if (busy_) return;
  if (stalled && Patience() < timeout) return End(Draining());
  const double rate = static_cast<double>(rpc_.transfer_rate_min);
  const absl::Duration due = timeout + absl::Seconds(static_cast<double>(moved_) / rate);
  const absl::Duration age = Since(transfer_began_);
  if (!stalled && age < due) return;
  const bool stuck = writing_;
  End(absl::DeadlineExceededError(
      stalled ? absl::StrCat("nothing moved for ", absl::FormatDuration(timeout))
              : absl::StrCat(moved_, " bytes moved in ", absl::FormatDuration(age), ": fewer than ",
                             rpc_.transfer_rate_min, " a second after the first ",
                             absl::FormatDuration(timeout))));
  // A reader that takes nothing would not take the status either.
  if (stuck) context_->TryCancel();
}

}  // namespace prefilld

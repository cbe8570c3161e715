#include "server/rpc/attend_reactor.h"

#include <array>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "proto/wire/chunk.h"
#include "server/record/errors.h"
#include "server/record/log.h"
#include "server/rpc/messages.h"

namespace prefilld {
AttendReactor* AttendReactor::Start(RpcContext& rpc, grpc::CallbackServerContext* context) {
  std::shared_ptr<AttendReactor> reactor(new AttendReactor(rpc, context));
  absl::MutexLock lock(&reactor->mutex_);
  reactor->self_ = reactor;
  reactor->Watch();
  reactor->StartRead(&reactor->read_);
  return reactor.get();
}

AttendReactor::AttendReactor(RpcContext& rpc, grpc::CallbackServerContext* context)
    : rpc_(rpc),
      context_(context),
      deadline_(DeadlineOf(*context)),
      record_(rpc.metrics, "Attend") {}

void AttendReactor::OnReadDone(bool ok) {
  {
    absl::MutexLock lock(&mutex_);
    if (ended_) return;
    progress_ = absl::Now();
    if (!upload_) {
      if (!ok && context_->IsCancelled()) return End(WhyCancelled(deadline_));
      const absl::Status status = ok ? OnHeader() : InvalidField("header", "no header was sent");
      if (!status.ok()) {
        rpc_.metrics.Rejected(status);
        return End(status);
      }
      StartRead(&read_);
      return;
    }
    if (!ok) {  // the caller has closed its side
      if (upload_->complete()) {
        peer_closed_ = true;
        if (summary_written_) WriteNext();  // it may be what was waited for
        return;
      }
      if (context_->IsCancelled()) return End(WhyCancelled(deadline_));
      return End(
          absl::DataLossError(absl::StrCat("the upload ended after ", upload_->received_bytes(),
                                           " of ", upload_->total_bytes(), " bytes")));
    }
  }
  // The copy happens outside the lock: a cancel need not wait for it.
  const absl::Status status = OnTensors();
  absl::MutexLock lock(&mutex_);
  if (ended_) return;
  if (!status.ok()) return End(status);
  const uint64_t to_come = upload_->total_bytes() - upload_->received_bytes();
  rpc_.metrics.upload_bytes_inflight.Decrement(static_cast<double>(bytes_to_come_ - to_come));
  bytes_to_come_ = to_come;
  if (upload_->complete()) {
    computing_ = true;
    rpc_.scheduler.UploadDone(job_);
  }
  StartRead(&read_);
}

// Nothing of a tensor is read before this has found a place for all of it.
absl::Status AttendReactor::OnHeader() {
  if (FirstField(read_) == kAttendChunk) return absl::DataLossError("a chunk before the header");
  v1::AttendRequest request;
  if (!ParseMessage(&read_, &request) || !request.has_header()) {
    return InvalidField("header", "the first message is no AttendRequest with a header");
  }
  request_id_ = request.header().request_id().substr(0, kRequestIdBytesMax);
  auto valid = ValidateAttend(request.header(), rpc_.limits);
  if (!valid.ok()) return valid.status();
  const std::shared_ptr<Job> job = valid->job;
  AttendWork& work = *job->attend;
  if (absl::Status status = rpc_.backend.Supports(work.shape, job->policy); !status.ok()) {
    return absl::IsInvalidArgument(status) ? InvalidField("tensors", status.message()) : status;
  }
  job->deadline = deadline_;
  job->sink = shared_from_this();
  if (!rpc_.attends.Claim(job->request_id)) {
    return absl::AlreadyExistsError(
        absl::StrCat("an Attend with request_id '", job->request_id, "' is running"));
  }
  if (absl::Status status = rpc_.scheduler.Admit(job); !status.ok()) {
    rpc_.attends.Release(job->request_id);
    return status;
  }
  // After the budget: what is refused has taken nothing.
  auto memory = TakeMemory(*valid, rpc_.backend.device(), FindMedium(rpc_.media, valid->transport));
  if (!memory.ok()) {
    rpc_.scheduler.Cancel(job, memory.status());
    rpc_.attends.Release(job->request_id);
    return memory.status();
  }
  memory_ = *std::move(memory);
  upload_.emplace(memory_.upload);
  job_ = job;
  ragged_ = valid->ragged;
  bytes_to_come_ = upload_->total_bytes();
  rpc_.metrics.upload_bytes_inflight.Increment(static_cast<double>(bytes_to_come_));

  v1::AttendResponse response;
  v1::Admission& admission = *response.mutable_admission();
  admission.set_request_id(job->request_id);
  admission.set_queue_position(static_cast<uint32_t>(job->queue_position));
  *admission.mutable_estimated_wait() = ProtoOf(job->estimated_wait);
  admission.set_upload_credit_bytes(bytes_to_come_);
  for (v1::TensorSpec& spec : AnnouncedOutputs(*job, ragged_)) {
    *admission.add_outputs() = std::move(spec);
  }
  admission.set_transport(ProtoOf(valid->transport));
  for (size_t i = 0; i < memory_.inputs.size(); ++i) {
    *admission.add_buffers() =
        BufferIn(*memory_.region, memory_.inputs[i], memory_.upload[i].bytes);
  }
  Log(Level::kInfo, "attend_admitted",
      {{"request_id", job->request_id},
       {"method", Name(job->policy.method)},
       {"transport", Name(valid->transport)},
       {"tokens", job->tokens()},
       {"upload_bytes", bytes_to_come_}});
  Write(EncodeMessage(response));
  return absl::OkStatus();
}

absl::Status AttendReactor::OnTensors() {
  if (memory_.region != nullptr) {
    v1::AttendRequest request;
    if (FirstField(read_) != kAttendWritten || !ParseMessage(&read_, &request)) {
      return absl::DataLossError(absl::StrCat("over ", ProtoName(memory_.region->transport()),
                                              " only `written` follows the header"));
    }
    absl::Status status = upload_->Written();
    for (size_t i = 0; status.ok() && memory_.staging != nullptr && i < memory_.inputs.size();
         ++i) {
      status = memory_.staging->CopyFrom(i, memory_.upload[i].data);
    }
    return status;
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

void AttendReactor::OnFinished(const absl::Status& status) {
  absl::MutexLock lock(&mutex_);
  job_ended_ = true;
  if (ended_) return;
  if (!status.ok()) return End(status);
  AttendWork& work = *job_->attend;
  // Only the outputs are needed until the caller has them. What the caller opened stays as a whole.
  for (Buffer* input : {&work.q, &work.k, &work.v}) *input = Buffer();
  const bool staged = memory_.staging != nullptr;
  if (staged) {  // o and lse are on the host
    memory_.staging->Computed();
    memory_.staging = nullptr;
    work.staging.reset();
    work.o = Buffer();
    work.lse = Buffer();
  }
  rpc_.reports.Add({job_->request_id, kAttendModel, job_->policy.method, job_->policy.gamma,
                    job_->tokens(), job_->report});
  outputs_ = std::make_shared<AttendOutputs>(job_, ragged_, memory_);
  if (memory_.region == nullptr) return Answer();
  if (staged) {  // too much for the completion thread: one of gRPC's
    place_ = std::make_unique<grpc::Alarm>();
    place_->Set(absl::ToChronoTime(absl::Now()), [weak = weak_from_this()](bool fired) {
      const auto self = fired ? weak.lock() : nullptr;
      if (self) self->PlaceOutputs();
    });
    return;
  }
  if (absl::Status placed = outputs_->Place(rpc_.backend.device()); !placed.ok()) {
    return End(placed);
  }
  Answer();
}

void AttendReactor::PlaceOutputs() {
  std::shared_ptr<AttendOutputs> outputs;
  {
    absl::MutexLock lock(&mutex_);
    if (ended_) return;
    outputs = outputs_;
  }
  const absl::Time begin = absl::Now();
  const absl::Status status = outputs->Place(rpc_.backend.device());
  absl::MutexLock lock(&mutex_);
  if (ended_) return;
  if (!status.ok()) return End(status);
  placing_ = absl::Now() - begin;
  Answer();
}

void AttendReactor::Answer() {
  computing_ = false;
  progress_ = absl::Now();
  v1::AttendResponse response;
  *response.mutable_outputs() = outputs_->specs();
  next_ = EncodeMessage(response);
  Watch();
  WriteNext();
}

void AttendReactor::Write(const grpc::ByteBuffer& message) {
  writing_ = true;
  write_ = message;  // shares the slices
  StartWrite(&write_);
}

// One write is in flight at a time; the message after it is encoded meanwhile.
void AttendReactor::WriteNext() {
  if (writing_ || computing_ || !outputs_) return;  // or they are not in their place yet
  if (next_) {
    Write(*std::exchange(next_, std::nullopt));
  } else if (!peer_closes() || peer_closed_) {
    return End(absl::OkStatus());
  } else {
    return;  // the peer may have our memory open: its end of the stream tells that it has not
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
  progress_ = absl::Now();
  if (!ok) return End(WhyCancelled(deadline_));
  WriteNext();
}

void AttendReactor::OnCancel() {
  absl::MutexLock lock(&mutex_);
  End(WhyCancelled(deadline_));
}

void AttendReactor::End(const absl::Status& status) {
  if (ended_) return;
  ended_ = true;
  rpc_.metrics.upload_bytes_inflight.Decrement(static_cast<double>(bytes_to_come_));
  bytes_to_come_ = 0;
  if (memory_.region != nullptr) memory_.region->Unlink();  // the job may still compute in it
  if (job_ && !job_ended_) rpc_.scheduler.Cancel(job_, status);
  const grpc::Status wire = record_.End(status);
  if (job_) {
    rpc_.attends.Release(job_->request_id);
    Log(status.ok() ? Level::kInfo : Level::kWarning, "attend_finished",
        {{"request_id", job_->request_id},
         {"code", CodeName(wire.error_code())},
         {"message", wire.error_message()},
         {"tokens", job_->tokens()},
         {"seconds", absl::ToDoubleSeconds(record_.age())},
         {"density", job_ended_ ? job_->report.MeanDensity() : 0},
         {"captured_mass", job_ended_ ? job_->report.MeanCapturedMass() : 0}});
  } else {
    Log(Level::kWarning, "attend_refused",
        {{"request_id", request_id_},
         {"code", CodeName(wire.error_code())},
         {"message", wire.error_message()}});
  }
  Finish(wire);
}

void AttendReactor::OnDone() {
  std::shared_ptr<AttendReactor> self;  // dropped last, after the lock
  std::shared_ptr<Job> job;
  absl::MutexLock lock(&mutex_);
  if (alarm_) alarm_->Cancel();
  job.swap(job_);
  outputs_.reset();
  self.swap(self_);
}

// A peer that stalls holds memory: there is a limit to that, but not while it waits for us.
void AttendReactor::Watch() {
  alarm_ = std::make_unique<grpc::Alarm>();
  alarm_->Set(absl::ToChronoTime(progress_ + rpc_.upload_timeout),
              [weak = weak_from_this()](bool fired) {
                // Weak: the alarm, which is ours, keeps this function as long as it lives.
                const auto self = fired ? weak.lock() : nullptr;
                if (self) self->OnAlarm();
              });
}

void AttendReactor::OnAlarm() {
  absl::MutexLock lock(&mutex_);
  if (!self_) return;                 // the call is over, its context gone
  if (!ended_ && computing_) return;  // OnFinished watches again
  if (absl::Now() < progress_ + rpc_.upload_timeout) return Watch();
  if (ended_) return context_->TryCancel();  // the peer does not even take the status
  const absl::Status status = absl::DeadlineExceededError(
      absl::StrCat("nothing moved for ", absl::FormatDuration(rpc_.upload_timeout)));
  const bool stuck = writing_;
  End(status);
  // A reader that takes nothing would not take the status either.
  if (stuck) context_->TryCancel();
}

}  // namespace prefilld

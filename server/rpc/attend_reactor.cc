#include "server/rpc/attend_reactor.h"

#include <array>
#include <utility>

#include "absl/strings/str_cat.h"
#include "proto/wire/chunk.h"
#include "server/errors.h"
#include "server/log.h"
#include "server/rpc/messages.h"

namespace prefilld {
namespace {

// Of q and o, and of k and v.
std::pair<uint64_t, uint64_t> TensorBytes(const AttentionShape& shape) {
  const uint64_t row = static_cast<uint64_t>(shape.head_dim) * SizeOf(shape.dtype);
  return {static_cast<uint64_t>(shape.total_q()) * shape.q_heads * row,
          static_cast<uint64_t>(shape.total_k()) * shape.kv_heads * row};
}

}  // namespace

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
      if (!upload_->complete()) {
        if (context_->IsCancelled()) return End(WhyCancelled(deadline_));
        End(absl::DataLossError(absl::StrCat("the upload ended after ", upload_->received_bytes(),
                                             " of ", upload_->total_bytes(), " bytes")));
      }
      return;
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
  const bool shared = valid->transport == Transport::kPosixShm;
  absl::Status placed = shared ? AllocateSegment(*valid) : AllocateBuffers(work, valid->roles);
  if (!placed.ok()) {
    rpc_.scheduler.Cancel(job, placed);
    rpc_.attends.Release(job->request_id);
    return placed;
  }
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
  for (size_t i = 0; i < segment_.inputs.size(); ++i) {
    *admission.add_buffers() = BufferIn(*segment_.memory, segment_.inputs[i],
                                        BytesOf(request.header().tensors(static_cast<int>(i))));
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

absl::Status AttendReactor::AllocateBuffers(AttendWork& work, const std::array<int, 3>& roles) {
  const auto [q_bytes, kv_bytes] = TensorBytes(work.shape);
  Device& device = rpc_.backend.device();
  for (auto [buffer, bytes] : {std::pair(&work.q, q_bytes), std::pair(&work.k, kv_bytes),
                               std::pair(&work.v, kv_bytes), std::pair(&work.o, q_bytes)}) {
    auto memory = device.Allocate(bytes);
    if (!memory.ok()) {
      return RetryLater(absl::StatusCode::kResourceExhausted, "attend_memory",
                        memory.status().message(), absl::Seconds(1));
    }
    *buffer = *std::move(memory);
  }
  const std::array<Upload::Tensor, 3> by_role = {
      {{work.q.data(), q_bytes}, {work.k.data(), kv_bytes}, {work.v.data(), kv_bytes}}};
  upload_.emplace(
      std::vector<Upload::Tensor>{by_role[roles[0]], by_role[roles[1]], by_role[roles[2]]});
  return absl::OkStatus();
}

// Lengths are bounded by attend_bytes_max, which counts every tensor.
absl::Status AttendReactor::AllocateSegment(const ValidAttend& valid) {
  AttendWork& work = *valid.job->attend;
  const auto [q_bytes, kv_bytes] = TensorBytes(work.shape);
  uint64_t end = 0;
  const auto place = [&](uint64_t bytes) { return std::exchange(end, end + ShmAligned(bytes)); };
  std::vector<uint64_t> inputs, outputs;
  for (int role : valid.roles) inputs.push_back(place(role == 0 ? q_bytes : kv_bytes));
  for (const v1::TensorSpec& spec : AnnouncedOutputs(*valid.job, valid.ragged)) {
    outputs.push_back(place(BytesOf(spec)));
  }
  auto memory = rpc_.shm->Create(end);
  if (!memory.ok()) return memory.status();
  segment_ = {*std::move(memory), std::move(inputs), std::move(outputs)};
  std::byte* const base = segment_.memory->data();
  Buffer* const by_role[] = {&work.q, &work.k, &work.v};
  std::vector<Upload::Tensor> tensors;
  for (size_t i = 0; i < valid.roles.size(); ++i) {
    const uint64_t bytes = valid.roles[i] == 0 ? q_bytes : kv_bytes;
    *by_role[valid.roles[i]] = Buffer(base + segment_.inputs[i], bytes, nullptr);
    tensors.push_back({base + segment_.inputs[i], bytes});
  }
  work.o = Buffer(base + segment_.outputs[0], q_bytes, nullptr);
  work.held = segment_.memory;
  upload_.emplace(std::move(tensors));
  return absl::OkStatus();
}

absl::Status AttendReactor::OnTensors() {
  if (segment_.memory != nullptr) {
    v1::AttendRequest request;
    if (FirstField(read_) != kAttendWritten || !ParseMessage(&read_, &request)) {
      return absl::DataLossError("over TRANSPORT_POSIX_SHM only `written` follows the header");
    }
    return upload_->Written();
  }
  if (FirstField(read_) == kAttendWritten) {
    return absl::DataLossError("`written` is of TRANSPORT_POSIX_SHM; here tensors come as chunks");
  }
  auto chunk = ParseChunk(read_, kAttendChunk);
  if (!chunk.ok()) return absl::DataLossError(chunk.status().message());
  absl::Status status = upload_->Take(*chunk);
  read_.Clear();
  return status;
}

void AttendReactor::OnFinished(const absl::Status& status) {
  absl::MutexLock lock(&mutex_);
  job_ended_ = true;
  if (ended_) return;
  if (!status.ok()) return End(status);
  computing_ = false;
  progress_ = absl::Now();
  AttendWork& work = *job_->attend;
  // Only the outputs are needed until the caller has them.
  for (Buffer* input : {&work.q, &work.k, &work.v}) *input = Buffer();
  rpc_.reports.Add({job_->request_id, kAttendModel, job_->policy.method, job_->policy.gamma,
                    job_->tokens(), job_->report});
  outputs_.emplace(job_, ragged_, segment_.memory != nullptr ? &segment_ : nullptr);
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
  if (writing_ || !outputs_) return;
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
    *response.mutable_summary() = SummaryOf(*job_, upload_->total_bytes(), outputs_->total_bytes());
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
  if (segment_.memory != nullptr) segment_.memory->Unlink();  // the job may still compute in it
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

#include "server/rpc/prefill_reactor.h"

#include <openssl/sha.h>

#include <utility>

#include "server/record/errors.h"
#include "server/record/log.h"
#include "server/rpc/peer.h"
#include "server/rpc/validate.h"

namespace prefilld {
namespace {

// To compare two says nothing of how much of one is right in the other.
std::string HashOf(const std::string& request) {
  std::string hash(SHA256_DIGEST_LENGTH, '\0');
  SHA256(reinterpret_cast<const uint8_t*>(request.data()), request.size(),
         reinterpret_cast<uint8_t*>(hash.data()));
  return hash;
}

}  // namespace

PrefillReactor* PrefillReactor::Start(RpcContext& rpc, grpc::CallbackServerContext* context,
                                      const grpc::ByteBuffer& bytes) {
  std::shared_ptr<PrefillReactor> reactor(new PrefillReactor(rpc, context));
  v1::PrefillRequest request;
  const bool may = reactor->record_.caller().ok();
  const absl::Status parsed = may ? Parse(bytes, &request) : reactor->record_.caller().status();
  auto stream = parsed.ok() ? reactor->Admit(request) : parsed;
  absl::MutexLock lock(&reactor->mutex_);
  reactor->self_ = reactor;
  if (!may) {
    reactor->End(stream.status());
  } else if (!stream.ok()) {
    rpc.metrics.Rejected(stream.status());
    PrefillStream::LogRefusal(request.request_id().substr(0, kRequestIdBytesMax), stream.status());
    reactor->End(stream.status());
  } else if (*stream == nullptr) {
    reactor->End(absl::OkStatus());
  } else {
    reactor->stream_ = *std::move(stream);
    reactor->WriteNext();
  }
  return reactor.get();
}

PrefillReactor::PrefillReactor(RpcContext& rpc, grpc::CallbackServerContext* context)
    : rpc_(rpc),
      context_(context),
      deadline_(DeadlineOf(*context)),
      record_(rpc, *context, Rpc::kPrefill) {}

absl::StatusOr<std::shared_ptr<PrefillStream>> PrefillReactor::Admit(
    const v1::PrefillRequest& request) {
  const Caller& caller = *record_.caller();
  auto model = FindModel(rpc_, Rpc::kPrefill, caller, request.model(), "model");
  if (!model.ok()) return model.status();
  if (absl::Status status = (*model)->files(); !status.ok()) return status;
  const ModelInfo& info = (*model)->info();
  auto valid = ValidatePrefill(request, info, rpc_.limits);
  if (!valid.ok()) return valid.status();
  const int64_t tokens = request.token_ids_size();
  const AttentionShape shape{info.activations, info.q_heads, info.kv_heads,
                             info.head_dim,    {0, tokens},  {0, tokens}};
  absl::Status status = rpc_.backend.Supports(shape, valid->job->policy);
  if (!status.ok()) return status;
  valid->job->prefill->model = *model;
  status = rpc_.scheduler.CheckFits(*valid->job);
  if (!status.ok()) return status;
  if (request.validate_only()) return std::shared_ptr<PrefillStream>();

  valid->job->deadline = deadline_;
  valid->job->peer = PeerOf(caller);
  valid->job->share = caller.weight;
  const std::string request_id = valid->job->request_id;
  const std::string content = HashOf(request.SerializeAsString());
  const auto self = shared_from_this();
  return rpc_.prefills.FindOrStart(caller, request_id, content, self, [&] {
    return PrefillStream::Start(rpc_, caller, *std::move(valid), content, self);
  });
}

void PrefillReactor::OnEvents() {
  absl::MutexLock lock(&mutex_);
  if (stream_ && !writing_ && !ended_) WriteNext();  // else whoever sets it does
}

void PrefillReactor::WriteNext() {
  absl::Status end;
  bool ended = false;
  if (const v1::PrefillEvent* event = stream_->Get(next_, &end, &ended)) {
    writing_ = true;
    ++next_;
    write_ = EncodeMessage(*event);
    StartWrite(&write_);
  } else if (ended) {
    End(end);
  }
}

void PrefillReactor::OnWriteDone(bool ok) {
  absl::MutexLock lock(&mutex_);
  writing_ = false;
  if (ended_) return;
  if (!ok) return Lose();  // before OnCancel, or after it
  WriteNext();
}

void PrefillReactor::OnCancel() {
  absl::MutexLock lock(&mutex_);
  Lose();
}

void PrefillReactor::Lose() {
  if (ended_) return;
  broke_ = !rpc_.connected(context_->peer());
  End(WhyCancelled(deadline_));
}

void PrefillReactor::End(const absl::Status& status) {
  if (ended_) return;
  ended_ = true;
  Finish(record_.End(status));
}

void PrefillReactor::OnDone() {
  std::shared_ptr<PrefillReactor> self;
  std::shared_ptr<PrefillStream> stream;
  {
    absl::MutexLock lock(&mutex_);
    self.swap(self_);
    stream.swap(stream_);
  }
  if (stream) stream->Detach(this);
}

}  // namespace prefilld

#include "server/rpc/services.h"

#include "absl/strings/str_cat.h"
#include "proto/wire/chunk.h"
#include "server/record/errors.h"
#include "server/rpc/attend_reactor.h"
#include "server/rpc/call.h"
#include "server/rpc/messages.h"
#include "server/rpc/prefill_reactor.h"
#include "server/rpc/pull_reactor.h"
#include "server/rpc/validate.h"
#include "server/version.h"

namespace prefilld {
namespace {

constexpr int kTransportsMax = 8;
constexpr int kDeviceUuidsMax = 64;

// Memory is shared with a caller that sees the same /dev/shm.
absl::Status CheckShm(const RpcContext& rpc, const v1::NegotiateRequest& request) {
  if (rpc.shm == nullptr) {
    return absl::FailedPreconditionError(
        "transports: TRANSPORT_POSIX_SHM is not offered by this server");
  }
  if (request.shm_domain() == rpc.shm->name()) return absl::OkStatus();
  return absl::FailedPreconditionError(absl::StrCat(
      "transports: TRANSPORT_POSIX_SHM is not possible: shm_domain '",
      request.shm_domain().substr(0, 128), "' is not the server's '", rpc.shm->name(), "'"));
}

// Device memory is shared with a caller of this host that has its tensors on the same GPU.
absl::Status CheckCudaIpc(const RpcContext& rpc, const v1::NegotiateRequest& request) {
  if (!rpc.limits.cuda_ipc) {
    return absl::FailedPreconditionError(
        "transports: TRANSPORT_CUDA_IPC is not offered by this server");
  }
  if (request.cuda_ipc_domain() != rpc.cuda_ipc_domain) {
    return absl::FailedPreconditionError(
        absl::StrCat("transports: TRANSPORT_CUDA_IPC is not possible: cuda_ipc_domain '",
                     request.cuda_ipc_domain().substr(0, 128), "' is not the server's '",
                     rpc.cuda_ipc_domain, "'"));
  }
  const std::string uuid(rpc.backend.device().uuid());
  for (const std::string& other : request.device_uuids()) {
    if (other == uuid) return absl::OkStatus();
  }
  return absl::FailedPreconditionError(absl::StrCat(
      "transports: TRANSPORT_CUDA_IPC is not possible: the server computes on ", uuid,
      ", which is none of the caller's ", request.device_uuids_size(), " device_uuids"));
}

// The transport to use: the first acceptable one that is possible here.
absl::StatusOr<v1::Transport> PickTransport(const RpcContext& rpc,
                                            const v1::NegotiateRequest& request) {
  if (request.transports_size() > kTransportsMax) {
    return InvalidField("transports", absl::StrCat(request.transports_size(),
                                                   " transports, the limit is ", kTransportsMax));
  }
  if (request.device_uuids_size() > kDeviceUuidsMax) {
    return InvalidField("device_uuids", absl::StrCat(request.device_uuids_size(),
                                                     " devices, the limit is ", kDeviceUuidsMax));
  }
  for (int i = 0; i < request.transports_size(); ++i) {
    if (!v1::Transport_IsValid(request.transports(i))) {
      return InvalidField(absl::StrCat("transports[", i, "]"),
                          absl::StrCat("unknown transport ", request.transports(i)));
    }
  }
  const absl::Status shm = CheckShm(rpc, request), ipc = CheckCudaIpc(rpc, request);
  const v1::Transport best = ipc.ok()   ? v1::TRANSPORT_CUDA_IPC
                             : shm.ok() ? v1::TRANSPORT_POSIX_SHM
                                        : v1::TRANSPORT_GRPC;
  if (request.transports_size() == 0) return best;
  absl::Status refusal;  // of the first that was acceptable
  for (int transport : request.transports()) {
    if (transport == v1::TRANSPORT_UNSPECIFIED) return best;
    if (transport == v1::TRANSPORT_GRPC) return v1::TRANSPORT_GRPC;
    const bool device = transport == v1::TRANSPORT_CUDA_IPC;
    const absl::Status& possible = device ? ipc : shm;
    if (possible.ok()) return device ? v1::TRANSPORT_CUDA_IPC : v1::TRANSPORT_POSIX_SHM;
    refusal.Update(possible);
  }
  return refusal;
}

void FillLimits(const RpcContext& rpc, const ModelInfo* model, v1::Limits* limits) {
  limits->set_max_prompt_tokens(static_cast<uint32_t>(
      model != nullptr ? PromptTokensMax(*model, rpc.limits) : rpc.limits.prompt_tokens_max));
  limits->set_max_attend_bytes(rpc.limits.attend_bytes_max);
  limits->set_max_chunk_bytes(kMaxChunkBytes);
  limits->set_max_sequences(kSequencesMax);
  *limits->mutable_max_lease_ttl() = ProtoOf(rpc.limits.lease_ttl_max);
  *limits->mutable_default_lease_ttl() = ProtoOf(rpc.limits.lease_ttl);
  limits->set_max_waiting_jobs(static_cast<uint32_t>(rpc.waiting_jobs_max));
}

absl::Status FillNegotiated(const RpcContext& rpc, const v1::NegotiateRequest& request,
                            v1::NegotiateResponse* response) {
  auto transport = PickTransport(rpc, request);
  if (!transport.ok()) return transport.status();
  response->set_transport(*transport);
  response->set_boot_id(rpc.boot_id);
  if (rpc.shm != nullptr) response->set_shm_domain(rpc.shm->name());
  if (rpc.limits.cuda_ipc) {
    response->set_cuda_ipc_domain(rpc.cuda_ipc_domain);
    response->add_device_uuids(std::string(rpc.backend.device().uuid()));
  }
  response->set_server_version(kVersion);
  const ModelInfo* info = nullptr;
  if (!request.model().empty()) {
    auto model = FindModel(rpc.models, request.model(), "model");
    if (!model.ok()) return model.status();
    info = &(*model)->info();
    auto dtype =
        ValidateLayout(request.layout(), "layout", info->kv_heads, info->head_dim, info->dtype);
    if (!dtype.ok()) return dtype.status();
    if (!request.fingerprint().empty() && request.fingerprint() != info->fingerprint) {
      return absl::FailedPreconditionError(
          absl::StrCat("fingerprint ", request.fingerprint().substr(0, 64), " is not model '",
                       info->name, "''s ", info->fingerprint));
    }
    *response->mutable_layout() = LayoutOf(*info, *dtype);
    response->set_fingerprint(info->fingerprint);
  }
  FillLimits(rpc, info, response->mutable_limits());
  return absl::OkStatus();
}

}  // namespace

grpc::ServerBidiReactor<grpc::ByteBuffer, grpc::ByteBuffer>* PrefillServiceImpl::Attend(
    grpc::CallbackServerContext* context) {
  return AttendReactor::Start(rpc_, context);
}

grpc::ServerWriteReactor<v1::PrefillEvent>* PrefillServiceImpl::Prefill(
    grpc::CallbackServerContext* context, const v1::PrefillRequest* request) {
  return PrefillReactor::Start(rpc_, context, *request);
}

grpc::ServerUnaryReactor* PrefillServiceImpl::GetSparsityReport(
    grpc::CallbackServerContext* context, const v1::GetSparsityReportRequest* request,
    v1::SparsityReport* response) {
  return Answer(context, rpc_.metrics, "GetSparsityReport", [&]() -> absl::Status {
    const auto report = rpc_.reports.Find(request->request_id());
    if (!report) return ResourceNotFound("request", request->request_id().substr(0, 64));
    *response = ProtoOf(report->report);
    return absl::OkStatus();
  });
}

grpc::ServerUnaryReactor* KvHandoffServiceImpl::Negotiate(grpc::CallbackServerContext* context,
                                                          const v1::NegotiateRequest* request,
                                                          v1::NegotiateResponse* response) {
  return Answer(context, rpc_.metrics, "Negotiate",
                [&] { return FillNegotiated(rpc_, *request, response); });
}

grpc::ServerWriteReactor<grpc::ByteBuffer>* KvHandoffServiceImpl::PullKv(
    grpc::CallbackServerContext* context, const grpc::ByteBuffer* request) {
  return PullReactor::Start(rpc_, context, *request);
}

grpc::ServerUnaryReactor* KvHandoffServiceImpl::RenewLease(grpc::CallbackServerContext* context,
                                                           const v1::RenewLeaseRequest* request,
                                                           v1::Lease* response) {
  return Answer(context, rpc_.metrics, "RenewLease", [&]() -> absl::Status {
    auto cache = rpc_.leases.Find(request->lease(), request->generation());
    if (!cache.ok()) return cache.status();
    auto ttl = ValidateLeaseTtl(request->has_ttl(), request->ttl(), "ttl", rpc_.limits,
                                absl::ZeroDuration());
    if (!ttl.ok()) return ttl.status();
    auto lease = rpc_.leases.Renew(request->lease(), request->generation(), *ttl);
    if (!lease.ok()) return lease.status();
    *response = ProtoOf(*lease, (*cache)->geometry(), rpc_.boot_id);
    return absl::OkStatus();
  });
}

grpc::ServerUnaryReactor* KvHandoffServiceImpl::ReleaseLease(grpc::CallbackServerContext* context,
                                                             const v1::ReleaseLeaseRequest* request,
                                                             v1::ReleaseLeaseResponse* response) {
  return Answer(context, rpc_.metrics, "ReleaseLease", [&]() -> absl::Status {
    if (request->reason() != v1::RELEASE_REASON_CONSUMED &&
        request->reason() != v1::RELEASE_REASON_ABANDONED) {
      return InvalidField("reason",
                          absl::StrCat(request->reason(), " is neither CONSUMED nor ABANDONED"));
    }
    auto running = rpc_.leases.Release(request->lease(), request->generation(),
                                       request->reason() == v1::RELEASE_REASON_CONSUMED
                                           ? LeaseEnd::kConsumed
                                           : LeaseEnd::kAbandoned);
    if (!running.ok()) return running.status();
    response->set_running_transfers(static_cast<uint32_t>(*running));
    return absl::OkStatus();
  });
}

grpc::ServerUnaryReactor* ModelServiceImpl::GetModel(grpc::CallbackServerContext* context,
                                                     const v1::GetModelRequest* request,
                                                     v1::Model* response) {
  return Answer(context, rpc_.metrics, "GetModel", [&]() -> absl::Status {
    auto model = FindModel(rpc_.models, request->name(), "name");
    if (!model.ok()) return model.status();
    const ModelInfo& info = (*model)->info();
    *response = ProtoOf(info, PromptTokensMax(info, rpc_.limits));
    return absl::OkStatus();
  });
}

grpc::ServerUnaryReactor* ModelServiceImpl::ListModels(grpc::CallbackServerContext* context,
                                                       const v1::ListModelsRequest*,
                                                       v1::ListModelsResponse* response) {
  return Answer(context, rpc_.metrics, "ListModels", [&] {
    for (const auto& [name, model] : rpc_.models) {
      *response->add_models() = ProtoOf(model->info(), PromptTokensMax(model->info(), rpc_.limits));
    }
    return absl::OkStatus();
  });
}

}  // namespace prefilld

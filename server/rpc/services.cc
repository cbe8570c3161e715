#include "server/rpc/services.h"

#include "absl/strings/str_cat.h"
#include "server/record/errors.h"
#include "server/rpc/attend_reactor.h"
#include "server/rpc/call.h"
#include "server/rpc/messages.h"
#include "server/rpc/negotiate.h"
#include "server/rpc/prefill_reactor.h"
#include "server/rpc/pull_reactor.h"
#include "server/rpc/validate.h"

namespace prefilld {
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
                [&] { return prefilld::Negotiate(rpc_, *request, response); });
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
    const bool consumed = request->reason() == v1::RELEASE_REASON_CONSUMED;
    auto running = rpc_.leases.Release(request->lease(), request->generation(),
                                       consumed ? LeaseEnd::kConsumed : LeaseEnd::kAbandoned,
                                       consumed && request->unmapped());
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

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

grpc::ServerWriteReactor<grpc::ByteBuffer>* PrefillServiceImpl::Prefill(
    grpc::CallbackServerContext* context, const grpc::ByteBuffer* request) {
  return PrefillReactor::Start(rpc_, context, *request);
}

grpc::ServerUnaryReactor* PrefillServiceImpl::GetSparsityReport(
    grpc::CallbackServerContext* context, const grpc::ByteBuffer* request,
    grpc::ByteBuffer* response) {
  return Answer<v1::GetSparsityReportRequest, v1::SparsityReport>(
      rpc_, *context, Rpc::kGetSparsityReport, *request, response,
      [&](const v1::GetSparsityReportRequest& asked, const Caller& caller,
          v1::SparsityReport* answer) -> absl::Status {
        const auto report = rpc_.reports.Find(asked.request_id(), caller);
        if (!report) {
          const std::string id = asked.request_id().substr(0, kRequestIdBytesMax);
          if (rpc_.reports.Find(id, {})) {  // another's
            rpc_.access.ReportDenied(Rpc::kGetSparsityReport, caller, id);
          }
          return ResourceNotFound("request", id);
        }
        *answer = ProtoOf(report->report);
        return absl::OkStatus();
      });
}

grpc::ServerUnaryReactor* KvHandoffServiceImpl::Negotiate(grpc::CallbackServerContext* context,
                                                          const grpc::ByteBuffer* request,
                                                          grpc::ByteBuffer* response) {
  return Answer<v1::NegotiateRequest, v1::NegotiateResponse>(
      rpc_, *context, Rpc::kNegotiate, *request, response,
      [&](const v1::NegotiateRequest& asked, const Caller& caller, v1::NegotiateResponse* answer) {
        return prefilld::Negotiate(rpc_, caller, asked, answer);
      });
}

grpc::ServerWriteReactor<grpc::ByteBuffer>* KvHandoffServiceImpl::PullKv(
    grpc::CallbackServerContext* context, const grpc::ByteBuffer* request) {
  return PullReactor::Start(rpc_, context, *request);
}

grpc::ServerUnaryReactor* KvHandoffServiceImpl::RenewLease(grpc::CallbackServerContext* context,
                                                           const grpc::ByteBuffer* request,
                                                           grpc::ByteBuffer* response) {
  return Answer<v1::RenewLeaseRequest, v1::Lease>(
      rpc_, *context, Rpc::kRenewLease, *request, response,
      [&](const v1::RenewLeaseRequest& asked, const Caller& caller,
          v1::Lease* answer) -> absl::Status {
        auto found = FindLease(rpc_, Rpc::kRenewLease, caller, asked.lease(), asked.generation());
        if (!found.ok()) return found.status();
        auto ttl = ValidateLeaseTtl(asked.has_ttl(), asked.ttl(), "ttl", rpc_.limits,
                                    absl::ZeroDuration());
        if (!ttl.ok()) return ttl.status();
        auto lease = rpc_.leases.Renew(asked.lease(), asked.generation(), *ttl);
        if (!lease.ok()) return lease.status();
        *answer = ProtoOf(*lease, found->cache->geometry(), rpc_.boot_id);
        return absl::OkStatus();
      });
}

grpc::ServerUnaryReactor* KvHandoffServiceImpl::ReleaseLease(grpc::CallbackServerContext* context,
                                                             const grpc::ByteBuffer* request,
                                                             grpc::ByteBuffer* response) {
  return Answer<v1::ReleaseLeaseRequest, v1::ReleaseLeaseResponse>(
      rpc_, *context, Rpc::kReleaseLease, *request, response,
      [&](const v1::ReleaseLeaseRequest& asked, const Caller& caller,
          v1::ReleaseLeaseResponse* answer) -> absl::Status {
        if (asked.reason() != v1::RELEASE_REASON_CONSUMED &&
            asked.reason() != v1::RELEASE_REASON_ABANDONED) {
          return InvalidField("reason",
                              absl::StrCat(asked.reason(), " is neither CONSUMED nor ABANDONED"));
        }
        const absl::Status may =
            rpc_.access.CheckLease(Rpc::kReleaseLease, caller, rpc_.leases, asked.lease());
        if (!may.ok()) return may;
        const bool consumed = asked.reason() == v1::RELEASE_REASON_CONSUMED;
        auto running = rpc_.leases.Release(asked.lease(), asked.generation(),
                                           consumed ? LeaseEnd::kConsumed : LeaseEnd::kAbandoned);
        if (!running.ok()) return running.status();
        answer->set_running_transfers(static_cast<uint32_t>(*running));
        return absl::OkStatus();
      });
}

grpc::ServerUnaryReactor* ModelServiceImpl::GetModel(grpc::CallbackServerContext* context,
                                                     const grpc::ByteBuffer* request,
                                                     grpc::ByteBuffer* response) {
  return Answer<v1::GetModelRequest, v1::Model>(
      rpc_, *context, Rpc::kGetModel, *request, response,
      [&](const v1::GetModelRequest& asked, const Caller& caller,
          v1::Model* answer) -> absl::Status {
        auto model = FindModel(rpc_, Rpc::kGetModel, caller, asked.name(), "name");
        if (!model.ok()) return model.status();
        const ModelInfo& info = (*model)->info();
        *answer = ProtoOf(info, PromptTokensMax(info, rpc_.limits));
        return absl::OkStatus();
      });
}

grpc::ServerUnaryReactor* ModelServiceImpl::ListModels(grpc::CallbackServerContext* context,
                                                       const grpc::ByteBuffer* request,
                                                       grpc::ByteBuffer* response) {
  return Answer<v1::ListModelsRequest, v1::ListModelsResponse>(
      rpc_, *context, Rpc::kListModels, *request, response,
      [&](const v1::ListModelsRequest&, const Caller& caller,
          v1::ListModelsResponse* answer) -> absl::Status {
        for (const auto& [name, model] : rpc_.models) {
          if (!caller.MayUse(name)) continue;
          *answer->add_models() =
              ProtoOf(model->info(), PromptTokensMax(model->info(), rpc_.limits));
        }
        return absl::OkStatus();
      });
}

}  // namespace prefilld

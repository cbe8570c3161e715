#include "server/rpc/negotiate.h"

#include <algorithm>
#include <iterator>
#include <utility>

#include "absl/strings/str_cat.h"
#include "proto/wire/chunk.h"
#include "server/record/errors.h"
#include "server/rpc/messages.h"
#include "server/rpc/validate.h"
#include "server/version.h"

namespace prefilld {
namespace {

constexpr int kTransportsMax = 8;
constexpr int kRefusedMax = 8;
constexpr int kDeviceUuidsMax = 64;

PeerFacts FactsOfPeer(const v1::NegotiateRequest& request) {
  return {.shm_domain = request.shm_domain(),
          .cuda_ipc_domain = request.cuda_ipc_domain(),
          .device_uuids = {request.device_uuids().begin(), request.device_uuids().end()}};
}

// And ours, for the peer to compare.
void Introduce(const RpcContext& rpc, v1::NegotiateResponse* response) {
  PeerFacts ours;
  for (const auto& [transport, medium] : rpc.media) medium->Introduce(&ours);
  response->set_shm_domain(ours.shm_domain);
  response->set_cuda_ipc_domain(ours.cuda_ipc_domain);
  response->set_memory_socket(rpc.memory_socket);
  for (const std::string& uuid : ours.device_uuids) response->add_device_uuids(uuid);
}

bool Refuses(const v1::NegotiateRequest& request, const TransportRow& row) {
  return std::any_of(request.refused().begin(), request.refused().end(),
                     [&](const auto& refusal) { return refusal.transport() == row.wire; });
}

bool Accepts(const v1::NegotiateRequest& request, const TransportRow& row) {
  const auto& wanted = request.transports();
  return !Refuses(request, row) &&
         (wanted.empty() || std::any_of(wanted.begin(), wanted.end(), [&](int transport) {
            return transport == row.wire || transport == v1::TRANSPORT_UNSPECIFIED;
          }));
}

absl::Status CheckPossible(const RpcContext& rpc, const TransportRow& row,
                           const v1::NegotiateRequest& request, const PeerFacts& peer) {
  const bool for_kv = !request.model().empty();
  if (Refuses(request, row)) {
    return absl::FailedPreconditionError(
        absl::StrCat("transports: ", ProtoName(row.transport), " is refused by the caller"));
  }
  if (row.open == nullptr) return absl::OkStatus();
  const Medium* medium = FindMedium(rpc.media, row.transport);
  if (medium == nullptr) {
    return absl::FailedPreconditionError(
        absl::StrCat("transports: ", ProtoName(row.transport), " is not offered by this server"));
  }
  if (for_kv && row.kv_cache && rpc.limits.kv_regions.count(row.transport) == 0) {
    return absl::FailedPreconditionError(
        absl::StrCat("transports: ", ProtoName(row.transport), kNoRoomForCaches));
  }
  const absl::Status reached = medium->Reaches(peer);
  if (reached.ok()) return reached;
  return absl::FailedPreconditionError(absl::StrCat("transports: ", ProtoName(row.transport),
                                                    " is not possible: ", reached.message()));
}

absl::Status CheckTransport(int transport, const std::string& field) {
  if (FindTransportOfWire(transport) != nullptr) return absl::OkStatus();
  return InvalidField(field, absl::StrCat("unknown transport ", TransportName(transport)));
}

absl::Status CheckLists(const v1::NegotiateRequest& request) {
  if (request.transports_size() > kTransportsMax) {
    return InvalidField("transports", absl::StrCat(request.transports_size(),
                                                   " transports, the limit is ", kTransportsMax));
  }
  if (request.device_uuids_size() > kDeviceUuidsMax) {
    return InvalidField("device_uuids", absl::StrCat(request.device_uuids_size(),
                                                     " devices, the limit is ", kDeviceUuidsMax));
  }
  for (int i = 0; i < request.transports_size(); ++i) {
    const int transport = request.transports(i);
    if (transport == v1::TRANSPORT_UNSPECIFIED) continue;
    absl::Status known = CheckTransport(transport, absl::StrCat("transports[", i, "]"));
    if (!known.ok()) return known;
  }
  if (request.refused_size() > kRefusedMax) {
    return InvalidField(
        "refused", absl::StrCat(request.refused_size(), " transports, the limit is ", kRefusedMax));
  }
  for (int i = 0; i < request.refused_size(); ++i) {
    absl::Status known =
        CheckTransport(request.refused(i).transport(), absl::StrCat("refused[", i, "].transport"));
    if (!known.ok()) return known;
  }
  return absl::OkStatus();
}

// What the caller has against a transport, and GPUs that it names and of which none reaches ours. A
// reason that we do not know is none.
void CountRefused(const RpcContext& rpc, const v1::NegotiateRequest& request,
                  const PeerFacts& peer) {
  for (const v1::TransportRefusal& refusal : request.refused()) {
    const int reason =
        v1::TransportRefusal::Reason_IsValid(refusal.reason()) ? refusal.reason() : 0;
    rpc.metrics.TransportRefused(FindTransportOfWire(refusal.transport())->name,
                                 Metrics::kTransportRefusals[reason]);
  }
  for (const TransportRow& row : kTransports) {
    const Medium* medium = FindMedium(rpc.media, row.transport);
    if (medium == nullptr || !Accepts(request, row)) continue;
    if (absl::IsOutOfRange(medium->Reaches(peer))) {
      rpc.metrics.TransportRefused(row.name, Metrics::kOutOfReach);
    }
  }
}

// The first acceptable one that is possible here.
absl::StatusOr<Transport> PickTransport(const RpcContext& rpc,
                                        const v1::NegotiateRequest& request) {
  if (absl::Status status = CheckLists(request); !status.ok()) return status;
  const PeerFacts peer = FactsOfPeer(request);
  CountRefused(rpc, request, peer);
  absl::StatusOr<Transport> best = absl::InternalError("no transport");
  for (const TransportRow& row : kTransports) {
    absl::Status possible = CheckPossible(rpc, row, request, peer);
    if (possible.ok()) {
      best = row.transport;
    } else if (row.open == nullptr) {  // there is always this one, unless it is refused
      best = std::move(possible);
    }
  }
  if (request.transports_size() == 0) return best;
  absl::Status refusal;  // of the first that was acceptable
  for (int transport : request.transports()) {
    if (transport == v1::TRANSPORT_UNSPECIFIED) {
      if (best.ok()) return best;
      refusal.Update(best.status());
      continue;
    }
    const TransportRow& row = *FindTransportOfWire(transport);
    const absl::Status possible = CheckPossible(rpc, row, request, peer);
    if (possible.ok()) return row.transport;
    refusal.Update(possible);
  }
  return refusal;
}

// Of the model, or, where none is named, the longest of any.
int64_t LongestPrompt(const RpcContext& rpc, const ModelInfo* named, bool retain,
                      Transport transport) {
  int64_t longest = 0;
  for (const auto& [name, model] : rpc.models) {
    const ModelInfo& info = model->info();
    if (named != nullptr && named != &info) continue;
    longest = std::max(longest, PromptTokensMax(info, rpc.limits, retain, transport));
  }
  return longest;
}

void FillLimits(const RpcContext& rpc, const ModelInfo* model, Transport transport,
                v1::Limits* limits) {
  limits->set_max_prompt_tokens(
      static_cast<uint32_t>(LongestPrompt(rpc, model, /*retain=*/true, transport)));
  limits->set_max_unretained_prompt_tokens(
      static_cast<uint32_t>(LongestPrompt(rpc, model, /*retain=*/false, Transport::kGrpc)));
  limits->set_max_attend_bytes(rpc.limits.attend_bytes_max);
  limits->set_max_chunk_bytes(kMaxChunkBytes);
  limits->set_max_sequences(kSequencesMax);
  *limits->mutable_max_lease_ttl() = ProtoOf(rpc.limits.lease_ttl_max);
  *limits->mutable_default_lease_ttl() = ProtoOf(rpc.limits.lease_ttl);
  limits->set_max_waiting_jobs(static_cast<uint32_t>(rpc.waiting_jobs_max));
}

}  // namespace

absl::Status Negotiate(const RpcContext& rpc, const Caller& caller,
                       const v1::NegotiateRequest& request, v1::NegotiateResponse* response) {
  auto transport = PickTransport(rpc, request);
  if (!transport.ok()) return transport.status();
  response->set_transport(ProtoOf(*transport));
  response->set_boot_id(rpc.boot_id);
  Introduce(rpc, response);
  response->set_server_version(kVersion);
  const ModelInfo* info = nullptr;
  if (!request.model().empty()) {
    auto model = FindModel(rpc, Rpc::kNegotiate, caller, request.model(), "model");
    if (!model.ok()) return model.status();
    info = &(*model)->info();
    auto form = ValidateLayout(request.layout(), "layout", GeometryOf(*info, 0));
    if (!form.ok()) return form.status();
    if (!request.fingerprint().empty() && request.fingerprint() != info->fingerprint) {
      return absl::FailedPreconditionError(
          absl::StrCat("fingerprint ", request.fingerprint().substr(0, 64), " is not model '",
                       info->name, "''s ", info->fingerprint));
    }
    *response->mutable_layout() = LayoutOf(*info, *form);
    response->set_fingerprint(info->fingerprint);
  }
  FillLimits(rpc, info, *transport, response->mutable_limits());
  return absl::OkStatus();
}

}  // namespace prefilld

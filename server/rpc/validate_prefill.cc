#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "server/record/errors.h"
#include "server/rpc/messages.h"
#include "server/rpc/validate.h"
#include "server/rpc/validate_policy.h"

namespace prefilld {
namespace {

// Where a cache can be pulled from in the most ways: what lies in a region of the host's memory is
// sent as well.
Transport BestForKv(const RequestLimits& limits) {
  Transport best = Transport::kGrpc;
  for (const TransportRow& row : kTransports) {
    if (!row.on_device && limits.kv_regions.count(row.transport) > 0) best = row.transport;
  }
  return best;
}

// Why a prompt may have no more than `tokens_max` tokens, where that is not the server's or the
// model's limit; and of whom more are taken: of a cache over gRPC, or one that passes through.
std::string WhyNoMore(const ModelInfo& info, const RequestLimits& limits, int64_t tokens_max,
                      bool retain, Transport lies_in) {
  if (tokens_max == info.sliding_window) return ", the sliding window";
  if (tokens_max == std::min(info.max_positions, limits.prompt_tokens_max)) return "";
  const std::string grpc = ProtoName(Transport::kGrpc);
  const int64_t sent = PromptTokensMax(info, limits);
  const int64_t passing = PromptTokensMax(info, limits, /*retain=*/false);
  const bool in_region = RowOf(lies_in).open != nullptr;
  std::string why = in_region && (!TakesBlocks(lies_in, limits) || sent > tokens_max)
                        ? absl::StrCat(", what a region of ", ProtoName(lies_in), " holds here")
                        : ", what the server's kv_memory holds in one cache";
  if (in_region && sent > tokens_max) {
    absl::StrAppend(&why, "; over ", grpc, " up to ", sent);
  } else if (retain && passing > tokens_max) {
    absl::StrAppend(&why, "; ", in_region ? absl::StrCat("over ", grpc, " ") : "",
                    "with destination.retain = false up to ", passing);
  }
  return why;
}

absl::Status CheckTokens(const v1::PrefillRequest& request, const ModelInfo& info,
                         const RequestLimits& limits, const ValidPrefill& valid) {
  const Transport lies_in = valid.pinned ? valid.transport : Transport::kGrpc;  // else it may
  const int64_t tokens_max = PromptTokensMax(info, limits, valid.retain, lies_in);
  if (request.token_ids_size() < 1 || request.token_ids_size() > tokens_max) {
    return InvalidField(
        "token_ids", absl::StrCat(request.token_ids_size(), " tokens, not from 1 to ", tokens_max,
                                  WhyNoMore(info, limits, tokens_max, valid.retain, lies_in)));
  }
  for (int i = 0; i < request.token_ids_size(); ++i) {
    if (request.token_ids(i) >= static_cast<uint32_t>(info.vocab_size)) {
      return InvalidField(
          absl::StrCat("token_ids[", i, "]"),
          absl::StrCat(request.token_ids(i), " is not below the vocabulary's ", info.vocab_size));
    }
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<ValidPrefill> ValidatePrefill(const v1::PrefillRequest& request,
                                             const ModelInfo& info, const RequestLimits& limits) {
  if (absl::Status status = ValidatePriority(request.priority()); !status.ok()) return status;
  auto policy = ValidatePolicy(request.sparsity());
  if (!policy.ok()) return policy.status();
  if (!v1::PrefixReuse::Mode_IsValid(request.prefix_reuse().mode())) {
    return InvalidField("prefix_reuse.mode",
                        absl::StrCat("unknown mode ", request.prefix_reuse().mode()));
  }
  if (request.prefix_reuse().mode() > v1::PrefixReuse::MODE_NONE) {
    return absl::UnimplementedError("prefix_reuse is not served yet; leave it out or MODE_NONE");
  }

  const v1::KvDestination& destination = request.destination();
  auto asked = ValidateTransport(destination.transport(), "destination.transport",
                                 Carries::kKvCache, limits);
  if (!asked.ok()) return asked.status();
  auto form = ValidateLayout(destination.layout(), "destination.layout", GeometryOf(info, 0));
  if (!form.ok()) return form.status();
  ValidPrefill valid;
  valid.retain = destination.has_retain() ? destination.retain() : true;
  valid.pinned = destination.transport() != v1::TRANSPORT_UNSPECIFIED;
  valid.transport = *asked;
  if (RowOf(*asked).open != nullptr && !valid.retain) {
    return InvalidField(
        "destination.retain",
        absl::StrCat("false is served over TRANSPORT_GRPC only, not ", ProtoName(*asked)));
  }
  if (!valid.pinned && valid.retain) valid.transport = BestForKv(limits);
  auto ttl = ValidateLeaseTtl(destination.has_lease_ttl(), destination.lease_ttl(),
                              "destination.lease_ttl", limits, limits.lease_ttl);
  if (!ttl.ok()) return ttl.status();
  valid.lease_ttl = *ttl;

  if (absl::Status status = CheckTokens(request, info, limits, valid); !status.ok()) return status;
  auto id = ValidateRequestId(request.request_id());
  if (!id.ok()) return id.status();

  valid.job = std::make_shared<Job>();
  valid.job->request_id = *std::move(id);
  valid.job->priority = request.priority();
  valid.job->policy = policy->policy;
  valid.job->method_unspecified = policy->method_unspecified;
  valid.job->prefill = std::make_unique<PrefillWork>();
  valid.job->prefill->token_ids.assign(request.token_ids().begin(), request.token_ids().end());
  valid.job->prefill->return_logits = request.return_logits();
  return valid;
}

}  // namespace prefilld

#include "server/rpc/access.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "server/record/errors.h"
#include "server/record/log.h"
#include "server/rpc/status.h"

namespace prefilld {
namespace {

constexpr size_t kNameBytesMax = 128;  // of what a caller has sent, in a line of the log
// gRPC takes more, as it would end the connection, with all who share it, for one call's.
constexpr size_t kMetadataBytesMax = 16 << 10;

absl::StatusCode CodeOf(Denial denial) {
  switch (denial) {
    case Denial::kNoCredentials:
    case Denial::kCertificate:
    case Denial::kToken:
    case Denial::kClear:
    case Denial::kHandshake:
      return absl::StatusCode::kUnauthenticated;
    case Denial::kLease:
    case Denial::kReport:
      return absl::StatusCode::kNotFound;
    case Denial::kTenant:
    case Denial::kMethod:
    case Denial::kModel:
      return absl::StatusCode::kPermissionDenied;
    case Denial::kMetadata:
      return absl::StatusCode::kResourceExhausted;
  }
  return absl::StatusCode::kPermissionDenied;
}

}  // namespace

struct Access::Refused {
  Denial denial;
  absl::string_view what;  // an RPC, or a port
  const Caller& caller;
  std::string why;
  std::string certificate;  // its first name, of who is nobody
};

absl::StatusOr<std::unique_ptr<Access>> Access::Open(Metrics& metrics,
                                                     const std::string& policy_file,
                                                     bool verifies) {
  if (policy_file.empty()) return std::make_unique<Access>(metrics);
  auto policy = AccessPolicy::Load(policy_file);
  if (!policy.ok()) return policy.status();
  if (!verifies && (*policy)->names_certificates()) {
    return absl::InvalidArgumentError(
        "it names certificates: without --tls_client_ca none is verified");
  }
  return std::make_unique<Access>(metrics, *std::move(policy));
}

void Access::Refuse(const Refused& refused) {
  const char* reason = AccessMetrics::kRefusals[static_cast<int>(refused.denial)];
  metrics_.Refused(reason);
  {
    absl::MutexLock lock(&mutex_);
    const SteadyTime now = SteadyNow();
    const double back = absl::ToDoubleSeconds(now - counted_) * kLinesPerSecond;
    lines_ = std::min(lines_ + back, kLinesAtOnce);
    counted_ = now;
    if (lines_ < 1) {
      ++unlogged_;
      return;
    }
    lines_ -= 1;
  }
  const auto code = static_cast<grpc::StatusCode>(CodeOf(refused.denial));
  Log(Level::kWarning, "access_refused",
      {{"reason", reason},
       {"code", CodeName(code)},
       {"what", std::string(refused.what)},
       {"identity", refused.caller.identity},
       {"tenant", refused.caller.tenant},
       {"peer", refused.caller.peer},
       {"certificate", refused.certificate.substr(0, kNameBytesMax)},
       {"message", refused.why}});
}

void Access::Refresh() {
  if (policy_) metrics_.stale_tokens.Set(policy_->Refresh());
  int64_t unlogged = 0;
  {
    absl::MutexLock lock(&mutex_);
    unlogged = std::exchange(unlogged_, 0);
  }
  if (unlogged > 0) Log(Level::kWarning, "access_refusals_unlogged", {{"count", unlogged}});
}

absl::Status Access::CheckMetadata(Rpc rpc, const std::string& peer, size_t bytes) {
  if (bytes <= kMetadataBytesMax) return absl::OkStatus();
  const std::string why = absl::StrCat("the metadata of the call has ", bytes,
                                       " bytes, the limit is ", kMetadataBytesMax);
  Caller somebody;
  somebody.peer = peer;
  Refuse({Denial::kMetadata, NameOf(rpc), somebody, why, ""});
  return absl::Status(CodeOf(Denial::kMetadata), why);
}

absl::StatusOr<Caller> Access::Admit(Rpc rpc, const Credentials& credentials) {
  if (!policy_) {
    Caller anybody;
    anybody.peer = credentials.peer;
    if (!credentials.uncertified) return anybody;
    const char* const why = "there is no client certificate, and one is needed";
    Refuse({Denial::kNoCredentials, NameOf(rpc), anybody, why, ""});
    return absl::UnauthenticatedError(why);
  }
  AccessPolicy::Verdict verdict = policy_->Judge(credentials, rpc);
  verdict.caller.peer = credentials.peer;
  if (!verdict.denial) return std::move(verdict.caller);
  const bool nobody = *verdict.denial == Denial::kCertificate;
  Refuse({*verdict.denial, NameOf(rpc), verdict.caller, verdict.why,
          nobody ? credentials.certificate.at(0) : ""});
  return absl::Status(CodeOf(*verdict.denial), verdict.why);
}

absl::Status Access::CheckModel(Rpc rpc, const Caller& caller, const std::string& model) {
  if (caller.MayUse(model)) return absl::OkStatus();
  const std::string why = absl::StrCat("identity '", caller.identity, "' may not use model '",
                                       model.substr(0, kNameBytesMax), "'");
  Refuse({Denial::kModel, NameOf(rpc), caller, why, ""});
  return absl::Status(CodeOf(Denial::kModel), why);
}

absl::Status Access::CheckLease(Rpc rpc, const Caller& caller, const LeaseTable& leases,
                                absl::string_view name) {
  const auto owner = policy_ ? leases.OwnerOf(name) : std::nullopt;
  if (!owner || caller.MayHaveCacheOf(*owner)) return absl::OkStatus();
  Refuse({Denial::kLease, NameOf(rpc), caller,
          absl::StrCat("the lease is of identity '", owner->identity, "', tenant '", owner->tenant,
                       "'"),
          ""});
  return ResourceNotFound("lease", "");
}

void Access::ReportDenied(Rpc rpc, const Caller& caller, absl::string_view request_id) {
  Refuse({Denial::kReport, NameOf(rpc), caller,
          absl::StrCat("the report of '", request_id, "' is another tenant's"), ""});
}

void Access::HandshakeFailed(absl::string_view port, absl::string_view peer,
                             absl::string_view why) {
  Caller nobody;
  nobody.peer = std::string(peer);
  Refuse({Denial::kHandshake, port, nobody, std::string(why.substr(0, 2 * kNameBytesMax)), ""});
}

}  // namespace prefilld

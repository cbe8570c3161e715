// What both sides can do, worked out once and before any work: transport, layout, fingerprint and
// limits. Changes nothing; any thread.
#pragma once

#include "absl/status/status.h"
#include "prefilld/v1/kv_handoff_service.pb.h"
#include "server/rpc/context.h"

namespace prefilld {

// INVALID_ARGUMENT by field, NOT_FOUND of the model, FAILED_PRECONDITION for what is legal and not
// possible here: it names both sides.
absl::Status Negotiate(const RpcContext& rpc, const Caller& caller,
                       const v1::NegotiateRequest& request, v1::NegotiateResponse* response);

}  // namespace prefilld

#include "server/rpc/context.h"

#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "server/record/errors.h"

namespace prefilld {

namespace {

absl::Status NoModel(const Models& models, const Caller& caller, const std::string& name) {
  const absl::Status plain = ResourceNotFound("model", name);
  std::vector<std::string> names;
  for (const auto& [served, model] : models) {
    if (caller.MayUse(served)) names.push_back(absl::StrCat("'", served, "'"));
  }
  absl::Status status(plain.code(), absl::StrCat(plain.message(),
                                                 names.empty() ? "; none is served" : "; there is ",
                                                 absl::StrJoin(names, ", ")));
  plain.ForEachPayload(
      [&](absl::string_view url, const absl::Cord& fact) { status.SetPayload(url, fact); });
  return status;
}

}  // namespace

absl::StatusOr<Transformer*> FindModel(const RpcContext& rpc, Rpc which, const Caller& caller,
                                       const std::string& name, const char* field) {
  constexpr size_t kNameBytesMax = 128;
  if (name.empty() || name.size() > kNameBytesMax) {
    return InvalidField(field, absl::StrCat(name.size(), " bytes, not from 1 to ", kNameBytesMax));
  }
  absl::Status status = rpc.access.CheckModel(which, caller, name);
  if (!status.ok()) return status;
  const auto model = rpc.models.find(name);
  if (model == rpc.models.end()) return NoModel(rpc.models, caller, name);
  return model->second.get();
}

absl::StatusOr<LeaseTable::Found> FindLease(const RpcContext& rpc, Rpc which, const Caller& caller,
                                            const std::string& name, uint64_t generation) {
  absl::Status status = rpc.access.CheckLease(which, caller, rpc.leases, name);
  if (!status.ok()) return status;
  return rpc.leases.Find(name, generation);
}

}  // namespace prefilld

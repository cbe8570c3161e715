// The table of RPCs: each is a row, and no call can be recorded that has none.
#pragma once

#include <array>

#include "absl/strings/string_view.h"

namespace prefilld {

enum class Rpc {
  kAttend,
  kPrefill,
  kGetSparsityReport,
  kNegotiate,
  kPullKv,
  kRenewLease,
  kReleaseLease,
  kGetModel,
  kListModels,
};

// group: what access policies call it together with its like.
struct RpcRow {
  Rpc rpc;
  const char* name;
  const char* group;
};
inline constexpr std::array<RpcRow, 9> kRpcs = {{
    {Rpc::kAttend, "Attend", "attend"},
    {Rpc::kPrefill, "Prefill", "prefill"},
    {Rpc::kGetSparsityReport, "GetSparsityReport", "report"},
    {Rpc::kNegotiate, "Negotiate", "discover"},
    {Rpc::kPullKv, "PullKv", "pull"},
    {Rpc::kRenewLease, "RenewLease", "pull"},
    {Rpc::kReleaseLease, "ReleaseLease", "pull"},
    {Rpc::kGetModel, "GetModel", "discover"},
    {Rpc::kListModels, "ListModels", "discover"},
}};

constexpr bool RowsAreInOrder() {
  for (size_t i = 0; i < kRpcs.size(); ++i) {
    if (kRpcs[i].rpc != static_cast<Rpc>(i)) return false;
  }
  return kRpcs.back().rpc == Rpc::kListModels;
}
static_assert(RowsAreInOrder());

constexpr const char* NameOf(Rpc rpc) { return kRpcs[static_cast<size_t>(rpc)].name; }

}  // namespace prefilld

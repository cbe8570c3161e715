// Who calls: whom work is counted under and whose leases and reports are whose. A plain value, made
// by rpc/access from what a call shows; without an access policy all callers are the same one, and
// may do everything.
#pragma once

#include <memory>
#include <optional>
#include <set>
#include <string>

namespace prefilld {

// What the policy lets an identity do beyond methods, which are checked when the call comes.
struct Permissions {
  std::optional<std::set<std::string>> models;  // absent: all
  std::set<std::string> pulls_of;               // identities whose caches it may have, too
  bool all_reports = false;                     // not its own tenant's only
};

struct Caller {
  std::string tenant;                      // whose work it is; empty without a policy
  std::string identity;                    // by its name in the policy; likewise
  double weight = 1;                       // of its tenant's work beside others'
  std::string peer;                        // its address, as gRPC has it: for the log
  std::shared_ptr<const Permissions> may;  // null: everything

  bool MayUse(const std::string& model) const {
    return !may || !may->models || may->models->count(model) > 0;
  }
  // Pull, renew and release what `owner` prefilled.
  bool MayHaveCacheOf(const Caller& owner) const {
    return !may || IsSame(owner) || may->pulls_of.count(owner.identity) > 0;
  }
  bool MayReadReportsOf(const std::string& of_tenant) const {
    return !may || may->all_reports || tenant == of_tenant;
  }
  bool IsSame(const Caller& other) const {
    return identity == other.identity && tenant == other.tenant;
  }
};

}  // namespace prefilld

// The file of an access policy. Everything in it is known by name, or refused by it.
#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <set>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "server/rpc/access_policy.h"

namespace prefilld {
namespace {

using Json = nlohmann::json;

absl::Status Wrong(absl::string_view where, absl::string_view what) {
  return absl::InvalidArgumentError(absl::StrCat(where, ": ", what));
}

// A key that is there twice would be its last value.
absl::StatusOr<Json> ParseJson(const std::string& text) {
  std::vector<std::set<std::string>> keys;
  std::string twice;
  const auto look = [&](int, Json::parse_event_t event, Json& parsed) {
    if (event == Json::parse_event_t::object_start) keys.emplace_back();
    if (event == Json::parse_event_t::object_end) keys.pop_back();
    if (event == Json::parse_event_t::key &&
        !keys.back().insert(parsed.get<std::string>()).second) {
      twice = parsed.get<std::string>();
    }
    return true;
  };
  try {
    Json json = Json::parse(text, look);
    if (!twice.empty()) return Wrong(twice, "the key is there twice in one object");
    return json;
  } catch (const Json::exception& error) {
    return absl::InvalidArgumentError(error.what());
  }
}

// Of an object, `where` in the file, that has no other keys than these.
absl::Status CheckKeys(const Json& json, absl::string_view where,
                       const std::vector<std::string>& known) {
  if (!json.is_object()) return Wrong(where, "is no object");
  for (const auto& [key, value] : json.items()) {
    if (std::find(known.begin(), known.end(), key) != known.end()) continue;
    return Wrong(where,
                 absl::StrCat("unknown key '", key, "'; there is ", absl::StrJoin(known, ", ")));
  }
  return absl::OkStatus();
}

}  // namespace

class AccessPolicyReader {
 public:
  absl::StatusOr<std::unique_ptr<AccessPolicy>> Read(const std::string& path) {
    auto text = WatchedFile(path).Read();
    if (!text.ok()) return text.status();
    auto json = ParseJson(*text);
    if (!json.ok()) return json.status();
    absl::Status status = CheckKeys(*json, "the file", {"identities", "tokens_in_clear"});
    if (!status.ok()) return status;
    if (!Take(*json, "the file", "tokens_in_clear", &policy_->tokens_in_clear_)) return status_;
    const Json identities = json->value("identities", Json());
    if (!identities.is_object() || identities.empty()) {
      return Wrong("identities", "is no object with an identity in it");
    }
    for (const auto& [name, identity] : identities.items()) {
      const std::string where = "identities." + name;
      if (!IsTenantName(name)) return Wrong(where, "is no name of letters, digits and . _ -");
      if (status = ReadIdentity(where, name, identity); !status.ok()) return status;
    }
    for (const auto& [name, others] : pulls_of_) {
      for (const std::string& other : others) {
        if (policy_->identities_.count(other) > 0) continue;
        return Wrong(absl::StrCat("identities.", name, ".pulls_of"),
                     absl::StrCat("there is no identity '", other, "'"));
      }
    }
    return std::move(policy_);
  }

 private:
  using Identity = AccessPolicy::Identity;

  absl::Status ReadIdentity(const std::string& where, const std::string& name, const Json& json) {
    status_ = CheckKeys(json, where,
                        {"certificates", "token_files", "tenant", "proxy", "methods", "models",
                         "share", "reports", "pulls_of"});
    if (!status_.ok()) return status_;
    Identity& identity = policy_->identities_[name];
    identity.name = name;
    std::vector<std::string> certificates, token_files, methods, models, pulls_of;
    std::string tenant, reports = "own";
    if (!Take(json, where, "certificates", &certificates) ||
        !Take(json, where, "token_files", &token_files) || !Take(json, where, "tenant", &tenant) ||
        !Take(json, where, "proxy", &identity.proxy) || !Take(json, where, "methods", &methods) ||
        !Take(json, where, "models", &models) || !Take(json, where, "share", &identity.weight) ||
        !Take(json, where, "reports", &reports) || !Take(json, where, "pulls_of", &pulls_of)) {
      return status_;
    }
    for (const char* key : {"methods", "models"}) {
      if (!json.contains(key)) return Wrong(where, absl::StrCat("'", key, "' is missing"));
    }
    if (certificates.empty() && token_files.empty()) {
      return Wrong(where, "it has neither certificates nor token_files: nobody could be it");
    }
    if (!tenant.empty()) identity.tenant = tenant;
    if (tenant.empty() ? !identity.proxy : !IsTenantName(tenant)) {
      return Wrong(where + ".tenant",
                   absl::StrCat("'", tenant, "' is not from 1 to 64 letters, digits and . _ -"));
    }
    if (!std::isfinite(identity.weight) || identity.weight < 0.01 || identity.weight > 100) {
      return Wrong(where + ".share", absl::StrCat(identity.weight, " is not from 0.01 to 100"));
    }
    if (reports != "own" && reports != "all") {
      return Wrong(where + ".reports", absl::StrCat("'", reports, "' is neither own nor all"));
    }
    Permissions may;
    may.all_reports = reports == "all";
    may.pulls_of.insert(pulls_of.begin(), pulls_of.end());
    const bool every_model = std::find(models.begin(), models.end(), "*") != models.end();
    if (!every_model) may.models.emplace(models.begin(), models.end());
    identity.may = std::make_shared<const Permissions>(std::move(may));
    pulls_of_[name] = std::move(pulls_of);
    if (absl::Status status = ReadMethods(where, methods, &identity); !status.ok()) return status;
    if (absl::Status status = ReadNames(where, certificates, identity); !status.ok()) return status;
    return ReadTokens(where, token_files, identity);
  }

  static absl::Status ReadMethods(const std::string& where, const std::vector<std::string>& methods,
                                  Identity* identity) {
    for (const std::string& method : methods) {
      bool known = false;
      for (const RpcRow& row : kRpcs) {
        if (method != "*" && method != row.name && method != row.group) continue;
        identity->methods.set(static_cast<size_t>(row.rpc));
        known = true;
      }
      if (known) continue;
      std::set<std::string> names = {"*"};
      for (const RpcRow& row : kRpcs) names.insert({row.name, row.group});
      return Wrong(where + ".methods",
                   absl::StrCat("'", method, "' is none of ", absl::StrJoin(names, ", ")));
    }
    return absl::OkStatus();
  }

  absl::Status ReadNames(const std::string& where, const std::vector<std::string>& names,
                         const Identity& identity) {
    for (const std::string& name : names) {
      const bool known = absl::StartsWith(name, "URI:") || absl::StartsWith(name, "DNS:") ||
                         absl::StartsWith(name, "CN:");
      if (!known || name.back() == ':') {
        return Wrong(where + ".certificates",
                     absl::StrCat("'", name, "' is not URI:..., DNS:... or CN:..."));
      }
      if (!policy_->certificates_.emplace(name, &identity).second) {
        return Wrong(where + ".certificates", absl::StrCat("'", name, "' is there twice"));
      }
    }
    return absl::OkStatus();
  }

  absl::Status ReadTokens(const std::string& where, const std::vector<std::string>& paths,
                          const Identity& identity) {
    for (const std::string& path : paths) {
      WatchedFile file(path);
      auto hash = AccessPolicy::ReadToken(file);
      if (!hash.ok()) return Wrong(where + ".token_files", hash.status().message());
      absl::MutexLock lock(&policy_->mutex_);
      for (const auto& token : policy_->tokens_) {
        if (token.hash != *hash || token.identity == &identity) continue;
        return Wrong(where + ".token_files",
                     absl::StrCat("'", path, "' holds the token of identity '",
                                  token.identity->name, "' too"));
      }
      policy_->tokens_.push_back({&identity, *hash});
      policy_->token_files_.push_back({std::move(file), &identity, ""});
    }
    return absl::OkStatus();
  }

  // Leaves *value as it is where the key is absent. False: see status_.
  template <typename T>
  bool Take(const Json& json, absl::string_view where, const char* key, T* value) {
    const auto found = json.find(key);
    if (found == json.end()) return true;
    try {
      const bool number = std::is_same_v<T, double>;
      if (number ? found->is_number() : found->is_boolean() == std::is_same_v<T, bool>) {
        *value = found->get<T>();
        return true;
      }
    } catch (const Json::exception&) {
    }
    status_ =
        Wrong(absl::StrCat(where, ".", key), absl::StrCat(found->dump(), " is of another type"));
    return false;
  }

  std::unique_ptr<AccessPolicy> policy_{new AccessPolicy};
  std::map<std::string, std::vector<std::string>> pulls_of_;  // checked when all names are known
  absl::Status status_;
};

absl::StatusOr<std::unique_ptr<AccessPolicy>> AccessPolicy::Load(const std::string& path) {
  return AccessPolicyReader().Read(path);
}

}  // namespace prefilld

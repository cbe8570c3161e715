// The access policy (docs/access.md): a JSON file that says which certificates and tokens are which
// identity, and what each may do. Read at start and then constant, but for the tokens, whose files
// may change. Thread-safe; no call but Load and Refresh touches a file.
#pragma once

#include <array>
#include <bitset>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/synchronization/mutex.h"
#include "server/caller.h"
#include "server/rpc/rpcs.h"
#include "server/rpc/watched_file.h"

namespace prefilld {

// What a call shows of who it is, verified by nobody yet but the certificate by TLS.
struct Credentials {
  // Of the client's certificate, best first: "URI:spiffe://...", "DNS:...", "CN:...".
  std::vector<std::string> certificate;
  std::optional<std::string> authorization;  // the header: "Bearer TOKEN"
  std::optional<std::string> tenant;         // metadata prefilld-tenant
  bool tls = false;                          // how it came
  bool uncertified = false;                  // a certificate was asked for, and none shown
  std::string peer;                          // its address, as gRPC has it
};

// Why who calls is not let in, or not to something; a label of prefilld_access_refused_total each.
enum class Denial {
  kNoCredentials,
  kCertificate,  // is nobody's in the policy
  kToken,        // is nobody's, or no longer
  kClear,        // a token came in the clear
  kTenant,       // a proxy named none, or who is no proxy another's
  kMethod,
  kModel,
  kLease,   // another's
  kReport,  // another tenant's
  kHandshake,
  kMetadata,  // more of it than a call may have
};

// From 1 to 64 letters, digits and . _ -: a tenant's name, or an identity's.
bool IsTenantName(absl::string_view name);

class AccessPolicy {
 public:
  // NOT_FOUND, INVALID_ARGUMENT: what is wrong, with the key or the identity that is.
  static absl::StatusOr<std::unique_ptr<AccessPolicy>> Load(const std::string& path);

  struct Verdict {
    std::optional<Denial> denial;
    std::string why;
    Caller caller;  // as far as it is known
  };
  Verdict Judge(const Credentials& credentials, Rpc rpc) const;

  bool names_certificates() const { return !certificates_.empty(); }

  // Reads token files that have changed; what is wrong with one goes to the log, and its old token
  // stays. Returns how many are in that state. One call at a time.
  int Refresh();

 private:
  struct Identity {
    std::string name;
    std::optional<std::string> tenant;  // absent: a proxy's, which always names one
    bool proxy = false;
    double weight = 1;
    std::bitset<kRpcs.size()> methods;
    std::shared_ptr<const Permissions> may;
  };
  using Hash = std::array<uint8_t, 32>;  // SHA-256: compared whole, and the token is not kept
  static absl::StatusOr<Hash> ReadToken(WatchedFile& file);
  // Puts what was read of these files in place of what is there; refuses, in *read, what would be a
  // token of two identities.
  void TakeTokens(std::map<size_t, absl::StatusOr<Hash>>* read);
  const Identity* OfToken(absl::string_view authorization) const;
  const Identity* OfCertificate(const std::vector<std::string>& names) const;
  friend class AccessPolicyReader;
  AccessPolicy() = default;

  std::map<std::string, Identity> identities_;
  std::map<std::string, const Identity*> certificates_;  // by "URI:...", "DNS:...", "CN:..."
  bool tokens_in_clear_ = false;
  struct TokenFile {
    WatchedFile file;
    const Identity* identity;
    std::string refusal;  // why what is there now is not taken; empty: it is
  };
  std::vector<TokenFile> token_files_;  // Refresh's
  struct Token {
    const Identity* identity;
    Hash hash;
  };
  mutable absl::Mutex mutex_;
  std::vector<Token> tokens_ ABSL_GUARDED_BY(mutex_);  // in the order of the files
};

}  // namespace prefilld

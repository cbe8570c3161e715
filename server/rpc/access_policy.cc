#include "server/rpc/access_policy.h"

#include <openssl/crypto.h>
#include <openssl/sha.h>

#include <algorithm>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "server/record/log.h"

namespace prefilld {
namespace {

constexpr size_t kTokenBytesMin = 16, kTokenBytesMax = 4096;
constexpr size_t kTenantBytesMax = 64;

std::array<uint8_t, 32> HashOf(absl::string_view text) {
  std::array<uint8_t, 32> hash;
  SHA256(reinterpret_cast<const uint8_t*>(text.data()), text.size(), hash.data());
  return hash;
}

// As grpc::ServerContext::peer() has addresses.
bool IsOfThisHost(absl::string_view peer) {
  for (const char* ours : {"ipv4:127.", "ipv6:%5B::1%5D:", "ipv6:[::1]:", "ipv6:%5B::ffff:127.",
                           "ipv6:[::ffff:127.", "unix:"}) {
    if (absl::StartsWith(peer, ours)) return true;
  }
  return false;
}

}  // namespace

bool IsTenantName(absl::string_view name) {
  for (const char c : name) {
    if (!absl::ascii_isalnum(static_cast<unsigned char>(c)) && c != '.' && c != '_' && c != '-') {
      return false;
    }
  }
  return !name.empty() && name.size() <= kTenantBytesMax;
}

absl::StatusOr<AccessPolicy::Hash> AccessPolicy::ReadToken(WatchedFile& file) {
  auto text = file.Read();
  if (!text.ok()) return text.status();
  const absl::string_view token = absl::StripAsciiWhitespace(*text);
  if (token.size() < kTokenBytesMin || token.size() > kTokenBytesMax) {
    return absl::InvalidArgumentError(absl::StrCat("'", file.path(), "' holds ", token.size(),
                                                   " bytes, a token has from ", kTokenBytesMin,
                                                   " to ", kTokenBytesMax));
  }
  for (const char c : token) {
    if (!absl::ascii_isgraph(static_cast<unsigned char>(c))) {
      return absl::InvalidArgumentError(absl::StrCat(
          "'", file.path(), "' holds more than one word, or bytes that no header can carry"));
    }
  }
  return HashOf(token);
}

int AccessPolicy::Refresh() {
  // A file that was refused is looked at again: it may be the others that have changed.
  std::map<size_t, absl::StatusOr<Hash>> read;
  for (size_t i = 0; i < token_files_.size(); ++i) {
    TokenFile& token = token_files_[i];
    if (token.file.Changed() || !token.refusal.empty()) read.emplace(i, ReadToken(token.file));
  }
  TakeTokens(&read);
  int stale = 0;
  for (const auto& [i, hash] : read) {
    const std::string& identity = token_files_[i].identity->name;
    const std::string refusal(hash.status().message());
    if (hash.ok()) {
      Log(Level::kInfo, "token_read", {{"identity", identity}});
    } else if (refusal != token_files_[i].refusal) {
      Log(Level::kWarning, "token_not_read", {{"identity", identity}, {"message", refusal}});
    }
    token_files_[i].refusal = refusal;
    stale += hash.ok() ? 0 : 1;
  }
  return stale;
}

// Compared is what there would be in the end: the files of one identity often change together, and
// the next token becomes the current one. Who is refused keeps what it had, which nobody else gets
// then, so that more may have to be refused.
void AccessPolicy::TakeTokens(std::map<size_t, absl::StatusOr<Hash>>* read) {
  absl::MutexLock lock(&mutex_);
  std::vector<Token> next = tokens_;
  for (const auto& [i, hash] : *read) {
    if (hash.ok()) next[i].hash = *hash;
  }
  const auto is_anothers = [&](const Token& token) {
    return std::any_of(next.begin(), next.end(), [&](const Token& other) {
      return other.identity != token.identity && other.hash == token.hash;
    });
  };
  for (std::vector<size_t> refused(1); !refused.empty();) {
    refused.clear();
    for (const auto& [i, hash] : *read) {
      if (hash.ok() && is_anothers(next[i])) refused.push_back(i);
    }
    for (const size_t i : refused) {
      next[i].hash = tokens_[i].hash;
      read->at(i) = absl::InvalidArgumentError(
          absl::StrCat("'", token_files_[i].file.path(), "' holds the token of another identity"));
    }
  }
  tokens_ = std::move(next);
}

// Every token is compared, and all of it.
const AccessPolicy::Identity* AccessPolicy::OfToken(absl::string_view authorization) const {
  constexpr absl::string_view kScheme = "bearer ";
  if (!absl::StartsWithIgnoreCase(authorization, kScheme)) return nullptr;
  const auto token = absl::StripAsciiWhitespace(authorization.substr(kScheme.size()));
  if (token.size() > kTokenBytesMax) return nullptr;
  const Hash shown = HashOf(token);
  const Identity* found = nullptr;
  absl::MutexLock lock(&mutex_);
  for (const Token& known : tokens_) {
    if (CRYPTO_memcmp(known.hash.data(), shown.data(), shown.size()) == 0) found = known.identity;
  }
  return found;
}

const AccessPolicy::Identity* AccessPolicy::OfCertificate(
    const std::vector<std::string>& names) const {
  for (const std::string& name : names) {
    const auto found = certificates_.find(name);
    if (found != certificates_.end()) return found->second;
  }
  return nullptr;
}

AccessPolicy::Verdict AccessPolicy::Judge(const Credentials& credentials, Rpc rpc) const {
  Verdict verdict;
  const auto deny = [&](Denial denial, std::string why) {
    verdict.denial = denial;
    verdict.why = std::move(why);
    return verdict;
  };
  const Identity* identity = nullptr;
  if (credentials.authorization) {
    if (!credentials.tls && !tokens_in_clear_ && !IsOfThisHost(credentials.peer)) {
      return deny(Denial::kClear, "a bearer token came without TLS, and is not taken");
    }
    identity = OfToken(*credentials.authorization);
    if (identity == nullptr) return deny(Denial::kToken, "the bearer token is nobody's");
  } else if (!credentials.certificate.empty()) {
    identity = OfCertificate(credentials.certificate);
    if (identity == nullptr) return deny(Denial::kCertificate, "the certificate is nobody's");
  } else {
    return deny(Denial::kNoCredentials,
                "there are no credentials: a client certificate or a bearer token is needed");
  }
  Caller& caller = verdict.caller;
  caller.identity = identity->name;
  caller.tenant = identity->tenant.value_or("");
  caller.weight = identity->weight;
  caller.may = identity->may;
  if (credentials.tenant && *credentials.tenant != identity->tenant) {
    if (!identity->proxy) {
      return deny(Denial::kTenant,
                  absl::StrCat("identity '", identity->name, "' may not name a tenant"));
    }
    if (!IsTenantName(*credentials.tenant)) {
      return deny(Denial::kTenant, absl::StrCat("prefilld-tenant is not from 1 to ",
                                                kTenantBytesMax, " letters, digits and . _ -"));
    }
    caller.tenant = *credentials.tenant;
  }
  if (caller.tenant.empty()) {
    return deny(Denial::kTenant, absl::StrCat("identity '", identity->name,
                                              "' has to name a tenant (prefilld-tenant)"));
  }
  if (!identity->methods.test(static_cast<size_t>(rpc))) {
    return deny(Denial::kMethod,
                absl::StrCat("identity '", identity->name, "' may not call ", NameOf(rpc)));
  }
  return verdict;
}

}  // namespace prefilld

#include "server/rpc/access_policy.h"

#include <openssl/crypto.h>
#include <openssl/sha.h>

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
  int stale = 0;
  for (size_t i = 0; i < token_files_.size(); ++i) {
    auto& [file, is_stale] = token_files_[i];
    if (file.Changed()) {
      auto hash = ReadToken(file);
      absl::MutexLock lock(&mutex_);
      for (size_t other = 0; hash.ok() && other < tokens_.size(); ++other) {
        if (other != i && tokens_[other].hash == *hash) {
          hash = absl::InvalidArgumentError(
              absl::StrCat("'", file.path(), "' holds the token of another file"));
        }
      }
      is_stale = !hash.ok();
      if (hash.ok()) {
        tokens_[i].hash = *hash;
        Log(Level::kInfo, "token_read", {{"identity", tokens_[i].identity->name}});
      } else {
        Log(Level::kWarning, "token_not_read",
            {{"identity", tokens_[i].identity->name},
             {"message", std::string(hash.status().message())}});
      }
    }
    stale += is_stale ? 1 : 0;
  }
  return stale;
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

#include "server/rpc/tls_files.h"

#include <openssl/err.h>
#include <openssl/pem.h>
#include <openssl/ssl.h>
#include <openssl/x509.h>

#include <utility>

#include "absl/strings/str_cat.h"
#include "server/record/log.h"

namespace prefilld {
namespace {

template <auto kFree>
struct FreeWith {
  template <typename T>
  void operator()(T* owned) const {
    kFree(owned);
  }
};
using OwnedBio = std::unique_ptr<BIO, FreeWith<BIO_free>>;
using OwnedCertificate = std::unique_ptr<X509, FreeWith<X509_free>>;
using OwnedKey = std::unique_ptr<EVP_PKEY, FreeWith<EVP_PKEY_free>>;

OwnedBio BioOf(const std::string& pem) {
  return OwnedBio(BIO_new_mem_buf(pem.data(), static_cast<int>(pem.size())));
}

std::vector<OwnedCertificate> CertificatesOf(const std::string& pem) {
  const OwnedBio bio = BioOf(pem);
  std::vector<OwnedCertificate> all;
  while (X509* next = PEM_read_bio_X509(bio.get(), nullptr, nullptr, nullptr)) {
    all.emplace_back(next);
  }
  ERR_clear_error();
  return all;
}

OwnedKey KeyOf(const std::string& pem) {
  const OwnedBio bio = BioOf(pem);
  const auto no_passphrase = [](char*, int, int, void*) { return -1; };  // nobody is asked
  return OwnedKey(PEM_read_bio_PrivateKey(bio.get(), nullptr, no_passphrase, nullptr));
}

absl::StatusOr<std::string> ReadOf(WatchedFile& file, const char* flag) {
  auto text = file.Read();
  if (text.ok()) return text;
  return absl::Status(text.status().code(), absl::StrCat(flag, ": ", text.status().message()));
}

// gRPC looks at them when a client comes, and does not say what is wrong.
absl::StatusOr<std::shared_ptr<SSL_CTX>> ContextOf(const TlsFiles::Pem& pem,
                                                   const TlsPaths& paths) {
  std::vector<OwnedCertificate> chain = CertificatesOf(pem.cert);
  const OwnedKey key = KeyOf(pem.key);
  const std::vector<OwnedCertificate> authorities = CertificatesOf(pem.client_ca);
  if (chain.empty()) {
    return absl::InvalidArgumentError(
        absl::StrCat("--tls_cert: '", paths.cert, "' holds no PEM certificate"));
  }
  if (!key) {
    return absl::InvalidArgumentError(absl::StrCat(
        "--tls_key: '", paths.key, "' holds no PEM private key, or one with a passphrase"));
  }
  if (X509_check_private_key(chain[0].get(), key.get()) != 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("--tls_key: '", paths.key, "' is not the key of '", paths.cert, "'"));
  }
  if (!paths.client_ca.empty() && authorities.empty()) {
    return absl::InvalidArgumentError(
        absl::StrCat("--tls_client_ca: '", paths.client_ca, "' holds no PEM certificate"));
  }
  std::shared_ptr<SSL_CTX> context(SSL_CTX_new(TLS_server_method()), SSL_CTX_free);
  bool good = SSL_CTX_set_min_proto_version(context.get(), TLS1_2_VERSION) == 1 &&
              SSL_CTX_use_certificate(context.get(), chain[0].get()) == 1 &&
              SSL_CTX_use_PrivateKey(context.get(), key.get()) == 1;
  for (size_t i = 1; good && i < chain.size(); ++i) {
    good = SSL_CTX_add1_chain_cert(context.get(), chain[i].get()) == 1;
  }
  for (const OwnedCertificate& authority : authorities) {
    good = good && X509_STORE_add_cert(SSL_CTX_get_cert_store(context.get()), authority.get()) == 1;
    good = good && SSL_CTX_add_client_CA(context.get(), authority.get()) == 1;
  }
  if (!good) {
    return absl::InvalidArgumentError(
        absl::StrCat("--tls_cert: '", paths.cert,
                     "' cannot be served: ", ERR_reason_error_string(ERR_get_error())));
  }
  SSL_CTX_set_verify(context.get(), authorities.empty() ? SSL_VERIFY_NONE : SSL_VERIFY_PEER,
                     nullptr);
  SSL_CTX_set_options(context.get(), SSL_OP_NO_TICKET | SSL_OP_NO_RENEGOTIATION);
  SSL_CTX_set_session_cache_mode(context.get(), SSL_SESS_CACHE_OFF);
  SSL_CTX_set_num_tickets(context.get(), 0);
  SSL_CTX_set_mode(context.get(),
                   SSL_MODE_ENABLE_PARTIAL_WRITE | SSL_MODE_ACCEPT_MOVING_WRITE_BUFFER);
  return context;
}

}  // namespace

absl::StatusOr<std::shared_ptr<const TlsFiles::Pem>> TlsFiles::Read() {
  auto pem = std::make_shared<Pem>();
  auto cert = ReadOf(cert_, "--tls_cert");
  auto key = ReadOf(key_, "--tls_key");
  if (!cert.ok()) return cert.status();
  if (!key.ok()) return key.status();
  pem->cert = *std::move(cert);
  pem->key = *std::move(key);
  if (!client_ca_.path().empty()) {
    auto ca = ReadOf(client_ca_, "--tls_client_ca");
    if (!ca.ok()) return ca.status();
    pem->client_ca = *std::move(ca);
  }
  auto context = ContextOf(*pem, {cert_.path(), key_.path(), client_ca_.path()});
  ERR_clear_error();
  if (!context.ok()) return context.status();
  pem->context = *std::move(context);
  return pem;
}

absl::StatusOr<std::unique_ptr<TlsFiles>> TlsFiles::Open(const TlsPaths& paths) {
  std::unique_ptr<TlsFiles> files(new TlsFiles(paths));
  auto pem = files->Read();
  if (!pem.ok()) return pem.status();
  absl::MutexLock lock(&files->mutex_);
  files->current_ = *std::move(pem);
  return files;
}

bool TlsFiles::Refresh() {
  if (!cert_.Changed() && !key_.Changed() && !client_ca_.Changed()) return !stale_;
  auto pem = Read();
  stale_ = !pem.ok();
  if (stale_) {
    Log(Level::kWarning, "tls_not_read", {{"message", std::string(pem.status().message())}});
    return false;
  }
  {
    absl::MutexLock lock(&mutex_);
    current_ = *std::move(pem);
  }
  Log(Level::kInfo, "tls_read", {{"tls_cert", cert_.path()}});  // who reads that is served it
  return true;
}

}  // namespace prefilld

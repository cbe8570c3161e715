#include "server/rpc/credentials.h"

#include <openssl/err.h>
#include <openssl/pem.h>
#include <openssl/x509.h>

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string_view>
#include <system_error>
#include <utility>

#include "absl/strings/str_cat.h"

namespace prefilld {
namespace {

absl::StatusOr<std::string> ReadFile(const std::string& path, const char* flag) {
  const auto refuse = [&](std::string_view why) {
    return absl::NotFoundError(absl::StrCat(flag, ": cannot read '", path,
                                            "': ", absl::string_view(why.data(), why.size())));
  };
  std::error_code error;
  if (std::filesystem::is_directory(path, error)) return refuse("it is a directory");
  errno = 0;
  std::ifstream file(path, std::ios::binary);
  if (!file) return refuse(std::strerror(errno));
  std::string text{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  if (text.empty()) return refuse("it is empty");
  return text;
}

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

// The first of the text; null: there is none.
OwnedCertificate CertificateOf(const std::string& pem) {
  const OwnedBio bio(BIO_new_mem_buf(pem.data(), static_cast<int>(pem.size())));
  return OwnedCertificate(PEM_read_bio_X509(bio.get(), nullptr, nullptr, nullptr));
}

OwnedKey KeyOf(const std::string& pem) {
  const OwnedBio bio(BIO_new_mem_buf(pem.data(), static_cast<int>(pem.size())));
  const auto no_passphrase = [](char*, int, int, void*) { return -1; };  // nobody is asked
  return OwnedKey(PEM_read_bio_PrivateKey(bio.get(), nullptr, no_passphrase, nullptr));
}

// gRPC looks at them when it begins to listen, and does not say what is wrong.
absl::Status CheckPem(const TlsFiles& tls, const grpc::SslServerCredentialsOptions& options) {
  const auto& pair = options.pem_key_cert_pairs[0];
  const OwnedCertificate certificate = CertificateOf(pair.cert_chain);
  const OwnedKey key = KeyOf(pair.private_key);
  const bool fits = certificate && key && X509_check_private_key(certificate.get(), key.get()) == 1;
  const bool ca = tls.client_ca.empty() || CertificateOf(options.pem_root_certs) != nullptr;
  ERR_clear_error();
  if (!certificate) {
    return absl::InvalidArgumentError(
        absl::StrCat("--tls_cert: '", tls.cert, "' holds no PEM certificate"));
  }
  if (!key) {
    return absl::InvalidArgumentError(absl::StrCat(
        "--tls_key: '", tls.key, "' holds no PEM private key, or one with a passphrase"));
  }
  if (!fits) {
    return absl::InvalidArgumentError(
        absl::StrCat("--tls_key: '", tls.key, "' is not the key of '", tls.cert, "'"));
  }
  if (!ca) {
    return absl::InvalidArgumentError(
        absl::StrCat("--tls_client_ca: '", tls.client_ca, "' holds no PEM certificate"));
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::shared_ptr<grpc::ServerCredentials>> Credentials(const TlsFiles& tls) {
  if (tls.cert.empty()) return grpc::InsecureServerCredentials();
  auto cert = ReadFile(tls.cert, "--tls_cert");
  if (!cert.ok()) return cert.status();
  auto key = ReadFile(tls.key, "--tls_key");
  if (!key.ok()) return key.status();
  grpc::SslServerCredentialsOptions options;
  options.pem_key_cert_pairs.push_back({*std::move(key), *std::move(cert)});
  if (!tls.client_ca.empty()) {
    auto ca = ReadFile(tls.client_ca, "--tls_client_ca");
    if (!ca.ok()) return ca.status();
    options.pem_root_certs = *std::move(ca);
    options.client_certificate_request = GRPC_SSL_REQUEST_AND_REQUIRE_CLIENT_CERTIFICATE_AND_VERIFY;
  }
  if (absl::Status status = CheckPem(tls, options); !status.ok()) return status;
  return grpc::SslServerCredentials(options);
}

}  // namespace prefilld

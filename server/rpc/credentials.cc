#include "server/rpc/credentials.h"

#include <grpc/grpc.h>
#include <grpc/grpc_security.h>

#include <string>

namespace prefilld {
namespace {

// gRPC asks for what is new at the begin of each handshake, which is on the acceptor's thread.
class TlsCredentials final : public grpc::ServerCredentials {
 public:
  TlsCredentials(const TlsFiles& files, grpc_ssl_client_certificate_request_type request)
      : files_(files),
        core_(grpc_ssl_server_credentials_create_with_options(
            grpc_ssl_server_credentials_create_options_using_config_fetcher(request, Fetch,
                                                                            this))) {}
  ~TlsCredentials() override { grpc_server_credentials_release(core_); }

  void SetAuthMetadataProcessor(const std::shared_ptr<grpc::AuthMetadataProcessor>&) override {}

 private:
  static grpc_ssl_certificate_config_reload_status Fetch(
      void* self, grpc_ssl_server_certificate_config** config) {
    TlsCredentials& credentials = *static_cast<TlsCredentials*>(self);
    const auto pem = credentials.files_.current();
    if (pem == credentials.fetched_) return GRPC_SSL_CERTIFICATE_CONFIG_RELOAD_UNCHANGED;
    credentials.fetched_ = pem;
    const grpc_ssl_pem_key_cert_pair pair{pem->key.c_str(), pem->cert.c_str()};
    // It wants some roots, also where nobody is asked for a certificate of them.
    const std::string& roots = pem->client_ca.empty() ? pem->cert : pem->client_ca;
    *config = grpc_ssl_server_certificate_config_create(roots.c_str(), &pair, 1);
    return GRPC_SSL_CERTIFICATE_CONFIG_RELOAD_NEW;
  }
  int AddPortToServer(const std::string& address, grpc_server* server) override {
    return grpc_server_add_http2_port(server, address.c_str(), core_);
  }

  const TlsFiles& files_;
  std::shared_ptr<const TlsFiles::Pem> fetched_;
  grpc_server_credentials* const core_;
};

}  // namespace

std::shared_ptr<grpc::ServerCredentials> ServerCredentialsOf(const TlsFiles* tls,
                                                             bool need_certificate) {
  if (tls == nullptr) return grpc::InsecureServerCredentials();
  return std::make_shared<TlsCredentials>(
      *tls, tls->current()->client_ca.empty() ? GRPC_SSL_DONT_REQUEST_CLIENT_CERTIFICATE
            : need_certificate ? GRPC_SSL_REQUEST_AND_REQUIRE_CLIENT_CERTIFICATE_AND_VERIFY
                               : GRPC_SSL_REQUEST_CLIENT_CERTIFICATE_AND_VERIFY);
}

}  // namespace prefilld

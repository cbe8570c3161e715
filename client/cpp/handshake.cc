#include "client/cpp/handshake.h"

#include <netdb.h>
#include <openssl/err.h>
#include <openssl/ssl.h>
#include <openssl/x509v3.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

#include <cerrno>
#include <memory>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/str_cat.h"

namespace prefilld::client {
namespace {

constexpr timeval kPatience{2, 0};

using Context = std::unique_ptr<SSL_CTX, decltype(&SSL_CTX_free)>;
using Tls = std::unique_ptr<SSL, decltype(&SSL_free)>;

// OpenSSL's own word, and none is left of it.
std::string Reason() {
  const unsigned long error = ERR_peek_last_error();  // NOLINT: OpenSSL's type
  const char* reason = error == 0 ? nullptr : ERR_reason_error_string(error);
  ERR_clear_error();
  return reason == nullptr ? "closed" : reason;
}

Context NewContext() {
  Context context(SSL_CTX_new(TLS_client_method()), &SSL_CTX_free);
  SSL_CTX_set_default_passwd_cb(context.get(), [](char*, int, int, void*) { return -1; });
  constexpr unsigned char kHttp2[] = {2, 'h', '2'};
  SSL_CTX_set_alpn_protos(context.get(), kHttp2, sizeof kHttp2);
  return context;
}

absl::Status LoadFiles(const Credentials& credentials, SSL_CTX* context) {
  if (SSL_CTX_load_verify_locations(context, credentials.tls_ca.c_str(), nullptr) != 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("tls_ca ", credentials.tls_ca, ": no certificate in PEM: ", Reason()));
  }
  if (credentials.tls_cert.empty()) return absl::OkStatus();
  if (SSL_CTX_use_certificate_chain_file(context, credentials.tls_cert.c_str()) != 1 ||
      SSL_CTX_use_PrivateKey_file(context, credentials.tls_key.c_str(), SSL_FILETYPE_PEM) != 1 ||
      SSL_CTX_check_private_key(context) != 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("tls_cert ", credentials.tls_cert, " and tls_key ", credentials.tls_key,
                     ": no certificate in PEM with its key, without a passphrase: ", Reason()));
  }
  return absl::OkStatus();
}

// Connected, or -1.
int ConnectTo(const std::string& host, const std::string& port) {
  addrinfo hints{}, *found = nullptr;
  hints.ai_socktype = SOCK_STREAM;
  if (getaddrinfo(host.c_str(), port.c_str(), &hints, &found) != 0) return -1;
  const absl::Cleanup free = [found] { freeaddrinfo(found); };
  for (const addrinfo* one = found; one != nullptr; one = one->ai_next) {
    const int fd = socket(one->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0) continue;
    setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &kPatience, sizeof kPatience);  // of connect too
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &kPatience, sizeof kPatience);
    if (connect(fd, one->ai_addr, one->ai_addrlen) == 0) return fd;
    close(fd);
  }
  return -1;
}

// OpenSSL writes to sockets that the other end may have closed.
class WithoutSigpipe {
 public:
  WithoutSigpipe() {
    sigemptyset(&pipe_);
    sigaddset(&pipe_, SIGPIPE);
    pthread_sigmask(SIG_BLOCK, &pipe_, &before_);
  }
  ~WithoutSigpipe() {
    constexpr timespec kNow{};
    if (sigismember(&before_, SIGPIPE) == 0) sigtimedwait(&pipe_, nullptr, &kNow);
    pthread_sigmask(SIG_SETMASK, &before_, nullptr);
  }

 private:
  sigset_t pipe_, before_;
};

void Expect(const std::string& name, SSL* tls) {
  SSL_set_verify(tls, SSL_VERIFY_PEER, nullptr);
  if (X509_VERIFY_PARAM_set1_ip_asc(SSL_get0_param(tls), name.c_str()) != 1) {
    ERR_clear_error();  // it is a host's name
    SSL_set1_host(tls, name.c_str());
    SSL_set_tlsext_host_name(tls, name.c_str());
  }
}

bool TimedOut(const SSL* tls, int result) {
  return SSL_get_error(tls, result) == SSL_ERROR_WANT_READ ||
         (SSL_get_error(tls, result) == SSL_ERROR_SYSCALL && errno == EAGAIN);
}

// Empty: nothing stands against it.
std::string WhyNot(const Credentials& credentials, const std::string& name, SSL* tls) {
  if (const int result = SSL_connect(tls); result != 1) {
    if (TimedOut(tls, result)) return "";
    if (const long verdict = SSL_get_verify_result(tls); verdict != X509_V_OK) {  // NOLINT
      ERR_clear_error();
      return absl::StrCat(
          "has no certificate that can be trusted: ", X509_verify_cert_error_string(verdict),
          " (tls_ca ", credentials.tls_ca, ", server name ", name, ")");
    }
    if (ERR_GET_REASON(ERR_peek_last_error()) == SSL_R_WRONG_VERSION_NUMBER) {
      ERR_clear_error();
      return absl::StrCat("does not speak TLS, for which tls_ca ", credentials.tls_ca,
                          " was given");
    }
  } else {
    // What a server has against our certificate comes behind TLS 1.3's handshake, if it says so at
    // all. One that takes it speaks first in HTTP/2.
    char said;
    const int got = SSL_read(tls, &said, 1);
    if (got == 1 || TimedOut(tls, got)) return "";
  }
  return absl::StrCat("refuses this client in the handshake: ", Reason(), " (",
                      credentials.tls_cert.empty()
                          ? "no tls_cert was given"
                          : absl::StrCat("tls_cert ", credentials.tls_cert),
                      ")");
}

}  // namespace

std::string HostOf(const std::string& target) {
  const size_t colon = target.rfind(':');
  if (colon == std::string::npos || target.find('/') != std::string::npos) return "";
  const std::string host = target.substr(0, colon);
  const bool brackets = host.size() > 2 && host.front() == '[' && host.back() == ']';
  return brackets ? host.substr(1, host.size() - 2) : host;
}

absl::Status CheckPem(const Credentials& credentials) {
  return LoadFiles(credentials, NewContext().get());
}

absl::Status WhyNoHandshake(const Credentials& credentials, const std::string& target) {
  const WithoutSigpipe quiet;
  const std::string host = HostOf(target);
  const Context context = NewContext();
  const bool with_tls = !credentials.tls_ca.empty();
  if (host.empty() || (with_tls && !LoadFiles(credentials, context.get()).ok())) {
    return absl::OkStatus();
  }
  const int fd = ConnectTo(host, target.substr(target.rfind(':') + 1));
  if (fd < 0) return absl::OkStatus();
  const absl::Cleanup hang_up = [fd] { close(fd); };
  const Tls tls(SSL_new(context.get()), &SSL_free);
  SSL_set_fd(tls.get(), fd);
  std::string why;
  if (with_tls) {
    const std::string& name = credentials.server_name.empty() ? host : credentials.server_name;
    Expect(name, tls.get());
    why = WhyNot(credentials, name, tls.get());
  } else if (SSL_connect(tls.get()) == 1) {
    why = "speaks TLS: give tls_ca, the file of who signed its certificate";
  }
  ERR_clear_error();
  return why.empty() ? absl::OkStatus()
                     : absl::UnauthenticatedError(absl::StrCat(target, " ", why));
}

}  // namespace prefilld::client

#include "server/http_stream.h"

#include <netdb.h>
#include <openssl/err.h>
#include <openssl/ssl.h>
#include <openssl/x509v3.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <climits>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"

namespace prefilld {
namespace {

std::string TextOf(const ASN1_STRING* text) {
  unsigned char* bytes = nullptr;
  const int count = ASN1_STRING_to_UTF8(&bytes, text);
  if (count < 0) return "";
  const std::unique_ptr<unsigned char, void (*)(unsigned char*)> owned(
      bytes, [](unsigned char* taken) { OPENSSL_free(taken); });
  return {reinterpret_cast<const char*>(bytes), static_cast<size_t>(count)};
}

}  // namespace

HttpStream::HttpStream(int fd, SSL_CTX* tls)
    : fd_(fd), tls_(tls == nullptr ? nullptr : SSL_new(tls), SSL_free) {
  if (tls_ == nullptr) return;
  SSL_set_fd(tls_.get(), fd_);
  SSL_set_accept_state(tls_.get());
}

HttpStream::~HttpStream() { close(fd_); }

ssize_t HttpStream::ResultOf(int result) {
  wants_ = 0;
  if (result > 0) return result;
  switch (SSL_get_error(tls_.get(), result)) {
    case SSL_ERROR_WANT_READ:
      wants_ = POLLIN;
      return -1;
    case SSL_ERROR_WANT_WRITE:
      wants_ = POLLOUT;
      return -1;
    case SSL_ERROR_SSL:
      if (!SSL_is_init_finished(tls_.get())) {
        const char* reason = ERR_reason_error_string(ERR_peek_error());
        failure_ = reason != nullptr ? reason : "no TLS";
      }
      return 0;
    default:
      return 0;
  }
}

ssize_t HttpStream::Read(char* bytes, size_t most) {
  if (tls_ != nullptr) {
    ERR_clear_error();
    return ResultOf(SSL_read(tls_.get(), bytes, static_cast<int>(std::min<size_t>(most, INT_MAX))));
  }
  const ssize_t count = recv(fd_, bytes, most, 0);
  if (count >= 0) return count;
  return errno == EAGAIN || errno == EINTR ? -1 : 0;
}

ssize_t HttpStream::Write(const char* bytes, size_t count) {
  if (tls_ != nullptr) {
    ERR_clear_error();
    return ResultOf(
        SSL_write(tls_.get(), bytes, static_cast<int>(std::min<size_t>(count, INT_MAX))));
  }
  const ssize_t sent = send(fd_, bytes, count, MSG_NOSIGNAL);
  if (sent >= 0) return sent;
  return errno == EAGAIN || errno == EINTR ? -1 : 0;
}

bool HttpStream::pending() const { return tls_ != nullptr && SSL_pending(tls_.get()) > 0; }

bool HttpStream::EndWriting() {
  wants_ = 0;
  if (tls_ != nullptr) {
    ERR_clear_error();
    SSL_shutdown(tls_.get());  // what the peer answers to that is of no interest
  }
  return shutdown(fd_, SHUT_WR) == 0;
}

bool HttpStream::is_uncertified() const {
  return tls_ != nullptr && SSL_get_verify_mode(tls_.get()) != SSL_VERIFY_NONE &&
         SSL_get0_peer_certificate(tls_.get()) == nullptr;
}

std::vector<std::string> HttpStream::CertificateNames() const {
  std::vector<std::string> names;
  const std::unique_ptr<X509, void (*)(X509*)> certificate(
      tls_ == nullptr ? nullptr : SSL_get1_peer_certificate(tls_.get()), X509_free);
  if (certificate == nullptr) return names;
  const std::unique_ptr<GENERAL_NAMES, void (*)(GENERAL_NAMES*)> others(
      static_cast<GENERAL_NAMES*>(
          X509_get_ext_d2i(certificate.get(), NID_subject_alt_name, nullptr, nullptr)),
      GENERAL_NAMES_free);
  for (const auto& [type, prefix] : {std::pair(GEN_URI, "URI:"), std::pair(GEN_DNS, "DNS:")}) {
    for (int i = 0; i < sk_GENERAL_NAME_num(others.get()); ++i) {
      const GENERAL_NAME* name = sk_GENERAL_NAME_value(others.get(), i);
      if (name->type == type) names.push_back(prefix + TextOf(name->d.ia5));  // as d.dNSName
    }
  }
  const X509_NAME* subject = X509_get_subject_name(certificate.get());
  const int at = X509_NAME_get_index_by_NID(subject, NID_commonName, -1);
  if (at >= 0) {
    names.push_back("CN:" + TextOf(X509_NAME_ENTRY_get_data(X509_NAME_get_entry(subject, at))));
  }
  return names;
}

std::string HttpStream::peer() const {
  sockaddr_storage address{};
  socklen_t bytes = sizeof address;
  char name[NI_MAXHOST] = "", port[NI_MAXSERV] = "0";
  if (getpeername(fd_, reinterpret_cast<sockaddr*>(&address), &bytes) == 0) {
    getnameinfo(reinterpret_cast<const sockaddr*>(&address), bytes, name, sizeof name, port,
                sizeof port, NI_NUMERICHOST | NI_NUMERICSERV);
  }
  const absl::string_view host = absl::StripPrefix(name, "::ffff:");
  return absl::StrContains(host, ":") ? absl::StrCat("ipv6:[", host, "]:", port)
                                      : absl::StrCat("ipv4:", host, ":", port);
}

}  // namespace prefilld

// A connection of the HTTP port, in the clear or under TLS, whose handshake goes on as it is read.
// Never blocks. Owned by the HTTP thread; throws nothing away of what the peer was told.
#pragma once

#include <openssl/types.h>
#include <sys/types.h>

#include <memory>
#include <string>
#include <vector>

namespace prefilld {

class HttpStream {
 public:
  // Takes the descriptor, which must not block. tls: null: in the clear.
  HttpStream(int fd, SSL_CTX* tls);
  ~HttpStream();
  HttpStream(const HttpStream&) = delete;
  HttpStream& operator=(const HttpStream&) = delete;

  int fd() const { return fd_; }
  // As recv and send: > 0; 0: it is over; < 0: again, when poll() has told wants().
  ssize_t Read(char* bytes, size_t most);
  ssize_t Write(const char* bytes, size_t count);
  short wants(short otherwise) const { return wants_ != 0 ? wants_ : otherwise; }
  // Bytes have arrived that poll() does not tell of.
  bool pending() const;
  // Nothing more will be written. False: it is over.
  bool EndWriting();

  bool is_tls() const { return tls_ != nullptr; }
  // Why there is no TLS, once Read has said that it is over; empty: that is not why.
  const std::string& failure() const { return failure_; }
  // The peer was asked for a certificate, and has shown none.
  bool is_uncertified() const;
  // Of the peer's certificate, which is verified: see Credentials. None without one.
  std::vector<std::string> CertificateNames() const;
  // As gRPC has it: "ipv4:192.0.2.1:4711", "ipv6:[2001:db8::1]:4711".
  std::string peer() const;

 private:
  ssize_t ResultOf(int result);

  const int fd_;
  const std::unique_ptr<SSL, void (*)(SSL*)> tls_;
  short wants_ = 0;  // 0: what the caller is about
  std::string failure_;
};

}  // namespace prefilld

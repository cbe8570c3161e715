#include "client/cpp/credentials.h"

#include <arpa/inet.h>
#include <sys/stat.h>

#include <cerrno>
#include <cstring>
#include <fstream>
#include <iterator>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "client/cpp/handshake.h"

namespace prefilld::client {
namespace {

constexpr size_t kTokenBytesMax = 8192;

absl::StatusOr<std::string> ReadFile(const std::string& path, const char* name) {
  errno = 0;
  std::ifstream file(path, std::ios::binary);
  std::string text{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  if (file) return text;
  return absl::InvalidArgumentError(absl::StrCat(name, " ", path, ": ", std::strerror(errno)));
}

bool OnThisHost(const std::string& target) {
  if (absl::StartsWith(target, "unix:") || absl::StartsWith(target, "unix-abstract:")) return true;
  const std::string host = HostOf(target);
  in_addr v4;
  if (inet_pton(AF_INET, host.c_str(), &v4) == 1) return ntohl(v4.s_addr) >> 24 == 127;
  in6_addr v6;
  return host == "localhost" ||
         (inet_pton(AF_INET6, host.c_str(), &v6) == 1 && IN6_IS_ADDR_LOOPBACK(&v6));
}

}  // namespace

absl::Status CheckCredentials(const Credentials& credentials, const std::string& target) {
  if (credentials.tls_cert.empty() != credentials.tls_key.empty()) {
    return absl::InvalidArgumentError("tls_cert and tls_key are needed together");
  }
  if (credentials.tls_ca.empty() && !credentials.tls_cert.empty()) {
    return absl::InvalidArgumentError("tls_cert needs tls_ca");
  }
  if (credentials.tls_ca.empty() && !credentials.server_name.empty()) {
    return absl::InvalidArgumentError("server_name needs tls_ca");
  }
  if (!credentials.token_file.empty() && credentials.tls_ca.empty() && !OnThisHost(target)) {
    return absl::InvalidArgumentError(
        absl::StrCat("token_file: ", target,
                     " is reached in the clear, where others can read a token; give tls_ca"));
  }
  if (!credentials.tls_ca.empty()) {
    if (auto channel = ChannelCredentialsOf(credentials); !channel.ok()) return channel.status();
    if (absl::Status status = CheckPem(credentials); !status.ok()) return status;
  }
  return credentials.token_file.empty() ? absl::OkStatus() : TokenOf(credentials).status();
}

absl::StatusOr<std::shared_ptr<grpc::ChannelCredentials>> ChannelCredentialsOf(
    const Credentials& credentials) {
  if (credentials.tls_ca.empty()) return grpc::InsecureChannelCredentials();
  grpc::SslCredentialsOptions options;
  auto ca = ReadFile(credentials.tls_ca, "tls_ca");
  if (!ca.ok()) return ca.status();
  options.pem_root_certs = *std::move(ca);
  if (!credentials.tls_cert.empty()) {
    auto cert = ReadFile(credentials.tls_cert, "tls_cert");
    if (!cert.ok()) return cert.status();
    auto key = ReadFile(credentials.tls_key, "tls_key");
    if (!key.ok()) return key.status();
    options.pem_cert_chain = *std::move(cert);
    options.pem_private_key = *std::move(key);
  }
  return grpc::SslCredentials(options);
}

std::string StampOf(const Credentials& credentials) {
  std::string stamp;
  for (const std::string* path :
       {&credentials.tls_ca, &credentials.tls_cert, &credentials.tls_key}) {
    struct stat file;
    if (path->empty() || stat(path->c_str(), &file) != 0) continue;
    absl::StrAppend(&stamp, file.st_dev, ":", file.st_ino, ":", file.st_size, ":",
                    file.st_mtim.tv_sec, ".", file.st_mtim.tv_nsec, " ");
  }
  return stamp;
}

absl::StatusOr<std::string> TokenOf(const Credentials& credentials) {
  auto text = ReadFile(credentials.token_file, "token_file");
  if (!text.ok()) return text;
  const std::string token(absl::StripAsciiWhitespace(*text));
  const bool printable = token.find_first_not_of(
                             "!\"#$%&'()*+,-./0123456789:;<=>?@ABCDEFGHIJKLMNOPQRSTUVWXYZ[\\]^_`"
                             "abcdefghijklmnopqrstuvwxyz{|}~") == std::string::npos;
  if (printable && !token.empty() && token.size() <= kTokenBytesMax) return token;
  return absl::InvalidArgumentError(absl::StrCat(
      "token_file ", credentials.token_file, ": ", token.size(),
      " bytes that are no token, which is 1 to ", kTokenBytesMax, " printable characters"));
}

}  // namespace prefilld::client

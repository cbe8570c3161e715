#include "client/cpp/credentials.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <string>

#include "client/cpp/client.h"
#include "tests/client/fake_server.h"
#include "tests/client/temp_dir.h"

namespace prefilld::client {
namespace {

using ::testing::Each;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

const std::string kTls = std::string(PREFILLD_FIXTURES) + "/tls/";

std::string ReadFile(const std::string& path) {
  std::ifstream file(path);
  return std::string(std::istreambuf_iterator<char>(file), {});
}

std::shared_ptr<grpc::ServerCredentials> ServerTls(bool wants_certificate) {
  grpc::SslServerCredentialsOptions options;
  options.pem_key_cert_pairs = {{ReadFile(kTls + "server.key"), ReadFile(kTls + "server.pem")}};
  if (wants_certificate) {
    options.pem_root_certs = ReadFile(kTls + "ca.pem");
    options.client_certificate_request = GRPC_SSL_REQUEST_AND_REQUIRE_CLIENT_CERTIFICATE_AND_VERIFY;
  }
  return grpc::SslServerCredentials(options);
}

absl::Status Ask(PrefillClient& client) {
  return client.GetModel("tiny", {.timeout = absl::Seconds(20)}).status();
}

class CredentialsTest : public ::testing::Test {
 protected:
  // A copy that a test may replace, by renaming another over it.
  std::string Put(const std::string& name, const std::string& bytes) const {
    files_.Write("next", bytes);
    std::filesystem::rename(files_ / "next", files_ / name);
    return files_ / name;
  }
  TempDir files_;
};

TEST_F(CredentialsTest, CallsCarryTheTokenAsItIsNow) {
  FakeServer server(ServerTls(false));
  PrefillClient client(server.target(),
                       {.tls_ca = kTls + "ca.pem", .token_file = Put("token", "s3cret\n")});
  ASSERT_TRUE(Ask(client).ok()) << Ask(client);
  Put("token", "another");
  ASSERT_TRUE(Ask(client).ok());
  EXPECT_THAT(server.script().authorization, ElementsAre("Bearer s3cret", "Bearer another"));
}

TEST_F(CredentialsTest, InTheClearATokenStaysOnThisHost) {
  FakeServer server;
  const std::string token = Put("token", "s3cret");
  PrefillClient client(server.target(), {.token_file = token});
  EXPECT_TRUE(Ask(client).ok());
  EXPECT_THAT(server.script().authorization, Each("Bearer s3cret"));
  for (const char* target : {"127.0.0.1:1", "127.9.9.9:1", "localhost:1", "[::1]:1", "unix:/p"}) {
    EXPECT_TRUE(CheckCredentials({.token_file = token}, target).ok()) << target;
  }
  for (const char* target :
       {"10.0.0.1:1", "h:1", "localhost.evil:1", "127.0.0.1.evil:1", "0.0.0.0:1", "[fd00::1]:1"}) {
    const absl::Status status = CheckCredentials({.token_file = token}, target);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << target;
    EXPECT_THAT(std::string(status.message()), HasSubstr("reached in the clear"));
  }
}

TEST_F(CredentialsTest, WhoeverIsAskedForACertificateHasOne) {
  FakeServer server(ServerTls(true));
  PrefillClient known(
      server.target(),
      {.tls_ca = kTls + "ca.pem", .tls_cert = kTls + "client.pem", .tls_key = kTls + "client.key"});
  EXPECT_TRUE(Ask(known).ok()) << Ask(known);
  PrefillClient stranger(server.target(), {.tls_ca = kTls + "ca.pem",
                                           .tls_cert = kTls + "stranger.pem",
                                           .tls_key = kTls + "stranger.key"});
  const absl::Status refused = Ask(stranger);
  EXPECT_EQ(refused.code(), absl::StatusCode::kUnauthenticated) << refused;
  EXPECT_THAT(std::string(refused.message()), HasSubstr("tls_cert " + kTls + "stranger.pem"));
}

TEST_F(CredentialsTest, AnAuthorityIsReadAgainForANewConnection) {
  FakeServer server(ServerTls(false));
  PrefillClient client(server.target(), {.tls_ca = Put("ca", ReadFile(kTls + "ca.pem"))});
  EXPECT_TRUE(Ask(client).ok());
  Put("ca", ReadFile(kTls + "stranger.pem"));
  const absl::Status refused = Ask(client);
  EXPECT_EQ(refused.code(), absl::StatusCode::kUnauthenticated) << refused;
  EXPECT_THAT(std::string(refused.message()), HasSubstr("tls_ca " + files_ / "ca"));
  Put("ca", ReadFile(kTls + "ca.pem"));
  EXPECT_TRUE(Ask(client).ok());
}

TEST_F(CredentialsTest, WhatAHandshakeFailsOfIsSaidInWords) {
  FakeServer with_tls(ServerTls(false)), plain;
  const auto why = [](const FakeServer& server, const Credentials& credentials) {
    PrefillClient client(server.target(), credentials);
    const absl::Status status = Ask(client);
    EXPECT_EQ(status.code(), absl::StatusCode::kUnauthenticated) << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr(server.target()));
    return std::string(status.message());
  };
  const std::string ca = kTls + "ca.pem";
  EXPECT_THAT(why(with_tls, {}), HasSubstr("speaks TLS: give tls_ca"));
  EXPECT_THAT(why(plain, {.tls_ca = ca}), HasSubstr("does not speak TLS"));
  EXPECT_THAT(why(with_tls, {.tls_ca = ca, .server_name = "other"}),
              HasSubstr("hostname mismatch (tls_ca " + ca + ", server name other)"));
  EXPECT_THAT(why(with_tls, {.tls_ca = kTls + "stranger.pem"}),
              HasSubstr("no certificate that can be trusted"));
}

TEST_F(CredentialsTest, WhatCannotBeUsedIsNamedWithItsFile) {
  const std::string ca = kTls + "ca.pem", junk = Put("junk", "nothing of the kind");
  for (const auto& [credentials, words] : std::vector<std::pair<Credentials, std::string>>{
           {{.tls_cert = "c"}, "tls_cert and tls_key are needed together"},
           {{.tls_cert = "c", .tls_key = "k"}, "tls_cert needs tls_ca"},
           {{.server_name = "n"}, "server_name needs tls_ca"},
           {{.tls_ca = "/no/such"}, "tls_ca /no/such: No such file"},
           {{.tls_ca = junk}, "tls_ca " + junk + ": no certificate in PEM"},
           {{.tls_ca = ca, .tls_cert = kTls + "client.pem", .tls_key = kTls + "server.key"},
            "no certificate in PEM with its key"},
           {{.token_file = "/no/such"}, "token_file /no/such: No such file"},
           {{.token_file = Put("lines", "a\nb: c")}, "are no token"},
           {{.token_file = Put("empty", "\n")}, "0 bytes that are no token"}}) {
    PrefillClient client("127.0.0.1:1", credentials);
    const absl::Status status = Ask(client);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr(words));
  }
}

TEST_F(CredentialsTest, WhoIsNotThereIsUnavailable) {
  for (const Credentials& credentials : {Credentials(), Credentials{.tls_ca = kTls + "ca.pem"}}) {
    PrefillClient client("127.0.0.1:1", credentials);
    EXPECT_EQ(client.GetModel("tiny", {.retry = {.tries_max = 1}}).status().code(),
              absl::StatusCode::kUnavailable);
  }
}

}  // namespace
}  // namespace prefilld::client

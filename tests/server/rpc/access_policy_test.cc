#include "server/rpc/access_policy.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <map>
#include <set>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "prefilld/v1/kv_handoff_service.pb.h"
#include "prefilld/v1/model_service.pb.h"
#include "prefilld/v1/prefill_service.pb.h"
#include "server/rpc/access.h"

namespace prefilld {
namespace {

constexpr char kToken[] = "0123456789abcdef";

class AccessPolicyTest : public testing::Test {
 protected:
  AccessPolicyTest() { std::filesystem::create_directories(directory_); }
  ~AccessPolicyTest() override { std::filesystem::remove_all(directory_); }

  std::string Write(const std::string& name, const std::string& text) const {
    const std::string path = directory_ + "/" + name;
    std::ofstream(path, std::ios::trunc) << text;
    return path;
  }
  // $T is a file that holds kToken.
  absl::StatusOr<std::unique_ptr<AccessPolicy>> Load(const std::string& json) const {
    const std::string token = Write("token", absl::StrCat(kToken, "\n"));
    return AccessPolicy::Load(Write("policy", absl::StrReplaceAll(json, {{"$T", token}})));
  }
  std::string Refusal(const std::string& json) const {
    return std::string(Load(json).status().message());
  }
  // Of an identity "a" with these keys more.
  std::string RefusalOf(const std::string& keys) const {
    return Refusal(absl::StrCat(
        R"({"identities": {"a": {"token_files": ["$T"], "tenant": "t", "methods": [], "models": [])",
        keys, "}}}"));
  }
  static Credentials Bearer(const std::string& token) {
    return {.authorization = absl::StrCat("Bearer ", token), .tls = true};
  }

  const std::string directory_ = absl::StrCat(testing::TempDir(), "/access_policy", getpid());
};

TEST_F(AccessPolicyTest, EveryMethodOfTheServicesHasARow) {
  std::set<std::string> methods, rows;
  for (const auto* file :
       {v1::PrefillRequest::descriptor()->file(), v1::PullKvRequest::descriptor()->file(),
        v1::GetModelRequest::descriptor()->file()}) {
    for (int service = 0; service < file->service_count(); ++service) {
      for (int i = 0; i < file->service(service)->method_count(); ++i) {
        methods.insert(file->service(service)->method(i)->name());
      }
    }
  }
  for (const RpcRow& row : kRpcs) rows.insert(row.name);
  EXPECT_EQ(methods, rows);
}

TEST_F(AccessPolicyTest, WhatIsWrongIsNamed) {
  EXPECT_EQ(RefusalOf(""), "");
  const std::pair<const char*, const char*> keys[] = {
      {R"(, "modles": [])", "identities.a: unknown key 'modles'; there is certificates"},
      {R"(, "models": [])", "models: the key is there twice"},
      {R"(, "proxy": "yes")", "identities.a.proxy: \"yes\" is of another type"},
      {R"(, "proxy": 1)", "identities.a.proxy: 1 is of another type"},
      {R"(, "share": true)", "identities.a.share: true is of another type"},
      {R"(, "share": 0)", "identities.a.share: 0 is not from 0.01 to 100"},
      {R"(, "reports": "some")", "identities.a.reports: 'some' is neither own nor all"},
      {R"(, "pulls_of": ["b"])", "identities.a.pulls_of: there is no identity 'b'"},
      {R"(, "pulls_of": [1])", "identities.a.pulls_of: [1] is of another type"},
      {R"(, "certificates": ["spiffe://a"])", "'spiffe://a' is not URI:..., DNS:... or CN:..."},
      {R"(, "certificates": ["CN:"])", "'CN:' is not URI:..., DNS:... or CN:..."},
      {R"(, "certificates": ["CN:x", "CN:x"])", "'CN:x' is there twice"}};
  for (const auto& [more, told] : keys) {
    EXPECT_NE(RefusalOf(more).find(told), std::string::npos) << more << ": " << RefusalOf(more);
  }
  const std::pair<const char*, const char*> files[] = {
      {"", "it is empty"},
      {"{", "parse error"},
      {"[]", "the file: is no object"},
      {"{}", "identities: is no object with an identity in it"},
      {R"({"identities": {}})", "identities: is no object with an identity in it"},
      {R"({"identitys": {}})", "the file: unknown key 'identitys'"},
      {R"({"identities": {"a b": {}}})", "identities.a b: is no name"},
      {R"({"identities": {"a": {"tenant": "t", "methods": [], "models": []}}})",
       "it has neither certificates nor token_files"},
      {R"({"identities": {"a": {"token_files": ["$T"], "tenant": "t", "models": []}}})",
       "'methods' is missing"},
      {R"({"identities": {"a": {"token_files": ["$T"], "methods": [], "models": []}}})",
       "identities.a.tenant: '' is not from 1 to 64"},
      {R"({"identities": {"a": {"token_files": ["$T"], "tenant": "t", "methods": ["pul"],
           "models": []}}})",
       "identities.a.methods: 'pul' is none of *, Attend, GetModel"},
      {R"({"identities": {"a": {"token_files": ["$T"], "tenant": "t", "methods": [], "models": []},
           "b": {"token_files": ["$T"], "tenant": "t", "methods": [], "models": []}}})",
       "holds the token of identity 'a' too"},
      {R"({"identities": {"a": {"token_files": ["/no/such"], "tenant": "t", "methods": [],
           "models": []}}})",
       "cannot read '/no/such'"}};
  for (const auto& [json, told] : files) {
    EXPECT_NE(Refusal(json).find(told), std::string::npos) << json << ": " << Refusal(json);
  }
  Write("short", "0123");
  Write("two", "0123456789abcdef 0123456789abcdef");
  for (const char* name : {"short", "two"}) {
    const std::string json = absl::StrReplaceAll(
        R"({"identities": {"a": {"token_files": ["$P"], "tenant": "t", "methods": [], "models": []}}})",
        {{"$P", absl::StrCat(directory_, "/", name)}});
    EXPECT_NE(Refusal(json), "") << name;
    EXPECT_EQ(Refusal(json).find("0123"), std::string::npos) << "it is a secret";
  }
}

TEST_F(AccessPolicyTest, GroupsAreTheirMethods) {
  const auto policy = *Load(R"({"identities": {"a": {"token_files": ["$T"], "tenant": "t",
      "methods": ["pull", "Prefill"], "models": ["*"]}}})");
  std::set<std::string> may;
  for (const RpcRow& row : kRpcs) {
    const auto verdict = policy->Judge(Bearer(kToken), row.rpc);
    if (!verdict.denial)
      may.insert(row.name);
    else
      EXPECT_EQ(*verdict.denial, Denial::kMethod);
  }
  EXPECT_EQ(may, (std::set<std::string>{"PullKv", "RenewLease", "ReleaseLease", "Prefill"}));
}

TEST_F(AccessPolicyTest, ATokenIsNotTakenWhereOthersHear) {
  const std::string identity = R"("identities": {"a": {"token_files": ["$T"], "tenant": "t",
      "methods": ["*"], "models": ["*"]}})";
  auto policy = *Load("{" + identity + "}");
  const auto denial = [&](const std::string& peer, bool tls) {
    Credentials credentials = Bearer(kToken);
    credentials.peer = peer;
    credentials.tls = tls;
    return policy->Judge(credentials, Rpc::kPrefill).denial;
  };
  const char* const others[] = {"ipv4:192.0.2.1:127", "ipv6:%5B2001:db8::1%5D:1", "ipv6:[::1:1]:1",
                                "ipv4:12.7.0.1:1", ""};
  for (const char* peer : others) {
    EXPECT_EQ(denial(peer, false), Denial::kClear) << peer;
    EXPECT_FALSE(denial(peer, true)) << peer;
  }
  for (const char* peer : {"ipv4:127.0.0.1:9", "ipv6:%5B::1%5D:9", "ipv6:[::1]:9",
                           "ipv6:%5B::ffff:127.0.0.1%5D:9", "unix:/run/s"}) {
    EXPECT_FALSE(denial(peer, false)) << peer;
  }
  policy = *Load(R"({"tokens_in_clear": true, )" + identity + "}");
  for (const char* peer : others) EXPECT_FALSE(denial(peer, false)) << peer;
}

TEST_F(AccessPolicyTest, ATokenGoesBeforeACertificateAndTheBestNameFirst) {
  const auto policy = *Load(R"({"identities": {
      "token": {"token_files": ["$T"], "tenant": "t", "methods": ["*"], "models": ["*"]},
      "uri": {"certificates": ["URI:spiffe://a/b"], "tenant": "u", "methods": ["*"],
              "models": ["m"], "share": 3},
      "cn": {"certificates": ["CN:b"], "tenant": "c", "methods": ["*"], "models": []}}})");
  const auto of = [&](const Credentials& credentials) {
    return policy->Judge(credentials, Rpc::kPullKv);
  };
  Credentials both = Bearer(kToken);
  both.certificate = {"URI:spiffe://a/b", "CN:b"};
  EXPECT_EQ(of(both).caller.identity, "token");
  both.authorization = "Bearer 0123456789abcdeF";
  EXPECT_EQ(of(both).denial, Denial::kToken) << "a wrong one is not made good by a certificate";
  both.authorization.reset();
  const Caller caller = of(both).caller;
  EXPECT_EQ(caller.identity, "uri");
  EXPECT_EQ(caller.tenant, "u");
  EXPECT_EQ(caller.weight, 3);
  EXPECT_TRUE(caller.MayUse("m"));
  EXPECT_FALSE(caller.MayUse("n"));
  EXPECT_EQ(of({.certificate = {"DNS:x", "CN:b"}}).caller.identity, "cn");
  EXPECT_EQ(of({.certificate = {std::string("CN:b\0x", 6)}}).denial, Denial::kCertificate);
  EXPECT_EQ(of({}).denial, Denial::kNoCredentials);
}

// The tokens that identities have by files of these names.
class TokenRotationTest : public AccessPolicyTest {
 protected:
  TokenRotationTest() {
    Put({{"cur", "1"}, {"next", "2"}, {"other", "9"}});
    policy_ = *AccessPolicy::Load(Write("rotation", absl::StrReplaceAll(R"({"identities": {
        "a": {"token_files": ["$D/cur", "$D/next"], "tenant": "t", "methods": ["*"], "models": []},
        "b": {"token_files": ["$D/other"], "tenant": "u", "methods": ["*"], "models": []}}})",
                                                                        {{"$D", directory_}})));
  }
  static std::string Token(const std::string& number) { return absl::StrCat(kToken, number); }
  // As new files, at once for who looks only between two calls.
  void Put(const std::map<std::string, std::string>& numbers) const {
    for (const auto& [name, number] : numbers) {
      const std::string path = Write(name + ".new", Token(number));
      std::filesystem::rename(path, absl::StrCat(directory_, "/", name));
    }
  }
  std::string Is(const std::string& number) const {
    return policy_->Judge(Bearer(Token(number)), Rpc::kPrefill).caller.identity;
  }

  std::unique_ptr<AccessPolicy> policy_;
};

TEST_F(TokenRotationTest, FilesOfOneIdentityAreSwappedTogether) {
  Put({{"cur", "2"}, {"next", "3"}});
  EXPECT_EQ(policy_->Refresh(), 0);
  EXPECT_EQ(Is("1"), "");
  EXPECT_EQ(Is("2"), "a");
  EXPECT_EQ(Is("3"), "a");
  Put({{"cur", "3"}});  // one after the other
  EXPECT_EQ(policy_->Refresh(), 0);
  EXPECT_EQ(Is("2"), "");
  EXPECT_EQ(Is("3"), "a");
  Put({{"next", "4"}});
  EXPECT_EQ(policy_->Refresh(), 0);
  EXPECT_EQ(Is("3"), "a");
  EXPECT_EQ(Is("4"), "a");
}

TEST_F(TokenRotationTest, ATokenPassesFromOneIdentityToAnother) {
  Put({{"cur", "9"}, {"other", "1"}});
  EXPECT_EQ(policy_->Refresh(), 0);
  EXPECT_EQ(Is("9"), "a");
  EXPECT_EQ(Is("1"), "b");
}

TEST_F(TokenRotationTest, ATokenOfAnotherIdentityIsTakenOnceItIsTheOthersNoMore) {
  Put({{"cur", "9"}});
  EXPECT_EQ(policy_->Refresh(), 1);
  EXPECT_EQ(Is("1"), "a") << "the old one stays";
  EXPECT_EQ(Is("9"), "b");
  EXPECT_EQ(policy_->Refresh(), 1);
  Put({{"other", "8"}});
  EXPECT_EQ(policy_->Refresh(), 0) << "looked at again, though it has not changed since";
  EXPECT_EQ(Is("1"), "");
  EXPECT_EQ(Is("9"), "a");
  EXPECT_EQ(Is("8"), "b");
}

TEST_F(TokenRotationTest, ANewTokenOfTwoIdentitiesIsNobodys) {
  Put({{"cur", "7"}, {"other", "7"}});
  EXPECT_EQ(policy_->Refresh(), 2);
  EXPECT_EQ(Is("7"), "");
  EXPECT_EQ(Is("1"), "a");
  EXPECT_EQ(Is("9"), "b");
}

TEST_F(TokenRotationTest, WhoIsRefusedKeepsItsTokenFromWhoWouldHaveHadIt) {
  Put({{"next", "9"}, {"other", "1"}});  // a's next is b's while b may not have a's cur
  EXPECT_EQ(policy_->Refresh(), 2);
  EXPECT_EQ(Is("1"), "a");
  EXPECT_EQ(Is("2"), "a");
  EXPECT_EQ(Is("9"), "b");
}

TEST_F(TokenRotationTest, FilesOfOneIdentityMayHoldOneToken) {
  Put({{"next", "1"}});
  EXPECT_TRUE(AccessPolicy::Load(directory_ + "/rotation").ok());
  Put({{"next", "9"}});
  EXPECT_FALSE(AccessPolicy::Load(directory_ + "/rotation").ok());
}

TEST_F(AccessPolicyTest, ACacheIsItsOwnersAndOfWhomThePolicySays) {
  const auto permissions = std::make_shared<Permissions>(Permissions{.pulls_of = {"router"}});
  const Caller router{.tenant = "a", .identity = "router", .may = permissions};
  const Caller decoder{.tenant = "d", .identity = "decoder", .may = permissions};
  Caller of_b = router;
  of_b.tenant = "b";
  EXPECT_TRUE(decoder.MayHaveCacheOf(router));
  EXPECT_TRUE(decoder.MayHaveCacheOf(decoder));
  EXPECT_FALSE(router.MayHaveCacheOf(decoder));
  const Caller proxy{.tenant = "a", .identity = "proxy", .may = std::make_shared<Permissions>()};
  Caller proxy_of_b = proxy;
  proxy_of_b.tenant = "b";
  EXPECT_TRUE(proxy.MayHaveCacheOf(proxy));
  EXPECT_FALSE(proxy_of_b.MayHaveCacheOf(proxy)) << "another tenant";
  EXPECT_TRUE(decoder.MayHaveCacheOf(of_b)) << "whatever its tenant";
}

TEST(WatchedFile, SeesWhatIsPutInItsPlace) {
  const std::string path = absl::StrCat(testing::TempDir(), "/watched", getpid());
  WatchedFile file(path);
  EXPECT_FALSE(file.Read().ok());
  EXPECT_FALSE(file.Changed());
  std::ofstream(path) << "one";
  EXPECT_TRUE(file.Changed());
  EXPECT_EQ(*file.Read(), "one");
  EXPECT_FALSE(file.Changed());
  EXPECT_EQ(file.Read(2).status().code(), absl::StatusCode::kResourceExhausted);
  std::ofstream(path + ".new") << "two";
  std::filesystem::rename(path + ".new", path);
  EXPECT_TRUE(file.Changed());
  EXPECT_EQ(*file.Read(), "two");
  std::filesystem::remove(path);
  EXPECT_TRUE(file.Changed());
}

}  // namespace
}  // namespace prefilld

#include "server/config.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>
#include <limits>
#include <string>
#include <vector>

namespace prefilld {
namespace {

absl::StatusOr<ParsedConfig> Parse(std::vector<const char*> flags) {
  flags.insert(flags.begin(), "prefilld");
  return ParseConfig(static_cast<int>(flags.size()), flags.data());
}

std::string Refusal(std::vector<const char*> flags) {
  const auto parsed = Parse(std::move(flags));
  EXPECT_FALSE(parsed.ok());
  const std::string message(parsed.status().message());
  EXPECT_EQ(message.find('\n'), std::string::npos) << "one line: " << message;
  return message;
}

TEST(Config, DefaultsAreLoopbackOnly) {
  const auto parsed = Parse({});
  ASSERT_TRUE(parsed.ok()) << parsed.status();
  const Config& config = parsed->config;
  EXPECT_EQ(config.listen.ToString(), "127.0.0.1:50051");
  EXPECT_EQ(config.http.ToString(), "127.0.0.1:9464");
  EXPECT_TRUE(config.listen.loopback());
  EXPECT_TRUE(config.models.empty());
  EXPECT_FALSE(config.transports) << "every one";
  EXPECT_GT(config.kv_memory, 0u);
  EXPECT_LE(config.kv_memory, uint64_t{8} << 30);
  EXPECT_GT(config.attend_memory, 0u);
  EXPECT_FALSE(config.kv_device_memory) << "what the plan leaves";
  EXPECT_TRUE(config.memory_socket.empty());
}

TEST(Config, TheDevicesKvMemoryMayBeNone) {
  EXPECT_EQ(Parse({"--kv_device_memory=0"})->config.kv_device_memory, 0u);
  EXPECT_EQ(Parse({"--kv_device_memory=3GiB"})->config.kv_device_memory, uint64_t{3} << 30);
  EXPECT_THAT(Refusal({"--kv_device_memory=some"}), testing::HasSubstr("--kv_device_memory"));
  EXPECT_THAT(Refusal({"--kv_memory=0"}), testing::HasSubstr("--kv_memory"));
  EXPECT_EQ(Parse({"--memory_socket=/run/p/s"})->config.memory_socket, "/run/p/s");
}

TEST(Config, ReadsEveryKindOfValue) {
  const auto parsed =
      Parse({"--listen=127.0.0.1:0", "--http=[::1]:80", "--backend=cpu", "--threads=3",
             "--model=a=/m/a", "--model=b=/m/b=c", "--kv_memory=8GiB", "--attend_memory=512MiB",
             "--max_prompt_tokens=99", "--max_waiting_jobs=5", "--lease_ttl=1m30s",
             "--max_lease_ttl=1h", "--upload_timeout=250ms", "--drain_timeout=5s"});
  ASSERT_TRUE(parsed.ok()) << parsed.status();
  const Config& config = parsed->config;
  EXPECT_EQ(config.listen.port, 0);
  EXPECT_EQ(config.http.host, "::1");
  EXPECT_EQ(config.http.ToString(), "[::1]:80");
  EXPECT_EQ(config.threads, 3);
  ASSERT_EQ(config.models.size(), 2u);
  EXPECT_EQ(config.models[1].name, "b");
  EXPECT_EQ(config.models[1].directory, "/m/b=c");
  EXPECT_EQ(config.kv_memory, uint64_t{8} << 30);
  EXPECT_EQ(config.attend_memory, uint64_t{512} << 20);
  EXPECT_EQ(config.prompt_tokens_max, 99);
  EXPECT_EQ(config.waiting_jobs_max, 5);
  EXPECT_EQ(config.lease_ttl, absl::Seconds(90));
  EXPECT_EQ(config.lease_ttl_max, absl::Hours(1));
  EXPECT_EQ(config.upload_timeout, absl::Milliseconds(250));
  EXPECT_EQ(config.drain_timeout, absl::Seconds(5));
}

TEST(Config, FlagsMayComeFromAFileAndTheCommandLineWins) {
  const std::string path = testing::TempDir() + "/prefilld_config_test.toml";
  std::ofstream(path) << "threads = 2\nlease_ttl = \"5s\"\nmodel = [\"a=/m/a\", \"b=/m/b\"]\n"
                      << "kv_memory = \"1GiB\"\n";
  const std::string flag = "--config=" + path;
  const auto parsed = Parse({flag.c_str(), "--threads=7"});
  ASSERT_TRUE(parsed.ok()) << parsed.status();
  EXPECT_EQ(parsed->config.threads, 7);
  EXPECT_EQ(parsed->config.lease_ttl, absl::Seconds(5));
  EXPECT_EQ(parsed->config.models.size(), 2u);
  EXPECT_EQ(parsed->config.kv_memory, uint64_t{1} << 30);
}

TEST(Config, AKeyOfAFileThatIsNoFlagIsRefusedByName) {
  const std::string path = testing::TempDir() + "/prefilld_config_test_typo.toml";
  const std::string flag = "--config=" + path;
  for (const char* text : {"tls_client_caa = \"ca.pem\"\n", "[tls_client_caa]\nx = 1\n"}) {
    std::ofstream(path) << text;
    EXPECT_EQ(Refusal({flag.c_str()}), "--config: there is no flag tls_client_caa");
  }
}

bool Offers(std::vector<const char*> flags, Transport transport) {
  return Parse(std::move(flags))->config.transports->count(transport) > 0;
}

TEST(Config, GrpcIsOfferedWhateverElseIs) {
  EXPECT_FALSE(Offers({"--transports=grpc"}, Transport::kPosixShm));
  EXPECT_TRUE(Offers({"--transports=grpc,posix_shm"}, Transport::kPosixShm));
  EXPECT_TRUE(Offers({"--transports=posix_shm"}, Transport::kPosixShm));
}

TEST(Config, CudaIpcIsOfferedWhereThereIsCudaUnlessSomebodySays) {
  EXPECT_FALSE(Parse({})->config.transports.has_value());
  EXPECT_TRUE(Offers({"--transports=posix_shm,cuda_ipc"}, Transport::kCudaIpc));
  EXPECT_FALSE(Offers({"--transports=posix_shm"}, Transport::kCudaIpc));
}

TEST(Config, OfTheGpuAllIsTakenUnlessSomebodySays) {
  EXPECT_EQ(Parse({})->config.gpu_memory, std::numeric_limits<uint64_t>::max());
  EXPECT_EQ(Parse({"--gpu_memory=48GiB"})->config.gpu_memory, uint64_t{48} << 30);
}

TEST(Config, BadFlagsAreNamed) {
  const std::pair<const char*, const char*> cases[] = {
      {"--nonsense=1", "nonsense"},
      {"--listen=127.0.0.1", "--listen"},
      {"--listen=127.0.0.1:70000", "--listen"},
      {"--listen=127.0.0.1:-1", "--listen"},
      {"--listen=:80", "--listen"},
      {"--listen=::1:80", "--listen"},
      {"--http=x:y", "--http"},
      {"--threads=-1", "--threads"},
      {"--threads=many", "--threads"},
      {"--cuda_kernels=sm70", "--cuda_kernels"},
      {"--model=justaname", "--model"},
      {"--model==/dir", "--model"},
      {"--model=name=", "--model"},
      {"--transports=", "--transports"},
      {"--transports=grpc,shm", "'shm'"},
      {"--kv_memory=-1", "--kv_memory"},
      {"--kv_memory=lots", "--kv_memory"},
      {"--kv_memory=0", "--kv_memory"},
      {"--kv_memory=1.5GiB", "--kv_memory"},
      {"--kv_memory=99999999TiB", "--kv_memory"},
      {"--max_prompt_tokens=0", "--max_prompt_tokens"},
      {"--max_waiting_jobs=0", "--max_waiting_jobs"},
      {"--lease_ttl=10", "--lease_ttl"},
      {"--lease_ttl=-1s", "--lease_ttl"},
      {"--drain_timeout=0s", "--drain_timeout"},
      {"--lease_ttl=20m", "--lease_ttl"},  // over the limit
      {"--config=/does/not/exist", "/does/not/exist"},
      {"stray", "stray"},
  };
  for (const auto& [flag, named] : cases) {
    EXPECT_NE(Refusal({flag}).find(named), std::string::npos) << flag << ": " << Refusal({flag});
  }
  EXPECT_NE(Refusal({"--model=a=/1", "--model=a=/2"}).find("'a'"), std::string::npos);
}

TEST(Config, OfAFlagThatIsThereTwiceTheLastCounts) {
  const auto parsed = Parse({"--listen=127.0.0.1:1", "--listen=127.0.0.1:2", "--model=a=/1",
                             "--lease_ttl=5s", "--model=b=/2", "--lease_ttl=6s", "--threads=1",
                             "--threads=2", "--transports=grpc", "--transports=posix_shm"});
  ASSERT_TRUE(parsed.ok()) << parsed.status();
  EXPECT_EQ(parsed->config.listen.port, 2);
  EXPECT_EQ(parsed->config.lease_ttl, absl::Seconds(6));
  EXPECT_EQ(parsed->config.threads, 2);
  EXPECT_EQ(parsed->config.models.size(), 2u) << "these are all meant";
  EXPECT_EQ(parsed->config.transports->size(), 2u);
  EXPECT_NE(Refusal({"--listen=0.0.0.0:1", "--listen=127.0.0.1:2", "--listen=0.0.0.0:1"}), "");
}

TEST(Config, OpeningToTheNetworkMustBeSaid) {
  EXPECT_NE(Refusal({"--listen=0.0.0.0:1"}).find("--insecure_listen"), std::string::npos);
  EXPECT_NE(Refusal({"--listen=[::]:1"}).find("--insecure_listen"), std::string::npos);
  EXPECT_NE(Refusal({"--listen=example.org:1"}).find("--insecure_listen"), std::string::npos);
  EXPECT_NE(Refusal({"--http=0.0.0.0:1"}).find("--insecure_listen"), std::string::npos);
  EXPECT_TRUE(Parse({"--listen=0.0.0.0:1", "--http=0.0.0.0:2", "--insecure_listen"}).ok());
  EXPECT_NE(Refusal({"--http=0.0.0.0:1"}).find("--tls_cert"), std::string::npos);
  EXPECT_TRUE(Parse({"--listen=0.0.0.0:1", "--http=[::]:2", "--tls_cert=c", "--tls_key=k"}).ok());
  EXPECT_TRUE(Parse({"--listen=127.8.9.1:1", "--http=localhost:2"}).ok());
  EXPECT_TRUE(Parse({"--listen=[::1]:1"}).ok());
}

TEST(Config, OneFaultAtATimeIsInjected) {
  EXPECT_EQ(Parse({"--inject_fault=2"})->config.inject_fault, 2);
  EXPECT_EQ(Parse({"--inject_hang=2"})->config.inject_hang, 2);
  for (const std::string& refusal : {Refusal({"--inject_fault=1", "--inject_hang=1"}),
                                     Refusal({"--inject_hang=1", "--inject_fault=1"})}) {
    EXPECT_NE(refusal.find("--inject_fault"), std::string::npos) << refusal;
    EXPECT_NE(refusal.find("--inject_hang"), std::string::npos) << refusal;
  }
}

TEST(Config, TlsFlagsBelongTogether) {
  EXPECT_NE(Refusal({"--tls_cert=c"}).find("--tls_key"), std::string::npos);
  EXPECT_NE(Refusal({"--tls_key=k"}).find("--tls_cert"), std::string::npos);
  EXPECT_NE(Refusal({"--tls_client_ca=ca"}).find("--tls_cert"), std::string::npos);
}

}  // namespace
}  // namespace prefilld

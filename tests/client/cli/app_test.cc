// prefillctl as its users see it: command lines in, files, text and exit status out.
#include "client/cli/app.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <nlohmann/json.hpp>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "client/cpp/safetensors.h"
#include "tests/client/fake_server.h"
#include "tests/client/temp_dir.h"

namespace prefilld::cli {
namespace {

using client::Describe;
using ::testing::AllOf;
using ::testing::ContainsRegex;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::StartsWith;

class AppTest : public ::testing::Test {
 protected:
  // The exit status; what was printed is in out_ and err_.
  int Run(std::vector<std::string> arguments) {
    arguments.insert(arguments.begin(), {"prefillctl", "--target=" + server_.target()});
    return RunAsWritten(arguments);
  }

  int RunAsWritten(const std::vector<std::string>& arguments) {
    std::vector<const char*> argv;
    for (const std::string& argument : arguments) argv.push_back(argument.c_str());
    std::ostringstream out, err;
    const int status = RunApp(static_cast<int>(argv.size()), argv.data(),
                              {.out = out, .err = err, .cancellation = cancellation_});
    out_ = out.str();
    err_ = err.str();
    return status;
  }

  // The one JSON object on stdout.
  nlohmann::json Printed() {
    EXPECT_EQ(std::count(out_.begin(), out_.end(), '\n'), 1) << out_;
    return nlohmann::json::parse(out_, nullptr, false);
  }

  struct Tensor {
    std::string name;
    v1::DataType type;
    std::vector<int64_t> shape;
    std::vector<int32_t> values;  // of an I32; else the bytes count up
  };

  std::string WriteTensors(const std::vector<Tensor>& tensors) {
    auto writer = client::SafetensorsWriter::Create(dir_ / "in");
    std::vector<v1::TensorSpec> specs;
    for (const Tensor& tensor : tensors) {
      v1::TensorSpec& spec = specs.emplace_back();
      spec.set_name(tensor.name);
      spec.set_data_type(tensor.type);
      spec.mutable_shape()->Add(tensor.shape.begin(), tensor.shape.end());
    }
    const auto places = (*writer)->Allocate(specs);
    EXPECT_TRUE(places.ok()) << places.status();
    for (size_t i = 0; i < specs.size(); ++i) {
      auto* bytes = static_cast<uint8_t*>((*places)[i]);
      const uint64_t size = *client::TensorBytes(specs[i]);
      if (tensors[i].type == v1::DATA_TYPE_I32) {
        std::memcpy(bytes, tensors[i].values.data(), size);
      } else {
        for (uint64_t j = 0; j < size; ++j) bytes[j] = static_cast<uint8_t>(i + j);
      }
    }
    EXPECT_TRUE((*writer)->Commit().ok());
    return dir_ / "in";
  }

  std::string WriteQkv(v1::DataType type = v1::DATA_TYPE_BF16) {
    return WriteTensors(
        {{"v", type, {20, 2, 64}}, {"q", type, {10, 4, 64}}, {"k", type, {20, 2, 64}}});
  }

  FakeServer server_;
  FakeServer::Script& script_ = server_.script();
  client::Cancellation cancellation_;
  TempDir dir_;
  std::string out_, err_;
};

TEST_F(AppTest, HealthFollowsTheServer) {
  EXPECT_EQ(Run({"health"}), 0);
  EXPECT_THAT(out_, AllOf(HasSubstr("live   yes"), HasSubstr("ready  yes")));
  server_.SetReady(false);
  EXPECT_EQ(Run({"health", "--json"}), 1);
  EXPECT_EQ(Printed(), nlohmann::json({{"live", true}, {"ready", false}}));
  EXPECT_THAT(err_, StartsWith("prefillctl: UNAVAILABLE: "));
  EXPECT_EQ(RunAsWritten({"prefillctl", "health", "--target=127.0.0.1:1"}), 1);
  EXPECT_THAT(err_, StartsWith("prefillctl: UNAVAILABLE: "));
}

TEST_F(AppTest, HealthWaitsUntilTheServerIsReady) {
  server_.SetReady(false);
  EXPECT_EQ(Run({"health", "--wait", "--timeout=0.3"}), 1);
  EXPECT_THAT(out_, HasSubstr("ready  no"));
  EXPECT_THAT(err_, StartsWith("prefillctl: UNAVAILABLE: "));
  EXPECT_EQ(
      RunAsWritten({"prefillctl", "health", "--wait", "--timeout=0.3", "--target=127.0.0.1:1"}), 1);
  EXPECT_EQ(out_, "");
  std::thread waiting([this] { EXPECT_EQ(Run({"health", "--wait"}), 0); });
  server_.SetReady(true);
  waiting.join();
  EXPECT_THAT(out_, HasSubstr("ready  yes"));
}

TEST_F(AppTest, ModelsListsThem) {
  EXPECT_EQ(Run({"models"}), 0);
  EXPECT_THAT(out_, AllOf(HasSubstr("tiny"), HasSubstr("4/2"), HasSubstr("f32")));
  EXPECT_EQ(Run({"--json", "models"}), 0);
  EXPECT_EQ(Printed()["models"][0]["vocab_size"], 100);
}

TEST_F(AppTest, AttendWritesTheOutputsAndTheReport) {
  EXPECT_EQ(Run({"attend", "--in=" + WriteQkv(), "--out=" + dir_ / "out", "--json",
                 "--method=joint", "--gamma=.8", "--softmax_scale=0.5", "--request_id=mine"}),
            0)
      << err_;
  const auto report = Printed();
  EXPECT_EQ(report["request_id"], "mine");
  EXPECT_EQ(report["tokens"], 10);
  EXPECT_EQ(report["density"], 0.25);
  EXPECT_EQ(report["captured_mass"], 0.93);
  EXPECT_EQ(report["ran"], nlohmann::json({{"joint", 3}, {"dense", 1}}));
  EXPECT_EQ(report["transport"], "grpc");
  EXPECT_EQ(report["phase_seconds"]["attention"], 0.25);
  EXPECT_EQ(report["phase_seconds"].size(), 7u);
  EXPECT_EQ(report["bytes_in"], 1000);
  EXPECT_EQ(report["bytes_out"], 2000);
  EXPECT_GT(report["total_seconds"], 0);

  ASSERT_EQ(script_.attends.size(), 1u);
  const v1::AttendHeader& header = script_.attends[0];
  EXPECT_EQ(header.tensors(0).name(), "q");
  EXPECT_EQ(header.sparsity().method(), v1::METHOD_JOINT);
  EXPECT_EQ(header.sparsity().gamma(), .8);
  EXPECT_FALSE(header.sparsity().has_tau());
  EXPECT_EQ(header.softmax_scale(), 0.5f);
  EXPECT_FALSE(header.return_block_index());

  const auto out = client::SafetensorsFile::Open(dir_ / "out");
  ASSERT_TRUE(out.ok()) << out.status();
  ASSERT_EQ(out->tensors().size(), 2u);
  EXPECT_EQ(Describe(out->Find("o")->spec), "o [10, 4, 64] BF16");
  EXPECT_EQ(Describe(out->Find("lse")->spec), "lse [4, 10] F32");
  const auto in = client::SafetensorsFile::Open(dir_ / "in");
  EXPECT_EQ(std::memcmp(out->Find("o")->data, in->Find("q")->data, 10 * 4 * 64 * 2), 0);
}

TEST_F(AppTest, AttendPassesOffsetsAndAsksForTheIndex) {
  const std::string in = WriteTensors({{"q", v1::DATA_TYPE_F16, {10, 4, 64}},
                                       {"k", v1::DATA_TYPE_F16, {20, 2, 64}},
                                       {"v", v1::DATA_TYPE_F16, {20, 2, 64}},
                                       {"cu_seqlens_q", v1::DATA_TYPE_I32, {3}, {0, 4, 10}},
                                       {"cu_seqlens_k", v1::DATA_TYPE_I32, {3}, {0, 5, 20}}});
  EXPECT_EQ(Run({"attend", "--in=" + in, "--out=" + dir_ / "out", "--return_index"}), 0) << err_;
  EXPECT_THAT(out_, AllOf(HasSubstr("\nran       joint x 3, dense x 1 (below_crossover)\n"),
                          HasSubstr("density   0.2500"), HasSubstr("captured mass 0.93"),
                          HasSubstr("attention 0.250")));
  EXPECT_THAT(script_.attends[0].cu_seqlens_q(), ElementsAre(0, 4, 10));
  EXPECT_THAT(script_.attends[0].cu_seqlens_k(), ElementsAre(0, 5, 20));
  EXPECT_TRUE(script_.attends[0].return_block_index());
  const auto out = client::SafetensorsFile::Open(dir_ / "out");
  ASSERT_TRUE(out.ok());
  EXPECT_EQ(Describe(out->Find("pattern")->spec), "pattern [4] U8");
  EXPECT_NE(out->Find("block_count"), nullptr);
}

TEST_F(AppTest, AttendRefusesBadFilesWithoutASideEffect) {
  const std::string out = "--out=" + dir_ / "out";
  const v1::DataType f32 = v1::DATA_TYPE_F32, i32 = v1::DATA_TYPE_I32;
  EXPECT_EQ(Run({"attend", "--in=" + dir_ / "none", out}), 1);
  EXPECT_THAT(err_, StartsWith("prefillctl: NOT_FOUND: "));
  EXPECT_EQ(Run({"attend", "--in=" + dir_.Write("in", "junk"), out}), 1);
  EXPECT_THAT(err_, StartsWith("prefillctl: INVALID_ARGUMENT: "));
  EXPECT_EQ(Run({"attend", "--in=" + WriteTensors({{"q", f32, {1, 1, 64}}}), out}), 1);
  EXPECT_THAT(err_, HasSubstr("no tensor k"));
  const std::vector<Tensor> bad_offsets = {{"cu_seqlens_q", f32, {1}},
                                           {"cu_seqlens_q", i32, {1, 1}, {0}},
                                           {"cu_seqlens_q", i32, {2}, {0, -1}}};
  for (const Tensor& offsets : bad_offsets) {
    const std::string in = WriteTensors(
        {{"q", f32, {1, 1, 64}}, {"k", f32, {1, 1, 64}}, {"v", f32, {1, 1, 64}}, offsets});
    EXPECT_EQ(Run({"attend", "--in=" + in, out}), 1);
    EXPECT_THAT(err_, AllOf(StartsWith("prefillctl: INVALID_ARGUMENT: "), HasSubstr("cu_seqlens")));
  }
  EXPECT_EQ(Run({"attend", "--in=" + WriteQkv(), "--out=" + dir_ / "none/out"}), 1);
  EXPECT_TRUE(script_.attends.empty()) << "the server was never asked";
  EXPECT_EQ(dir_.Count(), 1);
}

TEST_F(AppTest, AttendDoesNotWriteOverItsInput) {
  const std::string in = WriteQkv();
  EXPECT_EQ(Run({"attend", "--in=" + in, "--out=" + dir_ / "./" + in.substr(in.rfind('/') + 1)}),
            1);
  EXPECT_THAT(err_, HasSubstr("is --in"));
  EXPECT_TRUE(script_.attends.empty());
}

TEST_F(AppTest, AFailedAttendLeavesTheOldOutput) {
  dir_.Write("out", "old");
  script_.before_chunk = [](v1::TensorChunk& chunk) { return chunk.set_crc32c(1), true; };
  EXPECT_EQ(Run({"attend", "--in=" + WriteQkv(), "--out=" + dir_ / "out"}), 1);
  EXPECT_THAT(err_, StartsWith("prefillctl: DATA_LOSS: "));
  EXPECT_EQ(dir_.Read("out"), "old");
  EXPECT_EQ(dir_.Count(), 2);
}

TEST_F(AppTest, LetsTheServerJudgePolicyValues) {
  const std::string in = "--in=" + WriteQkv(), out = "--out=" + dir_ / "out";
  EXPECT_EQ(Run({"attend", in, out, "--gamma=nan", "--tau=-1", "--min_budget=0", "--max_budget=9",
                 "--block_size=77", "--min_captured_mass=2", "--method=streaming"}),
            0)
      << err_;
  const v1::SparsityPolicy& policy = script_.attends[0].sparsity();
  EXPECT_TRUE(std::isnan(policy.gamma()));
  EXPECT_EQ(policy.tau(), -1);
  EXPECT_TRUE(policy.has_min_budget_tokens());
  EXPECT_EQ(policy.max_budget_tokens(), 9u);
  EXPECT_EQ(policy.block_size(), 77u);
  EXPECT_EQ(policy.min_captured_mass(), 2);
  EXPECT_EQ(policy.method(), v1::METHOD_STREAMING);

  for (const char* method : {"other", "unspecified", "METHOD_JOINT", "JOINT"}) {
    EXPECT_EQ(Run({"attend", in, out, absl::StrCat("--method=", method)}), 1);
    EXPECT_THAT(err_, AllOf(StartsWith("prefillctl: INVALID_ARGUMENT: "),
                            HasSubstr("dense, flexprefill, joint")));
  }
  EXPECT_EQ(script_.attends.size(), 1u);
}

TEST_F(AppTest, ADirectoryHoldsNoTokens) {
  EXPECT_NE(Run({"prefill", "--model=tiny", "--tokens=/"}), 0);
  EXPECT_THAT(err_, HasSubstr("/: is a directory"));
}

TEST_F(AppTest, PrefillPullsTheCacheAndTheLogits) {
  EXPECT_EQ(Run({"prefill", "--model=tiny", "--tokens=" + dir_.Write("ids", "[1, 2, 99]"),
                 "--kv_out=" + dir_ / "kv", "--logits_out=" + dir_ / "logits", "--json"}),
            0)
      << err_;
  const auto report = Printed();
  EXPECT_EQ(report["tokens"], 3);
  EXPECT_EQ(report["transport"], "grpc");
  EXPECT_GT(report["ttft_seconds"], 0);
  EXPECT_GE(report["total_seconds"], report["ttft_seconds"]);
  EXPECT_THAT(script_.prefills[0].token_ids(), ElementsAre(1, 2, 99));

  const auto kv = client::SafetensorsFile::Open(dir_ / "kv");
  ASSERT_TRUE(kv.ok()) << kv.status();
  ASSERT_EQ(kv->tensors().size(), 6u);
  for (uint32_t i = 0; i < 6; ++i) {
    const auto* tensor = kv->Find(absl::StrCat("layers.", i / 2, i % 2 == 0 ? ".k" : ".v"));
    ASSERT_NE(tensor, nullptr);
    EXPECT_THAT(tensor->spec.shape(), ElementsAre(2, 3, 64));
    for (uint64_t byte = 0; byte < 2 * 3 * 64 * 4; ++byte) {
      ASSERT_EQ(static_cast<const char*>(tensor->data)[byte], KvByte(i / 2, i % 2, byte));
    }
  }
  const auto logits = client::SafetensorsFile::Open(dir_ / "logits");
  ASSERT_TRUE(logits.ok());
  EXPECT_EQ(Describe(logits->tensors().at(0).spec), "logits [100] F32");
  ASSERT_EQ(script_.releases.size(), 1u);
  EXPECT_EQ(script_.releases[0].reason(), v1::RELEASE_REASON_CONSUMED);
}

TEST_F(AppTest, PrefillWithoutOutputsAbandonsTheLease) {
  EXPECT_EQ(Run({"prefill", "--model=tiny", "--tokens=" + dir_.Write("ids", "[1]")}), 0) << err_;
  EXPECT_THAT(out_, AllOf(HasSubstr("KV ready after"), HasSubstr("\nran       joint x 3, dense")));
  EXPECT_TRUE(script_.pulls.empty());
  ASSERT_EQ(script_.releases.size(), 1u);
  EXPECT_EQ(script_.releases[0].reason(), v1::RELEASE_REASON_ABANDONED);
}

TEST_F(AppTest, PrefillRefusesWhatIsNoListOfTokens) {
  for (const char* text : {"", "{}", "[1", "[-1]", "[1.5]", "[\"1\"]", "[4294967296]", "[null]",
                           "[18446744073709551616]", "[[1]]", "[true]"}) {
    EXPECT_EQ(Run({"prefill", "--model=tiny", "--tokens=" + dir_.Write("ids", text)}), 1) << text;
    EXPECT_THAT(err_, StartsWith("prefillctl: INVALID_ARGUMENT: ")) << text;
  }
  dir_.Write("ids", std::string(1000000, '['));
  EXPECT_EQ(Run({"prefill", "--model=tiny", "--tokens=" + dir_ / "ids"}), 1);
  EXPECT_EQ(Run({"prefill", "--model=tiny", "--tokens=" + dir_ / "none"}), 1);
  EXPECT_THAT(err_, StartsWith("prefillctl: NOT_FOUND: "));
  EXPECT_TRUE(script_.prefills.empty());
}

TEST_F(AppTest, ABrokenPullFailsThePrefillAndAbandonsTheLease) {
  script_.before_chunk = [](v1::TensorChunk& chunk) { return chunk.set_crc32c(1), true; };
  EXPECT_EQ(Run({"prefill", "--model=tiny", "--tokens=" + dir_.Write("ids", "[1]"),
                 "--kv_out=" + dir_ / "kv", "--logits_out=" + dir_ / "logits"}),
            1);
  EXPECT_THAT(err_, StartsWith("prefillctl: DATA_LOSS: "));
  EXPECT_EQ(out_, "");
  EXPECT_EQ(dir_.Count(), 1) << "only the prompt";
  ASSERT_EQ(script_.releases.size(), 1u);
  EXPECT_EQ(script_.releases[0].reason(), v1::RELEASE_REASON_ABANDONED);
}

TEST_F(AppTest, PrefillShowsTheServersRefusal) {
  const std::string tokens = "--tokens=" + dir_.Write("ids", "[1]");
  EXPECT_EQ(Run({"prefill", "--model=none", tokens}), 1);
  EXPECT_EQ(err_, "prefillctl: NOT_FOUND: no model none\n  model: none\n");
  script_.refusals.assign(9, RetryLaterStatus(grpc::StatusCode::RESOURCE_EXHAUSTED, 1));
  EXPECT_EQ(Run({"prefill", "--model=tiny", tokens}), 1);
  EXPECT_EQ(err_, "prefillctl: RESOURCE_EXHAUSTED: later\n  retry in 1ms\n");
}

TEST_F(AppTest, CancellationEndsThePrefillAndAbandonsTheLease) {
  script_.hang_after_admission = true;
  std::thread canceller([&] {
    absl::SleepFor(absl::Milliseconds(200));  // lets the prefill be admitted; not needed to end
    cancellation_.Cancel();
  });
  EXPECT_EQ(Run({"prefill", "--model=tiny", "--tokens=" + dir_.Write("ids", "[1]")}), 1);
  canceller.join();
  EXPECT_THAT(err_, StartsWith("prefillctl: CANCELLED: interrupted"));
  EXPECT_EQ(script_.releases.size(), script_.prefills.size());
}

TEST_F(AppTest, TimeoutIsTheDeadline) {
  script_.hang_after_admission = true;
  EXPECT_EQ(Run({"--timeout=0.2", "attend", "--in=" + WriteQkv(), "--out=" + dir_ / "out"}), 1);
  EXPECT_THAT(err_, StartsWith("prefillctl: DEADLINE_EXCEEDED: "));
  EXPECT_EQ(Run({"models", "--timeout=0"}), 1);
  EXPECT_THAT(err_, StartsWith("prefillctl: DEADLINE_EXCEEDED: "));
}

TEST_F(AppTest, SparsityShowsTheReport) {
  EXPECT_EQ(Run({"sparsity", "--request=known"}), 0) << err_;
  EXPECT_THAT(out_,
              AllOf(HasSubstr("layer   1  1.0000  ####"),
                    HasSubstr("\nran joint x 4, dense x 1, vertical_slash x 1 (short_prompt)\n")));
  EXPECT_EQ(Run({"sparsity", "--request=known", "--json"}), 0);
  const auto report = Printed();
  EXPECT_EQ(report["density"], 0.5);
  EXPECT_EQ(report["head_density"][1][2], 1.0);
  EXPECT_EQ(report["head_pattern"][0][1], "vertical_slash");
  EXPECT_EQ(Run({"sparsity", "--request=other"}), 1);
  EXPECT_THAT(err_, StartsWith("prefillctl: NOT_FOUND: "));
}

TEST_F(AppTest, BenchMeasuresBothLoads) {
  EXPECT_EQ(
      Run({"bench", "--model=tiny", "--tokens=16,32", "--concurrency=1,3", "--duration=0.05"}), 0)
      << err_;
  EXPECT_EQ(std::count(out_.begin(), out_.end(), '\n'), 5) << out_;
  EXPECT_EQ(script_.releases.size(), script_.prefills.size());
  for (uint32_t id : script_.prefills.back().token_ids()) EXPECT_LT(id, 100u);

  script_.refusals = {RetryLaterStatus(grpc::StatusCode::RESOURCE_EXHAUSTED, 1)};
  EXPECT_EQ(Run({"bench", "--shape=4/2/64", "--tokens=100", "--duration=0.05", "--json",
                 "--method=dense"}),
            0)
      << err_;
  const auto runs = Printed()["runs"];
  ASSERT_EQ(runs.size(), 1u);
  EXPECT_GT(runs[0]["requests"], 0);
  EXPECT_GT(runs[0]["tokens_per_second"], 0);
  EXPECT_EQ(runs[0]["density"], 0.25);
  EXPECT_EQ(runs[0]["failures"]["RESOURCE_EXHAUSTED"]["count"], 1);
  EXPECT_GE(runs[0]["ttft_seconds"]["p99"], runs[0]["ttft_seconds"]["p50"]);
  EXPECT_GE(runs[0]["latency_seconds"]["p50"], runs[0]["ttft_seconds"]["p50"]);
  EXPECT_EQ(runs[0]["goodput"]["requests"], runs[0]["requests"]) << "without a deadline";
}

TEST_F(AppTest, BenchSendsAMixAtAnOpenRateFromSeveralPeers) {
  script_.refusals = {RetryLaterStatus(grpc::StatusCode::RESOURCE_EXHAUSTED, 1)};
  ASSERT_EQ(Run({"bench", "--model=tiny", "--tokens=16:3,32:1", "--rate=300", "--duration=0.3",
                 "--peers=3", "--deadline=1m", "--seed=2", "--json"}),
            0)
      << err_;
  const auto run = Printed()["runs"][0];
  const size_t sent = run["sent"];
  EXPECT_GT(sent, 40u);
  EXPECT_LT(sent, 160u) << "90 in the mean";
  EXPECT_EQ(run["requests"], sent - 1) << "a refusal is not tried again";
  EXPECT_EQ(run["goodput"]["requests"], sent - 1);
  EXPECT_EQ(run["tokens"], "16:3,32:1");
  EXPECT_EQ(run["rate"], 300.0);
  ASSERT_EQ(run["peers"].size(), 3u);
  EXPECT_EQ(run["peers"][2]["source"], "127.0.1.3");
  size_t short_ones = 0, from_peers = 0;
  for (const auto& peer : run["peers"]) from_peers += peer["sent"].get<size_t>();
  EXPECT_EQ(from_peers, sent);
  for (const auto& prefill : script_.prefills) short_ones += prefill.token_ids_size() == 16;
  EXPECT_GT(short_ones, script_.prefills.size() / 2) << "three of four";
  EXPECT_LT(short_ones, script_.prefills.size());
  EXPECT_EQ(script_.sources, (std::set<std::string>{"127.0.1.1", "127.0.1.2", "127.0.1.3"}));
}

TEST_F(AppTest, BenchTriesAgainWhereItIsTold) {
  script_.refusals = {RetryLaterStatus(grpc::StatusCode::RESOURCE_EXHAUSTED, 1)};
  ASSERT_EQ(Run({"bench", "--model=tiny", "--tokens=16", "--duration=0.05", "--retry", "--json"}),
            0)
      << err_;
  EXPECT_EQ(Printed()["runs"][0]["failures"].size(), 0u);
}

TEST_F(AppTest, BenchCountsWhatEndsBehindItsDeadlineAsFailed) {
  script_.hang_after_admission = true;
  EXPECT_EQ(Run({"bench", "--model=tiny", "--tokens=16", "--rate=100", "--duration=0.1",
                 "--deadline=100ms", "--json"}),
            1);
  const auto run = Printed()["runs"][0];
  EXPECT_EQ(run["failures"]["DEADLINE_EXCEEDED"]["count"], run["sent"]);
  EXPECT_GE(run["failures"]["DEADLINE_EXCEEDED"]["p99_seconds"], 0.09);
}

TEST_F(AppTest, BenchFailsWhereNothingSucceeds) {
  script_.refusals.assign(1000, grpc::Status(grpc::StatusCode::INTERNAL, "a reason"));
  EXPECT_EQ(Run({"bench", "--shape=4/2/64", "--tokens=100", "--duration=0.05"}), 1);
  EXPECT_THAT(out_, HasSubstr("INTERNAL="));
  EXPECT_THAT(err_, AllOf(HasSubstr("INTERNAL: "), HasSubstr("a reason")));
  EXPECT_EQ(Run({"bench", "--shape=4/2", "--tokens=100"}), 1);
  for (const char* flag : {"--tokens=0", "--tokens=5:0", "--tokens=5:nan", "--tokens=5:1:1",
                           "--tokens=x", "--tokens=5,6:1", "--deadline=soon"}) {
    EXPECT_EQ(Run({"bench", "--shape=4/2/64", "--tokens=100", flag}), 1) << flag;
    EXPECT_THAT(err_, StartsWith("prefillctl: INVALID_ARGUMENT: --")) << flag;
  }
  EXPECT_EQ(RunAsWritten({"prefillctl", "--target=localhost:1", "bench", "--model=m", "--tokens=1",
                          "--peers=2"}),
            1);
  EXPECT_THAT(err_, HasSubstr("--peers needs a --target of IPV4:PORT"));
  EXPECT_EQ(Run({"bench", "--model=tiny", "--tokens=1", "--transport=pigeon"}), 1);
  EXPECT_THAT(err_, StartsWith("prefillctl: INVALID_ARGUMENT: "));
}

TEST_F(AppTest, AWrongCommandLineExitsWith2) {
  const std::vector<std::vector<std::string>> lines = {
      {},
      {"other"},
      {"attend"},
      {"attend", "--in=x"},
      {"attend", "--in=x", "--out=y", "--nope"},
      {"attend", "--in=x", "--out=y", "--gamma=abc"},
      {"attend", "--in=x", "--out=y", "--min_budget=-1"},
      {"prefill", "--model=x"},
      {"sparsity"},
      {"bench", "--tokens=1"},
      {"bench", "--model=x", "--shape=1/1/64", "--tokens=1"},
      {"bench", "--model=x", "--tokens=1", "--concurrency=1", "--rate=1"},
      {"bench", "--model=x", "--tokens=1", "--concurrency=0"},
      {"health", "--target=http://127.0.0.1:50051"},
      {"health", "--target=127.0.0.1"},
      {"health", "--target=[::1]"},
      {"health", "--timeout=soon"}};
  for (const auto& line : lines) {
    EXPECT_EQ(Run(line), 2) << ::testing::PrintToString(line);
    EXPECT_NE(err_, "") << ::testing::PrintToString(line);
    EXPECT_EQ(out_, "");
  }
}

TEST_F(AppTest, SaysItsVersion) {
  EXPECT_EQ(RunAsWritten({"prefillctl", "--version"}), 0);
  EXPECT_THAT(out_, StartsWith("prefillctl 0."));
}

TEST_F(AppTest, HelpNamesEveryFlag) {
  EXPECT_EQ(RunAsWritten({"prefillctl", "--help"}), 0);
  for (const char* word : {"health", "models", "attend", "prefill", "sparsity", "bench", "--target",
                           "--json", "--timeout"}) {
    EXPECT_THAT(out_, HasSubstr(word));
  }
  EXPECT_EQ(RunAsWritten({"prefillctl", "attend", "--help"}), 0);
  for (const char* flag :
       {"--in", "--out", "--return_index", "--softmax_scale", "--method", "--gamma", "--tau",
        "--min_budget", "--max_budget", "--block_size", "--min_captured_mass", "--request_id"}) {
    EXPECT_THAT(out_, HasSubstr(flag));
  }
}

// "  --gamma FLOAT   Coverage [0.9]", "  --duration SECONDS=10   ...": what may be left out says
// what then holds.
TEST_F(AppTest, HelpOfEveryCommandHasDefaultsAndAnExample) {
  for (const char* command : {"health", "models", "attend", "prefill", "sparsity", "bench"}) {
    EXPECT_EQ(RunAsWritten({"prefillctl", command, "--help"}), 0);
    EXPECT_THAT(out_, HasSubstr(absl::StrCat("Example: prefillctl ", command)));
    std::vector<std::string> options;  // each with all its lines
    for (absl::string_view line : absl::StrSplit(out_, '\n')) {
      const bool starts = absl::StartsWith(absl::StripLeadingAsciiWhitespace(line), "-");
      if (starts) options.emplace_back(line);
      if (!starts && absl::StartsWith(line, "   ") && !options.empty())
        absl::StrAppend(&options.back(), line);
    }
    EXPECT_FALSE(options.empty()) << out_;
    for (const std::string& option : options) {
      const bool takes_value = testing::Value(option, ContainsRegex("^ *--[a-z_]+ [A-Z]"));
      const bool one_of_two =
          command == std::string("bench") &&
          (absl::StrContains(option, "--model") || absl::StrContains(option, "--shape"));
      const bool says = testing::Value(option, ContainsRegex("REQUIRED|\\[.+\\]|[A-Z]="));
      EXPECT_TRUE(!takes_value || one_of_two || says) << option;
    }
  }
}

}  // namespace
}  // namespace prefilld::cli

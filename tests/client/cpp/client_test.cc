#include "client/cpp/client.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <set>
#include <thread>

#include "client/cpp/errors.h"
#include "tests/client/fake_server.h"

namespace prefilld::client {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

CallOptions Quick() {
  return {.timeout = absl::Seconds(20), .retry = {.first_delay = absl::Milliseconds(5)}};
}

std::string RandomBytes(uint64_t size, uint32_t seed) {
  std::string bytes(size, '\0');
  for (char& byte : bytes) byte = static_cast<char>((seed = seed * 1664525 + 1013904223) >> 24);
  return bytes;
}

InputTensor Tensor(const std::string& name, std::vector<int64_t> shape, uint32_t seed) {
  InputTensor tensor;
  tensor.spec.set_name(name);
  tensor.spec.set_data_type(v1::DATA_TYPE_F32);
  tensor.spec.mutable_shape()->Add(shape.begin(), shape.end());
  auto bytes = std::make_shared<std::string>(RandomBytes(*TensorBytes(tensor.spec), seed));
  tensor.data = bytes->data();
  tensor.owner = bytes;
  return tensor;
}

class ClientTest : public ::testing::Test {
 protected:
  // An Attend over q of about 2.5 chunks, whose outputs land in outputs_.
  AttendCall Attend() {
    AttendCall call;
    call.inputs = {Tensor("q", {2600, 4, 64}, 1), Tensor("k", {10, 2, 64}, 2),
                   Tensor("v", {10, 2, 64}, 3)};
    call.header.set_return_lse(true);
    call.allocate =
        [this](const std::vector<v1::TensorSpec>& specs) -> absl::StatusOr<std::vector<void*>> {
      ++allocations_;
      outputs_.clear();
      std::vector<void*> places;
      for (const v1::TensorSpec& spec : specs) outputs_.emplace_back(*TensorBytes(spec), '\0');
      for (std::string& output : outputs_) places.push_back(output.data());
      return places;
    };
    return call;
  }

  static std::string BytesOf(const InputTensor& tensor) {
    return {static_cast<const char*>(tensor.data), *TensorBytes(tensor.spec)};
  }

  v1::PrefillRequest Prompt(int tokens) {
    v1::PrefillRequest request;
    request.set_model("tiny");
    for (int i = 0; i < tokens; ++i) request.add_token_ids(static_cast<uint32_t>(i));
    return request;
  }

  // Prefills `tokens` tokens; the call that pulls them into kv_.
  PullCall Prefilled(int tokens) {
    PullCall call;
    const auto summary = client_.Prefill(
        Prompt(tokens),
        [&](const v1::PrefillEvent& event) {
          if (event.has_admission()) call.lease = event.admission().lease();
          return absl::OkStatus();
        },
        Quick());
    EXPECT_TRUE(summary.ok()) << summary.status();
    call.tensor_bytes = static_cast<uint64_t>(tokens) * 2 * 64 * 4;
    kv_.assign(2 * server_.model().layers(), std::string(call.tensor_bytes, '\0'));
    call.destination = [this](uint32_t layer, int tensor_index) {
      destinations_.push_back({layer, tensor_index});
      return kv_[2 * layer + tensor_index].data();
    };
    return call;
  }

  void ExpectKvOfLayers(uint32_t begin, uint32_t end) {
    for (uint32_t i = 0; i < kv_.size(); ++i) {
      const bool pulled = i / 2 >= begin && i / 2 < end;
      for (uint64_t byte = 0; byte < kv_[i].size(); ++byte) {
        ASSERT_EQ(kv_[i][byte], pulled ? KvByte(i / 2, i % 2, byte) : '\0')
            << "layer " << i / 2 << " tensor " << i % 2 << " byte " << byte;
      }
    }
  }

  FakeServer server_;
  FakeServer::Script& script_ = server_.script();
  PrefillClient client_{server_.target()};
  std::vector<std::string> outputs_;
  int allocations_ = 0;
  std::vector<std::string> kv_;  // [layer * 2 + k|v]
  std::vector<std::pair<uint32_t, int>> destinations_;
};

TEST_F(ClientTest, AttendMovesEveryByteBothWays) {
  script_.chunk_bytes = 300000;
  AttendCall call = Attend();
  uint64_t sent = 0, received = 0;
  call.on_upload = [&](uint64_t done, uint64_t) { sent = done; };
  call.on_download = [&](uint64_t done, uint64_t total) {
    received = done;
    EXPECT_LE(done, total);
  };
  const auto summary = client_.Attend(call, Quick());
  ASSERT_TRUE(summary.ok()) << summary.status();
  ASSERT_EQ(script_.uploads.size(), 3u);
  for (int i = 0; i < 3; ++i) EXPECT_EQ(script_.uploads[i], BytesOf(call.inputs[i])) << i;
  ASSERT_EQ(outputs_.size(), 2u);
  EXPECT_EQ(outputs_[0], BytesOf(call.inputs[0]));
  EXPECT_EQ(outputs_[1], std::string(4 * 4 * 2600, '\1'));
  EXPECT_EQ(sent, (2600 * 4 + 2 * 10 * 2) * 64u * 4);
  EXPECT_EQ(received, outputs_[0].size() + outputs_[1].size());
  ASSERT_EQ(script_.attends.size(), 1u);
  EXPECT_EQ(script_.attends[0].tensors(2).name(), "v");
  EXPECT_EQ(script_.attends[0].request_id().size(), 36u);
  EXPECT_EQ(summary->request_id(), script_.attends[0].request_id());
}

TEST_F(ClientTest, AttendSendsBytesThatNobodyOwns) {
  AttendCall call = Attend();
  const auto keep = call.inputs;
  for (InputTensor& input : call.inputs) input.owner = nullptr;
  ASSERT_TRUE(client_.Attend(call, Quick()).ok());
  EXPECT_EQ(script_.uploads[0], BytesOf(keep[0]));
}

TEST_F(ClientTest, AttendLetsGoOfItsInputs) {
  AttendCall call = Attend();
  ASSERT_TRUE(client_.Attend(call, Quick()).ok());
  // The transport may hold the last slices for a moment.
  const absl::Time deadline = SteadyNow() + absl::Seconds(10);
  while (call.inputs[0].owner.use_count() > 1 && SteadyNow() < deadline) {
    std::this_thread::yield();
  }
  EXPECT_EQ(call.inputs[0].owner.use_count(), 1);
}

TEST_F(ClientTest, AttendUploadsNothingThatWasNotAdmitted) {
  script_.refusals = {grpc::Status(grpc::StatusCode::INVALID_ARGUMENT, "no")};
  AttendCall call = Attend();
  call.on_upload = [](uint64_t, uint64_t) { FAIL() << "uploaded"; };
  const auto summary = client_.Attend(call, Quick());
  EXPECT_TRUE(absl::IsInvalidArgument(summary.status())) << summary.status();
  EXPECT_EQ(allocations_, 0);
}

TEST_F(ClientTest, AttendRetriesUnderOneRequestId) {
  script_.refusals = {grpc::Status(grpc::StatusCode::UNAVAILABLE, "x"),
                      RetryLaterStatus(grpc::StatusCode::RESOURCE_EXHAUSTED, 10), grpc::Status::OK};
  ASSERT_TRUE(client_.Attend(Attend(), Quick()).ok());
  ASSERT_EQ(script_.attends.size(), 3u);
  EXPECT_EQ(script_.attends[0].request_id(), script_.attends[2].request_id());
}

TEST_F(ClientTest, AttendStartsOverWhenTheDownloadBreaks) {
  int chunks = 0;
  script_.chunk_bytes = 300000;
  script_.before_chunk = [&](v1::TensorChunk&) { return ++chunks != 3; };
  AttendCall call = Attend();
  const auto summary = client_.Attend(call, Quick());
  ASSERT_TRUE(summary.ok()) << summary.status();
  EXPECT_EQ(allocations_, 2);
  EXPECT_EQ(outputs_[0], BytesOf(call.inputs[0]));
}

TEST_F(ClientTest, AttendRefusesDamagedOutputs) {
  const std::pair<const char*, std::function<bool(v1::TensorChunk&)>> damages[] = {
      {"checksum", [](v1::TensorChunk& chunk) { return chunk.set_crc32c(1), true; }},
      {"offset", [](v1::TensorChunk& chunk) { return chunk.set_byte_offset(5), true; }},
      {"tensor", [](v1::TensorChunk& chunk) { return chunk.set_tensor_index(9), true; }},
      {"too long", [](v1::TensorChunk& chunk) {
         return chunk.set_data(std::string(kMaxChunkBytes, 'x')), true;
       }}};
  for (const auto& [what, damage] : damages) {
    script_.before_chunk = damage;
    EXPECT_EQ(client_.Attend(Attend(), Quick()).status().code(), absl::StatusCode::kDataLoss)
        << what;
  }
  script_.before_chunk = nullptr;
  script_.skip_summary = true;
  EXPECT_EQ(client_.Attend(Attend(), Quick()).status().code(), absl::StatusCode::kDataLoss);
}

TEST_F(ClientTest, AttendEndsWithTheCallersOwnError) {
  AttendCall call = Attend();
  call.allocate = [](const std::vector<v1::TensorSpec>&) -> absl::StatusOr<std::vector<void*>> {
    return absl::ResourceExhaustedError("disk full");
  };
  const auto summary = client_.Attend(call, Quick());
  EXPECT_EQ(summary.status().message(), "disk full");
  EXPECT_EQ(script_.attends.size(), 1u) << "not retried";
}

TEST_F(ClientTest, AttendHonoursDeadlineAndCancellation) {
  script_.hang_after_admission = true;
  CallOptions options = Quick();
  options.timeout = absl::Milliseconds(200);
  EXPECT_TRUE(absl::IsDeadlineExceeded(client_.Attend(Attend(), options).status()));

  Cancellation cancellation;
  options = {.cancellation = &cancellation};
  AttendCall call = Attend();
  std::thread canceller;
  call.on_upload = [&](uint64_t, uint64_t) {
    if (!canceller.joinable()) canceller = std::thread([&] { cancellation.Cancel(); });
  };
  EXPECT_TRUE(absl::IsCancelled(client_.Attend(call, options).status()));
  canceller.join();
}

TEST_F(ClientTest, PrefillShowsTheEventsInOrder) {
  std::vector<int> cases;
  v1::PrefillRequest request = Prompt(5);
  request.set_return_logits(true);
  const auto summary = client_.Prefill(
      request,
      [&](const v1::PrefillEvent& event) {
        cases.push_back(event.event_case());
        return absl::OkStatus();
      },
      Quick());
  ASSERT_TRUE(summary.ok()) << summary.status();
  EXPECT_THAT(cases, ElementsAre(1, 2, 2, 2, 5, 3, 4));
  EXPECT_EQ(summary->tokens(), 5u);
}

TEST_F(ClientTest, PrefillRetriesUnderOneRequestIdAndKeepsDetails) {
  const auto ignore = [](const v1::PrefillEvent&) { return absl::OkStatus(); };
  script_.refusals = {RetryLaterStatus(grpc::StatusCode::RESOURCE_EXHAUSTED, 1),
                      RetryLaterStatus(grpc::StatusCode::UNAVAILABLE, 1), grpc::Status::OK};
  ASSERT_TRUE(client_.Prefill(Prompt(5), ignore, Quick()).ok());
  ASSERT_EQ(script_.prefills.size(), 3u);
  EXPECT_FALSE(script_.prefills[0].request_id().empty());
  EXPECT_EQ(script_.prefills[0].request_id(), script_.prefills[2].request_id());

  v1::PrefillRequest request = Prompt(5);
  request.set_model("none");
  const absl::Status status = client_.Prefill(request, ignore, Quick()).status();
  EXPECT_TRUE(absl::IsNotFound(status)) << status;
  EXPECT_THAT(DetailLines(status), ElementsAre("model: none"));
}

TEST_F(ClientTest, PrefillEndsWithTheCallersOwnError) {
  const auto summary = client_.Prefill(
      Prompt(5), [](const v1::PrefillEvent&) { return absl::InternalError("mine"); }, Quick());
  EXPECT_EQ(summary.status().message(), "mine");
  EXPECT_EQ(script_.prefills.size(), 1u);
}

TEST_F(ClientTest, PullPutsEveryLayerInItsPlace) {
  PullCall call = Prefilled(7);
  std::vector<uint32_t> layers;
  call.on_layer = [&](uint32_t layer) { layers.push_back(layer); };
  ASSERT_TRUE(client_.PullKv(call, Quick()).ok());
  ExpectKvOfLayers(0, 3);
  EXPECT_THAT(layers, ElementsAre(0, 1, 2));
  EXPECT_EQ(destinations_.size(), 6u);
  EXPECT_EQ(script_.pulls[0].boot_id(), "boot");
}

TEST_F(ClientTest, PullServesSomeLayers) {
  PullCall call = Prefilled(7);
  call.first_layer = 1;
  call.layer_count = 1;
  ASSERT_TRUE(client_.PullKv(call, Quick()).ok());
  ExpectKvOfLayers(1, 2);
  call.layer_count = 3;
  EXPECT_TRUE(absl::IsInvalidArgument(client_.PullKv(call, Quick())));
  call.first_layer = 3;
  call.layer_count = 0;
  EXPECT_TRUE(absl::IsInvalidArgument(client_.PullKv(call, Quick())));
}

TEST_F(ClientTest, PullResumesAtTheByteItReached) {
  // The stream breaks before every third chunk: more often than tries are allowed in a row.
  int chunks = 0;
  script_.chunk_bytes = 1000;
  script_.before_chunk = [&](v1::TensorChunk&) { return ++chunks % 3 != 0; };
  PullCall call = Prefilled(7);
  const absl::Status status = client_.PullKv(call, Quick());
  ASSERT_TRUE(status.ok()) << status;
  ExpectKvOfLayers(0, 3);
  EXPECT_GT(script_.pulls.size(), 8u);
  EXPECT_EQ(destinations_.size(), 6u) << "a resumed tensor keeps its place";
  std::set<std::tuple<uint32_t, uint32_t, uint64_t>> positions;
  for (const v1::PullKvRequest& pull : script_.pulls) {
    positions.insert({pull.first_layer(), pull.resume_tensor_index(), pull.resume_byte_offset()});
  }
  EXPECT_EQ(positions.size(), script_.pulls.size()) << "no byte is asked for twice";
}

TEST_F(ClientTest, PullGivesUpWithoutProgress) {
  script_.before_chunk = [](v1::TensorChunk&) { return false; };
  EXPECT_TRUE(absl::IsUnavailable(client_.PullKv(Prefilled(7), Quick())));
  EXPECT_EQ(script_.pulls.size(), 5u);
}

TEST_F(ClientTest, PullRefusesDamagedChunksAndOldLeases) {
  PullCall call = Prefilled(7);
  script_.before_chunk = [](v1::TensorChunk& chunk) { return chunk.set_layer(2), true; };
  EXPECT_EQ(client_.PullKv(call, Quick()).code(), absl::StatusCode::kDataLoss);
  script_.before_chunk = [](v1::TensorChunk& chunk) { return chunk.set_crc32c(2), true; };
  EXPECT_EQ(client_.PullKv(call, Quick()).code(), absl::StatusCode::kDataLoss);
  script_.before_chunk = nullptr;
  call.lease.set_generation(1);
  EXPECT_TRUE(absl::IsFailedPrecondition(client_.PullKv(call, Quick())));
  call.lease.set_generation(7);
  call.tensor_bytes -= 4;  // the caller's idea of the model is wrong
  EXPECT_EQ(client_.PullKv(call, Quick()).code(), absl::StatusCode::kDataLoss);
}

TEST_F(ClientTest, ServesTheSmallCalls) {
  v1::Lease lease;
  lease.set_name("l");
  lease.set_generation(4);
  EXPECT_EQ(*client_.ReleaseLease(lease, v1::RELEASE_REASON_CONSUMED, Quick()), 3u);
  EXPECT_EQ(script_.releases[0].generation(), 4u);
  v1::RenewLeaseRequest renew;
  renew.set_lease("l");
  EXPECT_EQ(client_.RenewLease(renew, Quick())->name(), "l");
  EXPECT_EQ(client_.Negotiate({}, Quick())->transport(), v1::TRANSPORT_GRPC);
  EXPECT_EQ(client_.ListModels(Quick())->at(0).name(), "tiny");
  EXPECT_EQ(client_.GetModel("tiny", Quick())->layers(), 3u);
  EXPECT_TRUE(absl::IsNotFound(client_.GetModel("none", Quick()).status()));
  EXPECT_EQ(client_.GetSparsityReport("known", Quick())->heads(), 3u);
  EXPECT_TRUE(*client_.Health("", Quick()));
  EXPECT_TRUE(*client_.Health("prefilld.v1.PrefillService", Quick()));
  server_.SetReady(false);
  EXPECT_FALSE(*client_.Health("prefilld.v1.PrefillService", Quick()));
  EXPECT_TRUE(absl::IsNotFound(client_.Health("other", Quick()).status()));
}

TEST(PrefillClient, SaysUnavailableWhereNobodyListens) {
  PrefillClient client("127.0.0.1:1");
  const absl::Time start = SteadyNow();
  EXPECT_TRUE(absl::IsUnavailable(client.Health("", Quick()).status()));
  EXPECT_LT(SteadyNow() - start, absl::Seconds(10));
}

TEST_F(ClientTest, RefusesADeadlineThatIsPast) {
  CallOptions past = Quick();
  past.timeout = absl::ZeroDuration();
  EXPECT_TRUE(absl::IsDeadlineExceeded(client_.ListModels(past).status()));
}

TEST(NewRequestId, IsARandomUuid) {
  std::set<std::string> ids;
  for (int i = 0; i < 100; ++i) {
    const std::string id = NewRequestId();
    EXPECT_THAT(id, ::testing::ContainsRegex(
                        "^[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$"));
    ids.insert(id);
  }
  EXPECT_EQ(ids.size(), 100u);
}

}  // namespace
}  // namespace prefilld::client

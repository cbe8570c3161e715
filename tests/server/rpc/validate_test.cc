#include "server/rpc/validate.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <functional>
#include <limits>
#include <set>
#include <string>
#include <vector>

#include "absl/strings/ascii.h"
#include "server/record/errors.h"
#include "server/record/metrics.h"
#include "server/rpc/messages.h"
#include "server/transport/ipc_memory.h"
#include "server/transport/shm_memory.h"
#include "tests/server/fake_device.h"

namespace prefilld {
namespace {

constexpr uint64_t kGiB = uint64_t{1} << 30;
const RequestLimits kShm{.offered = {Transport::kPosixShm},
                         .kv_regions = {{Transport::kPosixShm, kGiB}}};
const RequestLimits kIpc{.offered = {Transport::kCudaIpc}};
constexpr int64_t kHuge = int64_t{1} << 62;

// --- Attend
// ----------------------------------------------------------------------------------------

v1::AttendHeader GoodHeader() {
  v1::AttendHeader header;
  header.set_request_id("good-1");
  const std::tuple<const char*, int, int> tensors[] = {{"v", 20, 2}, {"q", 10, 4}, {"k", 20, 2}};
  for (auto [name, tokens, heads] : tensors) {
    v1::TensorSpec& spec = *header.add_tensors();
    spec.set_name(name);
    spec.set_data_type(v1::DATA_TYPE_BF16);
    for (int dim : {tokens, heads, 64}) spec.add_shape(dim);
  }
  return header;
}

v1::AttendHeader Ragged(std::vector<uint32_t> q, std::vector<uint32_t> k) {
  v1::AttendHeader header = GoodHeader();
  header.mutable_cu_seqlens_q()->Assign(q.begin(), q.end());
  header.mutable_cu_seqlens_k()->Assign(k.begin(), k.end());
  return header;
}

TEST(ValidateAttend, MakesAJobOfAGoodHeader) {
  v1::AttendHeader header = GoodHeader();
  header.set_priority(-7);
  header.set_return_lse(true);
  const auto valid = ValidateAttend(header, {});
  ASSERT_TRUE(valid.ok()) << valid.status();
  EXPECT_EQ(valid->roles, (std::array<int, 3>{2, 0, 1})) << "the order of announcement";
  EXPECT_FALSE(valid->ragged);
  const Job& job = *valid->job;
  EXPECT_EQ(job.request_id, "good-1");
  EXPECT_EQ(job.priority, -7);
  EXPECT_TRUE(job.method_unspecified);
  const AttendWork& work = *job.attend;
  EXPECT_EQ(work.shape.dtype, DType::kBF16);
  EXPECT_EQ(work.shape.q_heads, 4);
  EXPECT_EQ(work.shape.kv_heads, 2);
  EXPECT_EQ(work.shape.head_dim, 64);
  EXPECT_EQ(work.shape.cu_seqlens_q, (std::vector<int64_t>{0, 10}));
  EXPECT_EQ(work.shape.cu_seqlens_k, (std::vector<int64_t>{0, 20}));
  EXPECT_DOUBLE_EQ(work.softmax_scale, 0.125);
  EXPECT_TRUE(work.return_lse);
}

TEST(ValidateAttend, TakesRaggedBatches) {
  const auto valid = ValidateAttend(Ragged({0, 3, 10}, {0, 3, 20}), {});
  ASSERT_TRUE(valid.ok()) << valid.status();
  EXPECT_TRUE(valid->ragged);
  EXPECT_EQ(valid->job->attend->shape.sequences(), 2);
}

TEST(ValidateAttend, ReturningCapturedMassMeasuresIt) {
  v1::AttendHeader header = GoodHeader();
  header.mutable_sparsity()->set_method(v1::METHOD_FLEXPREFILL);
  EXPECT_FALSE(ValidateAttend(header, {})->job->policy.measure_captured_mass);
  header.set_return_block_index(true);
  EXPECT_TRUE(ValidateAttend(header, {})->job->policy.measure_captured_mass);
}

TEST(ValidateAttend, RefusesBadHeadersByField) {
  using Change = std::function<void(v1::AttendHeader&)>;
  const auto dim = [](int tensor, int axis, int64_t value) -> Change {
    return [=](v1::AttendHeader& h) { h.mutable_tensors(tensor)->set_shape(axis, value); };
  };
  const auto ragged = [](std::vector<uint32_t> q, std::vector<uint32_t> k) -> Change {
    return [=](v1::AttendHeader& h) { h = Ragged(q, k); };
  };
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const std::pair<const char*, Change> cases[] = {
      {"request_id", [](auto& h) { h.set_request_id(std::string(65, 'a')); }},
      {"request_id", [](auto& h) { h.set_request_id("a b"); }},
      {"request_id", [](auto& h) { h.set_request_id("../etc"); }},
      {"priority", [](auto& h) { h.set_priority(101); }},
      {"priority", [](auto& h) { h.set_priority(std::numeric_limits<int32_t>::min()); }},
      {"sparsity.gamma", [](auto& h) { h.mutable_sparsity()->set_gamma(2); }},
      {"tensors", [](auto& h) { h.clear_tensors(); }},
      {"tensors", [](auto& h) { h.add_tensors(); }},
      {"tensors[1].name", [](auto& h) { h.mutable_tensors(1)->set_name("w"); }},
      {"tensors[1].name", [](auto& h) { h.mutable_tensors(1)->set_name("v"); }},
      {"tensors[1].data_type", [](auto& h) { h.mutable_tensors(1)->clear_data_type(); }},
      {"tensors[1].data_type",
       [](auto& h) { h.mutable_tensors(1)->set_data_type(v1::DATA_TYPE_I32); }},
      {"tensors[1].data_type",
       [](auto& h) { h.mutable_tensors(1)->set_data_type(static_cast<v1::DataType>(99)); }},
      {"tensors", [](auto& h) { h.mutable_tensors(1)->set_data_type(v1::DATA_TYPE_F16); }},
      {"tensors[1].shape", [](auto& h) { h.mutable_tensors(1)->add_shape(1); }},
      {"tensors[1].shape", [](auto& h) { h.mutable_tensors(1)->clear_shape(); }},
      {"tensors[0].shape[0]", dim(0, 0, 0)},
      {"tensors[0].shape[0]", dim(0, 0, -1)},
      {"tensors[0].shape[0]", dim(0, 0, kHuge)},
      {"tensors[0].shape[1]", dim(0, 1, kHuge)},
      {"tensors[0].shape[2]", dim(0, 2, kHuge)},
      {"tensors[0].shape[2]", dim(0, 2, std::numeric_limits<int64_t>::min())},
      {"tensors", dim(0, 0, 21)},  // v longer than k
      {"tensors", dim(1, 0, 21)},  // more queries than keys
      {"tensors", dim(1, 1, 3)},   // 3 heads over 2
      {"tensors", dim(1, 2, 128)},
      {"softmax_scale", [](auto& h) { h.set_softmax_scale(0); }},
      {"softmax_scale", [](auto& h) { h.set_softmax_scale(-1); }},
      {"softmax_scale", [&](auto& h) { h.set_softmax_scale(nan); }},
      {"softmax_scale", [](auto& h) { h.set_softmax_scale(HUGE_VALF); }},
      {"cu_seqlens_k", ragged({0, 10}, {})},
      {"cu_seqlens_q", ragged({}, {0, 20})},
      {"cu_seqlens_q", ragged({0}, {0, 20})},
      {"cu_seqlens_q[0]", ragged({1, 10}, {0, 20})},
      {"cu_seqlens_q[2]", ragged({0, 5, 5, 10}, {0, 5, 10, 20})},
      {"cu_seqlens_q[2]", ragged({0, 7, 5, 10}, {0, 7, 10, 20})},
      {"cu_seqlens_q", ragged({0, 5, 11}, {0, 5, 20})},
      {"cu_seqlens_k", ragged({0, 5, 10}, {0, 5, 6, 20})},
      {"cu_seqlens_q", ragged({0, 5, 10}, {0, 4, 20})},  // Sq > Sk in the first
      {"cu_seqlens_q", [](auto& h) { h = Ragged(std::vector<uint32_t>(2000, 0), {0, 20}); }},
  };
  for (const auto& [field, change] : cases) {
    v1::AttendHeader header = GoodHeader();
    change(header);
    const absl::Status status = ValidateAttend(header, {}).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << field << ": " << status;
    EXPECT_EQ(FactsOf(status).field, field) << status;
  }
}

TEST(ValidateAttend, CountsEveryByteOfTheCall) {
  v1::AttendHeader header = GoodHeader();
  RequestLimits limits;
  // q and o: 10 x 4 x 64 x 2 bytes; k and v: 20 x 2 x 64 x 2; index: 4 heads x 1 row x (1 + 1) x 4.
  limits.attend_bytes_max = 2 * 5120 + 2 * 5120 + 32;
  EXPECT_TRUE(ValidateAttend(header, limits).ok());
  limits.attend_bytes_max -= 1;
  EXPECT_EQ(FactsOf(ValidateAttend(header, limits).status()).field, "tensors");
  limits.attend_bytes_max += 1;
  header.set_return_lse(true);
  EXPECT_FALSE(ValidateAttend(header, limits).ok());
}

// Many key blocks in little data: the index alone would not fit the machine.
TEST(ValidateAttend, LimitsTheBlockIndex) {
  v1::AttendHeader header = GoodHeader();
  for (v1::TensorSpec& spec : *header.mutable_tensors()) {
    spec.set_shape(0, 4 << 20);
    spec.set_shape(1, 1);
  }
  EXPECT_EQ(FactsOf(ValidateAttend(header, {}).status()).field, "tensors");
}

TEST(ValidateAttend, SharedMemoryIsTakenWhereItIsOffered) {
  v1::AttendHeader header = GoodHeader();
  EXPECT_EQ(ValidateAttend(header, {})->transport, Transport::kGrpc);
  header.set_transport(v1::TRANSPORT_GRPC);
  EXPECT_EQ(ValidateAttend(header, {})->transport, Transport::kGrpc);
  header.set_transport(v1::TRANSPORT_POSIX_SHM);
  EXPECT_EQ(ValidateAttend(header, {}).status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(ValidateAttend(header, kShm)->transport, Transport::kPosixShm);
  header.set_transport(v1::TRANSPORT_CUDA_IPC);
  EXPECT_EQ(ValidateAttend(header, kShm).status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(ValidateAttend(header, kIpc)->transport, Transport::kCudaIpc);
  header.set_transport(v1::Transport(50));
  EXPECT_EQ(FactsOf(ValidateAttend(header, {}).status()).field, "transport");
}

TEST(ValidateAttend, CountsWhatASegmentHoldsASecondTime) {
  v1::AttendHeader header = GoodHeader();
  header.set_return_lse(true);
  header.set_return_block_index(true);
  const uint64_t sent = ValidateAttend(header, {})->job->held_bytes;
  header.set_transport(v1::TRANSPORT_POSIX_SHM);
  // The index: 4 heads x 1 row x (1 + 1) x 4 bytes. o and lse are written where they stay.
  EXPECT_EQ(ValidateAttend(header, kShm)->job->held_bytes, sent + 32);
  header.set_transport(v1::TRANSPORT_CUDA_IPC);
  EXPECT_EQ(ValidateAttend(header, kIpc)->job->held_bytes, sent + 32);
  // On their way to a device the tensors are there once more; the index beside them is not.
  header.set_transport(v1::TRANSPORT_POSIX_SHM);
  EXPECT_EQ(ValidateAttend(header, {.offered = {Transport::kPosixShm}, .device_memory = true})
                ->job->held_bytes,
            2 * (sent - 2 * 32) + 3 * 32);
}

TEST(ValidateAttend, BuffersOfTheCallerAreNotServed) {
  v1::AttendHeader header = GoodHeader();
  header.add_buffers();
  EXPECT_EQ(ValidateAttend(header, {}).status().code(), absl::StatusCode::kUnimplemented);
}

TEST(RequestId, IsMadeUpWhenAbsent) {
  std::set<std::string> ids;
  for (int i = 0; i < 100; ++i) ids.insert(*ValidateRequestId(""));
  EXPECT_EQ(ids.size(), 100u);
  EXPECT_TRUE(ValidateRequestId(*ids.begin()).ok());
}

// --- Prefill
// ---------------------------------------------------------------------------------------

ModelInfo SmallModel() {
  ModelInfo info;
  info.name = "m";
  info.layers = 4;
  info.q_heads = 4;
  info.kv_heads = 2;
  info.head_dim = 64;
  info.vocab_size = 100;
  info.max_positions = 50;
  info.dtype = DType::kBF16;
  return info;
}

v1::PrefillRequest GoodRequest() {
  v1::PrefillRequest request;
  request.set_request_id("r");
  request.set_model("m");
  for (uint32_t id : {1, 99, 0}) request.add_token_ids(id);
  return request;
}

TEST(ValidatePrefill, MakesAJobOfAGoodRequest) {
  v1::PrefillRequest request = GoodRequest();
  request.mutable_destination()->mutable_lease_ttl()->set_seconds(5);
  request.mutable_destination()->set_retain(false);
  request.set_return_logits(true);
  const auto valid = ValidatePrefill(request, SmallModel(), {});
  ASSERT_TRUE(valid.ok()) << valid.status();
  EXPECT_FALSE(valid->retain);
  EXPECT_EQ(valid->lease_ttl, absl::Seconds(5));
  EXPECT_EQ(valid->job->prefill->token_ids, (std::vector<uint32_t>{1, 99, 0}));
  EXPECT_TRUE(valid->job->prefill->return_logits);
  EXPECT_TRUE(ValidatePrefill(GoodRequest(), SmallModel(), {})->retain);
  EXPECT_EQ(ValidatePrefill(GoodRequest(), SmallModel(), {})->lease_ttl, RequestLimits().lease_ttl);
}

TEST(ValidatePrefill, ASlidingWindowIsNamedWhereItIsWhatBoundsAPrompt) {
  ModelInfo model = SmallModel();
  model.sliding_window = 50;
  v1::PrefillRequest request = GoodRequest();
  for (int i = 0; i < 50; ++i) request.add_token_ids(1);
  const auto message = [&] {
    return std::string(ValidatePrefill(request, model, {}).status().message());
  };
  EXPECT_TRUE(message().ends_with("53 tokens, not from 1 to 50, the sliding window")) << message();
  model.sliding_window = 0;
  EXPECT_TRUE(message().ends_with("53 tokens, not from 1 to 50")) << message();
}

TEST(ValidatePrefill, RefusesBadRequestsByFieldOrState) {
  using Change = std::function<void(v1::PrefillRequest&)>;
  constexpr auto kInvalid = absl::StatusCode::kInvalidArgument;
  constexpr auto kUnimplemented = absl::StatusCode::kUnimplemented;
  constexpr auto kPrecondition = absl::StatusCode::kFailedPrecondition;
  const auto tokens = [](int count) -> Change {
    return [=](v1::PrefillRequest& r) {
      r.clear_token_ids();
      for (int i = 0; i < count; ++i) r.add_token_ids(1);
    };
  };
  const auto ttl = [](int64_t seconds, int32_t nanos) -> Change {
    return [=](v1::PrefillRequest& r) {
      r.mutable_destination()->mutable_lease_ttl()->set_seconds(seconds);
      r.mutable_destination()->mutable_lease_ttl()->set_nanos(nanos);
    };
  };
  const auto layout = [](std::function<void(v1::KvLayout&)> change) -> Change {
    return [=](v1::PrefillRequest& r) { change(*r.mutable_destination()->mutable_layout()); };
  };
  const std::tuple<absl::StatusCode, const char*, Change> cases[] = {
      {kInvalid, "token_ids", tokens(0)},
      {kInvalid, "token_ids", tokens(51)},
      {kInvalid, "token_ids[1]", [](auto& r) { r.set_token_ids(1, 100); }},
      {kInvalid, "token_ids[2]", [](auto& r) { r.set_token_ids(2, UINT32_MAX); }},
      {kInvalid, "request_id", [](auto& r) { r.set_request_id("\n"); }},
      {kInvalid, "priority", [](auto& r) { r.set_priority(-101); }},
      {kInvalid, "sparsity.tau", [](auto& r) { r.mutable_sparsity()->set_tau(7); }},
      {kInvalid, "prefix_reuse.mode",
       [](auto& r) { r.mutable_prefix_reuse()->set_mode(v1::PrefixReuse::Mode(50)); }},
      {kUnimplemented, "",
       [](auto& r) { r.mutable_prefix_reuse()->set_mode(v1::PrefixReuse::MODE_EXACT); }},
      {kInvalid, "destination.transport",
       [](auto& r) { r.mutable_destination()->set_transport(v1::Transport(50)); }},
      {kPrecondition, "",
       [](auto& r) { r.mutable_destination()->set_transport(v1::TRANSPORT_CUDA_IPC); }},
      {kInvalid, "destination.lease_ttl", ttl(0, 0)},
      {kInvalid, "destination.lease_ttl", ttl(-1, 0)},
      {kInvalid, "destination.lease_ttl", ttl(601, 0)},
      {kInvalid, "destination.lease_ttl", ttl(INT64_MAX, INT32_MAX)},
      {kInvalid, "destination.lease_ttl", ttl(INT64_MIN, INT32_MIN)},
      {kInvalid, "destination.layout.physical_order[0]",
       layout([](auto& l) { l.add_physical_order(v1::Axis(40)); })},
      {kInvalid, "destination.layout.physical_order", layout([](auto& l) {
         for (int i = 0; i < 1000; ++i) l.add_physical_order(v1::AXIS_KV);
       })},
      {kInvalid, "destination.layout.data_type",
       layout([](auto& l) { l.set_data_type(v1::DATA_TYPE_U8); })},
      {kPrecondition, "", layout([](auto& l) { l.add_physical_order(v1::AXIS_KV); })},
      {kPrecondition, "", layout([](auto& l) { l.set_block_size(16); })},
      {kPrecondition, "", layout([](auto& l) { l.set_kv_packed_in_content(true); })},
      {kPrecondition, "", layout([](auto& l) { l.set_block_stride_bytes(4096); })},
      {kPrecondition, "", layout([](auto& l) { l.set_num_kv_heads(3); })},
      {kPrecondition, "", layout([](auto& l) { l.set_head_dim(128); })},
      {kPrecondition, "", layout([](auto& l) { l.mutable_rope_state()->set_applied(false); })},
  };
  for (const auto& [code, field, change] : cases) {
    v1::PrefillRequest request = GoodRequest();
    change(request);
    const absl::Status status = ValidatePrefill(request, SmallModel(), {}).status();
    EXPECT_EQ(status.code(), code) << field << ": " << status;
    EXPECT_EQ(FactsOf(status).field, field) << status;
  }
}

bool MayMap(const v1::PrefillRequest& request, const RequestLimits& limits) {
  return ValidatePrefill(request, SmallModel(), limits)->transport == Transport::kPosixShm;
}

TEST(ValidatePrefill, ACacheLiesInASegmentWhereThatIsPossible) {
  const RequestLimits& offered = kShm;
  v1::PrefillRequest request = GoodRequest();
  EXPECT_FALSE(MayMap(request, {})) << "not offered";
  EXPECT_TRUE(MayMap(request, offered));
  EXPECT_FALSE(ValidatePrefill(request, SmallModel(), offered)->pinned);
  request.mutable_destination()->set_retain(false);
  EXPECT_FALSE(MayMap(request, offered)) << "it passes through";
  request.mutable_destination()->set_transport(v1::TRANSPORT_POSIX_SHM);
  EXPECT_EQ(FactsOf(ValidatePrefill(request, SmallModel(), offered).status()).field,
            "destination.retain");
  request.mutable_destination()->clear_retain();
  EXPECT_TRUE(MayMap(request, offered));
  EXPECT_TRUE(ValidatePrefill(request, SmallModel(), offered)->pinned);
  EXPECT_EQ(ValidatePrefill(request, SmallModel(), {}).status().code(),
            absl::StatusCode::kFailedPrecondition);
  request.mutable_destination()->set_transport(v1::TRANSPORT_GRPC);
  EXPECT_FALSE(MayMap(request, offered));
}

TEST(ValidatePrefill, TakesTheSmallerOfTheTwoTokenLimits) {
  RequestLimits limits;
  EXPECT_EQ(PromptTokensMax(SmallModel(), limits), 50);
  limits.prompt_tokens_max = 2;
  EXPECT_EQ(FactsOf(ValidatePrefill(GoodRequest(), SmallModel(), limits).status()).field,
            "token_ids");
}

TEST(ValidatePrefill, NoPromptIsLongerThanOneCacheMayBe) {
  v1::PrefillRequest request = GoodRequest();
  request.clear_token_ids();
  ModelInfo deep = SmallModel();
  deep.layers = 8;
  deep.max_positions = 4096;
  RequestLimits limits = kShm;
  limits.kv.blocks = 17;
  EXPECT_EQ(PromptTokensMax(deep, limits), 2 * 128);
  EXPECT_EQ(PromptTokensMax(deep, limits, /*retain=*/false), 8 * 128) << "two layers at a time";
  limits.prompt_tokens_max = 500;
  EXPECT_EQ(PromptTokensMax(deep, limits, /*retain=*/false), 500);

  limits.prompt_tokens_max = 4096;
  for (int i = 0; i < 257; ++i) request.add_token_ids(1);
  const absl::Status refused = ValidatePrefill(request, deep, limits).status();
  EXPECT_EQ(FactsOf(refused).field, "token_ids");
  EXPECT_THAT(
      std::string(refused.message()),
      testing::EndsWith("257 tokens, not from 1 to 256, what the server's kv_memory holds in "
                        "one cache; with destination.retain = false up to 1024"));
  request.mutable_destination()->set_retain(false);
  EXPECT_TRUE(ValidatePrefill(request, deep, limits).ok());
}

// A cache that must lie in a region, beside blocks that it takes or without.
TEST(ValidatePrefill, NoPromptIsLongerThanItsRegionMayBe) {
  v1::PrefillRequest request = GoodRequest();
  request.mutable_token_ids()->Resize(101, 1);
  ModelInfo deep = SmallModel();
  deep.layers = 8;
  deep.max_positions = 4096;
  RequestLimits limits = kShm;
  limits.kv.blocks = 17;
  const auto longest = [&] {
    return PromptTokensMax(deep, limits, /*retain=*/true, Transport::kPosixShm);
  };
  const auto refusal = [&] {
    return std::string(ValidatePrefill(request, deep, limits).status().message());
  };
  EXPECT_EQ(longest(), 2 * 128) << "blocks";
  limits.kv_regions[Transport::kPosixShm] = GeometryOf(deep, 100).region_bytes();
  EXPECT_EQ(longest(), 100);
  EXPECT_EQ(PromptTokensMax(deep, limits), 2 * 128) << "blocks will do";
  EXPECT_TRUE(ValidatePrefill(request, deep, limits).ok());

  request.mutable_destination()->set_transport(v1::TRANSPORT_POSIX_SHM);
  EXPECT_THAT(refusal(), testing::EndsWith("101 tokens, not from 1 to 100, what a region of "
                                           "TRANSPORT_POSIX_SHM holds here; over TRANSPORT_GRPC up "
                                           "to 256"));
  limits.kv_regions[Transport::kPosixShm] = kGiB;
  request.mutable_token_ids()->Resize(257, 1);
  EXPECT_THAT(refusal(), testing::EndsWith("257 tokens, not from 1 to 256, what the server's "
                                           "kv_memory holds in one cache; over TRANSPORT_GRPC with "
                                           "destination.retain = false up to 1024"));
  limits.kv.segment_bytes = limits.kv_regions[Transport::kPosixShm];
  EXPECT_EQ(longest(), 4096) << "a pool's takes no blocks";
  limits.kv_regions[Transport::kPosixShm] = GeometryOf(deep, 300).region_bytes();
  EXPECT_TRUE(ValidatePrefill(request, deep, limits).ok());
}

TEST(ValidatePrefill, ATransportWithoutRoomForCachesCarriesNone) {
  const RequestLimits limits{.offered = {Transport::kPosixShm}};
  v1::PrefillRequest request = GoodRequest();
  EXPECT_FALSE(MayMap(request, limits));
  request.mutable_destination()->set_transport(v1::TRANSPORT_POSIX_SHM);
  const absl::Status refused = ValidatePrefill(request, SmallModel(), limits).status();
  EXPECT_EQ(refused.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(refused.message()), testing::HasSubstr("has no room for KV caches"));
}

TEST(ValidatePrefill, ACacheLiesOnTheDeviceOnlyWhereThatIsAskedFor) {
  RequestLimits limits{.offered = {Transport::kCudaIpc},
                       .kv_regions = {{Transport::kCudaIpc, kGiB}}};
  limits.kv.blocks = 0;
  v1::PrefillRequest request = GoodRequest();
  request.mutable_destination()->set_transport(v1::TRANSPORT_CUDA_IPC);
  const auto valid = ValidatePrefill(request, SmallModel(), limits);
  ASSERT_TRUE(valid.ok()) << valid.status() << ": it takes no blocks";
  EXPECT_EQ(valid->transport, Transport::kCudaIpc);
  EXPECT_TRUE(valid->pinned);
  request.mutable_destination()->set_retain(false);
  EXPECT_EQ(FactsOf(ValidatePrefill(request, SmallModel(), limits).status()).field,
            "destination.retain");
  request.clear_destination();
  limits.kv.blocks = 1000;
  EXPECT_EQ(ValidatePrefill(request, SmallModel(), limits)->transport, Transport::kGrpc);
  limits.offered.insert(Transport::kPosixShm);
  limits.kv_regions[Transport::kPosixShm] = kGiB;
  EXPECT_EQ(ValidatePrefill(request, SmallModel(), limits)->transport, Transport::kPosixShm);
}

TEST(ValidatePrefill, TheLargestMessageHoldsTheLongestPromptOfAnyTransport) {
  ModelInfo info = SmallModel();
  info.max_positions = 10 << 20;
  RequestLimits limits{.prompt_tokens_max = 10 << 20};
  limits.kv.blocks = 2;
  const int least = MessageBytesMax({&info}, limits);
  limits.kv_regions[Transport::kCudaIpc] = GeometryOf(info, 10 << 20).region_bytes();
  EXPECT_GT(MessageBytesMax({&info}, limits), least);
}

// --- PullKv
// ----------------------------------------------------------------------------------------

constexpr KvGeometry kGeometry{
    .layers = 4, .kv_heads = 2, .head_dim = 64, .dtype = DType::kBF16, .tokens = 300};

// A cache in blocks, and one in a segment.
class ValidatePullTest : public testing::Test {
 protected:
  absl::StatusOr<ValidPull> Validate(const v1::PullKvRequest& request) {
    return ValidatePull(request, *cache_, kShm);
  }
  absl::StatusOr<ValidPull> ValidateMapped(v1::PullKvRequest request) {
    request.set_transport(v1::TRANSPORT_POSIX_SHM);
    return ValidatePull(request, *mapped_, kShm);
  }

  std::unique_ptr<Backend> backend_ = *CreateBackend("cpu", 1);
  std::unique_ptr<BlockPool> pool_ =
      *BlockPool::Create(backend_->device(), 24 * kGeometry.block_bytes(), kGeometry.block_bytes());
  std::unique_ptr<PosixShm> shm_ = *PosixShm::Open(std::make_shared<RegionNames>());
  std::shared_ptr<KvCache> cache_ = *KvCache::Create(*pool_, kGeometry, true);
  std::shared_ptr<KvCache> mapped_ = InRegion();

  std::shared_ptr<KvCache> InRegion() {
    auto cache = *KvCache::Create(*pool_, kGeometry, true);
    cache->LieIn(*shm_->Create(kGeometry.region_bytes(), PeerAccess::kRead));
    return cache;
  }
};

TEST_F(ValidatePullTest, DefaultsToEverythingInTheCachesOwnDtype) {
  const auto pull = Validate({});
  ASSERT_TRUE(pull.ok()) << pull.status();
  EXPECT_EQ(pull->first_layer, 0);
  EXPECT_EQ(pull->end_layer, 4);
  EXPECT_EQ(pull->chunk_bytes, 1u << 20);
  EXPECT_EQ(pull->form.dtype, DType::kBF16);
}

TEST_F(ValidatePullTest, TakesTheNegotiatedLayoutBack) {
  v1::PullKvRequest request;
  v1::KvLayout& layout = *request.mutable_layout();
  for (auto axis : {v1::AXIS_LAYER, v1::AXIS_KV, v1::AXIS_HEAD, v1::AXIS_TOKEN, v1::AXIS_CHANNEL}) {
    layout.add_physical_order(axis);
  }
  layout.set_num_kv_heads(2);
  layout.set_head_dim(64);
  layout.set_data_type(v1::DATA_TYPE_F32);
  layout.mutable_rope_state()->set_applied(true);
  const auto pull = Validate(request);
  ASSERT_TRUE(pull.ok()) << pull.status();
  EXPECT_EQ(pull->form.dtype, DType::kF32);
}

TEST_F(ValidatePullTest, RefusesWhatIsNotThere) {
  using Change = std::function<void(v1::PullKvRequest&)>;
  const std::pair<const char*, Change> cases[] = {
      {"first_layer", [](auto& r) { r.set_first_layer(4); }},
      {"first_layer", [](auto& r) { r.set_first_layer(UINT32_MAX); }},
      {"layer_count", [](auto& r) { r.set_layer_count(0); }},
      {"layer_count",
       [](auto& r) {
         r.set_first_layer(2);
         r.set_layer_count(3);
       }},
      {"layer_count", [](auto& r) { r.set_layer_count(UINT32_MAX); }},
      {"resume_tensor_index", [](auto& r) { r.set_resume_tensor_index(2); }},
      {"resume_byte_offset", [](auto& r) { r.set_resume_byte_offset(2 * 300 * 64 * 2 + 1); }},
      {"resume_byte_offset", [](auto& r) { r.set_resume_byte_offset(UINT64_MAX); }},
      {"chunk_bytes", [](auto& r) { r.set_chunk_bytes(4095); }},
      {"chunk_bytes", [](auto& r) { r.set_chunk_bytes((1 << 20) + 1); }},
      {"transport", [](auto& r) { r.set_transport(v1::Transport(50)); }},
  };
  for (const auto& [field, change] : cases) {
    v1::PullKvRequest request;
    change(request);
    const absl::Status status = Validate(request).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << field << ": " << status;
    EXPECT_EQ(FactsOf(status).field, field) << status;
  }
  v1::PullKvRequest end;
  end.set_resume_byte_offset(2 * 300 * 64 * 2);
  EXPECT_TRUE(Validate(end).ok()) << "resuming at a tensor's end is legal";
}

TEST_F(ValidatePullTest, ATensorIsMappedWhole) {
  v1::PullKvRequest request;
  request.set_chunk_bytes(4096);
  const auto pull = ValidateMapped(request);
  ASSERT_TRUE(pull.ok()) << pull.status();
  EXPECT_EQ(pull->chunk_bytes, kGeometry.tensor_bytes());
  request.set_resume_byte_offset(kGeometry.tensor_bytes());
  EXPECT_TRUE(ValidateMapped(request).ok());
  request.set_resume_byte_offset(4096);
  EXPECT_EQ(FactsOf(ValidateMapped(request).status()).field, "resume_byte_offset");
}

TEST_F(ValidatePullTest, OnlyWhatLiesInASegmentIsMapped) {
  constexpr auto kPrecondition = absl::StatusCode::kFailedPrecondition;
  v1::PullKvRequest request;
  request.mutable_layout()->set_data_type(v1::DATA_TYPE_F32);
  EXPECT_EQ(ValidateMapped(request).status().code(), kPrecondition) << "another dtype";
  request.clear_layout();
  request.set_transport(v1::TRANSPORT_POSIX_SHM);
  EXPECT_EQ(Validate(request).status().code(), kPrecondition) << "in blocks";
  EXPECT_EQ(ValidatePull(request, *cache_, {}).status().code(), kPrecondition) << "not offered";
  request.set_transport(v1::TRANSPORT_CUDA_IPC);
  EXPECT_EQ(Validate(request).status().code(), kPrecondition) << "not offered";
  request.set_transport(v1::TRANSPORT_GRPC);
  EXPECT_TRUE(ValidatePull(request, *mapped_, kShm).ok()) << "sent as any other";
}

// Nothing on the host reads the device's memory.
TEST_F(ValidatePullTest, WhatLiesOnTheDeviceIsMappedThereAndNowhereElse) {
  RequestLimits limits = kShm;
  limits.offered.insert(Transport::kCudaIpc);
  limits.kv_regions[Transport::kCudaIpc] = kGiB;
  FakeDevice device;
  const auto medium = *CudaIpc::Open(device, std::make_shared<RegionNames>());
  const std::shared_ptr<KvCache> on_device = KvCache::CreateIn(
      *medium->Create(kGeometry.region_bytes(), PeerAccess::kRead), nullptr, *pool_, kGeometry);
  v1::PullKvRequest request;
  request.set_transport(v1::TRANSPORT_CUDA_IPC);
  EXPECT_TRUE(ValidatePull(request, *on_device, limits).ok());
  using Case = std::pair<v1::Transport, std::shared_ptr<KvCache>>;
  for (const auto& [transport, cache] :
       {Case(v1::TRANSPORT_UNSPECIFIED, on_device), Case(v1::TRANSPORT_GRPC, on_device),
        Case(v1::TRANSPORT_POSIX_SHM, on_device), Case(v1::TRANSPORT_CUDA_IPC, mapped_),
        Case(v1::TRANSPORT_CUDA_IPC, cache_)}) {
    request.set_transport(transport);
    const absl::Status status = ValidatePull(request, *cache, limits).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition) << status;
    EXPECT_THAT(std::string(status.message()), testing::HasSubstr(ProtoName(cache->transport())));
    const auto asked = transport == 0 ? v1::TRANSPORT_GRPC : transport;
    EXPECT_THAT(std::string(status.message()), testing::HasSubstr(v1::Transport_Name(asked)));
  }
  request.set_transport(v1::TRANSPORT_CUDA_IPC);
  request.mutable_layout()->set_data_type(v1::DATA_TYPE_F32);
  EXPECT_EQ(ValidatePull(request, *on_device, limits).status().code(),
            absl::StatusCode::kFailedPrecondition)
      << "another dtype";
}

// --- transports and layouts, against the proto
// ---------------------------------------------------------------------------

TEST(Transports, ARowIsAValueOfTheProtoAndNothingElseIsServed) {
  for (const TransportRow& row : kTransports) {
    std::string name = ProtoName(row.transport).substr(sizeof("TRANSPORT_") - 1);
    for (char& c : name) c = absl::ascii_tolower(static_cast<unsigned char>(c));
    EXPECT_EQ(name, row.name);
    EXPECT_EQ(&RowOf(row.transport), &row);
    EXPECT_EQ(FindTransport(row.name), &row);
    EXPECT_EQ(FindTransportOfWire(row.wire), &row);
  }
  RequestLimits everything;
  for (const TransportRow& row : kTransports) {
    everything.offered.insert(row.transport);
    if (row.open && row.kv_cache) everything.kv_regions[row.transport] = kGiB;
  }
  for (int value : {-1, 1, 2, 3, 4, 5, 50}) {
    v1::AttendHeader header = GoodHeader();
    header.set_transport(static_cast<v1::Transport>(value));
    const auto valid = ValidateAttend(header, everything);
    if (const TransportRow* row = FindTransportOfWire(value)) {
      EXPECT_EQ(valid->transport, row->transport);
      continue;
    }
    EXPECT_EQ(FactsOf(valid.status()).field, "transport") << value;
    EXPECT_NE(valid.status().message().find(std::to_string(value)), absl::string_view::npos);
  }
}

TEST(KvLayouts, ARowIsServedByItsOrder) {
  for (const KvLayout& row : kKvLayouts) {
    v1::KvLayout layout;
    for (KvAxis axis : row.order) layout.add_physical_order(static_cast<v1::Axis>(axis));
    const auto form = ValidateLayout(layout, "layout", kGeometry);
    ASSERT_TRUE(form.ok()) << form.status();
    EXPECT_EQ(form->layout, &row);
    EXPECT_EQ(form->dtype, kGeometry.dtype);
  }
}

}  // namespace
}  // namespace prefilld

// Any bytes as an AttendHeader, a PrefillRequest or a PullKvRequest: what is admitted is within the
// limits, and what is not is refused in words that a client can read.
#include <cmath>
#include <string>

#include "proto/wire/chunk.h"
#include "server/engine/memory_plan.h"
#include "server/rpc/messages.h"
#include "server/rpc/validate.h"
#include "tests/fuzz/refusal.h"

namespace prefilld {
namespace {

constexpr uint64_t kMiB = uint64_t{1} << 20;

const RequestLimits& Limits() {
  static const RequestLimits limits = {.prompt_tokens_max = 4096,
                                       .kv = {.block_bytes = 4096, .blocks = 64},
                                       .attend_bytes_max = 64 * kMiB,
                                       .offered = {Transport::kPosixShm, Transport::kCudaIpc},
                                       .kv_regions = {{Transport::kPosixShm, kMiB}},
                                       .device_memory = true};
  return limits;
}

const ModelInfo& Model() {
  static const ModelInfo model = {.name = "m",
                                  .layers = 4,
                                  .q_heads = 4,
                                  .kv_heads = 2,
                                  .head_dim = 64,
                                  .vocab_size = 300,
                                  .max_positions = 2048,
                                  .dtype = DType::kBF16};
  return model;
}

void CheckJob(const Job& job, const std::string& asked_id) {
  Promise(!job.request_id.empty() && job.request_id.size() <= kRequestIdBytesMax &&
              (asked_id.empty() || job.request_id == asked_id),
          "a job has the caller's id, or one of its own", job.request_id);
  Promise(job.priority >= -100 && job.priority <= 100, "priorities are from -100 to 100");
}

// In 128 bits, where nothing wraps.
using Wide = unsigned __int128;

void CheckAttend(const v1::AttendHeader& header) {
  const auto valid = ValidateAttend(header, Limits());
  if (!valid.ok()) return CheckRefusal(valid.status());
  const std::string text = header.ShortDebugString();
  const Job& job = *valid->job;
  CheckJob(job, header.request_id());
  const AttentionShape& shape = job.attend->shape;
  Promise(shape.q_heads > 0 && shape.kv_heads > 0 && shape.q_heads % shape.kv_heads == 0 &&
              shape.head_dim > 0,
          "heads fit each other", text);
  Promise(shape.cu_seqlens_q.size() == shape.cu_seqlens_k.size() && shape.sequences() >= 1 &&
              shape.sequences() <= kSequencesMax,
          "sequences are within the limit", text);
  for (int s = 0; s < shape.sequences(); ++s) {
    const int64_t sq = shape.cu_seqlens_q[s + 1] - shape.cu_seqlens_q[s];
    const int64_t sk = shape.cu_seqlens_k[s + 1] - shape.cu_seqlens_k[s];
    Promise(sq >= 1 && sq <= sk, "1 <= queries <= keys in every sequence", text);
  }
  std::array<bool, 3> seen{};
  for (int i = 0; i < 3; ++i) {
    const int role = valid->roles[i];
    const v1::TensorSpec& spec = header.tensors(i);
    Promise(!std::exchange(seen[role], true), "q, k and v once each", text);
    Promise(spec.shape(0) == (role == 0 ? shape.total_q() : shape.total_k()) &&
                spec.shape(1) == (role == 0 ? shape.q_heads : shape.kv_heads) &&
                spec.shape(2) == shape.head_dim,
            "tensors are as announced", text);
  }
  const Wide rows = Wide(shape.total_q()) * shape.q_heads + Wide(shape.total_k()) * shape.kv_heads;
  const Wide tensors = 2 * rows * shape.head_dim * SizeOf(shape.dtype);
  Promise(tensors <= job.held_bytes && job.held_bytes <= Limits().attend_bytes_max,
          "the tensors are counted, within the limit", text);
  Promise(job.attend->softmax_scale > 0 && std::isfinite(job.attend->softmax_scale),
          "softmax_scale is a number above 0", text);
}

void CheckPrefill(const v1::PrefillRequest& request) {
  const auto valid = ValidatePrefill(request, Model(), Limits());
  if (!valid.ok()) return CheckRefusal(valid.status());
  const std::string text = request.ShortDebugString();
  CheckJob(*valid->job, request.request_id());
  Promise(valid->lease_ttl > absl::ZeroDuration() && valid->lease_ttl <= Limits().lease_ttl_max,
          "a lease lives, within the limit", text);
  const std::vector<uint32_t>& ids = valid->job->prefill->token_ids;
  const int64_t most = PromptTokensMax(Model(), Limits(), valid->retain,
                                       valid->pinned ? valid->transport : Transport::kGrpc);
  Promise(!ids.empty() && static_cast<int64_t>(ids.size()) <= most, "tokens within the limit",
          text);
  for (const uint32_t id : ids) {
    Promise(id < static_cast<uint32_t>(Model().vocab_size), "IDs of the vocabulary", text);
  }
  Promise(valid->retain || valid->transport == Transport::kGrpc,
          "what is not retained is sent, not mapped", text);
}

// A committed cache in blocks.
const KvCache& Cache() {
  static const KvGeometry geometry = GeometryOf(Model(), 300);
  static const auto backend = *CreateBackend("cpu", 1);
  static const auto pool =
      *BlockPool::Create(backend->device(), 16 * geometry.block_bytes(), geometry.block_bytes());
  static const auto cache = *KvCache::Create(*pool, geometry, /*retain=*/true);
  return *cache;
}

void CheckPull(const v1::PullKvRequest& request) {
  const auto valid = ValidatePull(request, Cache(), Limits());
  if (!valid.ok()) return CheckRefusal(valid.status());
  const std::string text = request.ShortDebugString();
  const KvGeometry& geometry = Cache().geometry();
  Promise(0 <= valid->first_layer && valid->first_layer < valid->end_layer &&
              valid->end_layer <= geometry.layers,
          "layers of the cache", text);
  Promise(valid->tensor == 0 || valid->tensor == 1, "K or V", text);
  Promise(valid->byte_offset <= valid->form.tensor_bytes(geometry), "bytes of the tensor", text);
  Promise(valid->chunk_bytes >= 4096 && valid->chunk_bytes <= kMaxChunkBytes, "chunks in bounds",
          text);
  Promise(valid->transport == Transport::kGrpc, "what lies in blocks is sent", text);
}

template <typename Message>
void Check(void (*check)(const Message&), const uint8_t* data, size_t size) {
  Message message;
  if (message.ParseFromArray(data, static_cast<int>(size))) check(message);
}

}  // namespace
}  // namespace prefilld

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace prefilld;  // NOLINT
  if (size == 0) return 0;
  --size;
  switch (data[size] % 3) {  // the last byte says which message it is
    case 0:
      Check(CheckAttend, data, size);
      break;
    case 1:
      Check(CheckPrefill, data, size);
      break;
    default:
      Check(CheckPull, data, size);
  }
  return 0;
}

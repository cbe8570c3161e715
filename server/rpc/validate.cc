#include "server/rpc/validate.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "absl/random/random.h"
#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "proto/wire/chunk.h"
#include "server/kv/layout.h"
#include "server/record/errors.h"
#include "server/rpc/messages.h"
#include "server/rpc/validate_policy.h"

namespace prefilld {
namespace {

constexpr int kPriorityMax = 100;
// With these no product of one tensor's dimensions can overflow 64 bits.
constexpr int64_t kTokensMax = std::numeric_limits<int32_t>::max();
constexpr int64_t kHeadsMax = 256;
constexpr int64_t kHeadDimMax = 4096;
// Entries of a report, so that it fits one message.
constexpr int64_t kReportHeadsMax = 1 << 17;

constexpr const char* kRoleNames[] = {"q", "k", "v"};

absl::Status CheckPriority(int32_t priority) {
  if (priority < -kPriorityMax || priority > kPriorityMax) {
    return InvalidField(
        "priority", absl::StrCat(priority, " is not from ", -kPriorityMax, " to ", kPriorityMax));
  }
  return absl::OkStatus();
}

// One announced tensor: its role, and a shape within the caps.
absl::StatusOr<int> CheckTensor(const v1::TensorSpec& spec, const std::string& field) {
  const auto role = std::find(std::begin(kRoleNames), std::end(kRoleNames), spec.name());
  if (role == std::end(kRoleNames)) {
    return InvalidField(absl::StrCat(field, ".name"),
                        absl::StrCat("'", spec.name().substr(0, 64), "' is not q, k or v"));
  }
  if (!DTypeOf(spec.data_type())) {
    return InvalidField(absl::StrCat(field, ".data_type"),
                        absl::StrCat(DataTypeName(spec.data_type()), " is not F32, BF16 or F16"));
  }
  if (spec.shape_size() != 3) {
    return InvalidField(
        absl::StrCat(field, ".shape"),
        absl::StrCat(spec.shape_size(), " dimensions; [tokens, heads, head_dim] are needed"));
  }
  constexpr int64_t kMax[] = {kTokensMax, kHeadsMax, kHeadDimMax};
  for (int i = 0; i < 3; ++i) {
    if (spec.shape(i) < 1 || spec.shape(i) > kMax[i]) {
      return InvalidField(absl::StrCat(field, ".shape[", i, "]"),
                          absl::StrCat(spec.shape(i), " is not from 1 to ", kMax[i]));
    }
  }
  return static_cast<int>(role - kRoleNames);
}

absl::StatusOr<std::vector<int64_t>> CheckCuSeqlens(
    const google::protobuf::RepeatedField<uint32_t>& proto, const char* field, int64_t total) {
  if (proto.empty()) return std::vector<int64_t>{0, total};
  if (proto.size() < 2 || proto.size() > kSequencesMax + 1) {
    return InvalidField(field,
                        absl::StrCat(proto.size(), " entries, not from 2 to ", kSequencesMax + 1));
  }
  if (proto[0] != 0) return InvalidField(absl::StrCat(field, "[0]"), "must be 0");
  for (int i = 1; i < proto.size(); ++i) {
    if (proto[i] <= proto[i - 1]) {
      return InvalidField(absl::StrCat(field, "[", i, "]"),
                          absl::StrCat(proto[i], " does not rise from ", proto[i - 1]));
    }
  }
  if (proto[proto.size() - 1] != total) {
    return InvalidField(field, absl::StrCat("ends at ", proto[proto.size() - 1],
                                            ", the tensor has ", total, " tokens"));
  }
  return std::vector<int64_t>(proto.begin(), proto.end());
}

// The sequences of an Attend, from shapes that are legal one by one.
absl::Status CheckSequences(const v1::AttendHeader& header, AttentionShape* shape, int64_t total_q,
                            int64_t total_k) {
  const bool ragged = header.cu_seqlens_q_size() > 0;
  if (ragged != (header.cu_seqlens_k_size() > 0)) {
    return InvalidField(ragged ? "cu_seqlens_k" : "cu_seqlens_q",
                        "cu_seqlens_q and cu_seqlens_k are needed together");
  }
  auto q = CheckCuSeqlens(header.cu_seqlens_q(), "cu_seqlens_q", total_q);
  if (!q.ok()) return q.status();
  auto k = CheckCuSeqlens(header.cu_seqlens_k(), "cu_seqlens_k", total_k);
  if (!k.ok()) return k.status();
  if (q->size() != k->size()) {
    return InvalidField("cu_seqlens_k", absl::StrCat(k->size() - 1, " sequences, cu_seqlens_q has ",
                                                     q->size() - 1));
  }
  for (size_t s = 0; s + 1 < q->size(); ++s) {
    const int64_t sq = (*q)[s + 1] - (*q)[s], sk = (*k)[s + 1] - (*k)[s];
    if (sq > sk) {
      return InvalidField(
          ragged ? "cu_seqlens_q" : "tensors",
          absl::StrCat("sequence ", s, " has ", sq, " queries and only ", sk, " keys"));
    }
  }
  shape->cu_seqlens_q = *std::move(q);
  shape->cu_seqlens_k = *std::move(k);
  return absl::OkStatus();
}

// Tensors, outputs and the block index, which the engine needs whether it is returned or not. Where
// the caller reads its outputs in memory that we hand out, the index exists twice: the engine's,
// and that one. For a device with memory of its own a segment's tensors are copied once more; that
// memory counts its own.
uint64_t AttendBytes(const AttentionShape& shape, int block_size, const v1::AttendHeader& header,
                     const RequestLimits& limits) {
  const uint64_t q = static_cast<uint64_t>(shape.total_q()) * shape.q_heads;
  const uint64_t kv = static_cast<uint64_t>(shape.total_k()) * shape.kv_heads;
  const auto sequences = SplitIntoBlocks(shape, block_size);
  const uint64_t index = static_cast<uint64_t>(shape.q_heads) * TotalRows(sequences) *
                         (MaxKeyBlocks(sequences) + 1) * sizeof(int32_t);
  const uint64_t tensors = (2 * q + 2 * kv) * shape.head_dim * SizeOf(shape.dtype) +
                           (header.return_lse() ? q * sizeof(float) : 0);
  const bool twice = header.transport() == v1::TRANSPORT_POSIX_SHM && limits.device_memory;
  const uint64_t indices = header.transport() > v1::TRANSPORT_GRPC ? 2 : 1;
  return tensors + (twice ? tensors : 0) + (header.return_block_index() ? indices * index : 0) +
         index;
}

}  // namespace

int64_t PromptTokensMax(const ModelInfo& info, const RequestLimits& limits) {
  return std::min(info.max_positions, limits.prompt_tokens_max);
}

std::string NewId() {
  absl::BitGen bits;
  return absl::StrFormat("%016x%016x", absl::Uniform<uint64_t>(bits),
                         absl::Uniform<uint64_t>(bits));
}

absl::StatusOr<std::string> ValidateRequestId(const std::string& id) {
  if (id.empty()) return NewId();
  if (id.size() > kRequestIdBytesMax) {
    return InvalidField("request_id",
                        absl::StrCat(id.size(), " bytes, the limit is ", kRequestIdBytesMax));
  }
  for (char c : id) {
    if (!absl::ascii_isalnum(static_cast<unsigned char>(c)) && c != '.' && c != '_' && c != '-') {
      return InvalidField("request_id", "only letters, digits and . _ - are allowed");
    }
  }
  return id;
}

absl::StatusOr<ValidAttend> ValidateAttend(const v1::AttendHeader& header,
                                           const RequestLimits& limits) {
  auto id = ValidateRequestId(header.request_id());
  if (!id.ok()) return id.status();
  if (header.buffers_size() > 0) {
    return absl::UnimplementedError(
        "buffers of the caller are not served; with transport TRANSPORT_POSIX_SHM or "
        "TRANSPORT_CUDA_IPC the server hands out its own");
  }
  absl::Status status =
      ValidateTransport(header.transport(), "transport", Carries::kTensors, limits);
  if (!status.ok()) return status;
  if (status = CheckPriority(header.priority()); !status.ok()) return status;
  auto policy = ValidatePolicy(header.sparsity());
  if (!policy.ok()) return policy.status();

  if (header.tensors_size() != 3) {
    return InvalidField("tensors", absl::StrCat(header.tensors_size(), " tensors, not q, k and v"));
  }
  ValidAttend valid;
  std::array<const v1::TensorSpec*, 3> specs{};  // by role
  for (int i = 0; i < 3; ++i) {
    const std::string field = absl::StrCat("tensors[", i, "]");
    auto role = CheckTensor(header.tensors(i), field);
    if (!role.ok()) return role.status();
    if (specs[*role] != nullptr) {
      return InvalidField(absl::StrCat(field, ".name"),
                          absl::StrCat("'", kRoleNames[*role], "' is announced twice"));
    }
    specs[*role] = &header.tensors(i);
    valid.roles[i] = *role;
  }
  const auto& [q, k, v] = specs;
  if (q->data_type() != k->data_type() || q->data_type() != v->data_type()) {
    return InvalidField(
        "tensors",
        absl::StrCat("q is ", DataTypeName(q->data_type()), ", k ", DataTypeName(k->data_type()),
                     ", v ", DataTypeName(v->data_type()), "; one data_type is needed"));
  }
  if (!std::equal(k->shape().begin(), k->shape().end(), v->shape().begin())) {
    return InvalidField("tensors", "k and v have different shapes");
  }
  if (q->shape(2) != k->shape(2)) {
    return InvalidField("tensors",
                        absl::StrCat("head_dim of q is ", q->shape(2), ", of k ", k->shape(2)));
  }
  if (q->shape(1) % k->shape(1) != 0) {
    return InvalidField("tensors", absl::StrCat(q->shape(1), " heads of q are no multiple of the ",
                                                k->shape(1), " of k"));
  }

  auto work = std::make_unique<AttendWork>();
  work->shape.dtype = *DTypeOf(q->data_type());
  work->shape.q_heads = static_cast<int>(q->shape(1));
  work->shape.kv_heads = static_cast<int>(k->shape(1));
  work->shape.head_dim = static_cast<int>(q->shape(2));
  status = CheckSequences(header, &work->shape, q->shape(0), k->shape(0));
  if (!status.ok()) return status;
  const int64_t entries = int64_t{work->shape.sequences()} * work->shape.q_heads;
  if (entries > kReportHeadsMax) {
    return InvalidField(
        "cu_seqlens_q",
        absl::StrCat(entries, " heads over all sequences, the limit is ", kReportHeadsMax));
  }
  const uint64_t bytes = AttendBytes(work->shape, policy->policy.block_size, header, limits);
  if (bytes > limits.attend_bytes_max) {
    return InvalidField("tensors", absl::StrCat("inputs, outputs and block index take ", bytes,
                                                " bytes, the limit is ", limits.attend_bytes_max));
  }
  work->softmax_scale = 1 / std::sqrt(static_cast<double>(work->shape.head_dim));
  if (header.has_softmax_scale()) {
    if (!(header.softmax_scale() > 0 && std::isfinite(header.softmax_scale()))) {
      return InvalidField("softmax_scale",
                          absl::StrCat(header.softmax_scale(), " is not above 0 and finite"));
    }
    work->softmax_scale = header.softmax_scale();
  }
  work->return_lse = header.return_lse();
  work->return_block_index = header.return_block_index();

  if (header.transport() == v1::TRANSPORT_POSIX_SHM) valid.transport = Transport::kPosixShm;
  if (header.transport() == v1::TRANSPORT_CUDA_IPC) valid.transport = Transport::kCudaIpc;
  valid.ragged = header.cu_seqlens_q_size() > 0;
  valid.job = std::make_shared<Job>();
  valid.job->request_id = *std::move(id);
  valid.job->priority = header.priority();
  valid.job->policy = policy->policy;
  if (header.return_block_index()) valid.job->policy.measure_captured_mass = true;  // an output
  valid.job->method_unspecified = policy->method_unspecified;
  valid.job->held_bytes = bytes;
  valid.job->attend = std::move(work);
  return valid;
}

absl::StatusOr<ValidPrefill> ValidatePrefill(const v1::PrefillRequest& request,
                                             const ModelInfo& info, const RequestLimits& limits) {
  if (absl::Status status = CheckPriority(request.priority()); !status.ok()) return status;
  auto policy = ValidatePolicy(request.sparsity());
  if (!policy.ok()) return policy.status();
  if (!v1::PrefixReuse::Mode_IsValid(request.prefix_reuse().mode())) {
    return InvalidField("prefix_reuse.mode",
                        absl::StrCat("unknown mode ", request.prefix_reuse().mode()));
  }
  if (request.prefix_reuse().mode() > v1::PrefixReuse::MODE_NONE) {
    return absl::UnimplementedError("prefix_reuse is not served yet; leave it out or MODE_NONE");
  }

  const v1::KvDestination& destination = request.destination();
  absl::Status status = ValidateTransport(destination.transport(), "destination.transport",
                                          Carries::kKvCache, limits);
  if (!status.ok()) return status;
  auto dtype = ValidateLayout(destination.layout(), "destination.layout", info.kv_heads,
                              info.head_dim, info.dtype);
  if (!dtype.ok()) return dtype.status();
  ValidPrefill valid;
  valid.retain = destination.has_retain() ? destination.retain() : true;
  valid.must_map = destination.transport() == v1::TRANSPORT_POSIX_SHM;
  if (valid.must_map && !valid.retain) {
    return InvalidField("destination.retain",
                        "false is served over TRANSPORT_GRPC only, not TRANSPORT_POSIX_SHM");
  }
  valid.may_map = limits.posix_shm && valid.retain && destination.transport() != v1::TRANSPORT_GRPC;
  auto ttl = ValidateLeaseTtl(destination.has_lease_ttl(), destination.lease_ttl(),
                              "destination.lease_ttl", limits, limits.lease_ttl);
  if (!ttl.ok()) return ttl.status();
  valid.lease_ttl = *ttl;

  const int64_t tokens_max = PromptTokensMax(info, limits);
  if (request.token_ids_size() < 1 || request.token_ids_size() > tokens_max) {
    return InvalidField(
        "token_ids", absl::StrCat(request.token_ids_size(), " tokens, not from 1 to ", tokens_max));
  }
  for (int i = 0; i < request.token_ids_size(); ++i) {
    if (request.token_ids(i) >= static_cast<uint32_t>(info.vocab_size)) {
      return InvalidField(
          absl::StrCat("token_ids[", i, "]"),
          absl::StrCat(request.token_ids(i), " is not below the vocabulary's ", info.vocab_size));
    }
  }
  auto id = ValidateRequestId(request.request_id());
  if (!id.ok()) return id.status();

  valid.job = std::make_shared<Job>();
  valid.job->request_id = *std::move(id);
  valid.job->priority = request.priority();
  valid.job->policy = policy->policy;
  valid.job->method_unspecified = policy->method_unspecified;
  valid.job->prefill = std::make_unique<PrefillWork>();
  valid.job->prefill->token_ids.assign(request.token_ids().begin(), request.token_ids().end());
  valid.job->prefill->return_logits = request.return_logits();
  return valid;
}

absl::Status ValidateTransport(v1::Transport transport, const std::string& field, Carries what,
                               const RequestLimits& limits) {
  if (!v1::Transport_IsValid(transport)) {
    return InvalidField(field, absl::StrCat("unknown transport ", transport));
  }
  if (transport == v1::TRANSPORT_CUDA_IPC && what == Carries::kKvCache) {
    return absl::UnimplementedError(
        absl::StrCat(field,
                     ": TRANSPORT_CUDA_IPC carries the tensors of Attend only; a KV cache "
                     "leaves by TRANSPORT_GRPC or TRANSPORT_POSIX_SHM"));
  }
  if ((transport == v1::TRANSPORT_POSIX_SHM && !limits.posix_shm) ||
      (transport == v1::TRANSPORT_CUDA_IPC && !limits.cuda_ipc)) {
    return absl::FailedPreconditionError(
        absl::StrCat(field, ": ", v1::Transport_Name(transport), " is not offered by this server"));
  }
  return absl::OkStatus();
}

absl::StatusOr<absl::Duration> ValidateLeaseTtl(bool present, const google::protobuf::Duration& ttl,
                                                const std::string& field,
                                                const RequestLimits& limits,
                                                absl::Duration absent) {
  if (!present) return absent;
  // Out of range values are cut by absl's saturating arithmetic, not wrapped.
  const absl::Duration value = absl::Seconds(ttl.seconds()) + absl::Nanoseconds(ttl.nanos());
  if (value <= absl::ZeroDuration() || value > limits.lease_ttl_max) {
    return InvalidField(field,
                        absl::StrCat(absl::FormatDuration(value), " is not above 0 and at most ",
                                     absl::FormatDuration(limits.lease_ttl_max)));
  }
  return value;
}

absl::StatusOr<DType> ValidateLayout(const v1::KvLayout& layout, const std::string& field,
                                     int kv_heads, int head_dim, DType cache_dtype) {
  constexpr std::array<int, 5> kHuggingFace = {v1::AXIS_LAYER, v1::AXIS_KV, v1::AXIS_HEAD,
                                               v1::AXIS_TOKEN, v1::AXIS_CHANNEL};
  constexpr int kAxesMax = 8;
  if (layout.physical_order_size() > kAxesMax) {
    return InvalidField(
        absl::StrCat(field, ".physical_order"),
        absl::StrCat(layout.physical_order_size(), " axes, the limit is ", kAxesMax));
  }
  for (int i = 0; i < layout.physical_order_size(); ++i) {
    const int axis = layout.physical_order(i);
    if (!v1::Axis_IsValid(axis) || axis == v1::AXIS_UNSPECIFIED) {
      return InvalidField(absl::StrCat(field, ".physical_order[", i, "]"),
                          absl::StrCat("unknown axis ", axis));
    }
  }
  DType dtype = cache_dtype;
  if (layout.data_type() != v1::DATA_TYPE_UNSPECIFIED) {
    const auto asked = DTypeOf(layout.data_type());
    if (!asked) {
      return InvalidField(
          absl::StrCat(field, ".data_type"),
          absl::StrCat(DataTypeName(layout.data_type()), " is not F32, BF16 or F16"));
    }
    dtype = *asked;
  }
  const auto refuse = [&](const std::string& what) {
    return absl::FailedPreconditionError(absl::StrCat(
        field, ": ", what,
        " is not served; served is [LAYER, KV, HEAD, TOKEN, CHANNEL], dense, after rotation"));
  };
  if (layout.physical_order_size() > 0 &&
      !std::equal(kHuggingFace.begin(), kHuggingFace.end(), layout.physical_order().begin(),
                  layout.physical_order().end())) {
    return refuse("this physical_order");
  }
  if (layout.kv_packed_in_content()) return refuse("kv_packed_in_content");
  if (layout.block_size() != 0) return refuse(absl::StrCat("block_size ", layout.block_size()));
  if (layout.block_stride_bytes() != 0) {
    return refuse(absl::StrCat("block_stride_bytes ", layout.block_stride_bytes()));
  }
  if (layout.has_rope_state() &&
      (!layout.rope_state().applied() || layout.rope_state().position_base() != 0)) {
    return refuse("this rope_state");
  }
  if (layout.num_kv_heads() != 0 && layout.num_kv_heads() != static_cast<uint32_t>(kv_heads)) {
    return absl::FailedPreconditionError(
        absl::StrCat(field, ".num_kv_heads ", layout.num_kv_heads(), ": the model has ", kv_heads));
  }
  if (layout.head_dim() != 0 && layout.head_dim() != static_cast<uint32_t>(head_dim)) {
    return absl::FailedPreconditionError(
        absl::StrCat(field, ".head_dim ", layout.head_dim(), ": the model has ", head_dim));
  }
  return dtype;
}

absl::StatusOr<ValidPull> ValidatePull(const v1::PullKvRequest& request, const KvCache& cache,
                                       const RequestLimits& limits) {
  const KvGeometry& geometry = cache.geometry();
  absl::Status status =
      ValidateTransport(request.transport(), "transport", Carries::kKvCache, limits);
  if (!status.ok()) return status;
  const bool mapped = request.transport() == v1::TRANSPORT_POSIX_SHM;
  if (mapped && !cache.in_segment()) {
    return absl::FailedPreconditionError(
        "transport: the cache lies in no segment that TRANSPORT_POSIX_SHM could map (see "
        "Admission.transport); TRANSPORT_GRPC has it");
  }
  auto dtype = ValidateLayout(request.layout(), "layout", geometry.kv_heads, geometry.head_dim,
                              geometry.dtype);
  if (!dtype.ok()) return dtype.status();
  const uint32_t layers = static_cast<uint32_t>(geometry.layers);
  if (request.first_layer() >= layers) {
    return InvalidField("first_layer", absl::StrCat(request.first_layer(), " is not below the ",
                                                    layers, " layers"));
  }
  const uint32_t left = layers - request.first_layer();
  if (request.has_layer_count() && (request.layer_count() < 1 || request.layer_count() > left)) {
    return InvalidField("layer_count", absl::StrCat(request.layer_count(), " is not from 1 to ",
                                                    left, ", what is left from first_layer"));
  }
  if (request.resume_tensor_index() > 1) {
    return InvalidField("resume_tensor_index",
                        absl::StrCat(request.resume_tensor_index(), " is neither 0 (K) nor 1 (V)"));
  }
  if (mapped && *dtype != geometry.dtype) {
    return absl::FailedPreconditionError(absl::StrCat("layout.data_type: ", Name(*dtype),
                                                      " is not the cache's ", Name(geometry.dtype),
                                                      ", which is what TRANSPORT_POSIX_SHM maps"));
  }
  const uint64_t tensor_bytes = HfTensorBytes(geometry, *dtype);
  if (request.resume_byte_offset() > tensor_bytes) {
    return InvalidField(
        "resume_byte_offset",
        absl::StrCat(request.resume_byte_offset(), " is beyond the tensor's ", tensor_bytes));
  }
  if (mapped && request.resume_byte_offset() % tensor_bytes != 0) {
    return InvalidField(
        "resume_byte_offset",
        absl::StrCat(request.resume_byte_offset(), " is neither 0 nor the tensor's ", tensor_bytes,
                     ", as TRANSPORT_POSIX_SHM needs it"));
  }
  constexpr uint32_t kChunkBytesMin = 4096;
  if (request.chunk_bytes() != 0 &&
      (request.chunk_bytes() < kChunkBytesMin || request.chunk_bytes() > kMaxChunkBytes)) {
    return InvalidField("chunk_bytes", absl::StrCat(request.chunk_bytes(), " is not from ",
                                                    kChunkBytesMin, " to ", kMaxChunkBytes));
  }
  ValidPull pull;
  pull.first_layer = static_cast<int>(request.first_layer());
  pull.end_layer =
      pull.first_layer + static_cast<int>(request.has_layer_count() ? request.layer_count() : left);
  pull.tensor = static_cast<int>(request.resume_tensor_index());
  pull.byte_offset = request.resume_byte_offset();
  pull.chunk_bytes = request.chunk_bytes() != 0 ? request.chunk_bytes() : kMaxChunkBytes;
  pull.dtype = *dtype;
  if (mapped) pull.chunk_bytes = tensor_bytes;
  return pull;
}

}  // namespace prefilld

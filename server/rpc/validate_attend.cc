#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"
#include "server/record/errors.h"
#include "server/rpc/messages.h"
#include "server/rpc/validate.h"
#include "server/rpc/validate_policy.h"

namespace prefilld {
namespace {

// With these no product of one tensor's dimensions can overflow 64 bits.
constexpr int64_t kTokensMax = std::numeric_limits<int32_t>::max();
constexpr int64_t kHeadsMax = 256;
constexpr int64_t kHeadDimMax = 4096;
// Entries of a report, so that it fits one message.
constexpr int64_t kReportHeadsMax = 1 << 17;

constexpr const char* kRoleNames[] = {"q", "k", "v"};

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

// Tensors, outputs and the block index, which the engine needs whether it is returned or not. What
// is returned is twice as wide as the engine's, of which the job has a copy then; where the caller
// reads its outputs in memory that we hand out, it exists there once more. For a device with memory
// of its own a segment's tensors are copied once more; that memory counts its own.
uint64_t AttendBytes(const AttendWork& work, int block_size, const TransportRow& transport,
                     const RequestLimits& limits) {
  const AttentionShape& shape = work.shape;
  const uint64_t q = static_cast<uint64_t>(shape.total_q()) * shape.q_heads;
  const uint64_t kv = static_cast<uint64_t>(shape.total_k()) * shape.kv_heads;
  const auto sequences = SplitIntoBlocks(shape, block_size);
  const uint64_t index = static_cast<uint64_t>(shape.q_heads) * TotalRows(sequences) *
                         (MaxKeyBlocks(sequences) + 1) * sizeof(int32_t);
  const uint64_t tensors = (2 * q + 2 * kv) * shape.head_dim * SizeOf(shape.dtype) +
                           (work.return_lse ? q * sizeof(float) : 0);
  const bool opened = transport.open != nullptr;
  const bool twice = opened && !transport.on_device && limits.device_memory;
  const uint64_t indices = opened ? 2 : 1;
  return tensors + (twice ? tensors : 0) + (work.return_block_index ? indices * index : 0) + index;
}

struct Announced {
  std::array<const v1::TensorSpec*, 3> by_role{};  // q, k, v
  std::array<int, 3> roles{};                      // in the order of announcement
};

// Three tensors that fit each other.
absl::StatusOr<Announced> CheckTensors(const v1::AttendHeader& header) {
  if (header.tensors_size() != 3) {
    return InvalidField("tensors", absl::StrCat(header.tensors_size(), " tensors, not q, k and v"));
  }
  Announced announced;
  auto& specs = announced.by_role;
  for (int i = 0; i < 3; ++i) {
    const std::string field = absl::StrCat("tensors[", i, "]");
    auto role = CheckTensor(header.tensors(i), field);
    if (!role.ok()) return role.status();
    if (specs[*role] != nullptr) {
      return InvalidField(absl::StrCat(field, ".name"),
                          absl::StrCat("'", kRoleNames[*role], "' is announced twice"));
    }
    specs[*role] = &header.tensors(i);
    announced.roles[i] = *role;
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
  return announced;
}

absl::StatusOr<double> SoftmaxScale(const v1::AttendHeader& header, int head_dim) {
  if (!header.has_softmax_scale()) return 1 / std::sqrt(static_cast<double>(head_dim));
  if (!(header.softmax_scale() > 0 && std::isfinite(header.softmax_scale()))) {
    return InvalidField("softmax_scale",
                        absl::StrCat(header.softmax_scale(), " is not above 0 and finite"));
  }
  return header.softmax_scale();
}

}  // namespace

absl::StatusOr<ValidAttend> ValidateAttend(const v1::AttendHeader& header,
                                           const RequestLimits& limits) {
  auto id = ValidateRequestId(header.request_id());
  if (!id.ok()) return id.status();
  if (header.buffers_size() > 0) {
    return absl::UnimplementedError(
        "buffers of the caller are not served; over a transport of shared memory the server hands "
        "out "
        "its own");
  }
  auto transport = ValidateTransport(header.transport(), "transport", Carries::kTensors, limits);
  if (!transport.ok()) return transport.status();
  absl::Status status = ValidatePriority(header.priority());
  if (!status.ok()) return status;
  auto policy = ValidatePolicy(header.sparsity());
  if (!policy.ok()) return policy.status();

  auto tensors = CheckTensors(header);
  if (!tensors.ok()) return tensors.status();
  const auto& [q, k, v] = tensors->by_role;
  auto work = std::make_unique<AttendWork>();
  work->return_lse = header.return_lse();
  work->return_block_index = header.return_block_index();
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
  const uint64_t bytes = AttendBytes(*work, policy->policy.block_size, RowOf(*transport), limits);
  if (bytes > limits.attend_bytes_max) {
    return InvalidField("tensors", absl::StrCat("inputs, outputs and block index take ", bytes,
                                                " bytes, the limit is ", limits.attend_bytes_max));
  }
  auto scale = SoftmaxScale(header, work->shape.head_dim);
  if (!scale.ok()) return scale.status();
  work->softmax_scale = *scale;
  ValidAttend valid;
  valid.transport = *transport;
  valid.roles = tensors->roles;
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

}  // namespace prefilld

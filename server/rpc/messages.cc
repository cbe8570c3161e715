#include "server/rpc/messages.h"

#include <algorithm>
#include <cmath>
#include <set>

#include "server/transport/transports.h"

namespace prefilld {
namespace {

void AppendU16(float ratio, std::string* bytes) {
  const auto value = static_cast<uint16_t>(std::lround(std::clamp(ratio, 0.0f, 1.0f) * 65535.0f));
  bytes->push_back(static_cast<char>(value & 0xff));
  bytes->push_back(static_cast<char>(value >> 8));
}

}  // namespace

std::optional<DType> DTypeOf(v1::DataType type) {
  switch (type) {
    case v1::DATA_TYPE_F32:
      return DType::kF32;
    case v1::DATA_TYPE_BF16:
      return DType::kBF16;
    case v1::DATA_TYPE_F16:
      return DType::kF16;
    default:
      return std::nullopt;
  }
}

v1::DataType ProtoOf(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return v1::DATA_TYPE_F32;
    case DType::kBF16:
      return v1::DATA_TYPE_BF16;
    case DType::kF16:
      return v1::DATA_TYPE_F16;
  }
  return v1::DATA_TYPE_UNSPECIFIED;
}

v1::Transport ProtoOf(Transport transport) {
  return static_cast<v1::Transport>(RowOf(transport).wire);
}

std::string ProtoName(Transport transport) { return v1::Transport_Name(ProtoOf(transport)); }

std::string TransportName(int transport) {
  return v1::Transport_IsValid(transport)
             ? v1::Transport_Name(static_cast<v1::Transport>(transport))
             : std::to_string(transport);
}

v1::BufferRef BufferAt(const RegionAddress& address, uint64_t offset, uint64_t bytes) {
  v1::BufferRef buffer;
  buffer.set_name(address.name);
  buffer.set_device_uuid(address.device_uuid);
  buffer.set_byte_offset(offset);
  buffer.set_byte_length(bytes);
  return buffer;
}

std::string DataTypeName(int type) {
  constexpr size_t kPrefix = sizeof("DATA_TYPE_") - 1;
  return v1::DataType_IsValid(type)
             ? v1::DataType_Name(static_cast<v1::DataType>(type)).substr(kPrefix)
             : std::to_string(type);
}

google::protobuf::Duration ProtoOf(absl::Duration duration) {
  google::protobuf::Duration proto;
  proto.set_seconds(absl::IDivDuration(duration, absl::Seconds(1), &duration));
  proto.set_nanos(static_cast<int32_t>(absl::ToInt64Nanoseconds(duration)));
  return proto;
}

v1::SparsityReport ProtoOf(const JobReport& report) {
  v1::SparsityReport proto;
  proto.set_mean_density(report.MeanDensity());
  proto.set_layers(static_cast<uint32_t>(report.layers));
  proto.set_heads(static_cast<uint32_t>(report.heads));
  proto.set_captured_mass_measured(report.captured_mass_measured);
  proto.set_mean_captured_mass(report.MeanCapturedMass());
  uint32_t fallbacks = 0;
  std::set<DenseReason> reasons;
  for (const HeadReport& entry : report.entries) {
    AppendU16(entry.density, proto.mutable_density_u16());
    proto.mutable_pattern_u8()->push_back(static_cast<char>(entry.pattern));
    if (report.captured_mass_measured) {
      AppendU16(entry.captured_mass, proto.mutable_captured_mass_u16());
      AppendU16(entry.captured_mass_min, proto.mutable_captured_mass_min_u16());
    }
    if (entry.dense_reason == DenseReason::kNone) continue;
    ++fallbacks;
    reasons.insert(entry.dense_reason);
  }
  proto.set_dense_fallback_heads(fallbacks);
  for (DenseReason reason : reasons) proto.add_reasons(Name(reason));
  return proto;
}

v1::Summary SummaryOf(const Job& job, uint64_t bytes_in, uint64_t bytes_out,
                      absl::Duration handoff) {
  v1::Summary summary;
  const auto phase = [&](Phase p) {
    return ProtoOf(absl::Seconds(job.phases[static_cast<size_t>(p)]));
  };
  *summary.mutable_queue() = phase(Phase::kQueue);
  *summary.mutable_upload() = phase(Phase::kUpload);
  *summary.mutable_estimate() = phase(Phase::kEstimate);
  *summary.mutable_select() = phase(Phase::kSelect);
  *summary.mutable_attention() = phase(Phase::kAttention);
  *summary.mutable_linear() = phase(Phase::kLinear);
  *summary.mutable_handoff() =
      ProtoOf(absl::Seconds(job.phases[static_cast<size_t>(Phase::kHandoff)]) + handoff);
  *summary.mutable_sparsity() = ProtoOf(job.report);
  summary.set_bytes_in(bytes_in);
  summary.set_bytes_out(bytes_out);
  summary.set_tokens(static_cast<uint64_t>(job.tokens()));
  summary.set_request_id(job.request_id);
  return summary;
}

v1::Lease ProtoOf(const LeaseInfo& lease, const KvGeometry& geometry, const std::string& boot_id) {
  v1::Lease proto;
  proto.set_name(lease.name);
  *proto.mutable_ttl() = ProtoOf(lease.ttl);
  proto.set_generation(lease.generation);
  proto.set_boot_id(boot_id);
  proto.set_layers(static_cast<uint32_t>(geometry.layers));
  proto.set_tokens(static_cast<uint64_t>(geometry.tokens));
  return proto;
}

v1::KvLayout LayoutOf(const ModelInfo& info, const KvForm& form) {
  v1::KvLayout layout;
  for (KvAxis axis : form.layout->order) {
    layout.add_physical_order(static_cast<v1::Axis>(axis));
  }
  layout.set_num_kv_heads(static_cast<uint32_t>(info.kv_heads));
  layout.set_head_dim(static_cast<uint32_t>(info.head_dim));
  layout.set_data_type(ProtoOf(form.dtype));
  layout.mutable_rope_state()->set_applied(true);
  layout.mutable_rope_state()->set_theta(info.rope_theta);
  layout.mutable_rope_state()->set_scaling(info.rope_scaling);
  return layout;
}

v1::Model ProtoOf(const ModelInfo& info, int64_t prompt_tokens_max) {
  v1::Model model;
  model.set_name(info.name);
  model.set_model_type(info.model_type);
  model.set_revision(info.revision);
  model.set_layers(static_cast<uint32_t>(info.layers));
  model.set_q_heads(static_cast<uint32_t>(info.q_heads));
  model.set_kv_heads(static_cast<uint32_t>(info.kv_heads));
  model.set_head_dim(static_cast<uint32_t>(info.head_dim));
  model.set_hidden_size(static_cast<uint32_t>(info.hidden_size));
  model.set_vocab_size(static_cast<uint32_t>(info.vocab_size));
  model.set_max_prompt_tokens(static_cast<uint32_t>(prompt_tokens_max));
  model.set_data_type(ProtoOf(info.dtype));
  model.set_fingerprint(info.fingerprint);
  *model.mutable_kv_layout() = LayoutOf(info, {.dtype = info.dtype});
  model.set_kv_bytes_per_token(2 * uint64_t(info.layers) * info.kv_heads * info.head_dim *
                               SizeOf(info.dtype));
  return model;
}

}  // namespace prefilld

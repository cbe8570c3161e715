#include <algorithm>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "proto/wire/chunk.h"
#include "server/record/errors.h"
#include "server/rpc/messages.h"
#include "server/rpc/validate.h"

namespace prefilld {
namespace {

static_assert(static_cast<int>(KvAxis::kLayer) == v1::AXIS_LAYER &&
              static_cast<int>(KvAxis::kKv) == v1::AXIS_KV &&
              static_cast<int>(KvAxis::kBlock) == v1::AXIS_BLOCK &&
              static_cast<int>(KvAxis::kHead) == v1::AXIS_HEAD &&
              static_cast<int>(KvAxis::kToken) == v1::AXIS_TOKEN &&
              static_cast<int>(KvAxis::kChannel) == v1::AXIS_CHANNEL);

// "[LAYER, KV, ...]" of every row, for refusals.
std::string Orders() {
  constexpr size_t kPrefix = sizeof("AXIS_") - 1;
  return absl::StrJoin(kKvLayouts, " or ", [](std::string* out, const KvLayout& row) {
    absl::StrAppend(
        out, "[",
        absl::StrJoin(row.order, ", ",
                      [](std::string* name, KvAxis axis) {
                        name->append(v1::Axis_Name(static_cast<v1::Axis>(axis)).substr(kPrefix));
                      }),
        "]");
  });
}

const KvLayout* FindLayout(const v1::KvLayout& layout) {
  for (const KvLayout& row : kKvLayouts) {
    if (std::equal(row.order.begin(), row.order.end(), layout.physical_order().begin(),
                   layout.physical_order().end(),
                   [](KvAxis ours, int theirs) { return static_cast<int>(ours) == theirs; })) {
      return &row;
    }
  }
  return nullptr;
}

// What is asked for of a cache of this many layers.
absl::Status CheckLayers(const v1::PullKvRequest& request, uint32_t layers) {
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
  return absl::OkStatus();
}

// And of tensors of this many bytes.
absl::Status CheckBytes(const v1::PullKvRequest& request, uint64_t tensor_bytes,
                        Transport transport) {
  if (request.resume_byte_offset() > tensor_bytes) {
    return InvalidField(
        "resume_byte_offset",
        absl::StrCat(request.resume_byte_offset(), " is beyond the tensor's ", tensor_bytes));
  }
  if (RowOf(transport).open != nullptr && request.resume_byte_offset() % tensor_bytes != 0) {
    return InvalidField(
        "resume_byte_offset",
        absl::StrCat(request.resume_byte_offset(), " is neither 0 nor the tensor's ", tensor_bytes,
                     ", as ", ProtoName(transport), " needs it"));
  }
  constexpr uint32_t kChunkBytesMin = 4096;
  if (request.chunk_bytes() != 0 &&
      (request.chunk_bytes() < kChunkBytesMin || request.chunk_bytes() > kMaxChunkBytes)) {
    return InvalidField("chunk_bytes", absl::StrCat(request.chunk_bytes(), " is not from ",
                                                    kChunkBytesMin, " to ", kMaxChunkBytes));
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<KvForm> ValidateLayout(const v1::KvLayout& layout, const std::string& field,
                                      const KvGeometry& cache) {
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
  KvForm form{.dtype = cache.dtype};
  if (layout.data_type() != v1::DATA_TYPE_UNSPECIFIED) {
    const auto asked = DTypeOf(layout.data_type());
    if (!asked) {
      return InvalidField(
          absl::StrCat(field, ".data_type"),
          absl::StrCat(DataTypeName(layout.data_type()), " is not F32, BF16 or F16"));
    }
    form.dtype = *asked;
  }
  const auto refuse = [&](const std::string& what) {
    return absl::FailedPreconditionError(absl::StrCat(
        field, ": ", what, " is not served; served is ", Orders(), ", dense, after rotation"));
  };
  if (layout.physical_order_size() > 0) {
    form.layout = FindLayout(layout);
    if (form.layout == nullptr) return refuse("this physical_order");
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
  if (layout.num_kv_heads() != 0 &&
      layout.num_kv_heads() != static_cast<uint32_t>(cache.kv_heads)) {
    return absl::FailedPreconditionError(absl::StrCat(
        field, ".num_kv_heads ", layout.num_kv_heads(), ": the model has ", cache.kv_heads));
  }
  if (layout.head_dim() != 0 && layout.head_dim() != static_cast<uint32_t>(cache.head_dim)) {
    return absl::FailedPreconditionError(
        absl::StrCat(field, ".head_dim ", layout.head_dim(), ": the model has ", cache.head_dim));
  }
  return form;
}

absl::StatusOr<ValidPull> ValidatePull(const v1::PullKvRequest& request, const KvCache& cache,
                                       const RequestLimits& limits) {
  const KvGeometry& geometry = cache.geometry();
  auto transport = ValidateTransport(request.transport(), "transport", Carries::kKvCache, limits);
  if (!transport.ok()) return transport.status();
  const bool mapped = RowOf(*transport).open != nullptr;
  const Transport lies_in = cache.transport();
  const bool sendable = !RowOf(lies_in).on_device;
  if (mapped ? lies_in != *transport : !sendable) {
    return absl::FailedPreconditionError(
        absl::StrCat("transport: ", ProtoName(*transport), " has no cache that is of ",
                     ProtoName(lies_in), ", as this one (see Admission.transport)",
                     sendable ? absl::StrCat("; ", ProtoName(Transport::kGrpc), " has it") : ""));
  }
  auto form = ValidateLayout(request.layout(), "layout", geometry);
  if (!form.ok()) return form.status();
  const uint32_t layers = static_cast<uint32_t>(geometry.layers);
  if (absl::Status status = CheckLayers(request, layers); !status.ok()) return status;
  if (mapped && form->dtype != geometry.dtype) {
    return absl::FailedPreconditionError(
        absl::StrCat("layout.data_type: ", Name(form->dtype), " is not the cache's ",
                     Name(geometry.dtype), ", which is what ", ProtoName(*transport), " maps"));
  }
  if (mapped && !form->layout->in_regions) {
    return absl::FailedPreconditionError(
        absl::StrCat("layout: what ", ProtoName(*transport), " maps is not ", form->layout->name));
  }
  const uint64_t tensor_bytes = form->tensor_bytes(geometry);
  if (absl::Status status = CheckBytes(request, tensor_bytes, *transport); !status.ok()) {
    return status;
  }
  ValidPull pull;
  pull.first_layer = static_cast<int>(request.first_layer());
  pull.end_layer = pull.first_layer + static_cast<int>(request.has_layer_count()
                                                           ? request.layer_count()
                                                           : layers - request.first_layer());
  pull.tensor = static_cast<int>(request.resume_tensor_index());
  pull.byte_offset = request.resume_byte_offset();
  pull.chunk_bytes = request.chunk_bytes() != 0 ? request.chunk_bytes() : kMaxChunkBytes;
  pull.transport = *transport;
  pull.form = *form;
  if (mapped) pull.chunk_bytes = tensor_bytes;
  return pull;
}

}  // namespace prefilld

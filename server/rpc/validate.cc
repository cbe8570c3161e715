#include "server/rpc/validate.h"

#include <google/protobuf/io/coded_stream.h>

#include <algorithm>

#include "absl/random/random.h"
#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "proto/wire/chunk.h"
#include "server/record/errors.h"
#include "server/rpc/messages.h"

namespace prefilld {

bool TakesBlocks(Transport transport, const RequestLimits& limits) {
  const TransportRow& row = RowOf(transport);
  return row.open == nullptr || (!limits.kv.segment_bytes && !row.on_device);
}

int64_t PromptTokensMax(const ModelInfo& info, const RequestLimits& limits, bool retain,
                        Transport transport) {
  const KvGeometry cache = GeometryOf(info, 0);
  int64_t most = std::min(info.max_positions, limits.prompt_tokens_max);
  const auto region = limits.kv_regions.find(transport);
  if (region != limits.kv_regions.end()) {
    most = std::min(most, cache.TokensInRegion(region->second));
    if (!TakesBlocks(transport, limits)) return most;
  }
  return std::min(most, cache.TokensInBlocks(limits.kv.blocks, retain));
}

int MessageBytesMax(const ModelInfos& models, const RequestLimits& limits) {
  constexpr int64_t kBesides = 64 << 10;  // of a request: far more than it has
  int64_t most = kMaxMessageBytes;
  for (const ModelInfo* info : models) {
    const auto last_id = static_cast<uint32_t>(info->vocab_size - 1);
    const auto id_bytes = google::protobuf::io::CodedOutputStream::VarintSize32(last_id);
    int64_t tokens = PromptTokensMax(*info, limits, /*retain=*/false);
    for (const auto& [transport, bytes] : limits.kv_regions) {
      tokens = std::max(tokens, PromptTokensMax(*info, limits, /*retain=*/true, transport));
    }
    most = std::max(most, tokens * static_cast<int64_t>(1 + id_bytes) + kBesides);
  }
  return static_cast<int>(most);
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

absl::Status ValidatePriority(int32_t priority) {
  constexpr int kPriorityMax = 100;
  if (priority < -kPriorityMax || priority > kPriorityMax) {
    return InvalidField(
        "priority", absl::StrCat(priority, " is not from ", -kPriorityMax, " to ", kPriorityMax));
  }
  return absl::OkStatus();
}

absl::StatusOr<Transport> ValidateTransport(v1::Transport transport, const std::string& field,
                                            Carries what, const RequestLimits& limits) {
  if (transport == v1::TRANSPORT_UNSPECIFIED) return Transport::kGrpc;
  const TransportRow* row = FindTransportOfWire(transport);
  if (row == nullptr)
    return InvalidField(field, absl::StrCat("unknown transport ", TransportName(transport)));
  if (!(what == Carries::kTensors ? row->tensors : row->kv_cache)) {
    std::string others;
    for (const TransportRow& other : kTransports) {
      if (!(what == Carries::kTensors ? other.tensors : other.kv_cache)) continue;
      absl::StrAppend(&others, others.empty() ? "" : " or ", ProtoName(other.transport));
    }
    return absl::UnimplementedError(absl::StrCat(
        field, ": ", ProtoName(row->transport),
        what == Carries::kTensors ? " carries no tensors of Attend; they travel by "
                                  : " carries the tensors of Attend only; a KV cache leaves by ",
        others));
  }
  if (row->open != nullptr && limits.offered.count(row->transport) == 0) {
    return absl::FailedPreconditionError(
        absl::StrCat(field, ": ", ProtoName(row->transport), " is not offered by this server"));
  }
  if (row->open != nullptr && what == Carries::kKvCache &&
      limits.kv_regions.count(row->transport) == 0) {
    return absl::FailedPreconditionError(
        absl::StrCat(field, ": ", ProtoName(row->transport), kNoRoomForCaches));
  }
  return row->transport;
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

}  // namespace prefilld

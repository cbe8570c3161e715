// What the server knows, written into proto: the way back of validate.h. Functions only; any
// thread.
#pragma once

#include <optional>
#include <string>

#include "absl/time/time.h"
#include "google/protobuf/duration.pb.h"
#include "prefilld/v1/kv_handoff_service.pb.h"
#include "prefilld/v1/model_service.pb.h"
#include "prefilld/v1/prefill_service.pb.h"
#include "server/job.h"
#include "server/kv/layout.h"
#include "server/kv/lease_table.h"
#include "server/model/transformer.h"
#include "server/transport/region.h"

namespace prefilld {

std::optional<DType> DTypeOf(v1::DataType type);  // empty when no attention runs in it
v1::DataType ProtoOf(DType dtype);
v1::Transport ProtoOf(Transport transport);
std::string ProtoName(Transport transport);  // "TRANSPORT_GRPC"
std::string TransportName(int transport);    // the same, or the number of an unknown one
// A tensor in memory that the caller opens.
v1::BufferRef BufferAt(const RegionAddress& address, uint64_t offset, uint64_t bytes);
std::string DataTypeName(int type);  // "BF16", or the number of an unknown one

google::protobuf::Duration ProtoOf(absl::Duration duration);
v1::SparsityReport ProtoOf(const JobReport& report);
// handoff: what it took beyond the job's own.
v1::Summary SummaryOf(const Job& job, uint64_t bytes_in, uint64_t bytes_out,
                      absl::Duration handoff = absl::ZeroDuration());
v1::Lease ProtoOf(const LeaseInfo& lease, const KvGeometry& geometry, const std::string& boot_id);
v1::KvLayout LayoutOf(const ModelInfo& info, const KvForm& form);
v1::Model ProtoOf(const ModelInfo& info, int64_t prompt_tokens_max);

}  // namespace prefilld

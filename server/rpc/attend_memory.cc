#include "server/rpc/attend_memory.h"

#include <array>
#include <utility>

#include "server/record/errors.h"
#include "server/rpc/attend_outputs.h"

namespace prefilld {
namespace {

// Of q and o, and of k and v.
std::pair<uint64_t, uint64_t> TensorBytes(const AttentionShape& shape) {
  const uint64_t row = static_cast<uint64_t>(shape.head_dim) * SizeOf(shape.dtype);
  return {static_cast<uint64_t>(shape.total_q()) * shape.q_heads * row,
          static_cast<uint64_t>(shape.total_k()) * shape.kv_heads * row};
}

uint64_t LseBytes(const AttendWork& work) {
  const AttentionShape& shape = work.shape;
  return work.return_lse ? static_cast<uint64_t>(shape.q_heads) * shape.total_q() * sizeof(float)
                         : 0;
}

// Memory that there is none of now may be there later.
absl::Status NoMemory(const absl::Status& status) {
  if (!absl::IsResourceExhausted(status) || FactsOf(status).retry_after) return status;
  return RetryLater(status.code(), "attend_memory", status.message(), absl::Seconds(1));
}

absl::Status Take(absl::StatusOr<Buffer> memory, Buffer* buffer) {
  if (!memory.ok()) return NoMemory(memory.status());
  *buffer = *std::move(memory);
  return absl::OkStatus();
}

// Where the engine leaves the block index for who answers.
absl::Status AllocateIndex(const ValidAttend& valid, Device& device) {
  AttendWork& work = *valid.job->attend;
  if (!work.return_block_index) return absl::OkStatus();
  const auto sequences = SplitIntoBlocks(work.shape, valid.job->policy.block_size);
  const uint64_t rows = static_cast<uint64_t>(work.shape.q_heads) * TotalRows(sequences);
  const uint64_t bytes = rows * MaxKeyBlocks(sequences) * sizeof(uint16_t);
  absl::Status status = Take(device.AllocateHost(rows * sizeof(int32_t)), &work.host_count);
  return status.ok() ? Take(device.AllocateHost(bytes), &work.host_index) : status;
}

// The device's side of the tensors, where nobody else has made it.
absl::Status AllocateOnDevice(Device& device, AttendWork& work) {
  const auto [q_bytes, kv_bytes] = TensorBytes(work.shape);
  for (auto [buffer, bytes] :
       {std::pair(&work.q, q_bytes), std::pair(&work.k, kv_bytes), std::pair(&work.v, kv_bytes),
        std::pair(&work.o, q_bytes), std::pair(&work.lse, LseBytes(work))}) {
    if (bytes == 0) continue;
    if (absl::Status status = Take(device.Allocate(bytes), buffer); !status.ok()) return status;
  }
  return absl::OkStatus();
}

// And where they are on the host, on their way there and back.
absl::StatusOr<Staging*> AllocateStaging(const ValidAttend& valid, Device& device) {
  AttendWork& work = *valid.job->attend;
  absl::Status status = AllocateOnDevice(device, work);
  if (status.ok()) status = Take(device.AllocateHost(work.o.bytes()), &work.host_o);
  if (status.ok() && work.return_lse) {
    status = Take(device.AllocateHost(work.lse.bytes()), &work.host_lse);
  }
  if (!status.ok()) return status;
  const std::array<const Buffer*, 3> by_role = {&work.q, &work.k, &work.v};
  std::vector<Staging::Tensor> tensors;
  for (int role : valid.roles) tensors.push_back({by_role[role]->data(), by_role[role]->bytes()});
  auto staging = Staging::Create(device, std::move(tensors));
  if (!staging.ok()) return NoMemory(staging.status());
  work.staging = *staging;
  return staging->get();
}

absl::StatusOr<AttendMemory> TakeBuffers(const ValidAttend& valid, Device& device) {
  AttendWork& work = *valid.job->attend;
  AttendMemory memory;
  if (!device.host_memory()) {
    auto staging = AllocateStaging(valid, device);
    if (!staging.ok()) return staging.status();
    memory.staging = *staging;
  } else if (absl::Status status = AllocateOnDevice(device, work); !status.ok()) {
    return status;
  }
  const std::array<const Buffer*, 3> by_role = {&work.q, &work.k, &work.v};
  for (size_t i = 0; i < valid.roles.size(); ++i) {
    const Buffer& buffer = *by_role[valid.roles[i]];
    void* place = memory.staging != nullptr ? memory.staging->tensors()[i].host : buffer.data();
    memory.upload.push_back({place, buffer.bytes()});
  }
  return memory;
}

// The job is computed in the region, where the stages reach it.
void PointInto(const ValidAttend& valid, const AttendMemory& memory) {
  AttendWork& work = *valid.job->attend;
  const std::array<Buffer*, 3> by_role = {&work.q, &work.k, &work.v};
  for (size_t i = 0; i < valid.roles.size(); ++i) {
    *by_role[valid.roles[i]] = Buffer(memory.upload[i].data, memory.upload[i].bytes, nullptr);
  }
  std::byte* const base = memory.region->data();
  work.o = Buffer(base + memory.outputs[0], TensorBytes(work.shape).first, nullptr);
  if (work.return_lse) work.lse = Buffer(base + memory.outputs[1], LseBytes(work), nullptr);
}

// Lengths are bounded by attend_bytes_max, which counts every tensor.
absl::StatusOr<AttendMemory> TakeRegion(const ValidAttend& valid, Device& device, Medium& medium) {
  const auto [q_bytes, kv_bytes] = TensorBytes(valid.job->attend->shape);
  AttendMemory memory;
  uint64_t end = 0;
  const auto place = [&](uint64_t bytes) { return std::exchange(end, end + RegionAligned(bytes)); };
  std::vector<uint64_t> bytes;
  for (int role : valid.roles) {
    bytes.push_back(role == 0 ? q_bytes : kv_bytes);
    memory.inputs.push_back(place(bytes.back()));
  }
  for (const v1::TensorSpec& spec : AnnouncedOutputs(*valid.job, valid.ragged)) {
    memory.outputs.push_back(place(BytesOf(spec)));
  }
  auto region = medium.Create(end, PeerAccess::kReadAndWrite);
  if (!region.ok()) return NoMemory(region.status());
  memory.region = region->get();
  // A peer may have it for longer than the job lives: it counts until then.
  memory.region->Keep(valid.job->budget);
  valid.job->attend->region = Region::Link(*std::move(region));
  for (size_t i = 0; i < bytes.size(); ++i) {
    memory.upload.push_back({memory.region->data() + memory.inputs[i], bytes[i]});
  }
  if (RowOf(valid.transport).on_device || device.host_memory()) {
    PointInto(valid, memory);
  } else {
    auto staging = AllocateStaging(valid, device);
    if (!staging.ok()) return staging.status();
    memory.staging = *staging;
  }
  return memory;
}

}  // namespace

absl::StatusOr<AttendMemory> TakeMemory(const ValidAttend& valid, Device& device, Medium* medium) {
  if (absl::Status status = AllocateIndex(valid, device); !status.ok()) return status;
  return medium == nullptr ? TakeBuffers(valid, device) : TakeRegion(valid, device, *medium);
}

}  // namespace prefilld

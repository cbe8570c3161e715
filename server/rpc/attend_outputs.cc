#include "server/rpc/attend_outputs.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "proto/wire/chunk.h"
#include "server/rpc/attend_memory.h"
#include "server/rpc/messages.h"

namespace prefilld {
namespace {

v1::TensorSpec Spec(const char* name, v1::DataType type, std::initializer_list<int64_t> shape) {
  v1::TensorSpec spec;
  spec.set_name(name);
  spec.set_data_type(type);
  for (int64_t dim : shape) spec.add_shape(dim);
  return spec;
}

std::vector<v1::TensorSpec> Specs(const Job& job, bool ragged, int64_t rows, int64_t max_blocks) {
  const AttendWork& work = *job.attend;
  const AttentionShape& shape = work.shape;
  const int64_t heads = shape.q_heads;
  std::vector<v1::TensorSpec> specs = {
      Spec("o", ProtoOf(shape.dtype), {shape.total_q(), heads, shape.head_dim})};
  if (work.return_lse) specs.push_back(Spec("lse", v1::DATA_TYPE_F32, {heads, shape.total_q()}));
  if (!work.return_block_index) return specs;
  specs.push_back(Spec("block_count", v1::DATA_TYPE_I32, {heads, rows}));
  specs.push_back(Spec("block_index", v1::DATA_TYPE_I32, {heads, rows, max_blocks}));
  for (auto [name, type] :
       {std::pair("pattern", v1::DATA_TYPE_U8), std::pair("captured_mass", v1::DATA_TYPE_F32)}) {
    specs.push_back(ragged ? Spec(name, type, {shape.sequences(), heads})
                           : Spec(name, type, {heads}));
  }
  return specs;
}

// The block index as callers read it: as wide as its longest row, which is returned, and -1 behind
// each row's blocks.
int64_t Widen(AttendWork& work, int64_t rows, int64_t stride) {
  const int32_t* const count = work.host_count.as<int32_t>();
  const uint16_t* from = work.host_index.as<uint16_t>();
  const int64_t width = *std::max_element(count, count + rows);
  work.block_index.assign(static_cast<size_t>(rows * width), -1);
  auto to = work.block_index.begin();
  for (int64_t row = 0; row < rows; ++row, from += stride, to += width) {
    std::copy_n(from, count[row], to);
  }
  return width;
}

}  // namespace

uint64_t BytesOf(const v1::TensorSpec& spec) {
  uint64_t bytes = spec.data_type() == v1::DATA_TYPE_U8 ? 1
                   : spec.data_type() == v1::DATA_TYPE_F32 || spec.data_type() == v1::DATA_TYPE_I32
                       ? 4
                       : 2;
  for (int64_t dim : spec.shape()) bytes *= static_cast<uint64_t>(dim);
  return bytes;
}

std::vector<v1::TensorSpec> AnnouncedOutputs(const Job& job, bool ragged) {
  const auto sequences = SplitIntoBlocks(job.attend->shape, job.policy.block_size);
  return Specs(job, ragged, TotalRows(sequences), MaxKeyBlocks(sequences));
}

AttendOutputs::AttendOutputs(std::shared_ptr<Job> job, bool ragged, const AttendMemory& memory)
    : memory_(memory) {
  auto held = std::make_shared<Held>();
  for (const HeadReport& entry : job->report.entries) {
    held->pattern.push_back(static_cast<uint8_t>(entry.pattern));
    held->captured_mass.push_back(entry.captured_mass);
  }
  AttendWork& work = *job->attend;
  const auto sequences = SplitIntoBlocks(work.shape, job->policy.block_size);
  const int64_t rows = TotalRows(sequences);
  const int64_t width =
      work.return_block_index ? Widen(work, work.shape.q_heads * rows, MaxKeyBlocks(sequences)) : 0;
  const bool moved = work.host_o.data() != nullptr;
  for (v1::TensorSpec& spec : Specs(*job, ragged, rows, width)) {
    const std::string& name = spec.name();
    const void* data = name == "o"             ? (moved ? work.host_o : work.o).data()
                       : name == "lse"         ? (moved ? work.host_lse : work.lse).data()
                       : name == "block_count" ? work.host_count.data()
                       : name == "block_index" ? work.block_index.data()
                       : name == "pattern"     ? static_cast<const void*>(held->pattern.data())
                                               : held->captured_mass.data();
    const uint64_t bytes = BytesOf(spec);
    total_ += bytes;
    tensors_.push_back({std::move(spec), static_cast<const char*>(data), bytes});
  }
  held->job = std::move(job);
  held_ = std::move(held);
}

absl::Status AttendOutputs::Place(Device& device) {
  if (memory_.region == nullptr) return absl::OkStatus();
  const bool on_device = RowOf(memory_.region->transport()).on_device;
  bool copied = false;
  for (size_t i = 0; i < tensors_.size(); ++i) {
    std::byte* place = memory_.region->data() + memory_.outputs[i];
    const Tensor& tensor = tensors_[i];
    if (reinterpret_cast<const std::byte*>(tensor.data) == place) continue;  // o and lse
    if (!on_device) {
      std::memcpy(place, tensor.data, tensor.bytes);
      continue;
    }
    copied = true;
    absl::Status status = device.Copy(place, tensor.data, tensor.bytes, device.upload_stream());
    if (!status.ok()) return status;
  }
  current_ = tensors_.size();
  return copied ? device.Synchronize(device.upload_stream()) : absl::OkStatus();
}

v1::OutputSpecs AttendOutputs::specs() const {
  v1::OutputSpecs specs;
  for (size_t i = 0; i < tensors_.size(); ++i) {
    *specs.add_tensors() = tensors_[i].spec;
    if (memory_.region == nullptr) continue;
    *specs.add_buffers() =
        BufferAt(memory_.region->address(), memory_.outputs[i], tensors_[i].bytes);
  }
  return specs;
}

grpc::ByteBuffer AttendOutputs::NextChunk() {
  const Tensor& tensor = tensors_[current_];
  const size_t bytes = std::min<uint64_t>(kMaxChunkBytes, tensor.bytes - offset_);
  const char* data = tensor.data + offset_;
  ChunkHeader header;
  header.tensor_index = static_cast<uint32_t>(current_);
  header.byte_offset = offset_;
  header.crc32c = Crc32c(0, data, bytes);
  header.last = offset_ + bytes == tensor.bytes;
  offset_ += bytes;
  if (header.last) {
    ++current_;
    offset_ = 0;
  }
  return EncodeChunk(header, {SliceOf(data, bytes, held_)}, kAttendChunk);
}

}  // namespace prefilld

// The tensors that an Attend answers with, and their chunks. The bytes stay where the engine wrote
// them: slices refer to the job, which lives until gRPC has let go of the last of them. In memory
// that the caller opens there are no chunks: what the engine has not written there is copied.
#pragma once

#include <grpcpp/support/byte_buffer.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "prefilld/v1/prefill_service.pb.h"
#include "prefilld/v1/tensor.pb.h"
#include "server/job.h"
#include "server/transport/ipc_memory.h"
#include "server/transport/shm_segment.h"

namespace prefilld {

// The specs of the outputs of an admitted job: exact, but for block_index, whose last dimension is
// its upper bound. `ragged`: cu_seqlens were given, pattern and captured_mass are per sequence.
std::vector<v1::TensorSpec> AnnouncedOutputs(const Job& job, bool ragged);

uint64_t BytesOf(const v1::TensorSpec& spec);

// Where the tensors of one Attend lie that are not sent: the announced inputs, then the outputs,
// each with room for its upper bound.
struct AttendSegment {
  std::shared_ptr<ShmSegment> shm;        // over posix_shm
  std::shared_ptr<IpcMemory> ipc;         // over cuda_ipc
  std::vector<uint64_t> inputs, outputs;  // offsets

  bool exists() const { return shm != nullptr || ipc != nullptr; }
  std::byte* data() const { return shm != nullptr ? shm->data() : ipc->data(); }
  v1::BufferRef BufferAt(uint64_t offset, uint64_t bytes) const;
};

class AttendOutputs {
 public:
  // job: finished with OK. `segment`: where the outputs have to be, else null; outlives this.
  AttendOutputs(std::shared_ptr<const Job> job, bool ragged, const AttendSegment* segment);

  // Puts what is not there yet into the segment; then there is nothing to send. Waits for `device`
  // where that is its memory.
  absl::Status Place(Device& device);

  v1::OutputSpecs specs() const;
  uint64_t total_bytes() const { return total_; }
  bool done() const { return current_ == tensors_.size(); }
  // The next AttendResponse with a chunk. Not after done().
  grpc::ByteBuffer NextChunk();

 private:
  struct Tensor {
    v1::TensorSpec spec;
    const char* data;
    uint64_t bytes;
  };
  // What no job field holds as it is sent; shared with the slices.
  struct Held {
    std::shared_ptr<const Job> job;
    std::vector<uint8_t> pattern;      // [sequences, q_heads]
    std::vector<float> captured_mass;  // [sequences, q_heads]
  };

  std::shared_ptr<const Held> held_;
  const AttendSegment* const segment_;
  std::vector<Tensor> tensors_;
  uint64_t total_ = 0;
  size_t current_ = 0;
  uint64_t offset_ = 0;
};

}  // namespace prefilld

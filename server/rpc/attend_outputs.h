// The tensors that an Attend answers with, and their chunks. The bytes stay where the engine wrote
// them, but the block index, which is widened for the caller: slices refer to the job, which lives
// until gRPC has let go of the last of them. In memory that the caller opens there are no chunks:
// what the engine has not written there is copied.
#pragma once

#include <grpcpp/support/byte_buffer.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "kernels/backend.h"
#include "prefilld/v1/prefill_service.pb.h"
#include "prefilld/v1/tensor.pb.h"
#include "server/job.h"

namespace prefilld {

struct AttendMemory;

// The specs of the outputs of an admitted job: exact, but for block_index, whose last dimension is
// its upper bound. `ragged`: cu_seqlens were given, pattern and captured_mass are per sequence.
std::vector<v1::TensorSpec> AnnouncedOutputs(const Job& job, bool ragged);

uint64_t BytesOf(const v1::TensorSpec& spec);

class AttendOutputs {
 public:
  // job: finished with OK, and nobody else's. `memory`: of the job, outlives this; where the
  // outputs have to be when it has a region. Takes as long as the index is large.
  AttendOutputs(std::shared_ptr<Job> job, bool ragged, const AttendMemory& memory);

  // Puts what is not there yet into the region, where there is one; then there is nothing to send.
  // Copies; where the region is memory of `device`, on its upload stream, and waits for that, but
  // for no step.
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
  const AttendMemory& memory_;
  std::vector<Tensor> tensors_;
  uint64_t total_ = 0;
  size_t current_ = 0;
  uint64_t offset_ = 0;
};

}  // namespace prefilld

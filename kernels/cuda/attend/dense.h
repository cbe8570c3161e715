// Dense causal attention by cuDNN, which is loaded when it is there: nothing links it. Where it is
// missing or has no engine, Plan says no, and our kernel runs over the full index. One thread.
#pragma once

#include <memory>

#include "absl/status/status.h"
#include "kernels/cuda/device/cuda_device.h"
#include "kernels/cuda/launch.h"

namespace prefilld::cuda {

class Dense {
 public:
  // calls_before_plan: of a shape, before a plan is built for it.
  explicit Dense(CudaDevice& device, int calls_before_plan = 0);
  ~Dense();

  // Whether cuDNN computes this problem; asked once a call. It takes a plan, which takes
  // milliseconds to build, and its workspace. The last shapes are remembered, with a no as well.
  bool Plan(const Problem& problem);
  // Enqueues it. Right after Plan has said yes to it.
  absl::Status Attend(const Problem& problem, cudaStream_t stream);

 private:
  struct State;
  const std::unique_ptr<State> state_;
};

}  // namespace prefilld::cuda

// One attention problem on the GPU with all its memory: what is filled in, enqueued, timed and
// compared with exact attention.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "kernels/attention.h"
#include "kernels/cuda/attend/attend.h"
#include "kernels/cuda/attend/dense.h"
#include "kernels/cuda/device/cuda_device.h"
#include "kernels/cuda/select/selection.h"
#include "tests/bench/attention/attention_record.h"
#include "tests/bench/attention/device_clock.h"

namespace prefilld::bench {

// A set of stage-3 kernels.
struct KernelSet {
  const char* name;
  cudaError_t (*attend)(const cuda::Problem&, void*, int, cudaStream_t);
  bool (*has)(DType dtype, int head_dim, int block_size);
};
inline constexpr KernelSet kKernelSets[] = {{"sm90", cuda::AttendSm90, cuda::HasAttendSm90},
                                            {"sm80", cuda::AttendSm80, cuda::HasAttendSm80},
                                            {"f32", cuda::AttendF32, cuda::HasAttendF32}};

struct Settings {
  DType dtype = DType::kBF16;
  int q_heads = 32, kv_heads = 8, head_dim = 128, block_size = 128;
  double gamma = 0.9, flexprefill_gamma = 0.95, tau = 0.1;
  int64_t min_budget = kFlexPrefillMinBudget;  // flexprefill's
  std::vector<Method> methods;
  std::vector<std::string> kernels;
  double dense_ms = 0;  // stands in for cuDNN where this build or machine has none
};

class AttentionProblem {
 public:
  // Sq = Sk for every sequence. Everything runs on the device's compute stream.
  AttentionProblem(const Settings& settings, const std::vector<int64_t>& lengths,
                   cuda::CudaDevice* device, const Clock* clock);

  bool Wants(Method method) const;
  bool Runs(const KernelSet& set) const;  // wanted, and it has a kernel
  // What a call needs besides q, k, v, o and lse: the index, and the stages, which share a place.
  size_t WorkspaceBytes() const;

  void FillRandom();
  void FillStructured(double strength);
  void FillSaved(const uint8_t* q, const uint8_t* k, const uint8_t* v);
  // Fills in the structure, of the strength at which joint computes this share of the blocks.
  void FillForDensity(double density);
  // Rows of block 0, the diagonal and a random rest.
  void SetRandomIndex(double density);

  // cuDNN's dense attention; without it, the time that was given. What later lines are compared to.
  Record Cudnn();
  // Stage 3 over the index as it is.
  Record Attend(const std::string& workload, const std::string& method, const KernelSet& set);
  // A method from q and k to o, a line for every kernel set that runs.
  void Run(const std::string& workload, Method method, Table* table);

 private:
  template <typename T>
  T* Take(int64_t count);
  cuda::Selection SelectionOf(Method method) const;
  void EnqueueSelect(Method method);
  void EnqueueMass(Method method);
  void EnqueueAttend(const KernelSet& set);
  double PipelineMs(Method method, bool measure, const KernelSet& set);
  double Density() const;
  double Flops(bool dense) const;
  double Error(bool dense);

  const Settings settings_;
  cuda::CudaDevice& device_;
  cuda::Dense dense_;
  const Clock& clock_;
  const cudaStream_t stream_;
  std::vector<cuda::Sequence> host_sequences_;
  cuda::Problem problem_;
  std::vector<std::unique_ptr<DeviceMemory>> memory_;
  std::unique_ptr<DeviceMemory> count_, index_, report_, queries_;
  std::unique_ptr<DeviceMemory> selection_workspace_, attend_workspace_;
  std::vector<float> exact_dense_;  // of the inputs as they are
  double cudnn_ms_ = kNone, cudnn_tflops_ = kNone;
};

}  // namespace prefilld::bench

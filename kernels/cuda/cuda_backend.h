// The CUDA backend: the stages are kernels enqueued on a stream of one device. Stages allocate only
// where a call is larger than any before, and then before anything of it is enqueued; they never
// wait for the device. Called by one thread but for Supports and the device.
#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/backend.h"
#include "kernels/cuda/attend/dense.h"
#include "kernels/cuda/device/cuda_device.h"
#include "kernels/cuda/problem.h"
#include "kernels/cuda/select/selection.h"

namespace prefilld::cuda {

class CudaBackend : public Backend {
 public:
  // UNAVAILABLE without a device.
  static absl::StatusOr<std::unique_ptr<CudaBackend>> Create(const CudaOptions& options);

  std::string_view name() const override { return BackendName(set_); }
  CudaDevice& device() override { return *device_; }
  absl::StatusOr<Ops*> ops() override;  // made when first asked for

  absl::Status Supports(const AttentionShape& shape, const SparsityPolicy& policy) const override;
  size_t WorkspaceBytes(const AttentionShape& shape, const SparsityPolicy& policy) const override;
  absl::Status ReserveWorkspace(size_t bytes) override;
  absl::Status ReleaseWorkspace() override;
  absl::Status EstimatePattern(const AttentionArgs& args, Stream stream) override;
  absl::Status SelectBlocks(const AttentionArgs& args, Stream stream) override;
  absl::Status MeasureCapturedMass(const AttentionArgs& args, Stream stream) override;
  absl::Status Attend(const AttentionArgs& args, Stream stream) override;

 private:
  CudaBackend(std::unique_ptr<CudaDevice> device, KernelSet set, std::string cache_dir);
  absl::Status Prepare(const AttentionArgs& args, Stream stream);
  Selection SelectionOf(const AttentionArgs& args) const;

  const std::unique_ptr<CudaDevice> device_;
  const KernelSet set_;
  const std::string cache_dir_;
  Dense dense_;
  std::unique_ptr<Ops> ops_;

  // Of the last call, set by Prepare; stages of one call find it as it was.
  Buffer workspace_;  // grows to the largest call seen
  WorkspaceLayout layout_;
  std::vector<Sequence> sequences_;  // what the device has
  Problem problem_;
  bool planned_ = false;  // method dense goes to cuDNN
};

}  // namespace prefilld::cuda

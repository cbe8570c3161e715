// The CPU backend: the embedded default. Every stage runs inline on the caller's thread and an
// OpenMP team of `threads`; nothing is left running when a stage returns.
#pragma once

#include <memory>
#include <string_view>

#include "absl/status/status.h"
#include "kernels/backend.h"
#include "kernels/cpu/attend.h"
#include "kernels/cpu/cpu_device.h"
#include "kernels/cpu/selection.h"

namespace prefilld::cpu {

class CpuBackend : public Backend {
 public:
  explicit CpuBackend(int threads);  // > 0

  std::string_view name() const override { return "cpu"; }
  Device& device() override { return device_; }
  absl::StatusOr<Ops*> ops() override { return ops_.get(); }

  absl::Status Supports(const AttentionShape& shape, const SparsityPolicy& policy) const override;
  absl::Status SupportsPerHead(const AttentionShape& shape,
                               const HeadPolicies& heads) const override;
  absl::Status EstimatePattern(const AttentionArgs& args, Stream) override;
  absl::Status SelectBlocks(const AttentionArgs& args, Stream) override;
  absl::Status MeasureCapturedMass(const AttentionArgs& args, Stream) override;
  absl::Status Attend(const AttentionArgs& args, Stream) override;

 private:
  // `stage` over rows of K and V, gathered from their pages where they are paged.
  template <typename Stage>
  absl::Status Run(const AttentionArgs& args, Stage stage);

  CpuDevice device_;
  std::unique_ptr<Ops> ops_;
  Selection selection_;
  Attention attention_;
  Buffer gathered_;  // K and V of paged calls; grows to the largest
};

}  // namespace prefilld::cpu

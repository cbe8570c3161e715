// For tests of what follows a fault: another backend, until one attention too many breaks its
// device.
#pragma once

#include <functional>
#include <memory>
#include <string_view>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/backend.h"

namespace prefilld {

class FaultyBackend : public Backend {
 public:
  // `fault` leaves the device as an illegal memory access leaves it, or with work that never ends.
  FaultyBackend(std::unique_ptr<Backend> backend, std::function<absl::Status()> fault)
      : backend_(std::move(backend)), fault_(std::move(fault)) {}
  // The n-th Attend from now on is the one. Thread: the engine's, as for the stages.
  void Arm(int attends) { attends_to_fault_ = attends; }

  std::string_view name() const override { return backend_->name(); }
  Device& device() override { return backend_->device(); }
  absl::StatusOr<Ops*> ops() override { return backend_->ops(); }
  absl::Status Supports(const AttentionShape& shape, const SparsityPolicy& policy) const override {
    return backend_->Supports(shape, policy);
  }
  absl::Status SupportsPerHead(const AttentionShape& shape,
                               const HeadPolicies& heads) const override {
    return backend_->SupportsPerHead(shape, heads);
  }
  size_t WorkspaceBytes(const AttentionShape& shape, const SparsityPolicy& policy) const override {
    return backend_->WorkspaceBytes(shape, policy);
  }
  absl::Status ReserveWorkspace(size_t bytes) override { return backend_->ReserveWorkspace(bytes); }
  absl::Status ReleaseWorkspace() override { return backend_->ReleaseWorkspace(); }
  absl::Status EstimatePattern(const AttentionArgs& args, Stream stream) override {
    return backend_->EstimatePattern(args, stream);
  }
  absl::Status SelectBlocks(const AttentionArgs& args, Stream stream) override {
    return backend_->SelectBlocks(args, stream);
  }
  absl::Status MeasureCapturedMass(const AttentionArgs& args, Stream stream) override {
    return backend_->MeasureCapturedMass(args, stream);
  }
  absl::Status Attend(const AttentionArgs& args, Stream stream) override;

 private:
  const std::unique_ptr<Backend> backend_;
  const std::function<absl::Status()> fault_;
  int attends_to_fault_ = 0;  // 0: not armed
};

// What breaks this device, for FaultyBackend; null where nothing does. Beside the table of
// backends.
std::function<absl::Status()> FaultOf(Device& device);
// What never ends on this device: a kernel, or the call itself where stages run in it.
std::function<absl::Status()> HangOf(Device& device);

}  // namespace prefilld

#include "tests/bench/model/structured_backend.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "kernels/cuda/device/cuda_device.h"
#include "kernels/cuda/problem.h"
#include "tests/bench/attention/attention_workload.h"

namespace prefilld::bench {
namespace {

using cuda::CudaDevice;
using cuda::Sequence;

class CudaStructuredBackend : public StructuredBackend {
 public:
  CudaStructuredBackend(Backend& backend, CudaDevice& device, double strength)
      : backend_(backend), device_(device), strength_(strength) {}

  std::string_view name() const override { return backend_.name(); }
  Device& device() override { return device_; }
  absl::StatusOr<Ops*> ops() override { return backend_.ops(); }
  absl::Status Supports(const AttentionShape& shape, const SparsityPolicy& policy) const override {
    return backend_.Supports(shape, policy);
  }
  absl::Status SelectBlocks(const AttentionArgs& args, Stream stream) override {
    return backend_.SelectBlocks(args, stream);
  }
  absl::Status MeasureCapturedMass(const AttentionArgs& args, Stream stream) override {
    return backend_.MeasureCapturedMass(args, stream);
  }
  absl::Status Attend(const AttentionArgs& args, Stream stream) override {
    filled_ = false;
    return backend_.Attend(args, stream);
  }

  // The first stage of every call, and, where the method is open, once more for dense.
  absl::Status EstimatePattern(const AttentionArgs& args, Stream stream) override {
    absl::Status status;
    if (!filled_) {
      status = Mark(stream);
      if (status.ok()) status = Fill(args, stream);
      if (status.ok()) status = Mark(stream);
    }
    filled_ = true;
    return status.ok() ? backend_.EstimatePattern(args, stream) : status;
  }

  double TakeSeconds() override {
    double seconds = 0;
    for (size_t i = 0; i + 1 < used_; i += 2) seconds += marks_[i + 1]->SecondsSince(*marks_[i]);
    used_ = 0;
    return seconds;
  }

 private:
  absl::Status Mark(Stream stream) {
    if (used_ == marks_.size()) {
      auto mark = device_.NewMark();
      if (!mark.ok()) return mark.status();
      marks_.push_back(*std::move(mark));
    }
    return marks_[used_++]->Record(stream);
  }

  absl::Status Fill(const AttentionArgs& args, Stream stream) {
    if (args.shape.dtype == DType::kF32) return absl::UnimplementedError("structure in F32");
    std::vector<Sequence> sequences;
    cuda::Problem problem = cuda::MakeProblem(args, &sequences);
    absl::Status status = Grow(device_, sequences.size() * sizeof(Sequence), sequences_);
    if (!status.ok()) return status;
    const cudaStream_t on = device_.stream(stream);
    status = device_.Check(
        cuda::WriteSequences(sequences.data(), problem.sequences, sequences_.as<Sequence>(), on),
        "sequences");
    problem.sequence = sequences_.as<Sequence>();
    if (!status.ok()) return status;
    return device_.Check(FillStructured(problem, {.strength = strength_}, on), "structure");
  }

  Backend& backend_;
  CudaDevice& device_;
  const double strength_;
  Buffer sequences_;
  bool filled_ = false;                               // what is attended to next
  std::vector<std::unique_ptr<Device::Mark>> marks_;  // before and after every filling
  size_t used_ = 0;
};

}  // namespace

absl::StatusOr<std::unique_ptr<StructuredBackend>> StructuredBackend::Create(Backend& backend,
                                                                             double strength) {
  auto* device = dynamic_cast<CudaDevice*>(&backend.device());
  if (device == nullptr) return absl::UnimplementedError("structure is filled in on CUDA only");
  return std::make_unique<CudaStructuredBackend>(backend, *device, strength);
}

}  // namespace prefilld::bench

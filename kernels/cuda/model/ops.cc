#include "kernels/cuda/model/ops.h"

namespace prefilld::cuda {
namespace {

absl::Status NoOps() { return absl::UnimplementedError("models are served by --backend=cpu only"); }

class MissingOps : public Ops {
 public:
  absl::StatusOr<std::unique_ptr<Linear>> PrepareLinear(const void*, const void*, DType, int64_t,
                                                        int64_t) override {
    return NoOps();
  }
  absl::Status Apply(const LinearArgs&, Stream) override { return NoOps(); }
  absl::Status Embed(const void*, DType, int64_t, const uint32_t*, int64_t, float*,
                     Stream) override {
    return NoOps();
  }
  absl::Status RmsNorm(const float*, const float*, float, int64_t, int64_t, float*,
                       Stream) override {
    return NoOps();
  }
  absl::Status Rope(const RopeArgs&, Stream) override { return NoOps(); }
  absl::Status SwiGlu(const float*, const float*, int64_t, float*, Stream) override {
    return NoOps();
  }
  absl::Status Convert(const float*, int64_t, int64_t, int64_t, DType, void*, Stream) override {
    return NoOps();
  }
};

}  // namespace

std::unique_ptr<Ops> CreateOps() { return std::make_unique<MissingOps>(); }

}  // namespace prefilld::cuda

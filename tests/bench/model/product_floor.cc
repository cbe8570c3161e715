#include "tests/bench/model/product_floor.h"

#include <algorithm>
#include <random>
#include <utility>
#include <vector>

#include "kernels/convert.h"
#include "kernels/cuda/device/cuda_device.h"
#include "kernels/cuda/model/linear.h"

namespace prefilld::bench {
namespace {

using cuda::CudaDevice;
using cuda::CudaLinear;
using cuda::Multiplier;

constexpr Stream kStream{};
constexpr int kAllCandidates = 100;  // the heuristic has some dozens for a shape

class CudaFloor : public ProductFloor {
 public:
  CudaFloor(CudaDevice& device, const ModelInfo& info, int64_t tile_tokens)
      : device_(device), info_(info), tile_tokens_(tile_tokens) {}

  absl::Status Init() {
    for (const Algorithms algorithms : {kOfTheModel, kFastest}) {
      auto multiplier =
          Multiplier::Create(device_, /*cache_dir=*/"",
                             algorithms == kFastest ? kAllCandidates : Multiplier::kCandidates);
      if (!multiplier.ok()) return multiplier.status();
      multipliers_[algorithms] = *std::move(multiplier);
    }
    const int64_t hidden = info_.hidden_size;
    const int64_t q = int64_t{info_.q_heads} * info_.head_dim;
    const int64_t kv = int64_t{info_.kv_heads} * info_.head_dim;
    const int64_t inner = (info_.layer_weights / hidden - 2 * (q + kv)) / 3;
    absl::Status status = Make(hidden, q + 2 * kv, 0.02f, &qkv_);
    if (status.ok()) status = Make(q, hidden, 0.02f, &o_);
    if (status.ok()) status = Make(hidden, 2 * inner, 0.02f, &gate_up_);
    if (status.ok()) status = Make(inner, hidden, 0.02f, &down_);
    if (status.ok()) status = Make(hidden, info_.vocab_size, 0.02f, &logits_);
    if (status.ok()) status = Fill(tile_tokens_ * std::max({hidden, q, inner}), 1, &x_);
    if (status.ok()) status = Fill(tile_tokens_ * std::max(q + 2 * kv, 2 * inner), 1, &y_);
    if (status.ok()) status = Fill(tile_tokens_ * hidden, 1, &residual_);
    for (auto* mark : {&begin_, &end_}) {
      auto made = device_.NewMark();
      if (!made.ok()) return made.status();
      *mark = *std::move(made);
    }
    return status;
  }

  absl::StatusOr<double> Seconds(int64_t tokens, Algorithms algorithms) override {
    multiplier_ = multipliers_[algorithms].get();
    absl::Status status = begin_->Record(kStream);
    for (int layer = 0; layer < info_.layers && status.ok(); ++layer) {
      status = Layer(tokens, layer + 1 < info_.layers ? tokens : 1);
    }
    if (status.ok()) status = Run(logits_, y_, 1, false);
    if (status.ok()) status = end_->Record(kStream);
    const absl::Status done = device_.Synchronize(kStream);
    if (!status.ok()) return status;
    if (!done.ok()) return done;
    return end_->SecondsSince(*begin_);
  }

 private:
  // As Transformer walks them: q, k and v of all tiles before the rest of any.
  absl::Status Layer(int64_t tokens, int64_t finished) {
    absl::Status status;
    for (int64_t begin = 0; begin < tokens && status.ok(); begin += tile_tokens_) {
      status = Run(qkv_, y_, std::min(tile_tokens_, tokens - begin), false);
    }
    for (int64_t begin = 0; begin < finished && status.ok(); begin += tile_tokens_) {
      const int64_t tile = std::min(tile_tokens_, finished - begin);
      status = Run(o_, residual_, tile, true);
      if (status.ok()) status = Run(gate_up_, y_, tile, false);
      if (status.ok()) status = Run(down_, residual_, tile, true);
    }
    return status;
  }

  absl::Status Run(const CudaLinear& linear, const Buffer& y, int64_t tokens, bool accumulate) {
    return multiplier_->Run({.linear = &linear,
                             .x = {x_.data(), info_.dtype, linear.in_features},
                             .y = {y.data(), info_.dtype, linear.out_features},
                             .tokens = tokens,
                             .accumulate = accumulate},
                            device_.stream(kStream));
  }

  absl::Status Make(int64_t in, int64_t out, float deviation, CudaLinear* linear) {
    linear->dtype = info_.dtype;
    linear->in_features = in;
    linear->out_features = out;
    linear->parts = {out};
    Buffer weight;
    absl::Status status = Fill(in * out, deviation, &weight);
    linear->weight = std::make_shared<const Buffer>(std::move(weight));
    return status;
  }

  // The same few million normal numbers again and again.
  absl::Status Fill(int64_t count, float deviation, Buffer* buffer) {
    const size_t size = SizeOf(info_.dtype);
    auto memory = device_.Allocate(static_cast<size_t>(count) * size);
    if (!memory.ok()) return memory.status();
    *buffer = *std::move(memory);
    constexpr int64_t kDrawn = int64_t{1} << 22;
    std::minstd_rand random(1);
    std::normal_distribution<float> normal(0, deviation);
    std::vector<float> wide(static_cast<size_t>(std::min(count, kDrawn)));
    for (float& value : wide) value = normal(random);
    std::vector<char> drawn(wide.size() * size);
    Convert({.src = wide.data(),
             .from = DType::kF32,
             .dst = drawn.data(),
             .to = info_.dtype,
             .count = static_cast<int64_t>(wide.size())});
    absl::Status status;
    for (int64_t at = 0; at < count && status.ok(); at += kDrawn) {
      const auto bytes = static_cast<size_t>(std::min(kDrawn, count - at)) * size;
      status = device_.Copy(buffer->as<char>() + static_cast<size_t>(at) * size, drawn.data(),
                            bytes, kStream);
    }
    const absl::Status done = device_.Synchronize(kStream);
    return status.ok() ? done : status;
  }

  CudaDevice& device_;
  const ModelInfo info_;
  const int64_t tile_tokens_;
  std::unique_ptr<Multiplier> multipliers_[2];
  Multiplier* multiplier_ = nullptr;  // one of them
  CudaLinear qkv_, o_, gate_up_, down_, logits_;
  Buffer x_, y_, residual_;
  std::unique_ptr<Device::Mark> begin_, end_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<ProductFloor>> ProductFloor::Create(Backend& backend,
                                                                   const ModelInfo& info) {
  auto* device = dynamic_cast<CudaDevice*>(&backend.device());
  if (device == nullptr) return absl::UnimplementedError("products alone are run on CUDA only");
  auto ops = backend.ops();
  if (!ops.ok()) return ops.status();
  auto floor = std::make_unique<CudaFloor>(*device, info, (*ops)->tile_tokens());
  if (absl::Status status = floor->Init(); !status.ok()) return status;
  return floor;
}

}  // namespace prefilld::bench

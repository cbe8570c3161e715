#include "kernels/cpu/ops.h"

#include <omp.h>

#include <algorithm>
#include <dnnl.hpp>
#include <limits>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/cpu/elementwise.h"
#include "kernels/cpu/linear.h"
#include "kernels/cpu/tile.h"

namespace prefilld::cpu {
namespace {

// Tokens of x that are rounded to BF16 at a time: the rounded copy stays in the cache until the
// matmul reads it, and the staging memory does not grow with the prompt.
constexpr int64_t kStagedTokens = 512;
// Elements below which a second thread costs more than it saves.
constexpr int64_t kElementsPerThread = 16 * 1024;

// Compiled products that oneDNN keeps, each of about 350 KiB. A layer needs a few for full tiles of
// tokens and as many for every other number of tokens; oneDNN's own 1024 would grow to a third of a
// GiB.
constexpr int kCachedProducts = 128;

// oneDNN takes its number of threads from the caller's OpenMP setting.
class ScopedOmpThreads {
 public:
  explicit ScopedOmpThreads(int threads) : before_(omp_get_max_threads()) {
    omp_set_num_threads(threads);
  }
  ~ScopedOmpThreads() { omp_set_num_threads(before_); }

 private:
  const int before_;
};

class CpuOps : public Ops {
 public:
  CpuOps(int threads, bool native_bf16)
      : threads_(threads),
        native_bf16_(native_bf16),
        engine_(dnnl::engine::kind::cpu, 0),
        stream_(engine_) {}

  absl::StatusOr<std::unique_ptr<Linear>> PrepareLinear(const void* weight, const void* bias,
                                                        DType dtype, int64_t out_features,
                                                        int64_t in_features) override {
    constexpr int64_t kMax = std::numeric_limits<int32_t>::max();
    if (out_features < 1 || out_features > kMax || in_features < 1 || in_features > kMax) {
      return absl::InvalidArgumentError(absl::StrCat("linear layer of shape [", out_features, ", ",
                                                     in_features, "]; sides go from 1 to ", kMax));
    }
    const DType compute = dtype == DType::kBF16 && native_bf16_ ? DType::kBF16 : DType::kF32;
    return std::make_unique<CpuLinear>(engine_, weight, bias, dtype, compute, out_features,
                                       in_features);
  }

  absl::Status Apply(const LinearArgs& args, Stream) override {
    const CpuLinear& linear = static_cast<const CpuLinear&>(*args.linear);
    const ScopedOmpThreads scope(threads_);
    if (args.tokens == 0) return absl::OkStatus();
    if (linear.compute_dtype() == DType::kF32) {
      return linear.Run({.x = args.x,
                         .x_stride = args.x_stride,
                         .y = args.y,
                         .y_stride = args.y_stride,
                         .tokens = args.tokens,
                         .accumulate = args.accumulate},
                        stream_);
    }
    const int64_t in = linear.in_features();
    staged_.resize(std::max<size_t>(staged_.size(), kStagedTokens * in));
    for (int64_t begin = 0; begin < args.tokens; begin += kStagedTokens) {
      const int64_t tokens = std::min(kStagedTokens, args.tokens - begin);
      ForEachRow(tokens, in, [&](int64_t t) {
        Narrow(args.x + (begin + t) * args.x_stride, in, DType::kBF16, &staged_[t * in]);
      });
      const absl::Status status = linear.Run({.x = staged_.data(),
                                              .x_stride = in,
                                              .y = args.y + begin * args.y_stride,
                                              .y_stride = args.y_stride,
                                              .tokens = tokens,
                                              .accumulate = args.accumulate},
                                             stream_);
      if (!status.ok()) return status;
    }
    return absl::OkStatus();
  }

  absl::Status Embed(const void* table, DType dtype, int64_t width, const uint32_t* ids,
                     int64_t tokens, float* out, Stream) override {
    const size_t row_bytes = width * SizeOf(dtype);
    ForEachRow(tokens, width, [&](int64_t t) {
      WidenRows(static_cast<const char*>(table) + ids[t] * row_bytes, dtype, width, 1,
                static_cast<int>(width), 1.0f, out + t * width, width);
    });
    return absl::OkStatus();
  }

  absl::Status RmsNorm(const float* x, const float* weight, float eps, int64_t width,
                       int64_t tokens, float* out, Stream) override {
    ForEachRow(tokens, width, [&](int64_t t) {
      NormalizeRows(x + t * width, weight, eps, width, 1, out + t * width);
    });
    return absl::OkStatus();
  }

  absl::Status Rope(const RopeArgs& args, Stream) override {
    if (args.head_dim < 2 || args.head_dim % 2 != 0 || args.head_dim > kMaxRopeHeadDim) {
      return absl::InvalidArgumentError(absl::StrCat("rope of head_dim ", args.head_dim,
                                                     "; it is even and at most ", kMaxRopeHeadDim));
    }
    ForEachRow(args.tokens, static_cast<int64_t>(args.heads) * args.head_dim,
               [&](int64_t t) { RotateTokens(args, t, t + 1); });
    return absl::OkStatus();
  }

  absl::Status SwiGlu(const float* gate, const float* up, int64_t count, float* out,
                      Stream) override {
    const int64_t pieces = (count + kElementsPerThread - 1) / kElementsPerThread;
    ForEachRow(pieces, kElementsPerThread, [&](int64_t p) {
      const int64_t begin = p * kElementsPerThread;
      MultiplySilu(gate + begin, up + begin, std::min(kElementsPerThread, count - begin),
                   out + begin);
    });
    return absl::OkStatus();
  }

  absl::Status Convert(const float* src, int64_t src_stride, int64_t rows, int64_t width,
                       DType dtype, void* dst, Stream) override {
    const size_t row_bytes = width * SizeOf(dtype);
    for (int64_t r = 0; r < rows; ++r) {
      Narrow(src + r * src_stride, width, dtype, static_cast<char*>(dst) + r * row_bytes);
    }
    return absl::OkStatus();
  }

 private:
  int Threads(int64_t elements) const {
    return static_cast<int>(std::clamp<int64_t>(elements / kElementsPerThread, 1, threads_));
  }

  template <class Row>
  void ForEachRow(int64_t rows, int64_t width, const Row& row) const {
#pragma omp parallel for num_threads(Threads(rows* width)) schedule(static)
    for (int64_t r = 0; r < rows; ++r) row(r);
  }

  const int threads_;
  const bool native_bf16_;
  dnnl::engine engine_;
  dnnl::stream stream_;
  std::vector<uint16_t> staged_;  // [kStagedTokens, in_features] BF16
};

}  // namespace

std::unique_ptr<Ops> CreateOps(int threads, BF16Weights bf16) {
  dnnl::set_primitive_cache_capacity(kCachedProducts);
  const bool native_bf16 = bf16 == BF16Weights::kBestForCpu && CpuMultipliesBF16();
  return std::make_unique<CpuOps>(threads, native_bf16);
}

}  // namespace prefilld::cpu

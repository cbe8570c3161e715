#include "kernels/cpu/linear.h"

#include <omp.h>

#include <algorithm>
#include <limits>
#include <unordered_map>

#include "absl/strings/str_cat.h"
#include "kernels/cpu/elementwise.h"
#include "kernels/cpu/tile.h"

namespace prefilld::cpu {
namespace {

using Dims = dnnl::memory::dims;
using Desc = dnnl::memory::desc;

// Tokens of x that are rounded to BF16 at a time: the rounded copy stays in the cache until the
// matmul reads it, and the staging memory does not grow with the prompt.
constexpr int64_t kStagedTokens = 512;

// Compiled products that oneDNN keeps, each of about 350 KiB. A layer needs a few for full tiles of
// tokens and as many for every other number of tokens; oneDNN's own 1024 would grow to a third of a
// GiB.
constexpr int kCachedProducts = 128;

dnnl::memory::data_type DnnlType(DType dtype) {
  return dtype == DType::kBF16 ? dnnl::memory::data_type::bf16 : dnnl::memory::data_type::f32;
}

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

}  // namespace

bool CpuMultipliesBF16() {
  // The values are sets of features, each containing those it builds upon.
  const unsigned have = static_cast<unsigned>(dnnl::get_effective_cpu_isa());
  const unsigned need = static_cast<unsigned>(dnnl::cpu_isa::avx512_core_bf16);
  return (have & need) == need;
}

CpuLinear::CpuLinear(const LinearWeights& weights, DType compute_dtype)
    : in_(weights.in_features), compute_dtype_(compute_dtype) {
  for (const LinearPart& from : weights.parts) {
    Part& part = parts_.emplace_back();
    const int64_t out = part.out_features = from.out_features;
    part.weight = from.weight;
    if (weights.dtype != compute_dtype) {
      part.widened.resize(out * in_);
      WidenRows(from.weight, weights.dtype, in_, out, static_cast<int>(in_), 1.0f,
                part.widened.data(), in_);
      part.weight = part.widened.data();
    }
    if (from.bias != nullptr) {
      part.bias.resize(out);
      WidenRows(from.bias, weights.dtype, out, 1, static_cast<int>(out), 1.0f, part.bias.data(),
                out);
    }
  }
}

size_t CpuLinear::WorkspaceBytes(int64_t tokens) const {
  int64_t width = 0;
  for (size_t part = 1; part < parts_.size(); ++part) width += parts_[part].out_features;
  return static_cast<size_t>(tokens * width) * sizeof(float);
}

Multiplier::Multiplier(int threads, BF16Weights bf16)
    : threads_(threads),
      native_bf16_(bf16 == BF16Weights::kBestForCpu && CpuMultipliesBF16()),
      engine_(dnnl::engine::kind::cpu, 0),
      stream_(engine_) {
  dnnl::set_primitive_cache_capacity(kCachedProducts);
}

absl::StatusOr<std::unique_ptr<CpuLinear>> Multiplier::Prepare(const LinearWeights& weights) const {
  constexpr int64_t kMax = std::numeric_limits<int32_t>::max();
  const int64_t in = weights.in_features;
  for (const LinearPart& part : weights.parts) {
    if (part.out_features < 1 || part.out_features > kMax || in < 1 || in > kMax) {
      return absl::InvalidArgumentError(absl::StrCat("linear layer of shape [", part.out_features,
                                                     ", ", in, "]; sides go from 1 to ", kMax));
    }
  }
  const bool in_bf16 = weights.dtype == DType::kBF16 && native_bf16_;
  return std::make_unique<CpuLinear>(weights, in_bf16 ? DType::kBF16 : DType::kF32);
}

absl::Status Multiplier::Run(const Args& args) {
  const ScopedOmpThreads scope(threads_);
  if (args.tokens == 0) return absl::OkStatus();
  if (args.linear->compute_dtype() == DType::kF32) return Product(args);
  const int64_t in = args.linear->in_features();
  staged_.resize(std::max<size_t>(staged_.size(), kStagedTokens * in));
  for (int64_t begin = 0; begin < args.tokens; begin += kStagedTokens) {
    Args some = args;
    some.tokens = std::min(kStagedTokens, args.tokens - begin);
    some.x = {staged_.data(), DType::kBF16, in};
    some.y = args.y.From(begin);
    const Rows x = args.x.From(begin);
#pragma omp parallel for num_threads(ThreadsFor(some.tokens* in, threads_)) schedule(static)
    for (int64_t t = 0; t < some.tokens; ++t) {
      Narrow(static_cast<const float*>(x.From(t).data), in, DType::kBF16, &staged_[t * in]);
    }
    if (absl::Status status = Product(some); !status.ok()) return status;
  }
  return absl::OkStatus();
}

absl::Status Multiplier::Product(const Args& args) {
  const CpuLinear::Part& part = args.linear->parts()[args.part];
  const int64_t in = args.linear->in_features(), out = part.out_features;
  const dnnl::memory::data_type type = DnnlType(args.linear->compute_dtype());
  // Making a primitive that oneDNN's cache knows costs 3 us; one for a new number of tokens 0.2 ms.
  try {
    const Desc x({args.tokens, in}, type, Dims{args.x.stride, 1});
    const Desc w({in, out}, type, Dims{1, in});
    const Desc b({1, out}, dnnl::memory::data_type::f32, Dims{out, 1});
    const Desc y({args.tokens, out}, dnnl::memory::data_type::f32, Dims{args.y.stride, 1});
    dnnl::primitive_attr attributes;
    if (args.accumulate) {
      dnnl::post_ops sum;
      sum.append_sum();
      attributes.set_post_ops(sum);
    }
    const dnnl::matmul::desc operation =
        part.bias.empty() ? dnnl::matmul::desc(x, w, y) : dnnl::matmul::desc(x, w, b, y);
    const dnnl::matmul matmul({operation, attributes, engine_});

    std::unordered_map<int, dnnl::memory> memory = {
        {DNNL_ARG_SRC, {x, engine_, args.x.data}},
        {DNNL_ARG_WEIGHTS, {w, engine_, const_cast<void*>(part.weight)}},
        {DNNL_ARG_DST, {y, engine_, args.y.data}}};
    if (!part.bias.empty()) {
      memory.emplace(DNNL_ARG_BIAS, dnnl::memory(b, engine_, const_cast<float*>(part.bias.data())));
    }
    matmul.execute(stream_, memory);
    stream_.wait();
    return absl::OkStatus();
  } catch (const dnnl::error& error) {
    const std::string message = absl::StrCat("oneDNN: ", error.what(), " (matmul of [", args.tokens,
                                             ", ", in, "] by [", in, ", ", out, "])");
    return error.status == dnnl_out_of_memory ? absl::ResourceExhaustedError(message)
                                              : absl::InternalError(message);
  }
}

}  // namespace prefilld::cpu

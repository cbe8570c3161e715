#include "kernels/cpu/ops.h"

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/cpu/elementwise.h"
#include "kernels/cpu/linear.h"
#include "kernels/cpu/tile.h"

namespace prefilld::cpu {
namespace {

// Tokens of one head that a thread writes at a time.
constexpr int64_t kWriteTokens = 128;

struct CpuNorm : Norm {
  std::vector<float> weight;
  float eps = 0;
};
struct CpuEmbedding : Embedding {
  explicit CpuEmbedding(const EmbeddingWeights& from) : weights(from) {}
  const EmbeddingWeights weights;
};
struct CpuRotary : Rotary {
  explicit CpuRotary(const RotaryFrequencies& from) : frequencies(from) {}
  const RotaryFrequencies frequencies;
};
struct CpuTokens : PreparedTokens {
  explicit CpuTokens(BatchTokens from) : tokens(std::move(from)) {}
  const BatchTokens tokens;
};

template <typename Cpu, typename Any>
const Cpu& As(const Any* prepared) {
  return static_cast<const Cpu&>(*prepared);
}

float* Row(const Rows& rows, int64_t row) {
  return static_cast<float*>(rows.data) + row * rows.stride;
}

class CpuOps : public Ops {
 public:
  CpuOps(int threads, BF16Weights bf16) : threads_(threads), multiplier_(threads, bf16) {}

  DType activations(DType) const override { return DType::kF32; }
  // The products run as fast as over a whole prompt, and gate and up of a small model stay in the
  // last-level cache between them.
  int64_t tile_tokens() const override { return 512; }

  absl::StatusOr<std::unique_ptr<Linear>> Prepare(const LinearWeights& weights) override {
    return multiplier_.Prepare(weights);
  }

  absl::StatusOr<std::unique_ptr<Norm>> Prepare(const NormWeights& weights) override {
    auto norm = std::make_unique<CpuNorm>();
    norm->weight.resize(weights.width);
    norm->eps = weights.eps;
    WidenRows(weights.weight, weights.dtype, weights.width, 1, static_cast<int>(weights.width),
              1.0f, norm->weight.data(), weights.width);
    return norm;
  }

  absl::StatusOr<std::unique_ptr<Embedding>> Prepare(const EmbeddingWeights& weights) override {
    return std::make_unique<CpuEmbedding>(weights);
  }

  absl::StatusOr<std::unique_ptr<Rotary>> Prepare(const RotaryFrequencies& frequencies) override {
    const int64_t rotary_dim = 2 * static_cast<int64_t>(frequencies.inverse.size());
    const int head_dim = frequencies.head_dim;
    if (head_dim % 2 != 0 || rotary_dim < 2 || rotary_dim > std::min(head_dim, kMaxRotaryDim)) {
      return absl::InvalidArgumentError(
          absl::StrCat("rotation of ", rotary_dim, " channels of head_dim ", head_dim,
                       "; head_dim is even, and at most ", kMaxRotaryDim, " channels of it turn"));
    }
    return std::make_unique<CpuRotary>(frequencies);
  }

  absl::StatusOr<std::unique_ptr<PreparedTokens>> Prepare(BatchTokens tokens) override {
    return std::make_unique<CpuTokens>(std::move(tokens));
  }
  size_t TokensBytes(int64_t, const Rotary*) const override { return 0; }
  size_t WriteKvBytes(size_t) const override { return 0; }
  absl::Status ReserveWriteKv(size_t) override { return absl::OkStatus(); }

  absl::Status Embed(const EmbedArgs& args, Stream) override {
    const EmbeddingWeights& from = As<CpuEmbedding>(args.embedding).weights;
    const std::vector<uint32_t>& ids = As<CpuTokens>(args.tokens).tokens.ids;
    const char* table = static_cast<const char*>(from.table);
    const int64_t row_bytes = from.width * static_cast<int64_t>(SizeOf(from.dtype));
    ForEachRow(static_cast<int64_t>(ids.size()), from.width, [&](int64_t t) {
      const int64_t id = std::min<int64_t>(ids[t], from.vocabulary - 1);
      WidenRows(table + id * row_bytes, from.dtype, from.width, 1, static_cast<int>(from.width),
                1.0f, Row(args.out, t), from.width);
    });
    return absl::OkStatus();
  }

  absl::Status Normalize(const NormalizeArgs& args, Stream) override {
    const CpuNorm& norm = As<CpuNorm>(args.norm);
    const int64_t width = static_cast<int64_t>(norm.weight.size());
    ForEachRow(args.tokens, width, [&](int64_t t) {
      NormalizeRow({.x = Row(args.x, t),
                    .weight = norm.weight.data(),
                    .eps = norm.eps,
                    .width = width,
                    .out = Row(args.out, t)});
    });
    return absl::OkStatus();
  }

  absl::Status AddProduct(const AddProductArgs& args, Stream stream) override {
    absl::Status status = multiplier_.Run({.linear = &As<CpuLinear>(args.linear),
                                           .x = args.x,
                                           .y = args.residual,
                                           .tokens = args.tokens,
                                           .accumulate = true});
    if (!status.ok() || args.norm == nullptr) return status;
    return Normalize(
        {.norm = args.norm, .x = args.residual, .out = args.normed, .tokens = args.tokens}, stream);
  }

  absl::Status ProjectQkv(const ProjectQkvArgs& args, Stream) override {
    const CpuLinear& linear = As<CpuLinear>(args.linear);
    const Rows* parts[] = {&args.q, &args.k, &args.v};
    for (size_t part = 0; part < 3; ++part) {
      absl::Status status = multiplier_.Run(
          {.linear = &linear, .part = part, .x = args.x, .y = *parts[part], .tokens = args.tokens});
      if (!status.ok()) return status;
    }
    TurnHeads(args, {args.q, args.q_heads, args.q_norm});
    TurnHeads(args, {args.k, args.kv_heads, args.k_norm});
    return absl::OkStatus();
  }

  absl::Status Gate(const GateArgs& args, Stream) override {
    const CpuLinear& linear = As<CpuLinear>(args.linear);
    const int64_t width = linear.parts()[0].out_features;
    const Rows up = {args.workspace, DType::kF32, width};
    for (size_t part = 0; part < 2; ++part) {
      absl::Status status = multiplier_.Run({.linear = &linear,
                                             .part = part,
                                             .x = args.x,
                                             .y = part == 0 ? args.out : up,
                                             .tokens = args.tokens});
      if (!status.ok()) return status;
    }
    ForEachRow(args.tokens, width, [&](int64_t t) {
      MultiplySilu(Row(args.out, t), Row(up, t), width, Row(args.out, t));
    });
    return absl::OkStatus();
  }

  absl::Status Logits(const LogitsArgs& args, Stream stream) override {
    const CpuLinear& linear = As<CpuLinear>(args.linear);
    absl::Status status = Normalize(
        {.norm = args.norm, .x = args.x, .out = args.normed, .tokens = args.tokens}, stream);
    if (!status.ok()) return status;
    return multiplier_.Run({.linear = &linear,
                            .x = args.normed,
                            .y = {args.out, DType::kF32, linear.parts()[0].out_features},
                            .tokens = args.tokens});
  }

  absl::Status WriteKv(const WriteKvArgs& args, Stream) override {
    for (const WriteKvArgs::Part& part : args.parts) WritePart(args, part);
    return absl::OkStatus();
  }

  absl::Status RemoveRows(const RemoveRowsArgs& args, Stream) override {
    if (args.end == args.tokens) return absl::OkStatus();
    const int64_t values = (args.tokens - args.end - 1) * args.rows.stride + args.width;
    std::memmove(Row(args.rows, args.begin), Row(args.rows, args.end),
                 static_cast<size_t>(values) * sizeof(float));
    return absl::OkStatus();
  }

 private:
  void WritePart(const WriteKvArgs& args, const WriteKvArgs::Part& part) const {
    const KvTarget& target = part.target;
    const int64_t d = args.head_dim, size = static_cast<int64_t>(SizeOf(target.dtype));
    const int64_t run = std::min(kWriteTokens, target.page_tokens);
    const int64_t runs = (target.page_tokens + run - 1) / run;  // of a page
    const int64_t heads = 2 * args.kv_heads;                    // of K and of V
    const int64_t pages = static_cast<int64_t>(target.pages.size());
    ForEachRow(pages * runs * heads, run * d, [&](int64_t i) {
      const int64_t page = i / heads / runs, in_page = i / heads % runs * run;
      const int64_t head = i % heads / 2;
      const bool value = i % 2 != 0;
      const int64_t first = page * target.page_tokens + in_page;
      const int64_t rows = std::min({run, target.page_tokens - in_page, part.tokens - first});
      const int64_t at =
          head * target.head_stride + (value ? target.value_stride : 0) + in_page * d;
      char* out = static_cast<char*>(target.pages[page]) + at * size;
      for (int64_t t = 0; t < rows; ++t) {
        const float* row = Row(value ? args.v : args.k, part.first + first + t) + head * d;
        Narrow(row, d, target.dtype, out + t * d * size);
      }
    });
  }

  // Norm and rotation of q or k in place.
  struct Heads {
    Rows x;
    int count;
    const Norm* norm;
  };
  void TurnHeads(const ProjectQkvArgs& args, const Heads& heads) const {
    const RotaryFrequencies& rotary = As<CpuRotary>(args.rotary).frequencies;
    const BatchTokens& batch = As<CpuTokens>(args.batch).tokens;
    const size_t pairs = rotary.inverse.size();
    ForEachRow(args.tokens, int64_t{heads.count} * rotary.head_dim, [&](int64_t t) {
      const int64_t token = args.first + t;
      float* x = Row(heads.x, t);
      for (int h = 0; heads.norm != nullptr && h < heads.count; ++h) {
        const CpuNorm& norm = As<CpuNorm>(heads.norm);
        float* head = x + int64_t{h} * rotary.head_dim;
        NormalizeRow({.x = head,
                      .weight = norm.weight.data(),
                      .eps = norm.eps,
                      .width = rotary.head_dim,
                      .out = head});
      }
      RotateToken({.x = x,
                   .heads = heads.count,
                   .head_dim = rotary.head_dim,
                   .rotary_dim = static_cast<int>(2 * pairs),
                   .pairing = rotary.pairing,
                   .inverse_frequency = batch.inverse.empty()
                                            ? rotary.inverse.data()
                                            : batch.inverse.data() + batch.prompts[token] * pairs,
                   .scale = rotary.scale,
                   .position = batch.positions[token]});
    });
  }

  template <class Each>
  void ForEachRow(int64_t rows, int64_t width, const Each& each) const {
#pragma omp parallel for num_threads(ThreadsFor(rows* width, threads_)) schedule(static)
    for (int64_t r = 0; r < rows; ++r) each(r);
  }

  const int threads_;
  Multiplier multiplier_;
};

}  // namespace

std::unique_ptr<Ops> CreateOps(int threads, BF16Weights bf16) {
  return std::make_unique<CpuOps>(threads, bf16);
}

}  // namespace prefilld::cpu

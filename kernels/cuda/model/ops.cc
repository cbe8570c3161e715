#include "kernels/cuda/model/ops.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/convert.h"
#include "kernels/cuda/model/elementwise.h"
#include "kernels/cuda/model/linear.h"
#include "kernels/cuda/model/upload.h"
#include "kernels/cuda/workspace.h"

namespace prefilld::cuda {
namespace {

// Products reach their rate; what a layer keeps between them stays below a GiB.
constexpr int64_t kTileTokens = 4096;

struct CudaNorm : Norm {
  Buffer weight;  // [width] F32
  int64_t width = 0;
  float eps = 0;
};
struct CudaEmbedding : Embedding {
  std::shared_ptr<const Buffer> table;
  DType dtype = DType::kBF16;
  int64_t vocabulary = 0, width = 0;
};
struct CudaRotary : Rotary {
  std::vector<float> inverse;  // [pairs]
  int pairs = 0, head_dim = 0;
  float scale = 1;
  RotaryPairing pairing = RotaryPairing::kHalf;
};
struct CudaTokens : PreparedTokens {
  uint32_t* ids = nullptr;
  int32_t* positions = nullptr;
  float2* turns = nullptr;  // cosines and sines, [tokens, pairs of the rotary]
  int64_t tokens = 0;

  // From `memory` on, or only counted. Bytes of all.
  size_t LieAt(void* memory, int pairs) {
    Workspace workspace(memory);
    workspace.Take(&ids, tokens);
    workspace.Take(&positions, tokens);
    workspace.Take(&turns, tokens * pairs);
    return static_cast<size_t>(workspace.used());
  }
};

template <typename Cuda, typename Any>
const Cuda& As(const Any* prepared) {
  return static_cast<const Cuda&>(*prepared);
}

// Where the pages of one sequence lie in the buffer that they are copied out of: K and V of a page
// in one run, as a block of the cache has them, or a run each, where they lie apart in a region.
struct PackedKv {
  size_t begin = 0;                  // bytes
  int64_t run = 0, page_stride = 0;  // values
  bool apart = false;

  static PackedKv Of(const WriteKvArgs& args, const KvTarget& target, size_t begin) {
    const int64_t heads = args.kv_heads * target.head_stride;
    const bool apart = target.value_stride >= heads;
    return {.begin = begin, .run = heads, .page_stride = apart ? 2 * heads : heads, .apart = apart};
  }
  size_t Bytes(const KvTarget& target) const {
    return static_cast<size_t>(page_stride) * target.pages.size() * SizeOf(target.dtype);
  }
};

absl::Status CheckWidth(const char* what, int64_t width, int64_t most) {
  if (width > 0 && width <= most && width % kWidthUnit == 0) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(what, " of ", width, " channels is not computed by cuda (a multiple of ",
                   kWidthUnit, " up to ", most, ")"));
}

class CudaOps : public Ops {
 public:
  CudaOps(CudaDevice& device, std::unique_ptr<Multiplier> multiplier)
      : device_(device), multiplier_(std::move(multiplier)), upload_(device) {}

  DType activations(DType weights) const override { return weights; }
  int64_t tile_tokens() const override { return kTileTokens; }
  std::vector<int64_t> measured_tokens() const override {
    std::vector<int64_t> steps;
    for (int64_t tokens = 1; tokens <= kTileTokens; tokens = steps.back() + 1) {
      steps.push_back(TokensStep(tokens));
    }
    return steps;
  }

  absl::StatusOr<std::unique_ptr<Linear>> Prepare(const LinearWeights& weights) override {
    absl::Status status = CheckWidth("a product", weights.in_features, INT32_MAX);
    auto linear = std::make_unique<CudaLinear>();
    linear->dtype = weights.dtype;
    linear->in_features = weights.in_features;
    const int64_t size = static_cast<int64_t>(SizeOf(weights.dtype));
    std::vector<Piece> weight, bias;
    bool biased = false;
    for (const LinearPart& part : weights.parts) {
      if (status.ok() && weights.parts.size() > 1) {  // kernels read what several parts make
        status = CheckWidth("a product", part.out_features, INT32_MAX);
      }
      linear->parts.push_back(part.out_features);
      linear->out_features += part.out_features;
      weight.push_back(
          {part.weight, static_cast<size_t>(part.out_features * weights.in_features * size)});
      bias.push_back({part.bias, static_cast<size_t>(part.out_features * size)});
      biased = biased || part.bias != nullptr;
    }
    if (status.ok() && weights.tied != nullptr) {
      linear->weight = As<CudaEmbedding>(weights.tied).table;
    } else if (status.ok()) {
      status = Share(weight, &linear->weight);
    }
    if (status.ok() && biased) status = upload_.Pieces(bias, &linear->bias);
    if (!status.ok()) return status;
    return linear;
  }

  absl::StatusOr<std::unique_ptr<Norm>> Prepare(const NormWeights& weights) override {
    if (absl::Status s = CheckWidth("a norm", weights.width, kWidthMax); !s.ok()) return s;
    auto norm = std::make_unique<CudaNorm>();
    norm->width = weights.width;
    norm->eps = weights.eps;
    std::vector<float> wide(static_cast<size_t>(weights.width));
    Convert({.src = weights.weight,
             .from = weights.dtype,
             .dst = wide.data(),
             .to = DType::kF32,
             .count = weights.width});
    absl::Status status = upload_.Values(wide, &norm->weight);
    if (!status.ok()) return status;
    return norm;
  }

  absl::StatusOr<std::unique_ptr<Embedding>> Prepare(const EmbeddingWeights& weights) override {
    absl::Status status = CheckWidth("an embedding", weights.width, INT32_MAX);
    auto embedding = std::make_unique<CudaEmbedding>();
    embedding->dtype = weights.dtype;
    embedding->vocabulary = weights.vocabulary;
    embedding->width = weights.width;
    const size_t bytes =
        static_cast<size_t>(weights.vocabulary * weights.width) * SizeOf(weights.dtype);
    if (status.ok()) status = Share({{weights.table, bytes}}, &embedding->table);
    if (!status.ok()) return status;
    return embedding;
  }

  absl::StatusOr<std::unique_ptr<Rotary>> Prepare(const RotaryFrequencies& frequencies) override {
    const int pairs = static_cast<int>(frequencies.inverse.size()), d = frequencies.head_dim;
    if (d % kWidthUnit != 0 || d > kHeadDimMax || pairs < 2 || pairs % 2 != 0 || 2 * pairs > d) {
      return absl::InvalidArgumentError(
          absl::StrCat("rotation of ", 2 * pairs, " channels of head_dim ", d,
                       " is not computed by cuda; head_dim is a multiple of ", kWidthUnit,
                       " up to ", kHeadDimMax, ", and a multiple of 4 of its channels turn"));
    }
    auto rotary = std::make_unique<CudaRotary>();
    rotary->pairs = pairs;
    rotary->head_dim = d;
    rotary->scale = frequencies.scale;
    rotary->pairing = frequencies.pairing;
    rotary->inverse = frequencies.inverse;
    return rotary;
  }

  absl::StatusOr<std::unique_ptr<PreparedTokens>> Prepare(BatchTokens tokens) override {
    auto prepared = std::make_unique<CudaTokens>();
    prepared->tokens = static_cast<int64_t>(tokens.ids.size());
    prepared->LieAt(tokens.memory, PairsOf(tokens.rotary));
    absl::Status status = upload_.ValuesTo(tokens.ids, prepared->ids);
    if (status.ok()) status = upload_.ValuesTo(tokens.positions, prepared->positions);
    if (status.ok() && tokens.rotary != nullptr) status = Turn(tokens, *prepared);
    if (!status.ok()) return status;
    return prepared;
  }

  size_t TokensBytes(int64_t tokens, const Rotary* rotary) const override {
    CudaTokens counted;
    counted.tokens = tokens;
    return counted.LieAt(nullptr, PairsOf(rotary));
  }

  absl::Status Embed(const EmbedArgs& args, Stream stream) override {
    const auto& embedding = As<CudaEmbedding>(args.embedding);
    const auto& tokens = As<CudaTokens>(args.tokens);
    return device_.Check(EmbedRows({.table = embedding.table->data(),
                                    .ids = tokens.ids,
                                    .vocabulary = embedding.vocabulary,
                                    .width = embedding.width,
                                    .tokens = tokens.tokens,
                                    .out = args.out},
                                   device_.stream(stream)),
                         "embed");
  }

  absl::Status Normalize(const NormalizeArgs& args, Stream stream) override {
    const auto& norm = As<CudaNorm>(args.norm);
    return device_.Check(NormalizeRows({.weight = norm.weight.as<float>(),
                                        .eps = norm.eps,
                                        .width = norm.width,
                                        .tokens = args.tokens,
                                        .x = args.x,
                                        .out = args.out},
                                       device_.stream(stream)),
                         "norm");
  }

  absl::Status AddProduct(const AddProductArgs& args, Stream stream) override {
    absl::Status status = multiplier_->Run({.linear = &As<CudaLinear>(args.linear),
                                            .x = args.x,
                                            .y = args.residual,
                                            .tokens = args.tokens,
                                            .accumulate = true},
                                           device_.stream(stream));
    if (!status.ok() || args.norm == nullptr) return status;
    return Normalize(
        {.norm = args.norm, .x = args.residual, .out = args.normed, .tokens = args.tokens}, stream);
  }

  absl::Status ProjectQkv(const ProjectQkvArgs& args, Stream stream) override {
    const auto& linear = As<CudaLinear>(args.linear);
    const auto& rotary = As<CudaRotary>(args.rotary);
    const auto& tokens = As<CudaTokens>(args.batch);
    const Rows y = {args.workspace, linear.dtype, linear.out_features};
    absl::Status status = multiplier_->Run(
        {.linear = &linear, .x = args.x, .y = y, .tokens = args.tokens}, device_.stream(stream));
    if (!status.ok()) return status;
    const auto weight = [](const Norm* norm) {
      return norm == nullptr ? nullptr : As<CudaNorm>(norm).weight.as<float>();
    };
    const auto eps = [](const Norm* norm) { return norm == nullptr ? 0 : As<CudaNorm>(norm).eps; };
    return device_.Check(SplitQkv({.y = y,
                                   .q = args.q,
                                   .k = args.k,
                                   .v = args.v,
                                   .q_heads = args.q_heads,
                                   .kv_heads = args.kv_heads,
                                   .head_dim = rotary.head_dim,
                                   .q_norm = weight(args.q_norm),
                                   .k_norm = weight(args.k_norm),
                                   .q_eps = eps(args.q_norm),
                                   .k_eps = eps(args.k_norm),
                                   .turns = tokens.turns + args.first * rotary.pairs,
                                   .pairs = rotary.pairs,
                                   .pairing = rotary.pairing,
                                   .tokens = args.tokens},
                                  device_.stream(stream)),
                         "qkv");
  }

  absl::Status Gate(const GateArgs& args, Stream stream) override {
    const auto& linear = As<CudaLinear>(args.linear);
    const Rows y = {args.workspace, linear.dtype, linear.out_features};
    absl::Status status = multiplier_->Run(
        {.linear = &linear, .x = args.x, .y = y, .tokens = args.tokens}, device_.stream(stream));
    if (!status.ok()) return status;
    return device_.Check(
        GateRows({.y = y, .out = args.out, .width = linear.parts[0], .tokens = args.tokens},
                 device_.stream(stream)),
        "gate");
  }

  absl::Status Logits(const LogitsArgs& args, Stream stream) override {
    const auto& linear = As<CudaLinear>(args.linear);
    const Rows y = {args.workspace, DType::kF32, linear.out_features};
    absl::Status status = Normalize(
        {.norm = args.norm, .x = args.x, .out = args.normed, .tokens = args.tokens}, stream);
    if (status.ok()) {
      status =
          multiplier_->Run({.linear = &linear, .x = args.normed, .y = y, .tokens = args.tokens},
                           device_.stream(stream));
    }
    if (!status.ok()) return status;
    return device_.Copy(args.out, y.data,
                        static_cast<size_t>(args.tokens * y.stride) * sizeof(float), stream);
  }

  // Through device memory, where pages are put together, to where the targets lie.
  absl::Status WriteKv(const WriteKvArgs& args, Stream stream) override {
    std::vector<PackedKv> packed;
    size_t bytes = 0;
    for (const WriteKvArgs::Part& part : args.parts) {
      packed.push_back(PackedKv::Of(args, part.target, bytes));
      bytes += packed.back().Bytes(part.target);
    }
    absl::Status status = Grow(device_, bytes, packed_);
    for (size_t i = 0; i < packed.size() && status.ok(); ++i) {
      status = Pack(args, args.parts[i], packed[i], stream);
    }
    for (size_t i = 0; i < packed.size() && status.ok(); ++i) {
      status = SendPacked(args.parts[i].target, packed[i], stream);
    }
    return status;
  }

  size_t WriteKvBytes(size_t kv_bytes) const override { return kv_bytes; }
  absl::Status ReserveWriteKv(size_t bytes) override { return Grow(device_, bytes, packed_); }

  // In steps that are as long as the hole, so that no copy reads what it writes.
  absl::Status RemoveRows(const RemoveRowsArgs& args, Stream stream) override {
    const int64_t hole = args.end - args.begin;
    absl::Status status;
    for (int64_t row = args.end; row < args.tokens && status.ok(); row += hole) {
      const int64_t rows = std::min(hole, args.tokens - row);
      const int64_t values = (rows - 1) * args.rows.stride + args.width;
      status = device_.Copy(args.rows.From(row - hole).data, args.rows.From(row).data,
                            static_cast<size_t>(values) * SizeOf(args.rows.dtype), stream);
    }
    return status;
  }

 private:
  static int PairsOf(const Rotary* rotary) {
    return rotary == nullptr ? 0 : As<CudaRotary>(rotary).pairs;
  }

  // Tokens at the rotary's frequencies; or those of a prompt, which follow each other, at its own.
  absl::Status Turn(const BatchTokens& tokens, const CudaTokens& prepared) {
    const auto& rotary = As<CudaRotary>(tokens.rotary);
    const std::vector<int32_t>& prompts = tokens.prompts;
    absl::Status status;
    for (int64_t first = 0, end = 0; first < prepared.tokens && status.ok(); first = end) {
      const float* inverse = rotary.inverse.data();
      end = prepared.tokens;
      if (!tokens.inverse.empty()) {
        const auto begin = prompts.begin() + first;
        end = std::find_if(begin, prompts.end(), [&](int32_t p) { return p != *begin; }) -
              prompts.begin();
        inverse = tokens.inverse.data() + int64_t{*begin} * rotary.pairs;
      }
      TurnsCall call = {.positions = prepared.positions + first,
                        .pairs = rotary.pairs,
                        .scale = rotary.scale,
                        .tokens = end - first,
                        .turns = prepared.turns + first * rotary.pairs};
      std::copy_n(inverse, rotary.pairs, call.inverse);
      status = device_.Check(FillTurns(call, device_.stream({})), "rotation");
    }
    return status;
  }

  // On the device, for whoever prepares from it.
  absl::Status Share(const std::vector<Piece>& pieces, std::shared_ptr<const Buffer>* shared) {
    Buffer buffer;
    absl::Status status = upload_.Pieces(pieces, &buffer);
    if (status.ok()) *shared = std::make_shared<const Buffer>(std::move(buffer));
    return status;
  }

  absl::Status Pack(const WriteKvArgs& args, const WriteKvArgs::Part& part, const PackedKv& packed,
                    Stream stream) {
    return device_.Check(
        PackKv({.k = args.k.From(part.first),
                .v = args.v.From(part.first),
                .kv_heads = args.kv_heads,
                .head_dim = args.head_dim,
                .tokens = part.tokens,
                .page_tokens = part.target.page_tokens,
                .page_stride = packed.page_stride,
                .head_stride = part.target.head_stride,
                .value_stride = packed.apart ? packed.run : part.target.value_stride,
                .dtype = part.target.dtype,
                .out = packed_.as<char>() + packed.begin},
               device_.stream(stream)),
        "kv");
  }

  absl::Status SendPacked(const KvTarget& target, const PackedKv& packed, Stream stream) {
    const size_t size = SizeOf(target.dtype), bytes = static_cast<size_t>(packed.run) * size;
    const size_t value = static_cast<size_t>(target.value_stride) * size;
    const char* from = packed_.as<char>() + packed.begin;
    absl::Status status;
    for (size_t page = 0; page < target.pages.size() && status.ok(); ++page) {
      char* to = static_cast<char*>(target.pages[page]);
      status = device_.Copy(to, from, bytes, stream);
      if (status.ok() && packed.apart) {
        status = device_.Copy(to + value, from + bytes, bytes, stream);
      }
      from += static_cast<size_t>(packed.page_stride) * size;
    }
    return status;
  }

  CudaDevice& device_;
  const std::unique_ptr<Multiplier> multiplier_;
  Upload upload_;
  Buffer packed_;  // K and V on their way to targets, one call's at a time; grows to the largest
};

}  // namespace

absl::StatusOr<std::unique_ptr<Ops>> CreateOps(CudaDevice& device, const std::string& cache_dir) {
  auto multiplier = Multiplier::Create(device, cache_dir);
  if (!multiplier.ok()) return multiplier.status();
  return std::make_unique<CudaOps>(device, *std::move(multiplier));
}

}  // namespace prefilld::cuda

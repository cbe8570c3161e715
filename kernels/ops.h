// What a transformer needs besides attention, in pieces of a kernel or two each. Rows lie where
// the device computes; what is constant (weights, norms, frequencies, the tokens of a batch) is
// prepared once, in whatever form the backend likes. Operations are enqueued on the stream and do
// not wait for it; what they are given stays until the stream is done. The engine thread alone
// calls them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/tensor.h"

namespace prefilld {

struct Stream {
  void* handle = nullptr;  // null: the device's only stream
};

// --- What is prepared. Made by Ops and given back to the same. It may point into the host memory
// that it was prepared from, which must outlive it.

// Maps of [in_features] that are read together (q, k and v; gate and up; or one), so that a backend
// may stack them into one.
class Linear {
 public:
  virtual ~Linear() = default;
  // Device memory that ProjectQkv, Gate or Logits of so many tokens uses while it runs.
  virtual size_t WorkspaceBytes(int64_t tokens) const = 0;
};
struct LinearPart {
  const void* weight = nullptr;  // [out_features, in_features] row-major, host memory
  const void* bias = nullptr;    // [out_features] or null
  int64_t out_features = 0;
};
class Embedding;
struct LinearWeights {
  std::vector<LinearPart> parts;
  DType dtype = DType::kF32;
  int64_t in_features = 0;
  // Prepared from the weight of the only part, or null: a backend may hold the two once.
  const Embedding* tied = nullptr;
};

class Norm {
 public:
  virtual ~Norm() = default;
};
struct NormWeights {
  const void* weight = nullptr;  // [width], host memory
  DType dtype = DType::kF32;
  int64_t width = 0;
  float eps = 0;
};

class Embedding {
 public:
  virtual ~Embedding() = default;
};
struct EmbeddingWeights {
  const void* table = nullptr;  // [vocabulary, width] row-major, host memory
  DType dtype = DType::kF32;
  int64_t vocabulary = 0;
  int64_t width = 0;
};

// Which channels of a head turn together: i and i + rotary_dim / 2, or 2i and 2i + 1.
enum class RotaryPairing : uint8_t { kHalf, kInterleaved };
class Rotary {
 public:
  virtual ~Rotary() = default;
};
struct RotaryFrequencies {
  std::vector<float> inverse;  // [rotary_dim / 2]; channels from rotary_dim on do not turn
  RotaryPairing pairing = RotaryPairing::kHalf;
  int head_dim = 0;
  float scale = 1;  // of what turns: cosines and sines are multiplied by it
};

// The tokens of a batch: their IDs, where each stands in its prompt, and how fast it turns there.
class PreparedTokens {
 public:
  virtual ~PreparedTokens() = default;
};
struct BatchTokens {
  std::vector<uint32_t> ids;       // [tokens]
  std::vector<int32_t> positions;  // [tokens]
  // Where frequencies depend on the prompt, instead of the rotary's; else empty.
  std::vector<float> inverse;      // [prompts, rotary_dim / 2]
  std::vector<int32_t> prompts;    // [tokens], which prompt: those of one stand together
  const Rotary* rotary = nullptr;  // what turns their heads, or null
  void* memory = nullptr;          // of the device, Ops::TokensBytes, for as long as they are
};

// --- What is computed. y = x W^T + bias for each part of a linear.

// out[t] = the table's row of token t. An ID beyond the table, which a caller has refused, reads
// the last row.
struct EmbedArgs {
  const Embedding* embedding = nullptr;
  const PreparedTokens* tokens = nullptr;
  Rows out;  // [tokens, width]
};

// out[t] = x[t] / sqrt(mean(x[t]^2) + eps) * weight, F32 inside. out may be x.
struct NormalizeArgs {
  const Norm* norm = nullptr;
  Rows x, out;  // [tokens, width]
  int64_t tokens = 0;
};

// residual += y, of a linear of one part; with a norm also normed = the norm of the sum.
struct AddProductArgs {
  const Linear* linear = nullptr;
  Rows x;         // [tokens, in_features]
  Rows residual;  // [tokens, out_features]
  int64_t tokens = 0;
  const Norm* norm = nullptr;
  Rows normed;  // [tokens, out_features]
};

// The three parts of a linear, q and k turned by their positions. Where the model has norms of
// heads, each head of q and k is normalised before it turns.
struct ProjectQkvArgs {
  const Linear* linear = nullptr;
  Rows x;     // [tokens, in_features]
  Rows q;     // [tokens, q_heads, head_dim]
  Rows k, v;  // [tokens, kv_heads, head_dim]
  int q_heads = 0, kv_heads = 0;
  const Norm *q_norm = nullptr, *k_norm = nullptr;  // of head_dim, or null
  const Rotary* rotary = nullptr;
  const PreparedTokens* batch = nullptr;
  int64_t first = 0;  // the token of the batch that row 0 is
  int64_t tokens = 0;
  void* workspace = nullptr;
};

// out = silu(the first part) * the second.
struct GateArgs {
  const Linear* linear = nullptr;
  Rows x;    // [tokens, in_features]
  Rows out;  // [tokens, out_features of each part]
  int64_t tokens = 0;
  void* workspace = nullptr;
};

// The logits of the norm of x, in host memory once the stream is done.
struct LogitsArgs {
  const Norm* norm = nullptr;
  const Linear* linear = nullptr;  // of one part
  Rows x;                          // [tokens, in_features]
  Rows normed;                     // [tokens, in_features], used while it runs
  int64_t tokens = 0;
  float* out = nullptr;  // [tokens, out_features], host memory
  void* workspace = nullptr;
};

// Rounds K and V of the sequences of a batch to their targets' dtype, to nearest even, and puts
// them there. Calls are all on one stream, best one of copies, beside what computes.
struct WriteKvArgs {
  Rows k, v;  // [tokens of all, kv_heads, head_dim]
  int kv_heads = 0, head_dim = 0;
  struct Part {
    int64_t first = 0, tokens = 0;  // rows of a sequence
    KvTarget target;
  };
  std::vector<Part> parts;
};

// Takes rows [begin, end) out of [tokens, width]; those behind them move up.
struct RemoveRowsArgs {
  Rows rows;
  int64_t width = 0;
  int64_t tokens = 0;
  int64_t begin = 0, end = 0;
};

class Ops {
 public:
  virtual ~Ops() = default;

  // The dtype of rows, for a model whose weights are of `weights`.
  virtual DType activations(DType weights) const = 0;

  // Rows that a product is given at a time: enough for its full rate, and few, since what lies
  // between products is held for so many.
  virtual int64_t tile_tokens() const = 0;

  // Counts of tokens, up to a tile, at which a backend measures how a product is run best, when it
  // is first run with so many. Run at start they cost no prompt anything. Empty: it measures none.
  virtual std::vector<int64_t> measured_tokens() const { return {}; }

  // INVALID_ARGUMENT for a shape that the backend has no kernel for, RESOURCE_EXHAUSTED.
  virtual absl::StatusOr<std::unique_ptr<Linear>> Prepare(const LinearWeights& weights) = 0;
  virtual absl::StatusOr<std::unique_ptr<Norm>> Prepare(const NormWeights& weights) = 0;
  virtual absl::StatusOr<std::unique_ptr<Embedding>> Prepare(const EmbeddingWeights& weights) = 0;
  virtual absl::StatusOr<std::unique_ptr<Rotary>> Prepare(const RotaryFrequencies& frequencies) = 0;
  // What is on the stream still reads what was prepared in the same memory before.
  virtual absl::StatusOr<std::unique_ptr<PreparedTokens>> Prepare(BatchTokens tokens) = 0;
  virtual size_t TokensBytes(int64_t tokens, const Rotary* rotary) const = 0;  // threads: any

  virtual absl::Status Embed(const EmbedArgs& args, Stream stream) = 0;
  virtual absl::Status Normalize(const NormalizeArgs& args, Stream stream) = 0;
  virtual absl::Status AddProduct(const AddProductArgs& args, Stream stream) = 0;
  virtual absl::Status ProjectQkv(const ProjectQkvArgs& args, Stream stream) = 0;
  virtual absl::Status Gate(const GateArgs& args, Stream stream) = 0;
  virtual absl::Status Logits(const LogitsArgs& args, Stream stream) = 0;
  virtual absl::Status WriteKv(const WriteKvArgs& args, Stream stream) = 0;
  // Device memory for what it puts together of so many bytes of K and V, in whole pages. It grows
  // to the largest call and can be taken before the first: RESOURCE_EXHAUSTED. Threads of
  // WriteKvBytes: any.
  virtual size_t WriteKvBytes(size_t kv_bytes) const = 0;
  virtual absl::Status ReserveWriteKv(size_t bytes) = 0;
  virtual absl::Status RemoveRows(const RemoveRowsArgs& args, Stream stream) = 0;
};

}  // namespace prefilld

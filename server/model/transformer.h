// A pre-norm transformer with gated MLPs, written over kernels/ops.h: everything of a layer but
// attention, which the engine runs between ProjectQkv and FinishLayer.
//
// Activations lie on the backend's device, in the dtype it likes. Hidden widths are walked in tiles
// of tokens, so that what a layer needs beyond LayerScratch does not grow with the prompt. The
// engine thread alone calls it; calls enqueue on the stream and do not wait for it.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "kernels/backend.h"
#include "kernels/ops.h"
#include "kernels/tensor.h"
#include "server/model/checkpoint.h"

namespace prefilld {

struct ModelInfo {
  std::string name;  // the operator's
  std::string model_type;
  std::string revision;  // of the checkpoint, empty when it does not say
  int layers = 0;
  int q_heads = 0;
  int kv_heads = 0;
  int head_dim = 0;
  int hidden_size = 0;
  int vocab_size = 0;
  int64_t max_positions = 0;   // tokens of a prompt
  int64_t sliding_window = 0;  // of decode engines, 0: none; no prompt is longer
  int64_t layer_weights = 0;   // elements of one layer's linear maps, for cost estimates
  int64_t qkv_weights = 0;     // of those, of q, k and v
  DType dtype = DType::kF32;   // of the checkpoint, and of KV unless another is asked for
  DType activations =
      DType::kF32;  // of rows while it computes, attention's q, k, v and o among them
  double rope_theta = 0;
  std::string rope_scaling;  // none | linear | llama3 | dynamic | yarn
  std::string fingerprint;   // SHA-256 in hex; equal exactly for the same weights and mathematics
};

// Prompts that go through the model together, ragged: prompt i is tokens [cu_seqlens[i],
// cu_seqlens[i + 1]), and its positions start at 0.
struct PrefillBatch {
  std::vector<uint32_t> token_ids;  // [tokens], each below vocab_size
  std::vector<int64_t> cu_seqlens;  // [prompts + 1], from 0
  Buffer memory;                    // of Transformer::BatchBytes; set before Begin, or by it
  // Set by Transformer::Begin.
  std::unique_ptr<PreparedTokens> prepared;
  Rows residual;  // [tokens, hidden_size], in `memory`, before what is prepared

  int64_t tokens() const { return static_cast<int64_t>(token_ids.size()); }
};

// What attention reads and writes in one layer. Contiguous; owned by the engine, shared by all
// batches.
struct LayerScratch {
  Rows q;  // [tokens, q_heads, head_dim], after RoPE
  Rows k;  // [tokens, kv_heads, head_dim], after RoPE
  Rows v;  // [tokens, kv_heads, head_dim]
  Rows o;  // [tokens, q_heads, head_dim], attention's output
};
int64_t LayerScratchBytes(const ModelInfo& info, int64_t tokens);
// Splits LayerScratchBytes(info, tokens) bytes at `memory`.
LayerScratch SplitLayerScratch(const ModelInfo& info, int64_t tokens, void* memory);

struct RowRange {
  int64_t first = 0, count = 0;
};

class Transformer {
 public:
  // As Checkpoint::Load; UNIMPLEMENTED where the backend serves no models. `backend` outlives the
  // model.
  static absl::StatusOr<std::unique_ptr<Transformer>> Load(const std::string& name,
                                                           const std::string& directory,
                                                           Backend& backend,
                                                           const LoadProgress& progress = nullptr);

  const ModelInfo& info() const { return info_; }
  // UNAVAILABLE, for good, once a file that it computes with has changed (SafeTensors::CheckFiles):
  // what came of it since the last time this was OK is not to be used. Asks the file system; what
  // it said last anybody may know. Where the weights lie on a device the files are not needed.
  absl::Status CheckFiles() const;
  absl::Status files() const ABSL_LOCKS_EXCLUDED(files_mutex_);
  // Held from Load on.
  uint64_t weight_bytes() const { return weights_.bytes; }
  uint64_t tile_bytes() const { return tiles_.bytes(); }
  // Rows are walked in tiles of so many. Results are the same bits where a layer's rows come in
  // several ranges, if each begins at a tile.
  int64_t tile_tokens() const { return tile_tokens_; }

  // Device memory of a batch of so many tokens, from Begin to its end.
  size_t BatchBytes(int64_t tokens) const;
  // Checks the prompts' lengths and embeds. batch.memory has BatchBytes, or is empty and allocated.
  // The token IDs were checked where they came in.
  absl::Status Begin(PrefillBatch& batch, Stream stream);
  // Writes q, k and v of these rows, in `layer`, from the residual.
  absl::Status ProjectQkv(int layer, const PrefillBatch& batch, const LayerScratch& scratch,
                          RowRange rows, Stream stream);
  // Adds the output projection of scratch.o and then the MLP to these rows of the residual.
  absl::Status FinishLayer(int layer, PrefillBatch& batch, const LayerScratch& scratch,
                           RowRange rows, Stream stream);
  // Takes one prompt's rows out of the batch.
  absl::Status Remove(PrefillBatch& batch, size_t prompt, Stream stream);
  // out[rows, vocab_size], host memory: logits of tokens [row, row + rows) after the last layer,
  // once the stream is done.
  struct LogitsOf {
    int64_t row = 0, rows = 0;
    float* out = nullptr;
  };
  absl::Status Logits(const PrefillBatch& batch, const LogitsOf& of, Stream stream);

 private:
  Transformer(Checkpoint checkpoint, Backend& backend, Ops& ops)
      : weights_(std::move(checkpoint)), backend_(backend), ops_(ops) {}
  absl::Status AllocateTiles();
  absl::Status MeasureProducts();
  absl::Status RunOnce(int64_t tokens);
  size_t ResidualBytes(int64_t tokens) const;
  absl::Status PrepareTokens(PrefillBatch& batch);

  const Checkpoint weights_;
  mutable absl::Mutex files_mutex_;
  mutable absl::Status files_ ABSL_GUARDED_BY(files_mutex_);
  Backend& backend_;
  Ops& ops_;
  ModelInfo info_;
  Buffer tiles_;  // what `normed_`, `gated_` and `workspace_` lie in
  int64_t tile_tokens_ = 0;
  Rows normed_;  // [tile_tokens_, hidden_size]
  Rows gated_;   // [tile_tokens_, intermediate_size]
  void* workspace_ = nullptr;
};

}  // namespace prefilld

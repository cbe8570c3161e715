#include "server/model/transformer.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "server/record/errors.h"
#include "server/record/log.h"

namespace prefilld {
namespace {

constexpr int64_t kLogitsTokens = 64;  // rows of logits at once
constexpr size_t kAlignment = 256;     // of tensors in one allocation: what products are fast at

size_t Aligned(size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

// Of a tensor of a layer's scratch.
int64_t TensorBytes(const ModelInfo& info, int heads, int64_t tokens) {
  return static_cast<int64_t>(
      Aligned(static_cast<size_t>(tokens) * heads * info.head_dim * SizeOf(info.activations)));
}

// Elements of one layer's linear maps; and of those of q, k and v.
int64_t QkvElements(const ModelConfig& c) {
  return c.hidden_size * int64_t{c.head_dim} * (int64_t{c.q_heads} + 2 * c.kv_heads);
}
int64_t LayerElements(const ModelConfig& c) {
  const int64_t output = int64_t{c.q_heads} * c.head_dim, mlp = int64_t{3} * c.intermediate_size;
  return QkvElements(c) + c.hidden_size * (output + mlp);
}

ModelInfo InfoOf(const std::string& name, const Checkpoint& checkpoint, DType activations) {
  const ModelConfig& c = checkpoint.config;
  return {.name = name,
          .model_type = c.model_type,
          .revision = c.revision,
          .layers = c.layers,
          .q_heads = c.q_heads,
          .kv_heads = c.kv_heads,
          .head_dim = c.head_dim,
          .hidden_size = c.hidden_size,
          .vocab_size = c.vocab_size,
          .max_positions = c.max_positions,
          .sliding_window = c.sliding_window,
          .layer_weights = LayerElements(c),
          .qkv_weights = QkvElements(c),
          .dtype = checkpoint.dtype,
          .activations = activations,
          .rope_theta = c.rope.theta,
          .rope_scaling = Name(c.rope.scaling),
          .fingerprint = checkpoint.fingerprint};
}

absl::Status CheckLengths(const PrefillBatch& batch, const ModelInfo& info) {
  const std::vector<int64_t>& ends = batch.cu_seqlens;
  if (ends.size() < 2 || ends.front() != 0 || ends.back() != batch.tokens()) {
    return absl::InvalidArgumentError(absl::StrCat("cu_seqlens [", absl::StrJoin(ends, ", "),
                                                   "] does not go from 0 to ", batch.tokens()));
  }
  for (size_t i = 1; i < ends.size(); ++i) {
    if (ends[i] <= ends[i - 1] || ends[i] - ends[i - 1] > info.max_positions) {
      return absl::InvalidArgumentError(absl::StrCat("a prompt of ", ends[i] - ends[i - 1],
                                                     " tokens; model ", info.name, " takes 1 to ",
                                                     info.max_positions));
    }
  }
  return absl::OkStatus();
}

}  // namespace

int64_t LayerScratchBytes(const ModelInfo& info, int64_t tokens) {
  return 2 * TensorBytes(info, info.q_heads, tokens) + 2 * TensorBytes(info, info.kv_heads, tokens);
}

LayerScratch SplitLayerScratch(const ModelInfo& info, int64_t tokens, void* memory) {
  const int64_t q_width = int64_t{info.q_heads} * info.head_dim;
  const int64_t kv_width = int64_t{info.kv_heads} * info.head_dim;
  char* at = static_cast<char*>(memory);
  const auto take = [&](int heads, int64_t width) {
    const Rows rows = {at, info.activations, width};
    at += TensorBytes(info, heads, tokens);
    return rows;
  };
  LayerScratch scratch;
  scratch.q = take(info.q_heads, q_width);
  scratch.o = take(info.q_heads, q_width);
  scratch.k = take(info.kv_heads, kv_width);
  scratch.v = take(info.kv_heads, kv_width);
  return scratch;
}

absl::StatusOr<std::unique_ptr<Transformer>> Transformer::Load(const std::string& name,
                                                               const std::string& directory,
                                                               Backend& backend,
                                                               const LoadProgress& progress) {
  absl::StatusOr<Ops*> ops = backend.ops();
  if (!ops.ok()) {
    return absl::UnimplementedError(
        absl::StrCat("backend ", std::string(backend.name()),
                     " serves no models here: ", ops.status().message()));
  }
  absl::StatusOr<Checkpoint> checkpoint = Checkpoint::Load(directory, **ops, progress);
  if (!checkpoint.ok()) return checkpoint.status();
  std::unique_ptr<Transformer> model(new Transformer(*std::move(checkpoint), backend, **ops));
  const DType activations = model->ops_.activations(model->weights_.dtype);
  model->info_ = InfoOf(name, model->weights_, activations);
  if (absl::Status s = model->AllocateTiles(); !s.ok()) return s;
  if (absl::Status s = model->MeasureProducts(); !s.ok()) return s;
  return model;
}

absl::Status Transformer::CheckFiles() const {
  if (!backend_.device().host_memory()) return absl::OkStatus();
  const absl::Status now = weights_.tensors.CheckFiles();
  absl::MutexLock lock(&files_mutex_);
  if (!now.ok() && files_.ok()) {
    Log(Level::kError, "model_changed",
        {{"model", info_.name}, {"message", std::string(now.message())}});
    files_ = RetryLater(
        absl::StatusCode::kUnavailable, "model_changed",
        absl::StrCat("the files of model '", info_.name, "' have changed since the server started"),
        absl::Seconds(5));
  }
  return files_;
}

absl::Status Transformer::files() const {
  absl::MutexLock lock(&files_mutex_);
  return files_;
}

// Every product of a layer and that of the logits, so that the backend has seen them all.
absl::Status Transformer::MeasureProducts() {
  absl::Status status;
  for (const int64_t tokens : ops_.measured_tokens()) {
    if (status.ok() && tokens <= info_.max_positions) status = RunOnce(tokens);
  }
  return status;
}

absl::Status Transformer::RunOnce(int64_t tokens) {
  Device& device = backend_.device();
  auto memory = device.Allocate(static_cast<size_t>(LayerScratchBytes(info_, tokens)));
  if (!memory.ok()) return memory.status();
  const LayerScratch scratch = SplitLayerScratch(info_, tokens, memory->data());
  PrefillBatch batch;
  batch.token_ids.resize(static_cast<size_t>(tokens));
  batch.cu_seqlens = {0, tokens};
  std::vector<float> logits(static_cast<size_t>(info_.vocab_size));
  absl::Status status = Begin(batch, Stream{});
  if (status.ok()) status = ProjectQkv(0, batch, scratch, {0, tokens}, Stream{});
  if (status.ok()) status = FinishLayer(0, batch, scratch, {0, tokens}, Stream{});
  if (status.ok()) status = Logits(batch, {.row = 0, .rows = 1, .out = logits.data()}, Stream{});
  const absl::Status done = device.Synchronize(Stream{});
  return status.ok() ? done : status;
}

absl::Status Transformer::AllocateTiles() {
  tile_tokens_ = ops_.tile_tokens();
  size_t workspace = weights_.lm_head->WorkspaceBytes(kLogitsTokens);
  for (const LayerWeights& layer : weights_.layers) {
    for (const auto* linear : {&layer.qkv, &layer.gate_up}) {
      workspace = std::max(workspace, (*linear)->WorkspaceBytes(tile_tokens_));
    }
  }
  const size_t row = static_cast<size_t>(tile_tokens_) * SizeOf(info_.activations);
  const size_t normed = Aligned(row * weights_.config.hidden_size);
  const size_t gated = Aligned(row * weights_.config.intermediate_size);
  absl::StatusOr<Buffer> memory = backend_.device().Allocate(normed + gated + workspace);
  if (!memory.ok()) return memory.status();
  tiles_ = *std::move(memory);
  char* begin = tiles_.as<char>();
  normed_ = {begin, info_.activations, weights_.config.hidden_size};
  gated_ = {begin + normed, info_.activations, weights_.config.intermediate_size};
  workspace_ = begin + normed + gated;
  return absl::OkStatus();
}

size_t Transformer::ResidualBytes(int64_t tokens) const {
  return Aligned(static_cast<size_t>(tokens * info_.hidden_size) * SizeOf(info_.activations));
}

size_t Transformer::BatchBytes(int64_t tokens) const {
  return ResidualBytes(tokens) + ops_.TokensBytes(tokens, weights_.rotary.get());
}

absl::Status Transformer::PrepareTokens(PrefillBatch& batch) {
  const RopeConfig& rope = weights_.config.rope;
  BatchTokens tokens{.ids = batch.token_ids, .rotary = weights_.rotary.get()};
  // Behind the residual, which does not grow.
  tokens.memory = batch.memory.as<char>() + ResidualBytes(batch.tokens());
  tokens.positions.reserve(batch.token_ids.size());
  for (size_t i = 1; i < batch.cu_seqlens.size(); ++i) {
    const int64_t length = batch.cu_seqlens[i] - batch.cu_seqlens[i - 1];
    for (int64_t p = 0; p < length; ++p) tokens.positions.push_back(static_cast<int32_t>(p));
    if (rope.scaling == RopeScaling::kDynamic) {
      const auto inverse = InverseFrequencies(rope, info_.head_dim, length);
      tokens.inverse.insert(tokens.inverse.end(), inverse.begin(), inverse.end());
      tokens.prompts.insert(tokens.prompts.end(), length, static_cast<int32_t>(i - 1));
    }
  }
  absl::StatusOr<std::unique_ptr<PreparedTokens>> prepared = ops_.Prepare(std::move(tokens));
  if (prepared.ok()) batch.prepared = *std::move(prepared);
  return prepared.status();
}

absl::Status Transformer::Begin(PrefillBatch& batch, Stream stream) {
  if (absl::Status s = CheckLengths(batch, info_); !s.ok()) return s;
  if (absl::Status s = Grow(backend_.device(), BatchBytes(batch.tokens()), batch.memory); !s.ok()) {
    return s;
  }
  if (absl::Status s = PrepareTokens(batch); !s.ok()) return s;
  batch.residual = {batch.memory.data(), info_.activations, info_.hidden_size};
  return ops_.Embed({.embedding = weights_.embedding.get(),
                     .tokens = batch.prepared.get(),
                     .out = batch.residual},
                    stream);
}

absl::Status Transformer::ProjectQkv(int layer, const PrefillBatch& batch,
                                     const LayerScratch& scratch, RowRange rows, Stream stream) {
  const LayerWeights& weights = weights_.layers[layer];
  const int64_t end = rows.first + rows.count;
  for (int64_t begin = rows.first; begin < end; begin += tile_tokens_) {
    const int64_t tokens = std::min(tile_tokens_, end - begin);
    absl::Status status = ops_.Normalize({.norm = weights.input_norm.get(),
                                          .x = batch.residual.From(begin),
                                          .out = normed_,
                                          .tokens = tokens},
                                         stream);
    if (!status.ok()) return status;
    status = ops_.ProjectQkv({.linear = weights.qkv.get(),
                              .x = normed_,
                              .q = scratch.q.From(begin),
                              .k = scratch.k.From(begin),
                              .v = scratch.v.From(begin),
                              .q_heads = info_.q_heads,
                              .kv_heads = info_.kv_heads,
                              .q_norm = weights.q_norm.get(),
                              .k_norm = weights.k_norm.get(),
                              .rotary = weights_.rotary.get(),
                              .batch = batch.prepared.get(),
                              .first = begin,
                              .tokens = tokens,
                              .workspace = workspace_},
                             stream);
    if (!status.ok()) return status;
  }
  return absl::OkStatus();
}

absl::Status Transformer::FinishLayer(int layer, PrefillBatch& batch, const LayerScratch& scratch,
                                      RowRange rows, Stream stream) {
  const LayerWeights& weights = weights_.layers[layer];
  const int64_t end = rows.first + rows.count;
  for (int64_t begin = rows.first; begin < end; begin += tile_tokens_) {
    const int64_t tokens = std::min(tile_tokens_, end - begin);
    const Rows residual = batch.residual.From(begin);
    absl::Status status = ops_.AddProduct({.linear = weights.o.get(),
                                           .x = scratch.o.From(begin),
                                           .residual = residual,
                                           .tokens = tokens,
                                           .norm = weights.post_attention_norm.get(),
                                           .normed = normed_},
                                          stream);
    if (!status.ok()) return status;
    status = ops_.Gate({.linear = weights.gate_up.get(),
                        .x = normed_,
                        .out = gated_,
                        .tokens = tokens,
                        .workspace = workspace_},
                       stream);
    if (!status.ok()) return status;
    status = ops_.AddProduct(
        {.linear = weights.down.get(), .x = gated_, .residual = residual, .tokens = tokens},
        stream);
    if (!status.ok()) return status;
  }
  return absl::OkStatus();
}

absl::Status Transformer::Remove(PrefillBatch& batch, size_t prompt, Stream stream) {
  const int64_t begin = batch.cu_seqlens[prompt], end = batch.cu_seqlens[prompt + 1];
  absl::Status status = ops_.RemoveRows({.rows = batch.residual,
                                         .width = info_.hidden_size,
                                         .tokens = batch.tokens(),
                                         .begin = begin,
                                         .end = end},
                                        stream);
  if (!status.ok()) return status;
  batch.token_ids.erase(batch.token_ids.begin() + begin, batch.token_ids.begin() + end);
  batch.cu_seqlens.erase(batch.cu_seqlens.begin() + static_cast<std::ptrdiff_t>(prompt) + 1);
  for (size_t i = prompt + 1; i < batch.cu_seqlens.size(); ++i) batch.cu_seqlens[i] -= end - begin;
  return PrepareTokens(batch);
}

absl::Status Transformer::Logits(const PrefillBatch& batch, const LogitsOf& of, Stream stream) {
  for (int64_t done = 0; done < of.rows; done += kLogitsTokens) {
    absl::Status status = ops_.Logits({.norm = weights_.final_norm.get(),
                                       .linear = weights_.lm_head.get(),
                                       .x = batch.residual.From(of.row + done),
                                       .normed = normed_,
                                       .tokens = std::min(kLogitsTokens, of.rows - done),
                                       .out = of.out + done * info_.vocab_size,
                                       .workspace = workspace_},
                                      stream);
    if (!status.ok()) return status;
  }
  return absl::OkStatus();
}

}  // namespace prefilld

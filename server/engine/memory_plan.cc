#include "server/engine/memory_plan.h"

#include <algorithm>
#include <limits>
#include <string_view>
#include <utility>

#include "server/engine/layer_parts.h"

namespace prefilld {
namespace {

using Row = MemoryPlan::Row;
using When = MemoryPlan::When;

// Kernels that are loaded when they first run, cuDNN's plans, what allocations are rounded up by.
constexpr uint64_t kMarginBytes = uint64_t{512} << 20;

// In the order of Holding.
struct HeldRow {
  const char* what;
  bool host;
  const char* by;
};
constexpr HeldRow kHeldRows[kHeldCount] = {
    {"activations", false, "q, k, v and o of a layer, longest prompt"},
    {"short_activations", false,
     "the same of up to 4096 tokens, which pass a long prompt; on a GPU twice"},
    {"block_counts", false, "rows of blocks of the longest prompt"},
    {"block_index", false, "square of the longest prompt's blocks"},
    {"workspace", false, "longest prompt, the method that needs most"},
    {"kv_out", false, "K and V of a layer on their way to the cache, longest prompt"},
    {"reports", true, "prompts of a batch, heads"},
    {"batches", false, "residual streams: the longest prompt and batches of short ones"},
};

void Cover(const HeldBytes& more, HeldBytes& bytes) {
  for (size_t i = 0; i < kHeldCount; ++i) bytes[i] = std::max(bytes[i], more[i]);
}

int64_t Longest(const Transformer& model, int64_t prompt_tokens) {
  return std::min(prompt_tokens, model.info().max_positions);
}

// Short prompts that share a batch: one as long as can be, and all others of a token each, so that
// there are many, and long rows of the index.
std::vector<int64_t> ShortPrompts(const PlanInputs& inputs, int64_t longest) {
  std::vector<int64_t> lengths;
  int64_t left = inputs.batch_tokens;
  for (int64_t jobs = inputs.batch_jobs; jobs > 0 && left > 0; --jobs) {
    lengths.push_back(std::clamp(left - (jobs - 1), int64_t{1}, longest));
    left -= lengths.back();
  }
  return lengths;
}

// The largest of every method, for shapes that may come. What is larger at a shorter length, if
// anything is, is met at some power of two.
HeldBytes HeldByModel(const PlanInputs& inputs, const Transformer& model, int64_t longest) {
  std::vector<std::vector<int64_t>> batches = {{longest}, ShortPrompts(inputs, longest)};
  for (int64_t tokens = 1; tokens < longest; tokens *= 2) batches.push_back({tokens});
  HeldBytes held{};
  for (const MethodRow& row : kMethodTable) {
    SparsityPolicy policy;
    policy.method = row.method;
    policy.min_budget_tokens = row.min_budget_tokens;
    for (const auto& lengths : batches) {
      Cover(HeldBy(inputs.backend, model, lengths, policy), held);
    }
  }
  return held;
}

// The longest prompt, and short ones that pass it; or, of `every`, as many of the longest.
size_t BatchesOf(const PlanInputs& inputs, const Transformer& model, int64_t longest, bool every) {
  int64_t tokens = 0;
  for (const int64_t length : ShortPrompts(inputs, longest)) tokens += length;
  const size_t few = model.BatchBytes(tokens), most = std::max(few, model.BatchBytes(longest));
  return most + static_cast<size_t>(inputs.batches - 1) * (every ? most : few);
}

size_t BytesOf(const MemoryPlan& plan, Holding held) {
  constexpr size_t kReports = 2;  // of the layer that is collected, and of the next
  if (held == Holding::kBatch) return plan.batches;
  return Of(plan.held, held) * (held == Holding::kReports ? kReports : 1);
}

// What the device has given so far beside weights and tiles.
uint64_t OtherBytes(const PlanInputs& inputs) {
  uint64_t held = 0, models = 0;
  for (const Device::Memory& memory : inputs.backend.device().memory()) {
    if (std::string_view(memory.kind) == "device") held += memory.bytes;
  }
  for (const Transformer* model : inputs.models) {
    models += model->weight_bytes() + model->tile_bytes();
  }
  return held - std::min(held, models);
}

// Of what is not the models'.
void AddOthers(const PlanInputs& inputs, bool device, MemoryPlan& plan) {
  plan.rows.push_back({"kv_blocks", "", false, device ? When::kLoaded : When::kLater,
                       inputs.kv_block_bytes, "--kv_memory"});
  plan.rows.push_back({"kv_segments", "", false, When::kLater, inputs.kv_segment_bytes,
                       "--kv_memory, what their transport has room for"});
  plan.rows.push_back(
      {"attend_tensors", "", device, When::kLater, inputs.attend_bytes, "--attend_memory"});
  if (!device) return;
  plan.rows.push_back(
      {"kv_device_segments", "", true, When::kStart, inputs.kv_device_bytes, "--kv_device_memory"});
  plan.rows.push_back(
      {"other", "", true, When::kLoaded, OtherBytes(inputs), "products, calibration"});
  plan.rows.push_back(
      {"attend_tensors", "", false, When::kLater, inputs.attend_bytes, "--attend_memory, pinned"});
  plan.rows.push_back({"margin", "", true, When::kLater, kMarginBytes, "fixed"});
}

MemoryPlan PlanFor(const PlanInputs& inputs, int64_t prompt_tokens) {
  const bool device = !inputs.backend.device().host_memory();
  MemoryPlan plan{.prompt_tokens = prompt_tokens};
  for (const Transformer* model : inputs.models) {
    const int64_t longest = Longest(*model, prompt_tokens);
    const std::string& name = model->info().name;
    plan.rows.push_back({"weights", name, device, device ? When::kLoaded : When::kMapped,
                         model->weight_bytes(), "--model"});
    plan.rows.push_back({"tiles", name, device, device ? When::kLoaded : When::kLater,
                         model->tile_bytes(), "widths of the model, tokens of a tile"});
    Cover(HeldByModel(inputs, *model, longest), plan.held);
    plan.batches = std::max(plan.batches, BatchesOf(inputs, *model, longest, /*every=*/!device));
  }
  for (size_t i = 0; i < kHeldCount && !inputs.models.empty(); ++i) {
    const HeldRow& row = kHeldRows[i];
    const size_t bytes = BytesOf(plan, static_cast<Holding>(i));
    plan.rows.push_back(
        {row.what, "", device && !row.host, device ? When::kStart : When::kLater, bytes, row.by});
  }
  AddOthers(inputs, device, plan);
  std::erase_if(plan.rows, [](const Row& row) { return row.bytes == 0; });
  return plan;
}

// More long prompts may run in turn, of up to half of what nobody needs.
void Widen(const PlanInputs& inputs, uint64_t left, MemoryPlan& plan) {
  size_t wanted = 0;
  for (const Transformer* model : inputs.models) {
    const int64_t longest = Longest(*model, plan.prompt_tokens);
    wanted = std::max(wanted, BatchesOf(inputs, *model, longest, /*every=*/true));
  }
  const uint64_t more = std::min<uint64_t>(wanted - plan.batches, left / 2);
  plan.batches += more;
  plan.spare = left - more;
  for (Row& row : plan.rows) {
    if (row.what == kHeldRows[static_cast<size_t>(Holding::kBatch)].what) row.bytes = plan.batches;
  }
}

}  // namespace

KvGeometry GeometryOf(const ModelInfo& info, int64_t tokens) {
  return {info.layers, info.kv_heads, info.head_dim, info.dtype, tokens};
}

bool OnHost(Holding held) { return kHeldRows[static_cast<size_t>(held)].host; }

HeldBytes HeldBy(Backend& backend, const AttentionShape& shape, const SparsityPolicy& policy) {
  if (!backend.Supports(shape, policy).ok()) return {};
  const auto sequences = SplitIntoBlocks(shape, policy.block_size);
  const size_t rows = static_cast<size_t>(shape.q_heads) * TotalRows(sequences);
  HeldBytes held{};
  Of(held, Holding::kCounts) = rows * sizeof(int32_t);
  Of(held, Holding::kIndex) = rows * MaxKeyBlocks(sequences) * sizeof(uint16_t);
  Of(held, Holding::kWorkspace) = backend.WorkspaceBytes(shape, policy);
  return held;
}

HeldBytes HeldBy(Backend& backend, const Transformer& model, const std::vector<int64_t>& lengths,
                 const SparsityPolicy& policy) {
  const ModelInfo& info = model.info();
  std::vector<int64_t> ends = {0};
  size_t kv_bytes = 0;
  for (const int64_t length : lengths) {
    ends.push_back(ends.back() + length);
    const KvGeometry kv = GeometryOf(info, length);
    kv_bytes += kv.blocks_per_layer() * kv.block_bytes();
  }
  const AttentionShape shape = {info.activations, info.q_heads, info.kv_heads,
                                info.head_dim,    ends,         ends};
  if (!backend.Supports(shape, policy).ok()) return {};
  HeldBytes held = HeldBy(backend, shape, policy);
  const bool passes = ends.back() <= kShortBatchTokens;
  Of(held, passes ? Holding::kShortActivations : Holding::kActivations) =
      static_cast<size_t>(LayerScratchBytes(info, ends.back()) *
                          ScratchTurns(ends.back(), backend.device().host_memory()));
  Of(held, Holding::kKvOut) = (*backend.ops())->WriteKvBytes(kv_bytes);
  Of(held, Holding::kReports) = lengths.size() * info.q_heads * sizeof(HeadReport);
  Of(held, Holding::kBatch) = model.BatchBytes(ends.back());
  return held;
}

uint64_t MemoryPlan::needs() const {
  uint64_t bytes = 0;
  for (const Row& row : rows) bytes += row.device && row.when != When::kLoaded ? row.bytes : 0;
  return bytes;
}

uint64_t KvDeviceBytes(const MemoryPlan& plan) {
  return std::min(plan.spare / 4, uint64_t{8} << 30);
}

MemoryPlan PlanMemory(const PlanInputs& inputs) {
  MemoryPlan plan = PlanFor(inputs, inputs.prompt_tokens);
  plan.fits = inputs.prompt_tokens;
  plan.free = inputs.free;
  if (!plan.free.has_value()) {
    plan.spare = std::numeric_limits<uint64_t>::max();
    return plan;
  }
  if (plan.needs() <= *plan.free) {
    Widen(inputs, *plan.free - plan.needs(), plan);
    return plan;
  }
  plan.fits = 0;  // and what lies beyond `over` does not
  for (int64_t over = inputs.prompt_tokens; over - plan.fits > 1;) {
    const int64_t middle = plan.fits + (over - plan.fits) / 2;
    (PlanFor(inputs, middle).needs() <= *plan.free ? plan.fits : over) = middle;
  }
  return plan;
}

}  // namespace prefilld

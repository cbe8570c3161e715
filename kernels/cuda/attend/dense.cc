#include "kernels/cuda/attend/dense.h"

#include <dlfcn.h>

#include <algorithm>
#include <exception>
#include <list>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "cudnn_frontend.h"

namespace cudnn_frontend {
void* cudnn_dlhandle = nullptr;  // where cudnn-frontend looks up every function of cuDNN
}

namespace prefilld::cuda {
namespace {

namespace fe = cudnn_frontend;

constexpr char kLibrary[] = "libcudnn.so.9";
constexpr size_t kPlansMax = 64;  // a plan is some 100 KB of host memory
// Sequences are executed one by one: many short ones leave the device idle, our kernel takes all at
// once.
constexpr int64_t kTokensMin = 1024;

enum Uid : int64_t { kQ = 1, kK, kV, kO, kStats };

// One sequence of a problem; with its strides it is all that a plan depends on.
struct Shape {
  DType dtype;
  int q_heads, kv_heads, head_dim;
  int64_t sq, sk;
  int64_t q[2], k[2], v[2], o[2];  // token and head strides
  int64_t stats;                   // between heads; 0: none wanted
  float softmax_scale;

  bool operator==(const Shape&) const = default;
};

Shape ShapeOf(const Problem& p, const Sequence& sequence) {
  return {.dtype = p.dtype,
          .q_heads = p.q_heads,
          .kv_heads = p.kv_heads,
          .head_dim = p.head_dim,
          .sq = sequence.sq,
          .sk = sequence.sk,
          .q = {p.q.token_stride, p.q.head_stride},
          .k = {p.k.token_stride, p.k.head_stride},
          .v = {p.v.token_stride, p.v.head_stride},
          .o = {p.o.token_stride, p.o.head_stride},
          .stats = p.lse != nullptr ? p.total_q : 0,
          .softmax_scale = p.softmax_scale};
}

fe::graph::Tensor_attributes Attributes(Uid uid, int heads, int64_t tokens, int d,
                                        const int64_t (&strides)[2]) {
  return fe::graph::Tensor_attributes()
      .set_uid(uid)
      .set_dim({1, heads, tokens, d})
      .set_stride({tokens * strides[0], strides[1], strides[0], 1});
}

// Null where cuDNN has no engine.
std::unique_ptr<fe::graph::Graph> Build(const Shape& shape, cudnnHandle_t handle) {
  auto graph = std::make_unique<fe::graph::Graph>();
  graph
      ->set_io_data_type(shape.dtype == DType::kBF16 ? fe::DataType_t::BFLOAT16
                                                     : fe::DataType_t::HALF)
      .set_intermediate_data_type(fe::DataType_t::FLOAT)
      .set_compute_data_type(fe::DataType_t::FLOAT);
  const int d = shape.head_dim;
  auto q = graph->tensor(Attributes(kQ, shape.q_heads, shape.sq, d, shape.q));
  auto k = graph->tensor(Attributes(kK, shape.kv_heads, shape.sk, d, shape.k));
  auto v = graph->tensor(Attributes(kV, shape.kv_heads, shape.sk, d, shape.v));
  auto options = fe::graph::SDPA_attributes()
                     .set_generate_stats(shape.stats != 0)
                     .set_attn_scale(shape.softmax_scale);
  // Bottom right is the same where there are as many queries as keys, but has fewer engines.
  shape.sq == shape.sk ? options.set_causal_mask(true) : options.set_causal_mask_bottom_right(true);
  auto [o, stats] = graph->sdpa(q, k, v, options);
  o->set_output(true)
      .set_uid(kO)
      .set_dim({1, shape.q_heads, shape.sq, d})
      .set_stride({shape.sq * shape.o[0], shape.o[1], shape.o[0], 1});
  if (shape.stats != 0) {
    stats->set_output(true)
        .set_uid(kStats)
        .set_data_type(fe::DataType_t::FLOAT)
        .set_dim({1, shape.q_heads, shape.sq, 1})
        .set_stride({shape.q_heads * shape.stats, shape.stats, 1, 1});
  }
  return graph->build(handle, {fe::HeurMode_t::A}).is_good() ? std::move(graph) : nullptr;
}

}  // namespace

struct Dense::State {
  struct Entry {
    Shape shape;
    int calls = 0;
    std::unique_ptr<fe::graph::Graph> graph;  // null: not built, or no engine
    int64_t workspace_bytes = 0;
  };

  CudaDevice& device;
  const int calls_before_plan;
  cudnnHandle_t handle = nullptr;  // null: no cuDNN
  std::list<Entry> entries;        // the last used first
  Buffer workspace;

  Entry& Find(const Shape& shape) {
    const auto found = std::find_if(entries.begin(), entries.end(),
                                    [&](const Entry& entry) { return entry.shape == shape; });
    if (found != entries.end()) {
      entries.splice(entries.begin(), entries, found);
      return entries.front();
    }
    entries.push_front({.shape = shape});
    if (entries.size() > kPlansMax) entries.pop_back();
    return entries.front();
  }

  // One more call of this shape: builds its plan when its time has come.
  const Entry& Call(const Shape& shape) {
    Entry& entry = Find(shape);
    if (entry.calls > calls_before_plan || entry.calls++ < calls_before_plan) return entry;
    try {
      entry.graph = Build(shape, handle);
      if (entry.graph) entry.workspace_bytes = entry.graph->get_workspace_size();
    } catch (const std::exception&) {  // a function that this cuDNN has not
      entry.graph = nullptr;
    }
    return entry;
  }
};

Dense::Dense(CudaDevice& device, int calls_before_plan)
    : state_(new State{device, calls_before_plan}) {
  fe::cudnn_dlhandle = dlopen(kLibrary, RTLD_NOW);
  if (fe::cudnn_dlhandle == nullptr) return;
  try {
    if (fe::detail::create_handle(&state_->handle) != CUDNN_STATUS_SUCCESS) {
      state_->handle = nullptr;
    }
  } catch (const std::exception&) {
    state_->handle = nullptr;
  }
}

Dense::~Dense() {
  state_->entries.clear();
  if (state_->handle != nullptr) fe::detail::destroy_handle(state_->handle);
}

bool Dense::Plan(const Problem& p) {
  State& state = *state_;
  if (state.handle == nullptr || p.pages != nullptr || p.dtype == DType::kF32) return false;
  if (p.sequences > 1 && p.total_q < kTokensMin * p.sequences) return false;
  // One head of a long prompt, some of its queries: each such call is of a shape of its own.
  if (p.sequences == 1 && p.q_heads == 1 && p.total_q < p.total_k) return false;
  if (static_cast<size_t>(p.sequences) > kPlansMax) return false;
  int64_t bytes = 0;
  bool all = true;
  for (int s = 0; s < p.sequences; ++s) {
    const State::Entry& entry = state.Call(ShapeOf(p, p.host_sequence[s]));
    all &= entry.graph != nullptr;
    bytes = std::max(bytes, entry.workspace_bytes);
  }
  if (!all) return false;
  if (static_cast<int64_t>(state.workspace.bytes()) < bytes) {
    state.workspace = Buffer();  // the old one goes first
    auto workspace = state.device.Allocate(static_cast<size_t>(bytes));
    if (!workspace.ok()) return false;  // ours needs less
    state.workspace = *std::move(workspace);
  }
  return true;
}

absl::Status Dense::Attend(const Problem& p, cudaStream_t stream) {
  State& state = *state_;
  const auto row = [&](const Tensor& tensor, int64_t token) -> void* {
    return static_cast<char*>(tensor.data) +
           token * tensor.token_stride * static_cast<int64_t>(SizeOf(p.dtype));
  };
  try {
    bool done = fe::detail::set_stream(state.handle, stream) == CUDNN_STATUS_SUCCESS;
    for (int s = 0; s < p.sequences && done; ++s) {
      const Sequence& sequence = p.host_sequence[s];
      std::unordered_map<int64_t, void*> tensors = {{kQ, row(p.q, sequence.q_begin)},
                                                    {kK, row(p.k, sequence.k_begin)},
                                                    {kV, row(p.v, sequence.k_begin)},
                                                    {kO, row(p.o, sequence.q_begin)}};
      if (p.lse != nullptr) tensors[kStats] = p.lse + sequence.q_begin;
      const State::Entry& entry = state.Find(ShapeOf(p, sequence));
      done = entry.graph != nullptr &&
             entry.graph->execute(state.handle, tensors, state.workspace.data()).is_good();
    }
    if (done) return absl::OkStatus();
  } catch (const std::exception& error) {
    return absl::InternalError(error.what());
  }
  const cudaError_t error = cudaPeekAtLastError();
  if (error != cudaSuccess) return state.device.Check(error, "dense");
  return absl::InternalError("cuDNN has not run its plan");
}

}  // namespace prefilld::cuda

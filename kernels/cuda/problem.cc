#include "kernels/cuda/problem.h"

#include <algorithm>
#include <bit>
#include <cstdint>
#include <limits>
#include <string>

#include "absl/strings/str_cat.h"
#include "kernels/cuda/attend/attend.h"
#include "kernels/cuda/methods.h"
#include "kernels/cuda/workspace.h"
#include "kernels/validate.h"

namespace prefilld::cuda {
namespace {

constexpr int64_t kStrideUnit = 8;  // elements: 16 bytes
// Elements from one token to the next: in bytes they fit 32 bits, as attend_sm80 has them.
constexpr int64_t kTokenStrideMax = (int64_t{1} << 30) - kStrideUnit;
constexpr int kGridMax = 65535;  // thread blocks of a grid in y and in z
constexpr DType kDTypes[] = {DType::kF32, DType::kBF16, DType::kF16};

size_t Aligned(size_t bytes) {
  return static_cast<size_t>(Workspace::Aligned(static_cast<int64_t>(bytes)));
}

template <typename View>
absl::Status CheckTensor(const char* name, const View& view) {
  if (reinterpret_cast<uintptr_t>(view.data) % 16 != 0) {
    return absl::InvalidArgumentError(absl::StrCat(name, " is not 16-byte aligned"));
  }
  if (view.token_stride % kStrideUnit != 0 || view.head_stride % kStrideUnit != 0) {
    return absl::InvalidArgumentError(absl::StrCat(
        name, " has strides of ", view.token_stride, " and ", view.head_stride,
        " elements between tokens and heads; multiples of ", kStrideUnit, " are needed"));
  }
  if (view.token_stride < 0 || view.token_stride > kTokenStrideMax) {
    return absl::InvalidArgumentError(absl::StrCat(name, " has a stride of ", view.token_stride,
                                                   " elements between tokens, not from 0 to ",
                                                   kTokenStrideMax));
  }
  return absl::OkStatus();
}

absl::Status CheckPages(const AttentionArgs& args) {
  const KvPages& pages = args.kv_pages;
  absl::Status status = ValidatePages(pages);
  if (!status.ok()) return status;
  if (reinterpret_cast<uintptr_t>(pages.arena) % 16 != 0) {
    return absl::InvalidArgumentError("arena is not 16-byte aligned");
  }
  if (pages.page_tokens % args.policy.block_size != 0) {
    return absl::UnimplementedError(absl::StrCat("page_tokens ", pages.page_tokens,
                                                 " with block_size ", args.policy.block_size,
                                                 " not supported (a multiple of block_size)"));
  }
  return absl::OkStatus();
}

std::span<const int> HeadDimsOf(DType dtype) {
  return dtype == DType::kF32 ? AttendF32HeadDims() : AttendSm80HeadDims();
}

template <typename View>
Tensor TensorOf(const View& view) {
  return {const_cast<void*>(view.data), view.token_stride, view.head_stride};
}

}  // namespace

absl::StatusOr<KernelSet> ChooseKernelSet(std::string_view asked, int capability) {
  const bool hopper = capability == 90;
  if (asked == "auto") return hopper ? KernelSet::kSm90 : KernelSet::kSm80;
  if (asked == "sm80") return KernelSet::kSm80;
  if (asked != "sm90") {
    return absl::InvalidArgumentError(
        absl::StrCat("cuda kernels \"", std::string(asked), "\" are unknown (auto, sm80, sm90)"));
  }
  if (hopper) return KernelSet::kSm90;
  return absl::InvalidArgumentError(
      absl::StrCat("cuda kernels sm90 run on compute capability 9.0 alone; this device has ",
                   capability / 10, ".", capability % 10));
}

const char* BackendName(KernelSet set) {
  return set == KernelSet::kSm90 ? "cuda-sm90" : "cuda-sm80";
}

bool RunsSm90(KernelSet set, const Problem& problem) {
  return set == KernelSet::kSm90 &&
         HasAttendSm90(problem.dtype, problem.head_dim, problem.block_size);
}

absl::Status CheckSupported(KernelSet set, const AttentionShape& shape,
                            const SparsityPolicy& policy) {
  absl::Status status = ValidateAttention(shape, policy,
                                          {.backend = BackendName(set),
                                           .dtypes = kDTypes,
                                           .head_dims = HeadDimsOf(shape.dtype),
                                           .methods = ServedMethods()});
  if (!status.ok()) return status;
  if (!HasAttendSm80(shape.dtype, shape.head_dim, policy.block_size) &&
      !HasAttendF32(shape.dtype, shape.head_dim, policy.block_size)) {
    return absl::UnimplementedError(absl::StrCat("head_dim ", shape.head_dim, " with block_size ",
                                                 policy.block_size, " not supported by ",
                                                 BackendName(set)));
  }
  const bool dense = policy.method == Method::kDense;
  if (!LaunchersOf(policy.method).has(shape.dtype, shape.head_dim) ||
      (!dense && !HasCapturedMass(shape.dtype, shape.head_dim))) {
    return absl::UnimplementedError(absl::StrCat("head_dim ", shape.head_dim, " with method ",
                                                 Name(policy.method), " not supported by ",
                                                 BackendName(set)));
  }
  constexpr int64_t kMax = std::numeric_limits<int32_t>::max();
  const std::vector<SequenceBlocks> blocks = SplitIntoBlocks(shape, policy.block_size);
  const int64_t rows = TotalRows(blocks);
  if (shape.total_k() > kMax || rows * shape.q_heads > kMax) {
    return absl::UnimplementedError(
        absl::StrCat(shape.total_k(), " keys and ", rows, " rows of blocks in ", shape.q_heads,
                     " heads not supported by ", BackendName(set), " (below 2^31 each)"));
  }
  if (shape.sequences() > kGridMax || shape.q_heads > kGridMax / 3) {  // three to a head at most
    return absl::UnimplementedError(absl::StrCat(
        shape.sequences(), " sequences and ", shape.q_heads, " query heads not supported by ",
        BackendName(set), " (up to ", kGridMax, " and ", kGridMax / 3, ")"));
  }
  int64_t longest = 0;
  for (const SequenceBlocks& sequence : blocks) longest = std::max(longest, sequence.q_blocks);
  // Tasks of joint's repair, 32 rows each or more: every sequence has as many as the longest.
  if ((longest + 31) / 32 * shape.sequences() * shape.q_heads > kMax) {
    return absl::UnimplementedError(absl::StrCat(
        shape.sequences(), " sequences of up to ", longest, " rows of blocks in ", shape.q_heads,
        " heads not supported by ", BackendName(set), " (below 2^36 in all)"));
  }
  return absl::OkStatus();
}

absl::Status CheckTensors(const AttentionArgs& args) {
  if (!args.per_head.of_head.empty()) {
    return absl::UnimplementedError("policies that differ per head not supported");
  }
  absl::Status status = CheckTensor("q", args.q);
  if (status.ok()) status = CheckTensor("o", args.o);
  if (status.ok() && args.kv_pages.arena != nullptr) return CheckPages(args);
  if (status.ok()) status = CheckTensor("k", args.k);
  if (status.ok()) status = CheckTensor("v", args.v);
  return status;
}

Problem MakeProblem(const AttentionArgs& args, std::vector<Sequence>* sequences) {
  const AttentionShape& shape = args.shape;
  Problem problem;
  problem.dtype = shape.dtype;
  problem.q_heads = shape.q_heads;
  problem.kv_heads = shape.kv_heads;
  problem.head_dim = shape.head_dim;
  problem.block_size = args.policy.block_size;
  problem.sequences = shape.sequences();
  problem.total_q = shape.total_q();
  problem.total_k = shape.total_k();
  const std::vector<SequenceBlocks> blocks = SplitIntoBlocks(shape, args.policy.block_size);
  problem.rows = TotalRows(blocks);
  problem.k_blocks_max = static_cast<int32_t>(MaxKeyBlocks(blocks));
  const KvPages& pages = args.kv_pages;
  int64_t page_begin = 0;
  sequences->clear();
  for (const SequenceBlocks& from : blocks) {
    const auto narrow = [](int64_t value) { return static_cast<int32_t>(value); };
    sequences->push_back({.q_begin = narrow(from.q_begin),
                          .k_begin = narrow(from.k_begin),
                          .sq = narrow(from.sq),
                          .sk = narrow(from.sk),
                          .prefix = narrow(from.prefix),
                          .first_q_block = narrow(from.first_q_block),
                          .q_blocks = narrow(from.q_blocks),
                          .k_blocks = narrow(from.k_blocks),
                          .row_begin = narrow(from.row_begin),
                          .page_begin = narrow(page_begin)});
    if (pages.arena != nullptr) page_begin += (from.sk + pages.page_tokens - 1) / pages.page_tokens;
    const Sequence& to = sequences->back();
    problem.q_blocks_max = std::max(problem.q_blocks_max, to.q_blocks);
    problem.sq_max = std::max(problem.sq_max, to.sq);
    problem.sk_max = std::max(problem.sk_max, to.sk);
  }
  problem.host_sequence = sequences->data();
  problem.softmax_scale = static_cast<float>(args.softmax_scale);
  problem.q = TensorOf(args.q);
  problem.k = TensorOf(args.k);
  problem.v = TensorOf(args.v);
  problem.o = TensorOf(args.o);
  if (pages.arena != nullptr) {
    problem.pages = pages.pages;
    problem.arena = pages.arena;
    problem.arena_pages = pages.arena_pages;
    problem.page_tokens = pages.page_tokens;
    problem.page_shift = std::countr_zero(static_cast<uint32_t>(pages.page_tokens));
  }
  problem.lse = args.lse;
  problem.count = args.index.count;
  problem.index = args.index.index;
  problem.index_stride = args.index.stride;
  return problem;
}

WorkspaceLayout LayOut(const Problem& problem, Method method) {
  size_t stage = AttendWorkspace(problem);
  const auto workspace = LaunchersOf(method).workspace;
  if (workspace != nullptr) stage = std::max(stage, workspace(problem));
  if (method != Method::kDense) stage = std::max(stage, CapturedMassWorkspace(problem));
  WorkspaceLayout layout;
  layout.stage = Aligned(static_cast<size_t>(problem.sequences) * sizeof(Sequence));
  layout.bytes = layout.stage + Aligned(stage);
  return layout;
}

}  // namespace prefilld::cuda

#include "kernels/cpu/selection.h"

#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/cpu/captured_mass.h"
#include "kernels/cpu/head.h"
#include "kernels/cpu/methods.h"

namespace prefilld::cpu {
namespace {

// The query heads whose policy is such.
template <typename Such>
std::vector<int> HeadsWhose(const AttentionArgs& args, Such such) {
  std::vector<int> heads;
  for (int h = 0; h < args.shape.q_heads; ++h) {
    if (such(PolicyOf(args, h))) heads.push_back(h);
  }
  return heads;
}

absl::Status CheckLengths(const AttentionArgs& args, Method method) {
  if (!RowOf(method).needs_equal_lengths) return absl::OkStatus();
  for (const SequenceBlocks& blocks : SplitIntoBlocks(args.shape, args.policy.block_size)) {
    if (blocks.prefix == 0) continue;
    return absl::UnimplementedError(absl::StrCat(Name(method),
                                                 " needs as many queries as keys; a sequence has ",
                                                 blocks.sq, " queries and ", blocks.sk, " keys"));
  }
  return absl::OkStatus();
}

}  // namespace

Selection::Selection(int threads) : maps_(std::make_unique<Maps>()), threads_(threads) {}
Selection::~Selection() = default;

absl::Status Selection::Estimate(const AttentionArgs& args) {
  for (const Method method : ServedMethods()) {
    const std::vector<int> heads =
        HeadsWhose(args, [&](const SparsityPolicy& policy) { return policy.method == method; });
    if (heads.empty()) continue;
    if (absl::Status status = CheckLengths(args, method); !status.ok()) return status;
    const auto estimate = FunctionsOf(method).estimate;
    if (estimate != nullptr) estimate(args, heads, threads_, maps_.get());
  }
  return absl::OkStatus();
}

absl::Status Selection::Select(const AttentionArgs& args) {
  const std::vector<int> all = HeadsWhose(args, [](const SparsityPolicy&) { return true; });
  ForEachHead(args, all, threads_, [&](const Head& head) {
    const SparsityPolicy& policy = PolicyOf(args, head.h);
    const HeadChoice choice = FunctionsOf(policy.method).select(head, policy, *maps_);
    args.report[head.place] = {
        .pattern = choice.pattern,
        .dense_reason = choice.dense_reason,
        .density = static_cast<float>(static_cast<double>(choice.blocks) /
                                      static_cast<double>(head.blocks.causal_blocks()))};
  });
  return absl::OkStatus();
}

absl::Status Selection::MeasureCapturedMass(const AttentionArgs& args) {
  // Dense attention captures everything, as the report already says.
  const std::vector<int> heads = HeadsWhose(args, [](const SparsityPolicy& policy) {
    return policy.method != Method::kDense && Measures(policy);
  });
  if (!heads.empty()) cpu::MeasureCapturedMass(args, heads, threads_, &maps_->probe);
  return absl::OkStatus();
}

}  // namespace prefilld::cpu

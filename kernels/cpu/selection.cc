#include "kernels/cpu/selection.h"

#include <numeric>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/cpu/captured_mass.h"
#include "kernels/cpu/head.h"
#include "kernels/cpu/methods.h"

namespace prefilld::cpu {
namespace {

std::vector<int> AllHeads(const AttentionArgs& args) {
  std::vector<int> heads(args.shape.q_heads);
  std::iota(heads.begin(), heads.end(), 0);
  return heads;
}

absl::Status CheckLengths(const AttentionArgs& args) {
  if (!RowOf(args.policy.method).needs_equal_lengths) return absl::OkStatus();
  for (const SequenceBlocks& blocks : SplitIntoBlocks(args.shape, args.policy.block_size)) {
    if (blocks.prefix == 0) continue;
    return absl::UnimplementedError(absl::StrCat(Name(args.policy.method),
                                                 " needs as many queries as keys; a sequence has ",
                                                 blocks.sq, " queries and ", blocks.sk, " keys"));
  }
  return absl::OkStatus();
}

}  // namespace

Selection::Selection(int threads) : maps_(std::make_unique<Maps>()), threads_(threads) {}
Selection::~Selection() = default;

absl::Status Selection::Estimate(const AttentionArgs& args) {
  if (absl::Status status = CheckLengths(args); !status.ok()) return status;
  const auto estimate = FunctionsOf(args.policy.method).estimate;
  if (estimate != nullptr) estimate(args, AllHeads(args), threads_, maps_.get());
  return absl::OkStatus();
}

absl::Status Selection::Select(const AttentionArgs& args) {
  ForEachHead(args, AllHeads(args), threads_, [&](const Head& head) {
    const HeadChoice choice = FunctionsOf(args.policy.method).select(head, args.policy, *maps_);
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
  if (args.policy.method != Method::kDense) {
    cpu::MeasureCapturedMass(args, AllHeads(args), threads_, &maps_->probe);
  }
  return absl::OkStatus();
}

}  // namespace prefilld::cpu

#include "kernels/cpu/selection.h"

#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/cpu/captured_mass.h"
#include "kernels/cpu/flexprefill.h"
#include "kernels/cpu/joint.h"
#include "kernels/cpu/probe.h"

namespace prefilld::cpu {
namespace {

// Calls body(sequence, blocks of it, query head) for all of them. Heads differ much in their work,
// so each is handed out as a thread comes free.
template <typename Body>
void ForEachHead(const AttentionArgs& args, int threads, Body body) {
  const std::vector<SequenceBlocks> sequences = SplitIntoBlocks(args.shape, args.policy.block_size);
  const int heads = args.shape.q_heads;
  const int64_t count = static_cast<int64_t>(sequences.size()) * heads;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t x = 0; x < count; ++x) {
    body(x / heads, sequences[x / heads], static_cast<int>(x % heads));
  }
}

JointMap ReadJointMap(const BlockMass& probe, const Head& head, int64_t s, int h) {
  JointMap map;
  for (int64_t t : probe.rows(s)) {
    map.query_block.push_back((head.blocks.prefix + t) / head.block_size);
  }
  probe.Read(s, h, &map.mass);
  return map;
}

}  // namespace

struct Selection::Maps {
  BlockMass probe;                          // joint; then the measurement
  std::vector<FlexPrefillMap> flexprefill;  // [sequences, q_heads]
};

Selection::Selection(int threads) : maps_(std::make_unique<Maps>()), threads_(threads) {}
Selection::~Selection() = default;

absl::Status Selection::Estimate(const AttentionArgs& args) {
  if (args.policy.method == Method::kJoint) {
    maps_->probe.Probe(args, ProbeRows, threads_);
  } else if (args.policy.method == Method::kFlexPrefill) {
    for (const SequenceBlocks& blocks : SplitIntoBlocks(args.shape, args.policy.block_size)) {
      if (blocks.prefix == 0) continue;
      return absl::UnimplementedError(
          absl::StrCat("flexprefill needs as many queries as keys; a sequence has ", blocks.sq,
                       " queries and ", blocks.sk, " keys (methods dense and joint take them)"));
    }
    maps_->flexprefill.resize(static_cast<size_t>(args.shape.sequences()) * args.shape.q_heads);
    ForEachHead(args, threads_, [&](int64_t s, const SequenceBlocks& blocks, int h) {
      maps_->flexprefill[s * args.shape.q_heads + h] =
          EstimateFlexPrefill(Head(args, blocks, h), args.policy);
    });
  }
  return absl::OkStatus();
}

absl::Status Selection::Select(const AttentionArgs& args) {
  ForEachHead(args, threads_, [&](int64_t s, const SequenceBlocks& blocks, int h) {
    const Head head(args, blocks, h);
    HeadReport& report = args.report[s * args.shape.q_heads + h];
    report = HeadReport();
    int64_t written = 0;
    if (args.policy.method == Method::kDense || blocks.sq == 0) {
      head.WriteCausal();
      return;
    }
    if (args.policy.method == Method::kFlexPrefill) {
      const FlexPrefillMap& map = maps_->flexprefill[s * args.shape.q_heads + h];
      const FlexPrefillChoice choice = SelectFlexPrefill(head, args.policy, map);
      report.pattern = choice.pattern;
      if (map.short_prompt) report.dense_reason = DenseReason::kShortPrompt;
      written = choice.blocks;
    } else {
      report.pattern = Pattern::kJoint;
      written = SelectJoint(head, args.policy, ReadJointMap(maps_->probe, head, s, h));
    }
    report.density = static_cast<float>(static_cast<double>(written) /
                                        static_cast<double>(blocks.causal_blocks()));
  });
  return absl::OkStatus();
}

absl::Status Selection::MeasureCapturedMass(const AttentionArgs& args) {
  // Dense attention captures everything, as the report already says.
  if (args.policy.method != Method::kDense) {
    cpu::MeasureCapturedMass(args, threads_, &maps_->probe);
  }
  return absl::OkStatus();
}

}  // namespace prefilld::cpu

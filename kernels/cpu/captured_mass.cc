#include "kernels/cpu/captured_mass.h"

#include <algorithm>

#include "kernels/cpu/head.h"

namespace prefilld::cpu {
namespace {

void MeasureHead(const AttentionArgs& args, const Head& head, const BlockMass& probe) {
  const SequenceBlocks& blocks = head.blocks;
  HeadReport* report = &args.report[head.place];
  std::vector<double> mass;
  probe.Read(blocks.sequence, head.h, &mass);
  const std::vector<int64_t>& rows = probe.rows(blocks.sequence);
  double sum = 0, least = 1;
  for (size_t r = 0; r < rows.size(); ++r) {
    const int64_t I = (blocks.prefix + rows[r]) / args.policy.block_size;
    const int64_t row = blocks.row_begin + I - blocks.first_q_block;
    const uint16_t* index = args.index.row_at(head.h, row);
    double share = 0;
    for (int32_t x = 0; x < args.index.count_at(head.h, row); ++x) {
      share += mass[r * blocks.k_blocks + index[x]];
    }
    sum += share;
    least = std::min(least, share);
  }
  const double mean = rows.empty() ? 1 : sum / static_cast<double>(rows.size());
  if (mean < PolicyOf(args, head.h).min_captured_mass && report->pattern != Pattern::kDense) {
    head.WriteCausal();
    *report = {.pattern = Pattern::kDense, .dense_reason = DenseReason::kMinCapturedMass};
    return;
  }
  report->captured_mass = static_cast<float>(mean);
  report->captured_mass_min = static_cast<float>(least);
}

}  // namespace

void MeasureCapturedMass(const AttentionArgs& args, std::span<const int> heads, int threads,
                         BlockMass* probe) {
  probe->Probe(args, heads, MeasuredRows, threads);
  ForEachHead(args, heads, threads, [&](const Head& head) { MeasureHead(args, head, *probe); });
}

}  // namespace prefilld::cpu

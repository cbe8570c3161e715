#include "kernels/cpu/captured_mass.h"

#include <algorithm>

#include "kernels/cpu/head.h"

namespace prefilld::cpu {
namespace {

void MeasureHead(const AttentionArgs& args, const SequenceBlocks& blocks, int64_t s, int h,
                 const BlockMass& probe, HeadReport* report) {
  std::vector<double> mass;
  probe.Read(s, h, &mass);
  const std::vector<int64_t>& rows = probe.rows(s);
  double sum = 0, least = 1;
  for (size_t r = 0; r < rows.size(); ++r) {
    const int64_t I = (blocks.prefix + rows[r]) / args.policy.block_size;
    const int64_t row = blocks.row_begin + I - blocks.first_q_block;
    const uint16_t* index = args.index.row_at(h, row);
    double share = 0;
    for (int32_t x = 0; x < args.index.count_at(h, row); ++x) {
      share += mass[r * blocks.k_blocks + index[x]];
    }
    sum += share;
    least = std::min(least, share);
  }
  const double mean = rows.empty() ? 1 : sum / static_cast<double>(rows.size());
  if (mean < args.policy.min_captured_mass && report->pattern != Pattern::kDense) {
    Head(args, blocks, h).WriteCausal();
    *report = {.pattern = Pattern::kDense, .dense_reason = DenseReason::kMinCapturedMass};
    return;
  }
  report->captured_mass = static_cast<float>(mean);
  report->captured_mass_min = static_cast<float>(least);
}

}  // namespace

void MeasureCapturedMass(const AttentionArgs& args, int threads, BlockMass* probe) {
  const std::vector<SequenceBlocks> sequences = SplitIntoBlocks(args.shape, args.policy.block_size);
  probe->Probe(args, MeasuredRows, threads);
  const int heads = args.shape.q_heads;
  const int64_t count = static_cast<int64_t>(sequences.size()) * heads;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t x = 0; x < count; ++x) {
    MeasureHead(args, sequences[x / heads], x / heads, static_cast<int>(x % heads), *probe,
                &args.report[x]);
  }
}

}  // namespace prefilld::cpu

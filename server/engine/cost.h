// What a job will cost on this device, learned: curves are measured at start-up and follow what is
// observed. Used to refuse deadlines that cannot be met, to order jobs by slack, and to run dense
// where the selection of blocks would cost more than it saves. Thread-safe but for the start-up.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <vector>

#include "kernels/attention.h"

namespace prefilld {

// Seconds that a kind of work takes, by its FLOPs: a power law between measured points, the rate of
// the first and of the last beyond them. One point is a constant rate.
class CostCurve {
 public:
  struct Point {
    double flops, seconds;
  };
  explicit CostCurve(double flops_per_second) : points_{{flops_per_second, 1}} {}

  // Before the first thread that asks. Points without time or work are left out; at least one
  // stays.
  void Set(std::vector<Point> points);
  double Seconds(double flops) const;
  // Moves the rate of the whole curve by a tenth towards what was seen. What is much shorter than
  // the first measured point tells of overheads, not of a rate, and is not learned.
  void Observe(double flops, double seconds);
  // The whole curve is at least as fast as this says, which was seen.
  void NotSlowerThan(const Point& seen);

 private:
  double Measured(double flops) const;

  std::vector<Point> points_;     // ascending
  double least_flops_ = 0;        // that teach
  std::atomic<double> speed_{1};  // observed over measured rate
};

class CostModel {
 public:
  // FLOPs of one call of the stages over all its sequences.
  struct Work {
    double dense = 0;      // QK and PV over every visible key
    double select = 0;     // probes and measurement
    int64_t k_blocks = 0;  // of the longest sequence, 128 tokens each
  };
  static Work WorkOf(int q_heads, int head_dim, int64_t sq, int64_t sk);
  static Work WorkOf(const AttentionShape& shape);

  // Share of the causal blocks that joint at gamma .9 keeps in a prompt of n blocks of keys: a fit
  // to measured prompts (n = 60: .29, n = 1024: .14, synthetic), corrected by what is observed.
  double PredictedDensity(int64_t k_blocks) const;

  double DenseSeconds(const Work& work) const { return dense_.Seconds(work.dense); }
  double SparseSeconds(const Work& work, double density) const {  // stage 3 alone
    return sparse_.Seconds(work.dense * density);
  }
  double SelectSeconds(const Work& work) const { return select_.Seconds(work.select); }
  // Seconds of one layer's linear part: per token and per weight.
  double LinearSeconds(int64_t tokens, int64_t layer_weights) const;

  // How attention will be run: as one of the two, or as whichever is predicted to be faster.
  enum class Choice { kDense, kSparse, kOpen };
  // Seconds of all stages, by the predicted density.
  double AttentionSeconds(const Work& work, Choice choice) const;

  // Before selecting, by the predicted density; and after, by the one that was found. Faster means
  // by a margin: predictions are not exact, and a tie is dense.
  bool SparseIsFaster(const Work& work) const;
  bool SparseIsFaster(const Work& work, double density) const;
  // Before selecting, where like work was found to have this density.
  bool SelectingIsFaster(const Work& work, double density) const;
  // Whether to select where the prediction says dense, because earlier prompts kept much: this one
  // may keep less. True as seldom as it takes for tries in vain to cost half a percent on the
  // average.
  bool WorthATry(const Work& work);

  // How many times as long as the curves say work of this dtype takes: they are of the dtypes that
  // a GPU computes on tensor cores. What takes longer is not learned from. Before the first thread
  // that asks.
  void SetSlowness(DType dtype, double times) { slowness_[static_cast<size_t>(dtype)] = times; }
  double Slowness(DType dtype) const { return slowness_[static_cast<size_t>(dtype)]; }
  bool LearnsFrom(DType dtype) const { return Slowness(dtype) == 1; }

  void SetCurves(std::vector<CostCurve::Point> dense, std::vector<CostCurve::Point> sparse,
                 std::vector<CostCurve::Point> select);
  void SetLinear(const CostCurve::Point& point) { linear_flops_ = point.flops / point.seconds; }
  void NotSlowerThan(const CostCurve::Point& dense, const CostCurve::Point& sparse,
                     const CostCurve::Point& select) {
    dense_.NotSlowerThan(dense);
    sparse_.NotSlowerThan(sparse);
    select_.NotSlowerThan(select);
  }
  void LinearNotSlowerThan(const CostCurve::Point& seen) {
    linear_flops_ = std::max(linear_flops_.load(), seen.flops / seen.seconds);
  }
  void ObserveDense(const Work& work, double seconds) { dense_.Observe(work.dense, seconds); }
  void ObserveSparse(const Work& work, double density, double seconds) {
    sparse_.Observe(work.dense * density, seconds);
  }
  void ObserveSelect(const Work& work, double seconds) { select_.Observe(work.select, seconds); }
  void ObserveLinear(int64_t tokens, int64_t layer_weights, double seconds);
  void ObserveDensity(int64_t k_blocks, double density);

 private:
  // Selection and stage 3 at this density.
  double SelectedSeconds(const Work& work, double density) const {
    return SelectSeconds(work) + SparseSeconds(work, density);
  }

  std::array<double, 3> slowness_{1, 1, 1};  // by DType
  CostCurve dense_{5e10}, sparse_{5e10}, select_{2e10};
  std::atomic<double> linear_flops_{5e10};  // per second
  std::atomic<double> density_ratio_{1};    // observed over the fit
  std::atomic<double> tries_{0};            // whole ones may be made
};

}  // namespace prefilld

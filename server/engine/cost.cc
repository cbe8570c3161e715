#include "server/engine/cost.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

namespace prefilld {
namespace {

// FLOPs of dense causal attention of one sequence: QK and PV over the visible keys.
double AttentionFlops(int q_heads, int head_dim, int64_t sq, int64_t sk) {
  const double prefix = static_cast<double>(sk - sq);
  const double visible =
      static_cast<double>(sq) * prefix + 0.5 * static_cast<double>(sq) * (sq + 1.0);
  return 4.0 * q_heads * head_dim * visible;
}

// Selection probes 64 rows and measures the captured mass on 64 more, each against every key.
double SelectFlops(int q_heads, int head_dim, int64_t sk) {
  return 2.0 * 128 * q_heads * head_dim * static_cast<double>(sk);
}

constexpr double kAny = std::numeric_limits<double>::infinity();

// Goes a share of the way to what was seen, which counts as `times` the value at most, and as that
// fraction of it at least. What is no number above zero was not seen.
void Follow(std::atomic<double>& value, double seen, double share, double times) {
  if (!std::isfinite(seen) || seen <= 0) return;
  const double old = value.load(std::memory_order_relaxed);
  const double near = std::clamp(seen, old / times, old * times);
  value.store((1 - share) * old + share * near, std::memory_order_relaxed);
}

constexpr double kMargin = 0.97;       // of dense: what sparse must stay below
constexpr double kTriesShare = 0.005;  // of the time of dense: what tries may cost

double Fit(int64_t k_blocks) { return std::min(1.0, 0.14 + 9.0 / static_cast<double>(k_blocks)); }

}  // namespace

void CostCurve::Set(std::vector<Point> points) {
  std::erase_if(points, [](const Point& point) { return point.flops <= 0 || point.seconds <= 0; });
  if (points.empty()) return;
  std::sort(points.begin(), points.end(),
            [](const Point& a, const Point& b) { return a.flops < b.flops; });
  points_ = std::move(points);
  least_flops_ = points_.front().flops / 4;
  speed_ = 1;
}

double CostCurve::Measured(double flops) const {
  const auto above = std::find_if(points_.begin(), points_.end(),
                                  [flops](const Point& point) { return point.flops >= flops; });
  if (above == points_.begin() || above == points_.end()) {
    const Point& end = above == points_.end() ? points_.back() : points_.front();
    return end.seconds * flops / end.flops;
  }
  const Point &low = above[-1], &high = *above;
  const double share = std::log(flops / low.flops) / std::log(high.flops / low.flops);
  return low.seconds * std::pow(high.seconds / low.seconds, share);
}

double CostCurve::Seconds(double flops) const {
  return Measured(flops) / speed_.load(std::memory_order_relaxed);
}

void CostCurve::Observe(double flops, double seconds) {
  if (flops < least_flops_) return;
  // Once in a while a call takes many times as long: it made a plan, or the device did other work.
  Follow(speed_, Measured(flops) / seconds, 0.1, 2);
}

void CostCurve::NotSlowerThan(const Point& seen) {
  speed_ = std::max(speed_.load(), Measured(seen.flops) / seen.seconds);
}

CostModel::Work CostModel::WorkOf(int q_heads, int head_dim, int64_t sq, int64_t sk) {
  return {.dense = AttentionFlops(q_heads, head_dim, sq, sk),
          .select = SelectFlops(q_heads, head_dim, sk),
          .k_blocks = (sk + 127) / 128};
}

CostModel::Work CostModel::WorkOf(const AttentionShape& shape) {
  Work sum;
  for (int s = 0; s < shape.sequences(); ++s) {
    const Work one =
        WorkOf(shape.q_heads, shape.head_dim, shape.cu_seqlens_q[s + 1] - shape.cu_seqlens_q[s],
               shape.cu_seqlens_k[s + 1] - shape.cu_seqlens_k[s]);
    sum.dense += one.dense;
    sum.select += one.select;
    sum.k_blocks = std::max(sum.k_blocks, one.k_blocks);
  }
  return sum;
}

double CostModel::PredictedDensity(int64_t k_blocks) const {
  return std::clamp(Fit(k_blocks) * density_ratio_.load(std::memory_order_relaxed), 0.01, 1.0);
}

double CostModel::LinearSeconds(int64_t tokens, int64_t layer_weights) const {
  return 2.0 * static_cast<double>(tokens) * static_cast<double>(layer_weights) / linear_flops_;
}

double CostModel::AttentionSeconds(const Work& work, Choice choice) const {
  if (choice == Choice::kDense) return DenseSeconds(work);
  const double sparse = SelectedSeconds(work, PredictedDensity(work.k_blocks));
  return choice == Choice::kSparse ? sparse : std::min(sparse, DenseSeconds(work));
}

bool CostModel::SparseIsFaster(const Work& work) const {
  return SelectingIsFaster(work, PredictedDensity(work.k_blocks));
}

// Where all blocks are kept nothing is saved, whatever the curves say: one call that was disturbed
// while they were measured may have bent them.
bool CostModel::SparseIsFaster(const Work& work, double density) const {
  return density < 1 && SparseSeconds(work, density) < kMargin * DenseSeconds(work);
}

bool CostModel::SelectingIsFaster(const Work& work, double density) const {
  return density < 1 && SelectedSeconds(work, density) < kMargin * DenseSeconds(work);
}

bool CostModel::WorthATry(const Work& work) {
  const double select = SelectSeconds(work), dense = DenseSeconds(work);
  if (SelectedSeconds(work, Fit(work.k_blocks)) >= kMargin * dense) return false;
  const double tries = tries_.load(std::memory_order_relaxed) + kTriesShare * dense / select;
  tries_.store(tries >= 1 ? 0 : tries, std::memory_order_relaxed);
  return tries >= 1;
}

void CostModel::SetCurves(std::vector<CostCurve::Point> dense, std::vector<CostCurve::Point> sparse,
                          std::vector<CostCurve::Point> select) {
  dense_.Set(std::move(dense));
  sparse_.Set(std::move(sparse));
  select_.Set(std::move(select));
}

void CostModel::ObserveLinear(int64_t tokens, int64_t layer_weights, double seconds) {
  const double flops = 2.0 * static_cast<double>(tokens) * static_cast<double>(layer_weights);
  Follow(linear_flops_, flops / seconds, 0.1, kAny);
}

// Half way at once: prompts that follow each other are alike, and a wrong guess costs a selection.
void CostModel::ObserveDensity(int64_t k_blocks, double density) {
  Follow(density_ratio_, density / Fit(k_blocks), 0.5, kAny);
}

}  // namespace prefilld

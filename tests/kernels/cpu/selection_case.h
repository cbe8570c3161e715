// Seeded inputs of attention with their memory, for the tests of selection and of the reference.
#pragma once

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "kernels/attention.h"
#include "kernels/cpu/reference.h"
#include "kernels/cpu/selection.h"

namespace prefilld::cpu {

enum class Family { kRandom, kFaint, kSink, kBand, kNeedle, kZero, kFar };
inline constexpr Family kFamilies[] = {Family::kRandom, Family::kFaint,
                                       Family::kSink,   Family::kBand,
                                       Family::kNeedle, Family::kZero};  // but kFar
inline constexpr int64_t kLengths[] = {1, 127, 128, 129, 300, 1000, 2049, 4097};

inline std::string Describe(Family family, int64_t length, DType dtype, double gamma) {
  constexpr const char* kNames[] = {"random", "faint", "sink", "band", "needle", "zero", "far"};
  return std::string(kNames[static_cast<int>(family)]) + " S=" + std::to_string(length) + " " +
         Name(dtype) + " gamma=" + std::to_string(gamma);
}

struct CaseOptions {
  Family family = Family::kRandom;
  DType dtype = DType::kF32;  // or kBF16
  int q_heads = 4, kv_heads = 2, head_dim = 64;
  std::vector<int64_t> sq = {1000}, sk = {1000};  // one a sequence
  int64_t band_delta = 70;
  uint32_t seed = 1;
};

// q [total_q, q_heads, d], k and v [total_k, kv_heads, d], a block index and reports.
class Case {
 public:
  explicit Case(const CaseOptions& options) : options_(options) {
    shape_ = {.dtype = options.dtype,
              .q_heads = options.q_heads,
              .kv_heads = options.kv_heads,
              .head_dim = options.head_dim,
              .cu_seqlens_q = {0},
              .cu_seqlens_k = {0}};
    for (int64_t sq : options.sq) shape_.cu_seqlens_q.push_back(shape_.total_q() + sq);
    for (int64_t sk : options.sk) shape_.cu_seqlens_k.push_back(shape_.total_k() + sk);
    q_.resize(shape_.total_q() * options.q_heads * options.head_dim);
    k_.resize(shape_.total_k() * options.kv_heads * options.head_dim);
    v_.resize(k_.size());
    Fill();
  }

  // Room for what a policy of this block size selects. The views point into this case.
  AttentionArgs Args(const SparsityPolicy& policy) {
    const auto sequences = SplitIntoBlocks(shape_, policy.block_size);
    const int64_t rows = TotalRows(sequences), stride = MaxKeyBlocks(sequences);
    count_.assign(shape_.q_heads * rows, -1);
    index_.assign(shape_.q_heads * rows * stride, 0xffff);
    report_.assign(sequences.size() * shape_.q_heads, HeadReport());
    AttentionArgs args;
    args.shape = shape_;
    args.policy = policy;
    args.softmax_scale = 1 / std::sqrt(static_cast<double>(shape_.head_dim));
    args.q = View(q_, &q_narrow_, shape_.q_heads);
    args.k = View(k_, &k_narrow_, shape_.kv_heads);
    args.v = View(v_, &v_narrow_, shape_.kv_heads);
    args.index = {count_.data(), index_.data(), rows, stride};
    args.report = report_.data();
    return args;
  }

  const AttentionShape& shape() const { return shape_; }
  std::vector<float>& q() { return q_; }
  std::vector<float>& k() { return k_; }
  std::vector<float>& v() { return v_; }

 private:
  ConstHeadsView View(const std::vector<float>& wide, std::vector<uint16_t>* narrow,
                      int64_t heads) const {
    const int64_t d = shape_.head_dim;
    if (shape_.dtype == DType::kF32) return {wide.data(), heads * d, d};
    narrow->clear();
    for (float x : wide) {
      const uint32_t bits = std::bit_cast<uint32_t>(x);
      narrow->push_back(static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16));
    }
    return {narrow->data(), heads * d, d};
  }

  float* Q(int64_t t, int h) { return &q_[(t * shape_.q_heads + h) * shape_.head_dim]; }
  float* K(int64_t t, int g) { return &k_[(t * shape_.kv_heads + g) * shape_.head_dim]; }

  void Fill() {
    if (options_.family == Family::kZero) return;
    std::mt19937 rng(options_.seed);
    std::normal_distribution<float> normal;
    const bool quiet = options_.family == Family::kBand || options_.family == Family::kFaint;
    const float noise = quiet ? 0.2f : 1.0f;
    for (auto* x : {&q_, &k_}) {
      for (float& value : *x) value = noise * normal(rng);
    }
    for (float& value : v_) value = normal(rng);
    for (int s = 0; s < shape_.sequences(); ++s) FillSequence(s, &rng);
  }

  // Far: all keys have a large part in common, as a projection's bias gives them one; the logits of
  // a query lie around 150, 0 or -150. Faint: random with logits near zero, which pooled attention
  // predicts well. Sink: the first four keys answer a direction that all queries share. Needle:
  // sixteen random keys do. Band: key t - delta answers query t, by rotary phases.
  void FillSequence(int s, std::mt19937* rng) {
    const int64_t q0 = shape_.cu_seqlens_q[s], k0 = shape_.cu_seqlens_k[s];
    const int64_t sq = shape_.cu_seqlens_q[s + 1] - q0, sk = shape_.cu_seqlens_k[s + 1] - k0;
    const int d = shape_.head_dim;
    if (options_.family == Family::kBand) {
      for (int c = 0; c < d / 2; ++c) {
        const double w = 3.0 * std::pow(1000.0, -2.0 * c / d);
        const auto add = [&](float* x, double phase, float amount) {
          x[c] += amount * static_cast<float>(std::cos(w * phase));
          x[c + d / 2] += amount * static_cast<float>(std::sin(w * phase));
        };
        for (int64_t t = 0; t < sq; ++t) {
          for (int h = 0; h < shape_.q_heads; ++h) {
            add(Q(q0 + t, h), static_cast<double>(sk - sq + t - options_.band_delta), 6);
          }
        }
        for (int64_t t = 0; t < sk; ++t) {
          for (int g = 0; g < shape_.kv_heads; ++g) add(K(k0 + t, g), static_cast<double>(t), 1);
        }
      }
      return;
    }
    if (options_.family == Family::kRandom || options_.family == Family::kFaint) return;
    if (options_.family == Family::kFar) {
      const float share = 150 * std::sqrt(static_cast<float>(d)) / 40;
      for (int64_t t = 0; t < sq; ++t) {
        for (int h = 0; h < shape_.q_heads; ++h) {
          Q(q0 + t, h)[5] += share * static_cast<float>((t / 7 + h) % 3 - 1);
        }
      }
      for (int64_t t = 0; t < sk; ++t) {
        for (int g = 0; g < shape_.kv_heads; ++g) K(k0 + t, g)[5] += 40;
      }
      return;
    }
    for (int64_t t = 0; t < sq; ++t) {
      for (int h = 0; h < shape_.q_heads; ++h) Q(q0 + t, h)[3] += 4;
    }
    const bool sink = options_.family == Family::kSink;
    for (int64_t x = 0; x < (sink ? 4 : 16); ++x) {
      const int64_t t = sink ? x : static_cast<int64_t>((*rng)() % sk);
      for (int g = 0; g < shape_.kv_heads && t < sk; ++g) K(k0 + t, g)[3] += 14;
    }
  }

  CaseOptions options_;
  AttentionShape shape_;
  std::vector<float> q_, k_, v_;
  std::vector<uint16_t> q_narrow_, k_narrow_, v_narrow_;
  std::vector<int32_t> count_;
  std::vector<uint16_t> index_;
  std::vector<HeadReport> report_;
};

// A copy of what the stages wrote: rows[h * rows of blocks + row], and the reports.
struct Selected {
  std::vector<std::vector<int32_t>> rows;
  std::vector<HeadReport> report;
};

inline Selected Copy(const AttentionArgs& args) {
  Selected selected;
  for (int h = 0; h < args.shape.q_heads; ++h) {
    for (int64_t row = 0; row < args.index.rows; ++row) {
      const uint16_t* begin = args.index.row_at(h, row);
      selected.rows.emplace_back(begin, begin + args.index.count_at(h, row));
    }
  }
  selected.report.assign(args.report, args.report + args.shape.sequences() * args.shape.q_heads);
  return selected;
}

inline Selected Select(Case* input, const SparsityPolicy& policy, int threads = 2) {
  AttentionArgs args = input->Args(policy);
  Selection selection(threads);
  EXPECT_TRUE(selection.Estimate(args).ok());
  EXPECT_TRUE(selection.Select(args).ok());
  if (policy.measure_captured_mass) {
    EXPECT_TRUE(selection.MeasureCapturedMass(args).ok());
  }
  return Copy(args);
}

inline Selected ReferenceSelect(Case* input, const SparsityPolicy& policy) {
  AttentionArgs args = input->Args(policy);
  ReferenceSelectBlocks(args);
  if (policy.measure_captured_mass) ReferenceMeasureCapturedMass(args);
  return Copy(args);
}

// Rows ascending, unique, J <= I, holding 0 and I.
inline void ExpectWellFormed(const Case& input, const SparsityPolicy& policy,
                             const Selected& selected) {
  const auto sequences = SplitIntoBlocks(input.shape(), policy.block_size);
  const int64_t rows = TotalRows(sequences);
  for (int h = 0; h < input.shape().q_heads; ++h) {
    for (const SequenceBlocks& blocks : sequences) {
      for (int64_t i = 0; i < blocks.q_blocks; ++i) {
        const std::vector<int32_t>& row = selected.rows[h * rows + blocks.row_begin + i];
        ASSERT_FALSE(row.empty());
        EXPECT_EQ(row.front(), 0);
        EXPECT_EQ(row.back(), blocks.first_q_block + i);
        for (size_t x = 1; x < row.size(); ++x) ASSERT_LT(row[x - 1], row[x]);
      }
    }
  }
}

inline void ExpectSame(const Selected& a, const Selected& b) {
  ASSERT_EQ(a.rows.size(), b.rows.size());
  for (size_t row = 0; row < a.rows.size(); ++row) {
    ASSERT_EQ(a.rows[row], b.rows[row]) << "row " << row << " of " << a.rows.size();
  }
  ASSERT_EQ(a.report.size(), b.report.size());
  for (size_t x = 0; x < a.report.size(); ++x) {
    EXPECT_EQ(a.report[x].pattern, b.report[x].pattern) << "head " << x;
    EXPECT_EQ(a.report[x].dense_reason, b.report[x].dense_reason) << "head " << x;
    EXPECT_FLOAT_EQ(a.report[x].density, b.report[x].density) << "head " << x;
    EXPECT_NEAR(a.report[x].captured_mass, b.report[x].captured_mass, 1e-5) << "head " << x;
    EXPECT_NEAR(a.report[x].captured_mass_min, b.report[x].captured_mass_min, 1e-5) << "head " << x;
  }
}

}  // namespace prefilld::cpu

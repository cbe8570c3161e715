// Heads of one call with policies of their own: each gets what it gets where all have its policy.
#include <gtest/gtest.h>

#include "kernels/cpu/cpu_backend.h"
#include "tests/kernels/cpu/selection_case.h"

namespace prefilld::cpu {
namespace {

constexpr int kHeads = 6;
const std::vector<SparsityPolicy> kPolicies = {
    {.method = Method::kJoint, .gamma = .5},
    {.method = Method::kDense},
    {.method = Method::kFlexPrefill, .gamma = .6, .measure_captured_mass = false},
    {.method = Method::kJoint, .gamma = .95, .max_budget_tokens = 256},
    {.method = Method::kFlexPrefill, .gamma = .9, .flexprefill = {.tau = .8}}};
const std::vector<uint16_t> kOfHead = {2, 0, 1, 3, 0, 4};

struct Outcome {
  Selected selected;
  std::vector<float> o;
};

// The whole call, through the waist.
Outcome Compute(AttentionArgs args) {
  CpuBackend backend(/*threads=*/2);
  Outcome outcome;
  outcome.o.resize(args.shape.total_q() * args.shape.q_heads * args.shape.head_dim);
  args.o = {outcome.o.data(), args.shape.q_heads * args.shape.head_dim, args.shape.head_dim};
  EXPECT_TRUE(backend.EstimatePattern(args, {}).ok());
  EXPECT_TRUE(backend.SelectBlocks(args, {}).ok());
  if (Measures(args)) {
    EXPECT_TRUE(backend.MeasureCapturedMass(args, {}).ok());
  }
  EXPECT_TRUE(backend.Attend(args, {}).ok());
  outcome.selected = Copy(args);
  return outcome;
}

AttentionArgs Mixed(Case* input, const std::vector<SparsityPolicy>& policies,
                    const std::vector<uint16_t>& of_head) {
  AttentionArgs args = input->Args({.block_size = policies.front().block_size});
  args.per_head = {.policies = policies, .of_head = of_head};
  return args;
}

void ExpectHead(const AttentionShape& shape, int h, const Outcome& got, const Outcome& want) {
  const int64_t rows = static_cast<int64_t>(want.selected.rows.size()) / shape.q_heads;
  for (int64_t row = 0; row < rows; ++row) {
    EXPECT_EQ(got.selected.rows[h * rows + row], want.selected.rows[h * rows + row]) << row;
  }
  for (int s = 0; s < shape.sequences(); ++s) {
    const HeadReport& a = got.selected.report[s * shape.q_heads + h];
    const HeadReport& b = want.selected.report[s * shape.q_heads + h];
    EXPECT_EQ(a.pattern, b.pattern);
    EXPECT_EQ(a.dense_reason, b.dense_reason);
    EXPECT_EQ(a.density, b.density);
    EXPECT_EQ(a.captured_mass, b.captured_mass);
    EXPECT_EQ(a.captured_mass_min, b.captured_mass_min);
  }
  for (int64_t t = 0; t < shape.total_q(); ++t) {
    for (int c = 0; c < shape.head_dim; ++c) {
      const int64_t at = (t * shape.q_heads + h) * shape.head_dim + c;
      ASSERT_EQ(got.o[at], want.o[at]) << "token " << t;
    }
  }
}

TEST(HeadPolicies, EachHeadGetsWhatItGetsWhereAllHaveItsPolicy) {
  for (Family family : {Family::kRandom, Family::kSink}) {
    for (int block_size : {64, 128}) {
      Case input(
          {.family = family, .q_heads = kHeads, .kv_heads = 2, .sq = {200, 700}, .sk = {200, 700}});
      std::vector<SparsityPolicy> policies = kPolicies;
      for (SparsityPolicy& policy : policies) policy.block_size = block_size;
      const Outcome mixed = Compute(Mixed(&input, policies, kOfHead));
      for (int h = 0; h < kHeads; ++h) {
        SCOPED_TRACE(Describe(family, 700, DType::kF32, 0) + " head " + std::to_string(h));
        const Outcome uniform = Compute(input.Args(policies[kOfHead[h]]));
        ExpectHead(input.shape(), h, mixed, uniform);
      }
    }
  }
}

TEST(HeadPolicies, TheReferenceReadsThemAlike) {
  Case input({.family = Family::kNeedle, .q_heads = kHeads, .kv_heads = 2});
  const Outcome got = Compute(Mixed(&input, kPolicies, kOfHead));
  const AttentionArgs args = Mixed(&input, kPolicies, kOfHead);
  ReferenceSelectBlocks(args);
  const Selected want = Copy(args);
  for (size_t row = 0; row < want.rows.size(); ++row) {
    EXPECT_EQ(got.selected.rows[row], want.rows[row]) << row;
  }
}

TEST(HeadPolicies, OnlyThoseThatAskAreMeasuredAndBoundByAMinimum) {
  Case input({.family = Family::kNeedle, .q_heads = 4, .sq = {2000}, .sk = {2000}});
  const std::vector<SparsityPolicy> policies = {
      {.method = Method::kFlexPrefill, .gamma = .5, .measure_captured_mass = false},
      {.method = Method::kFlexPrefill,
       .gamma = .5,
       .measure_captured_mass = false,
       .min_captured_mass = .9999}};
  const Outcome got = Compute(Mixed(&input, policies, {0, 1, 0, 1}));
  for (int h = 0; h < 4; ++h) {
    const HeadReport& report = got.selected.report[h];
    EXPECT_EQ(report.dense_reason, h % 2 ? DenseReason::kMinCapturedMass : DenseReason::kNone);
    EXPECT_EQ(report.captured_mass, 1) << "of a dense head, or not measured";
    EXPECT_EQ(report.pattern == Pattern::kDense, h % 2 == 1);
  }
}

TEST(HeadPolicies, AMethodThatNeedsEqualLengthsIsRefusedForAnyHead) {
  Case input({.q_heads = kHeads, .kv_heads = 2, .sq = {100}, .sk = {400}});
  CpuBackend backend(1);
  const absl::Status status =
      backend.EstimatePattern(Mixed(&input, kPolicies, {0, 0, 0, 2, 0, 0}), {});
  EXPECT_EQ(status.code(), absl::StatusCode::kUnimplemented) << status;
  EXPECT_TRUE(backend.EstimatePattern(Mixed(&input, kPolicies, {0, 0, 0, 1, 3, 0}), {}).ok());
}

TEST(HeadPolicies, AdmissionLooksAtEachAndAtWhatTheyShare) {
  Case square({.q_heads = kHeads, .kv_heads = 2});
  Case prefix({.q_heads = kHeads, .kv_heads = 2, .sq = {100}, .sk = {400}});
  const auto refusal = [](Case& input, const std::vector<SparsityPolicy>& policies,
                          const std::vector<uint16_t>& of_head) {
    return CpuBackend(1)
        .SupportsPerHead(input.shape(), {.policies = policies, .of_head = of_head})
        .ToString();
  };
  const auto starts = [](const std::string& text, const std::string& start) {
    return text.starts_with(start);
  };
  EXPECT_EQ(refusal(square, kPolicies, kOfHead), "OK");
  EXPECT_PRED2(starts, refusal(prefix, kPolicies, kOfHead), "UNIMPLEMENTED: method flexprefill");
  EXPECT_EQ(refusal(square, kPolicies, {0, 1}),
            "INVALID_ARGUMENT: policies of 2 heads for 6 query heads");
  EXPECT_EQ(refusal(square, kPolicies, {0, 1, 2, 3, 4, 5}),
            "INVALID_ARGUMENT: a head has policy 5 of 5");
  std::vector<SparsityPolicy> policies = kPolicies;
  policies.back().block_size = 64;
  EXPECT_PRED2(starts, refusal(square, policies, kOfHead),
               "INVALID_ARGUMENT: block_size 128 and 64 in one call");
  policies.back().gamma = 2;
  EXPECT_PRED2(starts, refusal(square, policies, kOfHead), "INVALID_ARGUMENT: gamma 2");
}

}  // namespace
}  // namespace prefilld::cpu

#include "server/rpc/validate_policy.h"

#include <gtest/gtest.h>

#include <functional>
#include <limits>
#include <string>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "server/record/errors.h"

namespace prefilld {
namespace {

using Change = std::function<void(v1::SparsityPolicy&)>;

absl::StatusOr<ValidPolicy> Validate(const Change& change) {
  v1::SparsityPolicy proto;
  change(proto);
  return ValidatePolicy(proto);
}

// Clients name what they are told by the proto.
TEST(Patterns, HaveTheProtosNames) {
  ASSERT_EQ(std::size(kPatternNames), static_cast<size_t>(v1::Pattern_ARRAYSIZE));
  for (int i = 0; i < v1::Pattern_ARRAYSIZE; ++i) {
    EXPECT_EQ(absl::StrCat("PATTERN_", absl::AsciiStrToUpper(kPatternNames[i])),
              v1::Pattern_Name(static_cast<v1::Pattern>(i)));
  }
}

TEST(ValidatePolicy, NothingMeansJointWithDefaults) {
  const auto valid = Validate([](auto&) {});
  ASSERT_TRUE(valid.ok()) << valid.status();
  EXPECT_TRUE(valid->method_unspecified);
  EXPECT_EQ(valid->policy, SparsityPolicy());
  EXPECT_EQ(valid->policy.gamma, 0.9);
  EXPECT_TRUE(valid->policy.measure_captured_mass);
}

TEST(ValidatePolicy, MinBudgetDefaultsByMethod) {
  const auto flex = Validate([](auto& p) { p.set_method(v1::METHOD_FLEXPREFILL); });
  EXPECT_EQ(flex->policy.min_budget_tokens, 1024);
  EXPECT_FALSE(flex->method_unspecified);
  const auto zero = Validate([](auto& p) {
    p.set_method(v1::METHOD_FLEXPREFILL);
    p.set_min_budget_tokens(0);
  });
  EXPECT_EQ(zero->policy.min_budget_tokens, 0) << "zero is a value, not the default";
  EXPECT_EQ(Validate([](auto& p) { p.set_method(v1::METHOD_JOINT); })->policy.min_budget_tokens, 0);
  // A default above the caller's maximum is no contradiction of the caller's.
  EXPECT_TRUE(Validate([](auto& p) {
                p.set_method(v1::METHOD_FLEXPREFILL);
                p.set_max_budget_tokens(512);
              }).ok());
}

TEST(ValidatePolicy, MeasuresCapturedMassForJointOrOnRequest) {
  const auto measures = [](v1::Method method, v1::ReportLevel level) {
    return Validate([&](auto& p) {
             p.set_method(method);
             p.set_report_level(level);
           })
        ->policy.measure_captured_mass;
  };
  EXPECT_TRUE(measures(v1::METHOD_JOINT, v1::REPORT_LEVEL_UNSPECIFIED));
  EXPECT_FALSE(measures(v1::METHOD_FLEXPREFILL, v1::REPORT_LEVEL_UNSPECIFIED));
  EXPECT_FALSE(measures(v1::METHOD_JOINT, v1::REPORT_LEVEL_DENSITY));
  EXPECT_TRUE(measures(v1::METHOD_DENSE, v1::REPORT_LEVEL_CAPTURED_MASS));
}

TEST(ValidatePolicy, RefusesValuesOutOfRangeByField) {
  const double nan = std::numeric_limits<double>::quiet_NaN();
  const double inf = std::numeric_limits<double>::infinity();
  const std::pair<const char*, Change> cases[] = {
      {"sparsity.gamma", [&](auto& p) { p.set_gamma(nan); }},
      {"sparsity.gamma", [](auto& p) { p.set_gamma(0); }},
      {"sparsity.gamma", [](auto& p) { p.set_gamma(1); }},
      {"sparsity.gamma", [](auto& p) { p.set_gamma(2); }},
      {"sparsity.gamma", [&](auto& p) { p.set_gamma(-inf); }},
      {"sparsity.tau", [&](auto& p) { p.set_tau(nan); }},
      {"sparsity.tau", [](auto& p) { p.set_tau(-0.1); }},
      {"sparsity.tau", [](auto& p) { p.set_tau(1.1); }},
      {"sparsity.min_captured_mass", [&](auto& p) { p.set_min_captured_mass(nan); }},
      {"sparsity.min_captured_mass", [](auto& p) { p.set_min_captured_mass(1.5); }},
      {"sparsity.block_size", [](auto& p) { p.set_block_size(0); }},
      {"sparsity.block_size", [](auto& p) { p.set_block_size(32); }},
      {"sparsity.max_budget_tokens", [](auto& p) { p.set_max_budget_tokens(0); }},
      {"sparsity.max_budget_tokens", [](auto& p) { p.set_max_budget_tokens(UINT32_MAX); }},
      {"sparsity.min_budget_tokens", [](auto& p) { p.set_min_budget_tokens(UINT32_MAX); }},
      {"sparsity.min_budget_tokens",
       [](auto& p) {
         p.set_min_budget_tokens(200);
         p.set_max_budget_tokens(100);
       }},
      {"sparsity.method", [](auto& p) { p.set_method(static_cast<v1::Method>(77)); }},
      {"sparsity.report_level",
       [](auto& p) { p.set_report_level(static_cast<v1::ReportLevel>(9)); }},
  };
  for (const auto& [field, change] : cases) {
    const absl::Status status = Validate(change).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << field << ": " << status;
    EXPECT_EQ(FactsOf(status).field, field);
  }
  const absl::Status one = Validate([](auto& p) { p.set_gamma(1); }).status();
  EXPECT_NE(one.message().find("use method dense"), absl::string_view::npos) << one;
}

TEST(ValidatePolicy, ChecksValuesTheMethodDoesNotUse) {
  EXPECT_FALSE(Validate([](auto& p) {
                 p.set_method(v1::METHOD_DENSE);
                 p.set_gamma(5);
               }).ok());
}

TEST(ValidatePolicy, WhatIsNotServedYetIsUnimplementedAndSaysWhatIs) {
  const Change cases[] = {
      [](auto& p) { p.set_method(v1::METHOD_FLASHPREFILL); },
      [](auto& p) { p.set_method(v1::METHOD_MINFERENCE); },
      [](auto& p) { p.set_method(v1::METHOD_STREAMING); },
      [](auto& p) { p.set_alpha(0.5); },
      [](auto& p) { p.set_mean_correction(true); },
      [](auto& p) { p.add_head_overrides(); },
  };
  for (const auto& change : cases) {
    EXPECT_EQ(Validate(change).status().code(), absl::StatusCode::kUnimplemented);
  }
  const absl::Status status = Validate(cases[0]).status();
  EXPECT_NE(status.message().find("METHOD_JOINT"), absl::string_view::npos) << status;
}

}  // namespace
}  // namespace prefilld

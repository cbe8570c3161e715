// The closed table of methods: what each is called, needs and defaults to. Admission and dispatch
// search it, and beside it each backend's table of the method's functions
// (kernels/BACKEND/methods.h). A new method is a value, a row here and a row there.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace prefilld {

enum class Method : uint8_t { kDense, kFlexPrefill, kJoint };

struct MethodRow {
  Method method;
  const char* name;                  // as callers write it, and in messages
  int64_t min_budget_tokens = 0;     // where the caller names none
  bool needs_equal_lengths = false;  // as many queries as keys in every sequence
  bool measures_by_default = false;  // captured mass is reported unless the caller declines it
};
inline constexpr int64_t kFlexPrefillMinBudget = 1024;  // tokens, as published
inline constexpr MethodRow kMethodTable[] = {
    {.method = Method::kDense, .name = "dense"},
    {.method = Method::kFlexPrefill,
     .name = "flexprefill",
     .min_budget_tokens = kFlexPrefillMinBudget,
     .needs_equal_lengths = true},
    {.method = Method::kJoint, .name = "joint", .measures_by_default = true},
};

// What a request that leaves the method open gets. Dense may take its place where that is faster,
// so its cost is what is learned.
inline constexpr Method kOpenMethod = Method::kJoint;

// The row of a method in a table of rows with a `method`; null where it has none.
template <typename Row, size_t kRows>
constexpr const Row* FindRow(const Row (&table)[kRows], Method method) {
  for (const Row& row : table) {
    if (row.method == method) return &row;
  }
  return nullptr;
}
template <typename Row, size_t kRows>
constexpr std::array<Method, kRows> MethodsOf(const Row (&table)[kRows]) {
  std::array<Method, kRows> methods{};
  for (size_t i = 0; i < kRows; ++i) methods[i] = table[i].method;
  return methods;
}

constexpr const MethodRow& RowOf(Method method) { return *FindRow(kMethodTable, method); }
constexpr const char* Name(Method method) { return RowOf(method).name; }

// What a head was given; the values are those of reports and outputs.
enum class Pattern : uint8_t { kDense = 0, kVerticalSlash = 1, kQueryAware = 2, kJoint = 3 };
inline constexpr const char* kPatternNames[] = {"dense", "vertical_slash", "query_aware", "joint"};
constexpr const char* Name(Pattern pattern) { return kPatternNames[static_cast<int>(pattern)]; }

// ---- What a method alone reads of a policy (attention.h) --------------------------------------

struct FlexPrefillParameters {
  double tau = 0.1;  // heads whose JS distance is below it are query-aware

  bool operator==(const FlexPrefillParameters&) const = default;
};

}  // namespace prefilld

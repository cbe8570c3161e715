// Selection and measurement over paged keys: wherever a block lies in its page, the same bits as
// without pages.
#include <gtest/gtest.h>

#include <utility>

#include "tests/kernels/cuda/cuda_case.h"

namespace prefilld::cuda {
namespace {

class PagesOnGpu : public testing::Test {
 protected:
  void SetUp() override {
    if (!HasDevice()) GTEST_SKIP() << "no GPU";
  }

  // Runs `same` on inputs of the same values, contiguous and paged. FlexPrefill's sequences are as
  // long as their queries, others follow a prefix.
  template <typename Same>
  static void Compare(bool prefix, Same same) {
    for (int d : {64, 96, 128, 256}) {
      for (const auto& [block_size, page_tokens] :
           {std::pair{64, 64}, {64, 128}, {64, 512}, {128, 128}, {128, 256}, {128, 1024}}) {
        CaseOptions options{.head_dim = d,
                            .block_size = block_size,
                            .sq = {700, 1, 1500},
                            .sk = {900, 300, 1500},
                            .family = Family::kBand};
        if (!prefix) options.sk = options.sq;
        CudaCase contiguous(options);
        options.layout = Layout::kPaged;
        options.page_tokens = page_tokens;
        SCOPED_TRACE(Describe(options));
        CudaCase paged(options);
        same(&contiguous, &paged);
      }
    }
  }
};

TEST_F(PagesOnGpu, JointSelectsTheSame) {
  const SparsityPolicy policy{.method = Method::kJoint, .gamma = 0.9};
  Compare(true, [&](CudaCase* contiguous, CudaCase* paged) {
    ExpectSameSelection(contiguous->Select(policy), paged->Select(policy));
  });
}

// Both of its patterns: a threshold of 2 makes every head query-aware, 0 none.
TEST_F(PagesOnGpu, FlexPrefillSelectsTheSame) {
  for (double tau : {0.0, 0.1, 2.0}) {
    const SparsityPolicy policy{
        .method = Method::kFlexPrefill, .gamma = 0.9, .flexprefill = {.tau = tau}};
    Compare(false, [&](CudaCase* contiguous, CudaCase* paged) {
      ExpectSameSelection(contiguous->Select(policy), paged->Select(policy));
    });
  }
}

TEST_F(PagesOnGpu, DenseSelectsTheSame) {
  const SparsityPolicy policy{.method = Method::kDense};
  Compare(true, [&](CudaCase* contiguous, CudaCase* paged) {
    ExpectSameSelection(contiguous->Select(policy), paged->Select(policy));
  });
}

TEST_F(PagesOnGpu, CapturedMassIsTheSame) {
  Compare(true, [](CudaCase* contiguous, CudaCase* paged) {
    const CudaCase::Rows rows = contiguous->RandomRows(30);
    contiguous->SetIndex(rows);
    paged->SetIndex(rows);
    const Selected a = contiguous->MeasureCapturedMass({.min_captured_mass = 0.5});
    const Selected b = paged->MeasureCapturedMass({.min_captured_mass = 0.5});
    ExpectSameSelection(a, b);
    for (size_t x = 0; x < a.report.size(); ++x) {
      EXPECT_EQ(a.report[x].captured_mass, b.report[x].captured_mass) << "head " << x;
      EXPECT_EQ(a.report[x].captured_mass_min, b.report[x].captured_mass_min) << "head " << x;
    }
  });
}

}  // namespace
}  // namespace prefilld::cuda

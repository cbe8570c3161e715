// Dense attention by cuDNN on the GPU, against the oracle over every causal block.
#include "kernels/cuda/attend/dense.h"

#include <gtest/gtest.h>

#include <memory>
#include <vector>

#include "kernels/cuda/device/cuda_device.h"
#include "tests/kernels/cuda/cuda_case.h"

namespace prefilld::cuda {
namespace {

class DenseOnGpu : public testing::Test {
 protected:
  void SetUp() override {
    if (!HasDevice()) GTEST_SKIP() << "no GPU";
    auto device = CudaDevice::Open();
    ASSERT_TRUE(device.ok()) << device.status();
    device_ = *std::move(device);
    dense_ = std::make_unique<Dense>(*device_);
    const CudaCase probe({.sq = {1024}});
    if (!dense_->Plan(probe.problem())) GTEST_SKIP() << "no cuDNN";
  }

  // False where cuDNN has no engine.
  bool ExpectMatches(const CaseOptions& options) {
    SCOPED_TRACE(Describe(options));
    CudaCase input(options);
    if (!dense_->Plan(input.problem())) return false;
    for (int again = 0; again < 2; ++again) {
      input.PoisonOutput();
      EXPECT_TRUE(dense_->Attend(input.problem(), device_->stream({})).ok());
      EXPECT_CUDA_OK(cudaDeviceSynchronize());
      ExpectMatchesOracle(input, input.RandomRows(100), input.GetOutput());
    }
    return true;
  }

  std::unique_ptr<CudaDevice> device_;
  std::unique_ptr<Dense> dense_;
};

TEST_F(DenseOnGpu, MatchesTheOracle) {
  for (DType dtype : {DType::kBF16, DType::kF16}) {
    for (int d : {64, 128}) {
      for (int64_t tokens : {128, 300, 1000}) {
        EXPECT_TRUE(ExpectMatches({.dtype = dtype, .head_dim = d, .sq = {tokens}}));
      }
    }
  }
}

// Where there is an engine, it is right; our kernel takes the rest.
TEST_F(DenseOnGpu, MatchesTheOracleWhereItHasAnEngine) {
  for (int d : {96, 256}) ExpectMatches({.head_dim = d, .sq = {500}});
  for (int64_t tokens : {1, 2, 63, 129}) ExpectMatches({.sq = {tokens}});
  ExpectMatches({.sq = {300}, .sk = {1000}});
  ExpectMatches({.sq = {1}, .sk = {1000}});
  ExpectMatches({.sq = {300}, .layout = Layout::kHeads});
  ExpectMatches({.q_heads = 7, .kv_heads = 1, .sq = {300}});
  ExpectMatches({.sq = {1200, 1100}, .sk = {1200, 1500}});
}

TEST_F(DenseOnGpu, RefusesPages) {
  const CudaCase input({.sq = {1024}, .layout = Layout::kPaged});
  EXPECT_FALSE(dense_->Plan(input.problem()));
}

}  // namespace
}  // namespace prefilld::cuda

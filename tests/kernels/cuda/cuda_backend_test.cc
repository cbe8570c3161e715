// The backend and its device through their interfaces: the whole of a call.
#include "kernels/cuda/cuda_backend.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "kernels/backend.h"

namespace prefilld::cuda {
namespace {

std::unique_ptr<Backend> Gpu(const char* kernels = "auto") {
  auto backend = CreateBackend("cuda", 1, kernels);
  return backend.ok() ? *std::move(backend) : nullptr;
}

class CudaBackendOnGpu : public testing::Test {
 protected:
  void SetUp() override {
    backend_ = Gpu();
    if (!backend_) GTEST_SKIP() << "no GPU";
  }
  Buffer Take(size_t bytes) { return *backend_->device().Allocate(bytes); }

  std::unique_ptr<Backend> backend_;
};

// Zero keys: every visible value weighs the same, so the mean of positions is known.
TEST_F(CudaBackendOnGpu, RunsTheStagesInOrder) {
  constexpr int64_t kTokens = 1000, kRows = 8;
  constexpr int kHeads = 4, kDim = 128;
  Device& device = backend_->device();
  const auto bf16 = [](float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return static_cast<uint16_t>(bits >> 16);
  };
  std::vector<uint16_t> value(kTokens * kDim), out(kTokens * kHeads * kDim);
  for (int64_t t = 0; t < kTokens; ++t) value[t * kDim] = bf16(t < 500 ? 0.0f : 1.0f);
  Buffer q = Take(kTokens * kHeads * kDim * 2), k = Take(kTokens * kDim * 2),
         v = Take(kTokens * kDim * 2), o = Take(kTokens * kHeads * kDim * 2);
  Buffer count = Take(kHeads * kRows * 4), index = Take(kHeads * kRows * kRows * 2);
  Buffer report = *device.AllocateHost(kHeads * sizeof(HeadReport));
  ASSERT_TRUE(device.Copy(v.data(), value.data(), v.bytes(), device.upload_stream()).ok());
  ASSERT_TRUE(device.Wait({}, device.upload_stream()).ok());
  for (Method method : {Method::kDense, Method::kFlexPrefill, Method::kJoint}) {
    AttentionArgs args{.shape = {DType::kBF16, kHeads, 1, kDim, {0, kTokens}, {0, kTokens}},
                       .policy = {.method = method, .gamma = 0.999, .min_budget_tokens = 1024},
                       .softmax_scale = 0.125,
                       .q = {q.data(), kHeads * kDim, kDim},
                       .k = {k.data(), kDim, kDim},
                       .v = {v.data(), kDim, kDim},
                       .o = {o.data(), kHeads * kDim, kDim},
                       .index = {count.as<int32_t>(), index.as<uint16_t>(), kRows, kRows},
                       .report = report.as<HeadReport>()};
    ASSERT_TRUE(backend_->Supports(args.shape, args.policy).ok());
    ASSERT_TRUE(backend_->EstimatePattern(args, {}).ok());
    ASSERT_TRUE(backend_->SelectBlocks(args, {}).ok());
    ASSERT_TRUE(backend_->MeasureCapturedMass(args, {}).ok());
    ASSERT_TRUE(backend_->Attend(args, {}).ok());
    ASSERT_TRUE(device.Copy(out.data(), o.data(), o.bytes(), {}).ok());
    ASSERT_TRUE(device.Synchronize({}).ok());
    EXPECT_FLOAT_EQ(args.report[1].density, 1) << Name(method);
    EXPECT_NEAR(args.report[1].captured_mass, 1, 1e-3) << Name(method);
    for (int64_t t = 0; t < kTokens; ++t) {
      const uint32_t bits = uint32_t{out[(t * kHeads + 1) * kDim]} << 16;
      float got;
      std::memcpy(&got, &bits, 4);
      const double want = t < 500 ? 0 : static_cast<double>(t - 499) / static_cast<double>(t + 1);
      ASSERT_NEAR(got, want, 0.004) << Name(method) << " token " << t;
    }
  }
}

TEST_F(CudaBackendOnGpu, MisalignedTensorsAreRefusedAndNotLaunched) {
  Buffer memory = Take(1 << 20);
  Buffer report = *backend_->device().AllocateHost(sizeof(HeadReport));
  AttentionArgs args{.shape = {DType::kBF16, 1, 1, 64, {0, 100}, {0, 100}},
                     .policy = {.method = Method::kJoint},
                     .softmax_scale = 0.125,
                     .q = {memory.as<char>() + 2, 64, 64},
                     .k = {memory.data(), 64, 64},
                     .v = {memory.data(), 64, 64},
                     .o = {memory.data(), 64, 64},
                     .index = {memory.as<int32_t>(), memory.as<uint16_t>(), 1, 1},
                     .report = report.as<HeadReport>()};
  EXPECT_EQ(backend_->EstimatePattern(args, {}).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_TRUE(backend_->device().Synchronize({}).ok());
}

TEST_F(CudaBackendOnGpu, AfterMemoryHasRunOutTheNextCallWorks) {
  Device& device = backend_->device();
  EXPECT_EQ(device.Allocate(size_t{1} << 45).status().code(),
            absl::StatusCode::kResourceExhausted);
  EXPECT_TRUE(device.fault().empty());
  EXPECT_TRUE(device.Allocate(1 << 20).ok());
  EXPECT_TRUE(device.Synchronize({}).ok());
}

TEST_F(CudaBackendOnGpu, MemoryComesZeroedAlsoTheSecondTime) {
  Device& device = backend_->device();
  std::vector<char> host(3 << 20, 1), ones(host);
  for (int round = 0; round < 2; ++round) {
    Buffer buffer = Take(host.size());
    ASSERT_TRUE(device.Copy(host.data(), buffer.data(), host.size(), {}).ok());
    ASSERT_TRUE(device.Synchronize({}).ok());
    EXPECT_EQ(std::count(host.begin(), host.end(), 0), static_cast<int64_t>(host.size()));
    ASSERT_TRUE(device.Copy(buffer.data(), ones.data(), ones.size(), {}).ok());
  }
}

TEST_F(CudaBackendOnGpu, ExportsABufferUnderItsOwnHandle) {
  Buffer one = Take(1000), other = Take(1000);
  auto first = backend_->device().Export(one), second = backend_->device().Export(other);
  ASSERT_TRUE(first.ok() && second.ok()) << first.status() << second.status();
  EXPECT_EQ(first->size(), 64u);
  EXPECT_NE(*first, *second);
  EXPECT_THAT(std::string(backend_->device().uuid()), testing::StartsWith("GPU-"));
}

TEST_F(CudaBackendOnGpu, ModelsAreTheCpusAffair) { EXPECT_EQ(backend_->ops(), nullptr); }

}  // namespace
}  // namespace prefilld::cuda

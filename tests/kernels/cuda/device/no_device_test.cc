// A CUDA build on a machine without a GPU.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>

#include "kernels/backend.h"

namespace prefilld::cuda {
namespace {

TEST(CudaBackend, WithoutADeviceSaysWhyInOneLine) {
  auto backend = CreateBackend("cuda", 1);
  if (backend.ok()) GTEST_SKIP() << "there is a GPU";
  EXPECT_EQ(backend.status().code(), absl::StatusCode::kUnavailable) << backend.status();
  EXPECT_THAT(std::string(backend.status().message()), testing::StartsWith("no CUDA"));
}

TEST(CudaBackend, AutoFallsBackToTheCpu) {
  if (CreateBackend("cuda", 1).ok()) GTEST_SKIP() << "there is a GPU";
  EXPECT_EQ((*CreateBackend("auto", 1))->name(), "cpu");
}

}  // namespace
}  // namespace prefilld::cuda

#include "kernels/cuda/device/status.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>

#include "kernels/backend.h"

namespace prefilld::cuda {
namespace {

TEST(ToStatus, NamesTheCallAndTheError) {
  EXPECT_TRUE(ToStatus(cudaSuccess, "attend").ok());
  const absl::Status status = ToStatus(cudaErrorInvalidConfiguration, "attend");
  EXPECT_EQ(status.code(), absl::StatusCode::kInternal);
  EXPECT_THAT(std::string(status.message()),
              testing::StartsWith("attend: cudaErrorInvalidConfiguration: "));
}

TEST(ToStatus, NoMemoryCanBeTriedAgain) {
  EXPECT_EQ(ToStatus(cudaErrorMemoryAllocation, "workspace").code(),
            absl::StatusCode::kResourceExhausted);
}

TEST(FaultKind, TellsWhatAContextDoesNotSurvive) {
  EXPECT_STREQ(FaultKind(cudaErrorIllegalAddress), "illegal_address");
  EXPECT_STREQ(FaultKind(cudaErrorMisalignedAddress), "illegal_address");
  EXPECT_STREQ(FaultKind(cudaErrorLaunchFailure), "launch_failure");
  EXPECT_STREQ(FaultKind(cudaErrorAssert), "launch_failure");
  EXPECT_STREQ(FaultKind(cudaErrorECCUncorrectable), "ecc");
  EXPECT_STREQ(FaultKind(cudaErrorUnknown), "other");
  for (cudaError_t error : {cudaSuccess, cudaErrorMemoryAllocation, cudaErrorInvalidValue,
                            cudaErrorInvalidConfiguration, cudaErrorNotReady}) {
    EXPECT_STREQ(FaultKind(error), "") << cudaGetErrorName(error);
  }
}

TEST(FaultKind, IsOfTheClosedSet) {
  for (int error = 0; error < 1000; ++error) {
    const std::string kind = FaultKind(static_cast<cudaError_t>(error));
    if (kind.empty()) continue;
    EXPECT_THAT(Device::kFaultKinds, testing::Contains(kind));
  }
}

}  // namespace
}  // namespace prefilld::cuda

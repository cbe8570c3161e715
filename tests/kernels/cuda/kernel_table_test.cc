// What is admitted is what can run: admission and dispatch search the same rows. Needs no GPU.
#include "kernels/cuda/kernel_table.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>
#include <type_traits>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/cuda/attend/attend.h"
#include "kernels/cuda/methods.h"
#include "kernels/cuda/problem.h"
#include "kernels/cuda/select/probe.cuh"

namespace prefilld::cuda {
namespace {

constexpr int kUnlisted[] = {0, 8, 32, 80, 112, 192, 512};

TEST(KernelTable, LaunchesTheRowThatIsAskedFor) {
  using Table = KernelTable<64, 96>;
  int head_dim = 0;
  bool bf16 = false;
  const auto launch = [&]<typename T, int kHeadDim>() {
    head_dim = kHeadDim;
    bf16 = std::is_same_v<T, __nv_bfloat16>;
    return cudaSuccess;
  };
  for (const int asked : {64, 96}) {
    for (const DType dtype : {DType::kBF16, DType::kF16}) {
      EXPECT_TRUE(Table::Has(dtype, asked));
      EXPECT_EQ(Table::Launch(dtype, asked, launch), cudaSuccess);
      EXPECT_EQ(head_dim, asked);
      EXPECT_EQ(bf16, dtype == DType::kBF16);
    }
  }
}

TEST(KernelTable, LaunchesNothingForWhatIsNotListed) {
  using Table = KernelTable<64, 256>;
  const auto launch = []<typename T, int kHeadDim>() {
    ADD_FAILURE() << kHeadDim;
    return cudaSuccess;
  };
  for (const int asked : kUnlisted) {
    EXPECT_FALSE(Table::Has(DType::kBF16, asked));
    EXPECT_EQ(Table::Launch(DType::kBF16, asked, launch), cudaErrorInvalidValue) << asked;
  }
  EXPECT_FALSE(Table::Has(DType::kF32, 64));
  EXPECT_EQ(Table::Launch(DType::kF32, 64, launch), cudaErrorInvalidValue);
}

AttentionShape ShapeOf(DType dtype, int head_dim) {
  return {dtype, 8, 2, head_dim, {0, 300}, {0, 300}};
}

TEST(Admission, TakesTheHeadDimsThatEveryKernelOfTheMethodHas) {
  for (const DType dtype : {DType::kBF16, DType::kF32}) {
    for (const KernelSet set : {KernelSet::kSm80, KernelSet::kSm90}) {
      for (const Method method : ServedMethods()) {
        for (int head_dim = 4; head_dim <= 512; head_dim += 4) {
          const bool attends =
              HasAttendSm80(dtype, head_dim, 128) || HasAttendF32(dtype, head_dim, 128);
          const bool runs = attends && LaunchersOf(method).has(dtype, head_dim) &&
                            (method == Method::kDense || HasCapturedMass(dtype, head_dim));
          const absl::Status status =
              CheckSupported(set, ShapeOf(dtype, head_dim), {.method = method});
          EXPECT_EQ(status.ok(), runs) << Name(dtype) << Name(method) << " " << head_dim;
          if (runs) continue;
          EXPECT_EQ(status.code(), absl::StatusCode::kUnimplemented) << status;
          EXPECT_THAT(std::string(status.message()),
                      testing::HasSubstr(absl::StrCat("head_dim ", head_dim, " ")));
        }
        for (const int head_dim : kUnlisted) {
          EXPECT_FALSE(
              CheckSupported(set, ShapeOf(DType::kBF16, head_dim), {.method = method}).ok());
        }
      }
    }
  }
}

// A problem of no head_dim that there is reaches no kernel, not even that of the largest.
TEST(Dispatch, RunsNoOtherKernelForAnUnlistedHeadDim) {
  const Sequence sequence = {.sq = 128, .sk = 128, .q_blocks = 1, .k_blocks = 1};
  for (const int head_dim : kUnlisted) {
    Problem problem;
    problem.q_heads = problem.kv_heads = 1;
    problem.head_dim = head_dim;
    problem.sequences = 1;
    problem.total_q = problem.total_k = 128;
    problem.rows = problem.q_blocks_max = problem.k_blocks_max = 1;
    problem.host_sequence = &sequence;
    EXPECT_EQ(AttendSm80(problem, nullptr, 1, nullptr), cudaErrorInvalidValue) << head_dim;
    EXPECT_EQ(AttendSm90(problem, nullptr, 1, nullptr), cudaErrorInvalidValue) << head_dim;
    EXPECT_EQ(Probe(problem, RowRule::kProbe, nullptr, nullptr, 1, nullptr), cudaErrorInvalidValue)
        << head_dim;
  }
}

// Nor a dtype the kernel of another.
TEST(Dispatch, KeepsF32AndTheOthersApart) {
  const Sequence sequence = {.sq = 128, .sk = 128, .q_blocks = 1, .k_blocks = 1};
  Problem problem;
  problem.q_heads = problem.kv_heads = 1;
  problem.sequences = 1;
  problem.total_q = problem.total_k = 128;
  problem.rows = problem.q_blocks_max = problem.k_blocks_max = 1;
  problem.host_sequence = &sequence;
  problem.head_dim = 128;
  EXPECT_EQ(AttendF32(problem, nullptr, 1, nullptr), cudaErrorInvalidValue);
  problem.dtype = DType::kF32;
  EXPECT_EQ(AttendSm80(problem, nullptr, 1, nullptr), cudaErrorInvalidValue);
  EXPECT_EQ(AttendSm90(problem, nullptr, 1, nullptr), cudaErrorInvalidValue);
  problem.head_dim = 100;
  EXPECT_EQ(AttendF32(problem, nullptr, 1, nullptr), cudaErrorInvalidValue);
  EXPECT_EQ(Probe(problem, RowRule::kProbe, nullptr, nullptr, 1, nullptr), cudaErrorInvalidValue);
}

TEST(PlainTable, HasF32OfEveryMultipleOfEight) {
  for (const int head_dim : {-8, 0, 4, 12, 100, 257, 264, 512}) {
    EXPECT_FALSE(PlainTable::Has(DType::kF32, head_dim)) << head_dim;
  }
  for (const int head_dim : PlainTable::kHeadDimList) {
    EXPECT_TRUE(PlainTable::Has(DType::kF32, head_dim)) << head_dim;
    EXPECT_FALSE(PlainTable::Has(DType::kBF16, head_dim)) << head_dim;
    int groups = 0;
    const auto launch = [&]<int kGroups>() {
      groups = kGroups;
      return cudaSuccess;
    };
    EXPECT_EQ(PlainTable::Launch(DType::kF32, head_dim, launch), cudaSuccess);
    EXPECT_TRUE(64 * (groups - 1) < head_dim && head_dim <= 64 * groups) << head_dim;
  }
}

// Every head_dim, dtype and block size has a kernel in some set of this GPU.
TEST(AttendTable, CoversWhatTheServerOffers) {
  for (DType dtype : {DType::kBF16, DType::kF16}) {
    for (int d : {64, 96, 128, 256}) {
      for (int block_size : {64, 128}) {
        EXPECT_TRUE(HasAttendSm80(dtype, d, block_size) || HasAttendSm90(dtype, d, block_size))
            << Name(dtype) << " d " << d << " block " << block_size;
      }
    }
    EXPECT_TRUE(HasAttendSm90(dtype, 64, 128) && HasAttendSm90(dtype, 128, 128));
    EXPECT_TRUE(HasAttendSm80(dtype, 64, 128) && HasAttendSm80(dtype, 128, 128));
    EXPECT_FALSE(HasAttendSm80(dtype, 80, 128) || HasAttendSm90(dtype, 80, 128));
    EXPECT_FALSE(HasAttendSm80(dtype, 128, 32) || HasAttendSm90(dtype, 128, 32));
  }
  EXPECT_FALSE(HasAttendSm80(DType::kF32, 128, 128) || HasAttendSm90(DType::kF32, 128, 128));
  for (int d : {16, 32, 64, 96, 128, 256}) {
    EXPECT_TRUE(HasAttendF32(DType::kF32, d, 64) && HasAttendF32(DType::kF32, d, 128)) << d;
  }
  EXPECT_FALSE(HasAttendF32(DType::kBF16, 128, 128) || HasAttendF32(DType::kF32, 128, 32));
}

}  // namespace
}  // namespace prefilld::cuda

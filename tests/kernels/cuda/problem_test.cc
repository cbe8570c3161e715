#include "kernels/cuda/problem.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <string>

#include "kernels/cuda/attend/attend.h"
#include "kernels/cuda/select/flexprefill/flexprefill.h"
#include "kernels/cuda/select/joint/joint.h"

namespace prefilld::cuda {
namespace {

AttentionShape Shape(int head_dim = 128) {
  return {DType::kBF16, 8, 2, head_dim, {0, 300, 1324}, {0, 300, 2348}};
}

AttentionArgs Args(const AttentionShape& shape, int block_size = 128) {
  AttentionArgs args;
  args.shape = shape;
  args.policy.block_size = block_size;
  args.softmax_scale = 0.125;
  const int64_t d = shape.head_dim;
  void* aligned = reinterpret_cast<void*>(0x1000);  // nothing here looks behind a pointer
  args.q = {aligned, shape.q_heads * d, d};
  args.k = args.v = {aligned, shape.kv_heads * d, d};
  args.o = {aligned, shape.q_heads * d, d};
  return args;
}

void ExpectStatus(const absl::Status& status, absl::StatusCode code, const std::string& text) {
  EXPECT_EQ(status.code(), code) << status;
  EXPECT_THAT(std::string(status.message()), testing::HasSubstr(text));
}

TEST(KernelSet, AutoTakesTheBestOfTheDevice) {
  EXPECT_EQ(*ChooseKernelSet("auto", 90), KernelSet::kSm90);
  for (int capability : {80, 86, 89, 100, 120}) {
    EXPECT_EQ(*ChooseKernelSet("auto", capability), KernelSet::kSm80) << capability;
  }
}

TEST(KernelSet, Sm80RunsOnHopperToo) {
  EXPECT_EQ(*ChooseKernelSet("sm80", 90), KernelSet::kSm80);
  EXPECT_EQ(*ChooseKernelSet("sm90", 90), KernelSet::kSm90);
}

TEST(KernelSet, WhatCannotRunIsNamed) {
  ExpectStatus(ChooseKernelSet("sm90", 89).status(), absl::StatusCode::kInvalidArgument,
               "this device has 8.9");
  ExpectStatus(ChooseKernelSet("sm70", 90).status(), absl::StatusCode::kInvalidArgument,
               "\"sm70\" are unknown (auto, sm80, sm90)");
}

TEST(KernelSet, TheHopperKernelTakesWhatItIsMadeFor) {
  for (int head_dim : {64, 96, 128, 256}) {
    for (int block_size : {64, 128}) {
      std::vector<Sequence> sequences;
      const Problem problem = MakeProblem(Args(Shape(head_dim), block_size), &sequences);
      const bool sm90 = RunsSm90(KernelSet::kSm90, problem);
      EXPECT_FALSE(RunsSm90(KernelSet::kSm80, problem));
      EXPECT_EQ(sm90, block_size == 128 && (head_dim == 64 || head_dim == 128))
          << head_dim << " " << block_size;
    }
  }
}

TEST(CheckSupported, EveryHeadDimAndBlockSizeHasAKernel) {
  for (DType dtype : {DType::kBF16, DType::kF16}) {
    for (int head_dim : {64, 96, 128, 256}) {
      for (int block_size : {64, 128}) {
        AttentionShape shape = Shape(head_dim);
        shape.dtype = dtype;
        for (KernelSet set : {KernelSet::kSm80, KernelSet::kSm90}) {
          const absl::Status status = CheckSupported(set, shape, {.block_size = block_size});
          EXPECT_TRUE(status.ok()) << status;
        }
      }
    }
  }
}

TEST(CheckSupported, F32HasAKernelForEveryMultipleOfEight) {
  for (int head_dim = 8; head_dim <= 256; head_dim += 8) {
    AttentionShape shape = Shape(head_dim);
    shape.dtype = DType::kF32;
    shape.cu_seqlens_q = shape.cu_seqlens_k;
    for (Method method : {Method::kDense, Method::kFlexPrefill, Method::kJoint}) {
      for (int block_size : {64, 128}) {
        const absl::Status status =
            CheckSupported(KernelSet::kSm90, shape, {.method = method, .block_size = block_size});
        EXPECT_TRUE(status.ok()) << status;
      }
    }
  }
}

TEST(CheckSupported, NamesWhatHasNone) {
  AttentionShape shape = Shape();
  shape.dtype = DType::kF32;
  shape.head_dim = 100;
  ExpectStatus(CheckSupported(KernelSet::kSm90, shape, {}), absl::StatusCode::kUnimplemented,
               "head_dim 100 not supported by cuda-sm90 (8, 16, 24, ");
  ExpectStatus(CheckSupported(KernelSet::kSm80, Shape(80), {}), absl::StatusCode::kUnimplemented,
               "head_dim 80 not supported by cuda-sm80 (64, 96, 128, 256)");
  ExpectStatus(CheckSupported(KernelSet::kSm90, Shape(), {.method = Method::kFlexPrefill}),
               absl::StatusCode::kUnimplemented, "flexprefill not supported by cuda-sm90");
}

TEST(CheckSupported, NothingOverflowsAGrid) {
  AttentionShape shape = Shape();
  shape.cu_seqlens_q = {0, 1 << 22};
  shape.cu_seqlens_k = {0, 1 << 22};
  shape.q_heads = 128;
  EXPECT_TRUE(CheckSupported(KernelSet::kSm90, shape, {.method = Method::kJoint}).ok());
  shape.q_heads = 1 << 17;
  ExpectStatus(CheckSupported(KernelSet::kSm90, shape, {.method = Method::kJoint}),
               absl::StatusCode::kUnimplemented, "rows of blocks");

  const auto batch = [](int q_heads, int sequences, int64_t longest) {
    AttentionShape many{DType::kBF16, q_heads, 1, 128, {0}, {0}};
    for (int s = 0; s < sequences; ++s) many.cu_seqlens_q.push_back(s + longest);
    many.cu_seqlens_k = many.cu_seqlens_q;
    return CheckSupported(KernelSet::kSm90, many, {.method = Method::kJoint});
  };
  EXPECT_TRUE(batch(1, 65535, 1).ok());
  ExpectStatus(batch(1, 65536, 1), absl::StatusCode::kUnimplemented, "65536 sequences");
  EXPECT_TRUE(batch(21845, 1, 1).ok());
  ExpectStatus(batch(21846, 1, 1), absl::StatusCode::kUnimplemented, "21846 query heads");
  // Few rows each, but a task for every 32 rows of the longest in every sequence and head.
  ExpectStatus(batch(128, 10'000, int64_t{65536} * 128), absl::StatusCode::kUnimplemented,
               "10000 sequences of up to 65536 rows");
}

TEST(CheckTensors, WhatASixteenByteLoadCannotTakeIsInvalid) {
  EXPECT_TRUE(CheckTensors(Args(Shape())).ok());
  AttentionArgs args = Args(Shape());
  args.v.data = reinterpret_cast<void*>(0x1008);
  ExpectStatus(CheckTensors(args), absl::StatusCode::kInvalidArgument, "v is not 16-byte aligned");
  args = Args(Shape());
  args.q.token_stride += 4;
  ExpectStatus(CheckTensors(args), absl::StatusCode::kInvalidArgument,
               "q has strides of 1028 and 128 elements");
  args = Args(Shape());
  args.o.head_stride = 130;
  ExpectStatus(CheckTensors(args), absl::StatusCode::kInvalidArgument, "multiples of 8");
  args = Args(Shape());
  args.k.token_stride = int64_t{1} << 30;  // 2^31 bytes
  ExpectStatus(CheckTensors(args), absl::StatusCode::kInvalidArgument, "between tokens, not from");
}

TEST(MakeProblem, SplitsARaggedBatchAsTheContractDoes) {
  std::vector<Sequence> sequences;
  const Problem problem = MakeProblem(Args(Shape()), &sequences);
  ASSERT_EQ(sequences.size(), 2u);
  EXPECT_EQ(problem.host_sequence, sequences.data());
  EXPECT_EQ(problem.rows, 3 + 8);
  EXPECT_EQ(problem.q_blocks_max, 8);
  EXPECT_EQ(problem.k_blocks_max, 16);
  EXPECT_EQ(problem.sq_max, 1024);
  EXPECT_EQ(problem.sk_max, 2048);
  EXPECT_EQ(sequences[1].q_begin, 300);
  EXPECT_EQ(sequences[1].k_begin, 300);
  EXPECT_EQ(sequences[1].prefix, 1024);
  EXPECT_EQ(sequences[1].first_q_block, 8);
  EXPECT_EQ(sequences[1].row_begin, 3);
}

TEST(LayOut, EveryPartIsAlignedAndInside) {
  for (Method method : {Method::kDense, Method::kFlexPrefill, Method::kJoint}) {
    std::vector<Sequence> sequences;
    const Problem problem = MakeProblem(Args(Shape()), &sequences);
    const WorkspaceLayout layout = LayOut(problem, method);
    EXPECT_GE(layout.stage - layout.sequences, 2 * sizeof(Sequence));
    EXPECT_EQ(layout.stage % 256, 0u);
    EXPECT_GE(layout.bytes - layout.stage, AttendWorkspace(problem)) << Name(method);
    if (method == Method::kDense) continue;
    EXPECT_GE(layout.bytes - layout.stage, CapturedMassWorkspace(problem)) << Name(method);
    EXPECT_GE(layout.bytes - layout.stage,
              method == Method::kJoint ? JointWorkspace(problem) : FlexPrefillWorkspace(problem));
  }
}

// The block index and the workspace of one layer, 32/8/128.
TEST(LayOut, AMillionTokensFitInEightGiB) {
  AttentionShape shape{DType::kBF16, 32, 8, 128, {0, 1 << 20}, {0, 1 << 20}};
  for (Method method : {Method::kDense, Method::kFlexPrefill, Method::kJoint}) {
    std::vector<Sequence> sequences;
    const Problem problem = MakeProblem(Args(shape), &sequences);
    const uint64_t index = uint64_t{32} * problem.rows * problem.k_blocks_max * sizeof(uint16_t) +
                           uint64_t{32} * problem.rows * sizeof(int32_t);
    EXPECT_LE(index + LayOut(problem, method).bytes, uint64_t{8} << 30) << Name(method);
  }
}

TEST(LayOut, GrowsWithTheCall) {
  for (Method method : {Method::kDense, Method::kFlexPrefill, Method::kJoint}) {
    size_t before = 0;
    for (int64_t tokens : {128, 1000, 10'000, 100'000}) {
      std::vector<Sequence> sequences;
      AttentionShape shape{DType::kBF16, 8, 2, 64, {0, tokens}, {0, tokens}};
      const size_t bytes = LayOut(MakeProblem(Args(shape), &sequences), method).bytes;
      EXPECT_GE(bytes, before);
      shape.dtype = DType::kF32;
      EXPECT_GT(LayOut(MakeProblem(Args(shape), &sequences), method).bytes, 0u);
      before = bytes;
    }
  }
}

}  // namespace
}  // namespace prefilld::cuda

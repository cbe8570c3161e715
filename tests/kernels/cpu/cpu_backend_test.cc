#include "kernels/cpu/cpu_backend.h"

#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/backend.h"

namespace prefilld {
namespace {

using testing::HasSubstr;

std::unique_ptr<Backend> Cpu() { return *CreateBackend("cpu", 2); }

AttentionShape Shape(int head_dim = 64) {
  return {DType::kBF16, 4, 2, head_dim, {0, 100, 300}, {0, 100, 400}};
}

void ExpectStatus(const absl::Status& status, absl::StatusCode code, const std::string& part) {
  EXPECT_EQ(status.code(), code) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr(part));
}

TEST(CreateBackend, KnowsAClosedTable) {
  EXPECT_EQ((*CreateBackend("cpu", 1))->name(), "cpu");
  // What "auto" and "cuda" give depends on the build and the machine.
  const auto cuda = CreateBackend("cuda", 1);
  EXPECT_EQ((*CreateBackend("auto", 0))->name(), cuda.ok() ? (*cuda)->name() : "cpu");
  if (!cuda.ok()) {
    EXPECT_THAT(std::string(cuda.status().message()),
                testing::AnyOf(HasSubstr("cuda is not in this build (cpu)"), HasSubstr("no CUDA")));
  }
  ExpectStatus(CreateBackend("tpu", 1).status(), absl::StatusCode::kInvalidArgument,
               "backend \"tpu\" is unknown (auto, cpu, cuda)");
  ExpectStatus(CreateBackend("cpu", -1).status(), absl::StatusCode::kInvalidArgument, "threads -1");
  ExpectStatus(CreateBackend("cpu", 1 << 20).status(), absl::StatusCode::kInvalidArgument,
               "threads 1048576");
}

TEST(CpuDevice, NamesTheProcessorAndItsInstructionSet) {
  EXPECT_THAT(std::string(Cpu()->device().name()), testing::MatchesRegex(".+ \\([A-Z0-9_]+\\)"));
}

TEST(CpuDevice, AllocatesZeroedAlignedMemory) {
  auto backend = Cpu();
  for (size_t bytes : {size_t{1}, size_t{4097}, size_t{1} << 20}) {
    auto buffer = backend->device().Allocate(bytes);
    ASSERT_TRUE(buffer.ok());
    EXPECT_EQ(buffer->bytes(), bytes);
    EXPECT_EQ(reinterpret_cast<uintptr_t>(buffer->data()) % 64, 0u);
    for (size_t i = 0; i < bytes; ++i) ASSERT_EQ(buffer->as<uint8_t>()[i], 0) << i;
    buffer->as<uint8_t>()[bytes - 1] = 1;
  }
}

TEST(CpuDevice, DiscardsWholePagesOnly) {
  auto backend = Cpu();
  auto buffer = *backend->device().Allocate(1 << 20);
  auto* bytes = buffer.as<unsigned char>();
  std::fill(bytes, bytes + buffer.bytes(), 1);
  backend->device().Discard(bytes + 100, 1000);  // no page
  backend->device().Discard(bytes + 100, 0);     // nothing
  backend->device().Discard(bytes + 5000, (1 << 20) - 10'000);
  EXPECT_EQ(bytes[100], 1);
  EXPECT_EQ(bytes[4999], 1) << "what lies before it stays";
  EXPECT_EQ(bytes[(1 << 20) - 5000], 1) << "and what lies behind";
  EXPECT_EQ(bytes[1 << 19], 0);
}

TEST(CpuDevice, AllocatesNothingForNoBytes) {
  auto buffer = Cpu()->device().Allocate(0);
  ASSERT_TRUE(buffer.ok());
  EXPECT_EQ(buffer->bytes(), 0u);
}

TEST(CpuDevice, ReportsWhenThereIsNoMemory) {
  const size_t bytes = std::numeric_limits<size_t>::max() / 4;
  ExpectStatus(Cpu()->device().Allocate(bytes).status(), absl::StatusCode::kResourceExhausted,
               std::to_string(bytes));
}

TEST(Supports, AdmitsWhatHasAKernel) {
  auto backend = Cpu();
  for (DType dtype : {DType::kF32, DType::kBF16, DType::kF16}) {
    for (int head_dim : {64, 96, 128, 256}) {
      for (int block_size : {64, 128}) {
        for (Method method : {Method::kDense, Method::kJoint}) {
          AttentionShape shape = Shape(head_dim);
          shape.dtype = dtype;
          const absl::Status status =
              backend->Supports(shape, {.method = method, .block_size = block_size});
          EXPECT_TRUE(status.ok()) << status;
        }
      }
    }
  }
  AttentionShape square = Shape();
  square.cu_seqlens_k = square.cu_seqlens_q;
  EXPECT_TRUE(backend->Supports(square, {.method = Method::kFlexPrefill}).ok());
}

TEST(Supports, AdmitsEveryMethodOfTheTable) {
  AttentionShape square = Shape();
  square.cu_seqlens_k = square.cu_seqlens_q;
  for (const MethodRow& row : kMethodTable) {
    EXPECT_EQ(std::string(Name(row.method)), row.name);
    EXPECT_TRUE(Cpu()->Supports(square, {.method = row.method}).ok()) << row.name;
  }
}

TEST(Supports, NamesWhatHasNoKernel) {
  auto backend = Cpu();
  ExpectStatus(backend->Supports(Shape(80), {}), absl::StatusCode::kUnimplemented,
               "head_dim 80 not supported by cpu (64, 96, 128, 256)");
  ExpectStatus(backend->Supports(Shape(), {.method = Method::kFlexPrefill}),
               absl::StatusCode::kUnimplemented, "flexprefill");
}

TEST(Supports, RefusesNonsense) {
  auto backend = Cpu();
  const auto refused = [&](const AttentionShape& shape, const SparsityPolicy& policy,
                           const std::string& part) {
    ExpectStatus(backend->Supports(shape, policy), absl::StatusCode::kInvalidArgument, part);
  };
  refused(Shape(0), {}, "head_dim 0");
  refused(Shape(), {.block_size = 32}, "block_size 32");
  for (double gamma : {std::nan(""), 0.0, 1.0, 2.0, -1.0}) {
    refused(Shape(), {.gamma = gamma}, "gamma");
  }
  AttentionShape shape = Shape();
  shape.q_heads = 3;
  refused(shape, {}, "3 query heads over 2 kv heads");
  shape.kv_heads = 0;
  refused(shape, {}, "3 query heads over 0 kv heads");

  struct Lengths {
    std::vector<int64_t> q, k;
    const char* part;
  };
  constexpr int64_t kHuge = int64_t{1} << 62;
  for (const Lengths& lengths : {Lengths{{}, {}, "cu_seqlens"},
                                 {{0}, {0}, "cu_seqlens"},
                                 {{0, 5}, {0, 5, 6}, "cu_seqlens"},
                                 {{1, 5}, {0, 5}, "start at 1 and 0"},
                                 {{0, 0}, {0, 5}, "sequence 0"},
                                 {{0, 5, 4}, {0, 5, 9}, "sequence 1"},
                                 {{0, 5}, {0, -kHuge}, "sequence 0"},
                                 {{0, 6}, {0, 5}, "queries [0, 6) and keys [0, 5)"}}) {
    shape = Shape();
    shape.cu_seqlens_q = lengths.q;
    shape.cu_seqlens_k = lengths.k;
    refused(shape, {}, lengths.part);
  }
}

// All stages through the interface; the value of every token is its position, so an average over
// the visible tokens with equal weights is known.
TEST(CpuBackend, RunsTheStagesInOrder) {
  auto backend = Cpu();
  for (Method method : {Method::kDense, Method::kFlexPrefill, Method::kJoint}) {
    constexpr int64_t kTokens = 300, kRows = 3;
    constexpr int kHeadDim = 64, kHeads = 2;
    std::vector<float> q(kTokens * kHeads * kHeadDim), k(kTokens * kHeadDim, 1), v(k), o(q);
    for (int64_t t = 0; t < kTokens; ++t) v[t * kHeadDim] = static_cast<float>(t);
    std::vector<int32_t> count(kHeads * kRows);
    std::vector<uint16_t> index(kHeads * kRows * kRows);
    std::vector<HeadReport> report(kHeads);
    AttentionArgs args{.shape = {DType::kF32, kHeads, 1, kHeadDim, {0, kTokens}, {0, kTokens}},
                       .policy = {.method = method, .gamma = 0.999, .min_budget_tokens = 1024},
                       .softmax_scale = 0.125,
                       .q = {q.data(), kHeads * kHeadDim, kHeadDim},
                       .k = {k.data(), kHeadDim, kHeadDim},
                       .v = {v.data(), kHeadDim, kHeadDim},
                       .o = {o.data(), kHeads * kHeadDim, kHeadDim},
                       .index = {count.data(), index.data(), kRows, kRows},
                       .report = report.data()};
    ASSERT_TRUE(backend->Supports(args.shape, args.policy).ok());
    ASSERT_TRUE(backend->EstimatePattern(args, {}).ok());
    ASSERT_TRUE(backend->SelectBlocks(args, {}).ok());
    ASSERT_TRUE(backend->MeasureCapturedMass(args, {}).ok());
    ASSERT_TRUE(backend->Attend(args, {}).ok());
    ASSERT_TRUE(backend->device().Synchronize({}).ok());
    EXPECT_FLOAT_EQ(report[1].density, 1) << Name(method);  // equal weights: everything is needed
    EXPECT_NEAR(report[1].captured_mass, 1, 1e-5) << Name(method);
    for (int64_t t = 0; t < kTokens; ++t) {
      ASSERT_NEAR(o[(t * kHeads + 1) * kHeadDim], static_cast<double>(t) / 2, 1e-3)
          << Name(method) << " token " << t;
    }
  }
}

}  // namespace
}  // namespace prefilld

// The steps between method and attention on the GPU: sequences, bitmaps to block indices, the full
// index of dense, the queue of tasks.
#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <vector>

#include "kernels/cuda/attend/attend.h"
#include "kernels/cuda/attend/task_queue.h"
#include "kernels/cuda/select/selection.h"
#include "tests/kernels/cuda/cuda_case.h"

namespace prefilld::cuda {
namespace {

const CaseOptions kCases[] = {
    {.sq = {1}},
    {.sq = {128}},
    {.sq = {5000}},
    {.block_size = 64, .sq = {5000}},
    {.q_heads = 7, .kv_heads = 1, .head_dim = 64, .sq = {1, 300, 7, 513}, .sk = {1, 900, 200, 513}},
    {.q_heads = 2, .kv_heads = 2, .head_dim = 64, .sq = {40000}},
    {.q_heads = 2, .kv_heads = 1, .head_dim = 64, .block_size = 64, .sq = {3}, .sk = {140000}},
    // More K and V than L2 holds: in groups, with long rows and others.
    {.q_heads = 8, .kv_heads = 4, .sq = {1500, 7, 100}, .sk = {15000, 5000, 100}},
};

class IndexOnGpu : public testing::Test {
 protected:
  void SetUp() override {
    if (!HasDevice()) GTEST_SKIP() << "no GPU";
  }
};

TEST_F(IndexOnGpu, SequencesTravelAsTheyAre) {
  for (int count : {1, 7, 64, 100, 1000}) {
    std::vector<Sequence> host(count);
    int32_t next = 0;
    for (Sequence& s : host) {
      s = {next++, next++, next++, next++, next++, next++, next++, next++, next++, next++};
    }
    const std::vector<Sequence> expected = host;
    DeviceArray<Sequence> device(count);
    EXPECT_CUDA_OK(WriteSequences(host.data(), count, device.data(), nullptr));
    std::fill(host.begin(), host.end(), Sequence{});  // it need not stay
    EXPECT_CUDA_OK(cudaDeviceSynchronize());
    device.ExpectGuardsIntact("sequences");
    const std::vector<Sequence> got = device.Get();
    for (int s = 0; s < count; ++s) {
      EXPECT_EQ(got[s].q_begin, expected[s].q_begin) << s << " of " << count;
      EXPECT_EQ(got[s].page_begin, expected[s].page_begin) << s << " of " << count;
    }
  }
}

TEST_F(IndexOnGpu, BitmapsBecomeAscendingRows) {
  for (const CaseOptions& options : kCases) {
    SCOPED_TRACE(Describe(options));
    for (int keep_percent : {0, 3, 50, 100}) {
      CudaCase input(options);
      const Selection selection = input.SelectionOf({.method = Method::kJoint});
      input.PoisonSelection(0xFF);
      const CudaCase::Rows rows = input.RandomRows(keep_percent);
      const int64_t words = BitmapWords(input.problem());
      std::vector<uint32_t> bits(rows.size() * words);
      for (size_t row = 0; row < rows.size(); ++row) {
        for (int32_t J : rows[row]) bits[row * words + J / 32] |= 1u << (J % 32);
      }
      const DeviceArray<uint32_t> bitmap(bits);
      EXPECT_CUDA_OK(WriteIndex(selection, bitmap.data(), nullptr));
      EXPECT_CUDA_OK(cudaDeviceSynchronize());
      const Selected selected = input.GetSelected();
      EXPECT_EQ(selected.rows, rows);
      ExpectDensities(input, selected);
    }
  }
}

TEST_F(IndexOnGpu, DenseReadsEveryCausalBlock) {
  for (const CaseOptions& options : kCases) {
    SCOPED_TRACE(Describe(options));
    CudaCase input(options);
    const Selected selected = input.Select({.method = Method::kDense});
    EXPECT_EQ(selected.rows, input.RandomRows(100));
    for (const HeadReport& report : selected.report) {
      EXPECT_EQ(report.pattern, Pattern::kDense);
      EXPECT_EQ(report.dense_reason, DenseReason::kNone);
      EXPECT_EQ(report.density, 1);
    }
  }
}

TEST_F(IndexOnGpu, EveryTaskIsQueuedOnce) {
  for (const CaseOptions& options : kCases) {
    SCOPED_TRACE(Describe(options));
    CudaCase input(options);
    const CudaCase::Rows rows = input.RandomRows(20);
    input.SetIndex(rows);
    const Problem& p = input.problem();
    DeviceArray<uint8_t> workspace(static_cast<int64_t>(AttendWorkspace(p)));
    EXPECT_CUDA_OK(QueueTasks(p, workspace.data(), Multiprocessors(), nullptr));
    EXPECT_CUDA_OK(cudaDeviceSynchronize());
    workspace.ExpectGuardsIntact("workspace");
    std::vector<uint8_t> bytes = workspace.Get();
    const TaskQueue queue = TaskQueueIn(bytes.data(), p);
    EXPECT_EQ(*queue.taken, 0);
    std::vector<int> times(p.q_heads * p.rows);
    for (size_t i = 0; i < times.size(); ++i) {
      const QueuedTask& task = queue.task[i];
      ASSERT_TRUE(task.head >= 0 && task.head < p.q_heads && task.row >= 0 && task.row < p.rows);
      ASSERT_TRUE(task.sequence >= 0 && task.sequence < p.sequences);
      const Sequence& sequence = p.host_sequence[task.sequence];
      EXPECT_GE(task.row, sequence.row_begin);
      EXPECT_LT(task.row, sequence.row_begin + sequence.q_blocks);
      const int64_t id = task.head * p.rows + task.row;
      EXPECT_EQ(task.count, static_cast<int32_t>(rows[id].size()));
      ++times[id];
    }
    EXPECT_EQ(std::count(times.begin(), times.end(), 1), static_cast<int64_t>(times.size()));
  }
}

}  // namespace
}  // namespace prefilld::cuda

// Inputs of the CUDA kernels with their memory, what the kernels wrote, and the CPU oracle's answer
// to the same input. The bytes are poisoned wherever a kernel has nothing to read or write: margins
// between tokens, tokens before and after, tails of pages, pages of nobody, workspaces.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <ostream>
#include <string>
#include <vector>

#include "kernels/attention.h"
#include "kernels/cuda/select/selection.h"
#include "tests/kernels/cpu/selection_case.h"
#include "tests/kernels/cuda/device_array.h"

namespace prefilld::cuda {

using cpu::Family;
using cpu::Selected;

enum class Layout { kTokens, kHeads, kPaged };  // [t][h][d], [h][t][d], K and V in pages

struct CaseOptions {
  DType dtype = DType::kBF16;
  int q_heads = 4, kv_heads = 2, head_dim = 128;
  int block_size = 128;
  std::vector<int64_t> sq = {1000}, sk = {};  // one a sequence; sk empty: the same
  Layout layout = Layout::kTokens;
  int page_tokens = 0;  // where paged; 0: those of a block
  int64_t margin = 8;   // poisoned elements between tokens
  Family family = Family::kRandom;
  float amplitude = 1;  // of the queries
  uint32_t seed = 1;
};
std::string Describe(const CaseOptions& options);

// Dtypes that the same tests serve: what they are run in where nothing is said is the first, and
// the head_dims are those of selection. Tolerances are a row of cuda_case.cc a dtype.
struct DTypeRow {
  const char* name;
  std::vector<DType> dtypes;
  std::vector<int> head_dims;
};
inline const DTypeRow kDTypeRows[] = {{"16bit", {DType::kBF16, DType::kF16}, {64, 96, 128, 256}},
                                      {"F32", {DType::kF32}, {16, 32, 40, 64, 96, 128, 192, 256}}};
inline void PrintTo(const DTypeRow& row, std::ostream* out) { *out << row.name; }

// Tensors are held in words of 16 bits: one to an element, or two of F32.
constexpr int64_t Words(DType dtype) { return static_cast<int64_t>(SizeOf(dtype) / 2); }

// What stage 3 wrote.
struct Output {
  std::vector<uint16_t> o;  // [total_q, q_heads, d], in words
  std::vector<float> lse;   // [q_heads, total_q]

  bool operator==(const Output& other) const;  // the same bits
};

class CudaCase {
 public:
  // Tokens of poison before and after those of q, k, v and o.
  static constexpr int64_t kPad = 128;

  explicit CudaCase(const CaseOptions& options);
  // As above, after `edit` has changed the inputs [tokens, heads, d] in fp32.
  using Edit = std::function<void(cpu::Case*)>;
  CudaCase(const CaseOptions& options, const Edit& edit);

  const Problem& problem() const { return problem_; }
  const AttentionShape& shape() const { return shape_; }
  const std::vector<SequenceBlocks>& sequences() const { return blocks_; }
  const CaseOptions& options() const { return options_; }
  int64_t causal_blocks() const;  // of all heads

  // ---- The block index.
  using Rows = std::vector<std::vector<int32_t>>;  // [h * rows + row]
  // Rows hold 0 and the diagonal and `keep_percent` of the rest; 100 is dense.
  Rows RandomRows(int keep_percent, uint32_t seed = 1) const;
  void SetIndex(const Rows& rows);
  Rows GetIndex() const;  // fails where a count is out of range
  DeviceArray<int32_t>& count() { return *count_; }
  DeviceArray<uint16_t>& index() { return *index_; }

  // ---- Stages 1 and 2, on a poisoned index, report and workspace.
  Selected Select(const SparsityPolicy& policy, int poison = 0xFF);
  // The measurement alone, over the index as it is.
  Selected MeasureCapturedMass(const SparsityPolicy& policy, int poison = 0xFF);
  // What the launchers are given for a policy, with the workspace of this case.
  Selection SelectionOf(const SparsityPolicy& policy);
  // Enqueues stages 1 and 2 of a method; no check, no synchronisation: for graphs.
  cudaError_t EnqueueSelect(const Selection& selection, Method method, cudaStream_t stream);
  Selected GetSelected() const;
  void PoisonSelection(int workspace_byte);

  // ---- Stage 3, on poisoned outputs and workspace. Fails where a byte that is nobody's was
  // written.
  using Attend = cudaError_t (*)(const Problem&, void*, int, cudaStream_t);
  Output Run(Attend attend, int poison = 0xFF);
  Output GetOutput() const;
  void PoisonOutput();
  void* attend_workspace() { return attend_workspace_->data(); }

  // ---- The oracle, one thread a head.
  Selected ReferenceSelect(const SparsityPolicy& policy) const;
  Selected ReferenceMeasure(const SparsityPolicy& policy, const Rows& rows) const;
  // Queries [begin, end) of a sequence, begin at the first token of a block: o [t, d] and lse [t].
  struct Expected {
    std::vector<double> o, lse;
  };
  Expected ReferenceAttend(const Rows& rows, int sequence, int h, int64_t begin, int64_t end) const;

 private:
  void Build(cpu::Case* wide);
  DeviceArray<uint16_t>* Upload(const std::vector<uint16_t>& x, int64_t tokens, int heads,
                                Tensor* tensor);
  void BuildPages();
  void CheckNothingElseWritten() const;
  AttentionArgs HostArgs(const SparsityPolicy& policy, int sequence, int h, int64_t begin,
                         int64_t end) const;

  CaseOptions options_;
  AttentionShape shape_;
  std::vector<SequenceBlocks> blocks_;
  int64_t words_ = 1;                // of an element
  std::vector<uint16_t> q_, k_, v_;  // [tokens, heads, d] in the dtype, in words
  std::vector<Sequence> host_sequences_;
  Problem problem_;
  std::vector<std::unique_ptr<DeviceArray<uint16_t>>> tensors_;
  std::unique_ptr<DeviceArray<uint16_t>> o_, index_;
  std::unique_ptr<DeviceArray<float>> lse_;
  std::unique_ptr<DeviceArray<int32_t>> count_, pages_;
  std::unique_ptr<DeviceArray<Sequence>> sequences_;
  std::unique_ptr<DeviceArray<HeadReport>> report_;
  std::unique_ptr<DeviceArray<uint8_t>> attend_workspace_, selection_workspace_;
};

int Multiprocessors();
float Widen(const uint16_t* words, DType dtype);

// Compares stage 3 with the oracle over `rows`: relative Frobenius norm, worst element, worst lse.
// Every row where the sequence is short, else `sampled` blocks of each head.
void ExpectMatchesOracle(const CudaCase& input, const CudaCase::Rows& rows, const Output& output,
                         int sampled = 0);

// How a selection differs from the oracle's.
struct Difference {
  int64_t both = 0, either = 0;  // blocks
  std::string list;              // the first that differ
  double iou() const { return either == 0 ? 1 : static_cast<double>(both) / either; }
};
Difference Compare(const CudaCase& input, const Selected& got, const Selected& want);

// Selects on the GPU and by the oracle: rows are well formed, patterns and densities agree. What
// differs is printed and added to `sum`: one near tie of many is no failure, see ExpectClose.
void ExpectSelects(const CaseOptions& options, const SparsityPolicy& policy, Difference* sum);
void ExpectClose(const Difference& sum);  // IoU >= 0.999

// A test of selection: skipped without a GPU; what its cases differ in counts together.
class SelectionOnGpu : public testing::Test {
 protected:
  void SetUp() override {
    if (!HasDevice()) GTEST_SKIP() << "no GPU";
  }
  void TearDown() override { ExpectClose(sum_); }

  Difference sum_;
};

// Rows ascending and unique, holding 0 and the diagonal.
void ExpectWellFormed(const CudaCase& input, const Selected& selected);
// Densities follow from the rows.
void ExpectDensities(const CudaCase& input, const Selected& selected);

// The same rows, patterns and densities, to the bit.
void ExpectSameSelection(const Selected& a, const Selected& b);

// Captures `enqueue` in a graph and replays it.
class Graph {
 public:
  explicit Graph(const std::function<void(cudaStream_t)>& enqueue);
  ~Graph();
  void Replay();  // and waits

 private:
  cudaStream_t stream_ = nullptr;
  cudaGraphExec_t exec_ = nullptr;
};

}  // namespace prefilld::cuda

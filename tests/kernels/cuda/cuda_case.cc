#include "tests/kernels/cuda/cuda_case.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstring>
#include <iostream>
#include <random>
#include <sstream>
#include <thread>

#include "kernels/cpu/reference.h"
#include "kernels/cuda/attend/attend.h"
#include "kernels/cuda/select/flexprefill/flexprefill.h"
#include "kernels/cuda/select/joint/joint.h"

namespace prefilld::cuda {
namespace {

// Runs task(0) .. task(count - 1) on all processors: the oracle is one plain thread a head.
void ForEach(int64_t count, const std::function<void(int64_t)>& task) {
  std::atomic<int64_t> next = 0;
  std::vector<std::thread> threads;
  const int64_t workers =
      std::min<int64_t>(count, std::max(1u, std::thread::hardware_concurrency()));
  for (int64_t w = 0; w < workers; ++w) {
    threads.emplace_back([&] {
      for (int64_t i = next++; i < count; i = next++) task(i);
    });
  }
  for (std::thread& thread : threads) thread.join();
}

// NaN is infinitely wrong.
double Distance(double got, double want) {
  if (got == want) return 0;
  const double off = std::abs(got - want);
  return std::isnan(off) ? INFINITY : off;
}

// Of stage 3: of o relative, by its norm and at its worst element, and of lse.
struct Tolerance {
  DType dtype;
  double o, lse;
};
constexpr Tolerance kTolerances[] = {
    {DType::kF32, 1e-5, 1e-4}, {DType::kBF16, 1e-2, 1e-3}, {DType::kF16, 2e-3, 1e-3}};

const Tolerance& ToleranceOf(DType dtype) {
  return *std::find_if(std::begin(kTolerances), std::end(kTolerances),
                       [&](const Tolerance& row) { return row.dtype == dtype; });
}

// What stage 2 of a sparse method leaves.
constexpr HeadReport kUnmeasured = {.pattern = Pattern::kJoint, .density = 0.5f};

uint16_t Narrow(float x, DType dtype) {  // to 16 bits
  if (dtype == DType::kF16) return std::bit_cast<uint16_t>(static_cast<_Float16>(x));
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if (std::isnan(x)) return 0x7FC0;
  return static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

std::vector<uint16_t> WordsOf(const std::vector<float>& x, DType dtype) {
  std::vector<uint16_t> words(x.size() * Words(dtype));
  if (dtype == DType::kF32) {
    std::memcpy(words.data(), x.data(), x.size() * sizeof(float));
    return words;
  }
  std::transform(x.begin(), x.end(), words.begin(),
                 [&](float value) { return Narrow(value, dtype); });
  return words;
}

std::vector<int64_t> Offsets(const std::vector<int64_t>& lengths) {
  std::vector<int64_t> offsets = {0};
  for (int64_t length : lengths) offsets.push_back(offsets.back() + length);
  return offsets;
}

}  // namespace

int Multiprocessors() {
  int count = 0;
  EXPECT_CUDA_OK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, 0));
  return count;
}

float Widen(const uint16_t* words, DType dtype) {
  if (dtype == DType::kF16) return static_cast<float>(std::bit_cast<_Float16>(words[0]));
  const uint32_t low = dtype == DType::kF32 ? words[0] : 0;
  const uint32_t high = words[Words(dtype) - 1];
  return std::bit_cast<float>(high << 16 | low);
}

std::string Describe(const CaseOptions& options) {
  std::ostringstream out;
  out << Name(options.dtype) << " d " << options.head_dim << " heads " << options.q_heads << "/"
      << options.kv_heads << " block " << options.block_size << " sq/sk";
  for (size_t s = 0; s < options.sq.size(); ++s) {
    out << " " << options.sq[s] << "/" << (options.sk.empty() ? options.sq : options.sk)[s];
  }
  constexpr const char* kLayouts[] = {"", " by heads", " paged"};
  constexpr const char* kFamilyNames[] = {"random", "faint", "sink", "band", "needle", "zero"};
  out << kLayouts[static_cast<int>(options.layout)];
  if (options.page_tokens > 0) out << " by " << options.page_tokens;
  out << " " << kFamilyNames[static_cast<int>(options.family)] << " amplitude "
      << options.amplitude;
  return out.str();
}

bool Output::operator==(const Output& other) const {
  return o == other.o && lse.size() == other.lse.size() &&
         std::memcmp(lse.data(), other.lse.data(), lse.size() * sizeof(float)) == 0;
}

CudaCase::CudaCase(const CaseOptions& options) : CudaCase(options, nullptr) {}

CudaCase::CudaCase(const CaseOptions& options, const Edit& edit) : options_(options) {
  if (options_.sk.empty()) options_.sk = options_.sq;
  if (options_.page_tokens == 0) options_.page_tokens = options_.block_size;
  cpu::Case wide({.family = options.family,
                  .dtype = DType::kF32,
                  .q_heads = options.q_heads,
                  .kv_heads = options.kv_heads,
                  .head_dim = options.head_dim,
                  .sq = options_.sq,
                  .sk = options_.sk,
                  .seed = options.seed});
  for (float& x : wide.q()) x *= options.amplitude;
  if (edit) edit(&wide);
  Build(&wide);
}

void CudaCase::Build(cpu::Case* wide) {
  shape_ = {.dtype = options_.dtype,
            .q_heads = options_.q_heads,
            .kv_heads = options_.kv_heads,
            .head_dim = options_.head_dim,
            .cu_seqlens_q = Offsets(options_.sq),
            .cu_seqlens_k = Offsets(options_.sk)};
  blocks_ = SplitIntoBlocks(shape_, options_.block_size);
  words_ = Words(options_.dtype);
  q_ = WordsOf(wide->q(), options_.dtype);
  k_ = WordsOf(wide->k(), options_.dtype);
  v_ = WordsOf(wide->v(), options_.dtype);

  Problem& p = problem_;
  p.dtype = shape_.dtype;
  p.q_heads = shape_.q_heads;
  p.kv_heads = shape_.kv_heads;
  p.head_dim = shape_.head_dim;
  p.block_size = options_.block_size;
  p.sequences = shape_.sequences();
  p.total_q = shape_.total_q();
  p.total_k = shape_.total_k();
  p.rows = TotalRows(blocks_);
  p.softmax_scale = static_cast<float>(1 / std::sqrt(static_cast<double>(shape_.head_dim)));
  int32_t pages = 0;
  for (const SequenceBlocks& blocks : blocks_) {
    Sequence s = {.q_begin = static_cast<int32_t>(blocks.q_begin),
                  .k_begin = static_cast<int32_t>(blocks.k_begin),
                  .sq = static_cast<int32_t>(blocks.sq),
                  .sk = static_cast<int32_t>(blocks.sk),
                  .prefix = static_cast<int32_t>(blocks.prefix),
                  .first_q_block = static_cast<int32_t>(blocks.first_q_block),
                  .q_blocks = static_cast<int32_t>(blocks.q_blocks),
                  .k_blocks = static_cast<int32_t>(blocks.k_blocks),
                  .row_begin = static_cast<int32_t>(blocks.row_begin),
                  .page_begin = pages};
    pages += (s.sk + options_.page_tokens - 1) / options_.page_tokens;
    p.q_blocks_max = std::max(p.q_blocks_max, s.q_blocks);
    p.k_blocks_max = std::max(p.k_blocks_max, s.k_blocks);
    p.sq_max = std::max(p.sq_max, s.sq);
    p.sk_max = std::max(p.sk_max, s.sk);
    host_sequences_.push_back(s);
  }
  p.host_sequence = host_sequences_.data();
  sequences_ = std::make_unique<DeviceArray<Sequence>>(host_sequences_);
  p.sequence = sequences_->data();

  tensors_.emplace_back(Upload(q_, p.total_q, p.q_heads, &p.q));
  o_.reset(Upload(q_, p.total_q, p.q_heads, &p.o));
  if (options_.layout == Layout::kPaged) {
    BuildPages();
  } else {
    tensors_.emplace_back(Upload(k_, p.total_k, p.kv_heads, &p.k));
    tensors_.emplace_back(Upload(v_, p.total_k, p.kv_heads, &p.v));
  }
  lse_ = std::make_unique<DeviceArray<float>>(p.q_heads * p.total_q);
  p.lse = lse_->data();
  p.index_stride = p.k_blocks_max;
  count_ = std::make_unique<DeviceArray<int32_t>>(p.q_heads * p.rows);
  index_ = std::make_unique<DeviceArray<uint16_t>>(p.q_heads * p.rows * p.index_stride);
  p.count = count_->data();
  p.index = index_->data();
  report_ = std::make_unique<DeviceArray<HeadReport>>(p.sequences * p.q_heads);
  attend_workspace_ =
      std::make_unique<DeviceArray<uint8_t>>(static_cast<int64_t>(AttendWorkspace(p)));
}

// Tokens by tokens or heads by heads, `margin` poisoned elements between them.
DeviceArray<uint16_t>* CudaCase::Upload(const std::vector<uint16_t>& x, int64_t tokens, int heads,
                                        Tensor* tensor) {
  const int64_t d = options_.head_dim, padded = tokens + 2 * kPad;
  const bool by_heads = options_.layout == Layout::kHeads;
  tensor->token_stride = (by_heads ? d : heads * d) + options_.margin;
  tensor->head_stride = by_heads ? padded * tensor->token_stride : d;
  std::vector<uint16_t> host(
      padded * (heads * d + (by_heads ? heads : 1) * options_.margin) * words_, 0xFFFF);
  for (int64_t t = 0; t < tokens; ++t) {
    for (int h = 0; h < heads; ++h) {
      std::copy_n(&x[(t * heads + h) * d * words_], d * words_,
                  &host[((kPad + t) * tensor->token_stride + h * tensor->head_stride) * words_]);
    }
  }
  auto* array = new DeviceArray<uint16_t>(host);
  tensor->data = array->data() + kPad * tensor->token_stride * words_;
  return array;
}

// Pages in random order among some that belong to nobody.
void CudaCase::BuildPages() {
  const Sequence& last = host_sequences_.back();
  const int64_t rows = options_.page_tokens;
  const int64_t used = last.page_begin + (last.sk + rows - 1) / rows, all = used + 3;
  const int64_t d = options_.head_dim * words_, heads = options_.kv_heads;
  std::vector<int32_t> pages(all);
  for (int64_t x = 0; x < all; ++x) pages[x] = static_cast<int32_t>(x);
  std::shuffle(pages.begin(), pages.end(), std::mt19937(options_.seed));
  std::vector<uint16_t> arena(all * heads * 2 * rows * d, 0xFFFF);
  for (const Sequence& s : host_sequences_) {
    for (int64_t t = 0; t < s.sk; ++t) {
      const int64_t page = pages[s.page_begin + t / rows];
      for (int64_t g = 0; g < heads; ++g) {
        for (int kv : {0, 1}) {
          std::copy_n(&(kv ? v_ : k_)[((s.k_begin + t) * heads + g) * d], d,
                      &arena[(((page * heads + g) * 2 + kv) * rows + t % rows) * d]);
        }
      }
    }
  }
  tensors_.push_back(std::make_unique<DeviceArray<uint16_t>>(arena));
  problem_.arena = tensors_.back()->data();
  problem_.arena_pages = all;
  problem_.page_tokens = options_.page_tokens;
  problem_.page_shift = std::countr_zero(static_cast<unsigned>(options_.page_tokens));
  pages.resize(used);
  pages_ = std::make_unique<DeviceArray<int32_t>>(pages);
  problem_.pages = pages_->data();
}

int64_t CudaCase::causal_blocks() const {
  int64_t sum = 0;
  for (const SequenceBlocks& blocks : blocks_) sum += blocks.causal_blocks();
  return sum * problem_.q_heads;
}

CudaCase::Rows CudaCase::RandomRows(int keep_percent, uint32_t seed) const {
  std::mt19937 random(seed);
  Rows rows;
  for (int h = 0; h < problem_.q_heads; ++h) {
    for (const SequenceBlocks& blocks : blocks_) {
      for (int64_t i = 0; i < blocks.q_blocks; ++i) {
        std::vector<int32_t>& row = rows.emplace_back();
        const int64_t diagonal = blocks.first_q_block + i;
        for (int64_t J = 0; J <= diagonal; ++J) {
          const bool keep = static_cast<int>(random() % 100) < keep_percent;
          if (keep || J == 0 || J == diagonal) row.push_back(static_cast<int32_t>(J));
        }
      }
    }
  }
  return rows;
}

void CudaCase::SetIndex(const Rows& rows) {
  std::vector<int32_t> count;
  std::vector<uint16_t> index(static_cast<size_t>(index_->size()), 0xFFFF);
  for (size_t row = 0; row < rows.size(); ++row) {
    count.push_back(static_cast<int32_t>(rows[row].size()));
    std::copy(rows[row].begin(), rows[row].end(), &index[row * problem_.index_stride]);
  }
  count_->Set(count);
  index_->Set(index);
}

CudaCase::Rows CudaCase::GetIndex() const {
  const std::vector<int32_t> count = count_->Get();
  const std::vector<uint16_t> index = index_->Get();
  Rows rows(count.size());
  for (size_t row = 0; row < count.size(); ++row) {
    if (count[row] < 0 || count[row] > problem_.index_stride) {
      ADD_FAILURE() << "count " << count[row] << " in row " << row % problem_.rows << " of head "
                    << row / problem_.rows;
      continue;
    }
    const uint16_t* begin = &index[row * problem_.index_stride];
    rows[row].assign(begin, begin + count[row]);
  }
  return rows;
}

Selection CudaCase::SelectionOf(const SparsityPolicy& policy) {
  Selection selection = {.problem = problem_,
                         .gamma = policy.gamma,
                         .flexprefill = policy.flexprefill,
                         .min_budget_tokens = policy.min_budget_tokens,
                         .max_budget_tokens = policy.max_budget_tokens,
                         .report = report_->data()};
  const size_t method = policy.method == Method::kJoint         ? JointWorkspace(problem_)
                        : policy.method == Method::kFlexPrefill ? FlexPrefillWorkspace(problem_)
                                                                : 0;
  const auto bytes = static_cast<int64_t>(std::max(method, CapturedMassWorkspace(problem_)));
  if (!selection_workspace_ || selection_workspace_->size() != bytes) {
    selection_workspace_ = std::make_unique<DeviceArray<uint8_t>>(bytes);
  }
  selection.workspace = selection_workspace_->data();
  return selection;
}

cudaError_t CudaCase::EnqueueSelect(const Selection& selection, Method method,
                                    cudaStream_t stream) {
  if (method == Method::kDense) return SelectCausal(selection, stream);
  const auto estimate = method == Method::kJoint ? JointEstimate : FlexPrefillEstimate;
  const auto select = method == Method::kJoint ? JointSelect : FlexPrefillSelect;
  const cudaError_t error = estimate(selection, Multiprocessors(), stream);
  return error != cudaSuccess ? error : select(selection, Multiprocessors(), stream);
}

void CudaCase::PoisonSelection(int workspace_byte) {
  selection_workspace_->Fill(workspace_byte);
  count_->Fill(0xFF);
  index_->Fill(0xFF);
  report_->Fill(0xFF);
}

Selected CudaCase::Select(const SparsityPolicy& policy, int poison) {
  const Selection selection = SelectionOf(policy);
  PoisonSelection(poison);
  EXPECT_CUDA_OK(EnqueueSelect(selection, policy.method, nullptr));
  EXPECT_CUDA_OK(cudaDeviceSynchronize());
  CheckNothingElseWritten();
  return GetSelected();
}

Selected CudaCase::MeasureCapturedMass(const SparsityPolicy& policy, int poison) {
  const Selection selection = SelectionOf(policy);
  selection_workspace_->Fill(poison);
  report_->Set(std::vector<HeadReport>(static_cast<size_t>(report_->size()), kUnmeasured));
  EXPECT_CUDA_OK(
      cuda::MeasureCapturedMass(selection, policy.min_captured_mass, Multiprocessors(), nullptr));
  EXPECT_CUDA_OK(cudaDeviceSynchronize());
  CheckNothingElseWritten();
  return GetSelected();
}

Selected CudaCase::GetSelected() const { return {GetIndex(), report_->Get()}; }

void CudaCase::PoisonOutput() {
  o_->Fill(0xFF);
  lse_->Fill(0xFF);
}

Output CudaCase::Run(Attend attend, int poison) {
  PoisonOutput();
  attend_workspace_->Fill(poison);
  EXPECT_CUDA_OK(attend(problem_, attend_workspace_->data(), Multiprocessors(), nullptr));
  EXPECT_CUDA_OK(cudaDeviceSynchronize());
  CheckNothingElseWritten();
  return GetOutput();
}

Output CudaCase::GetOutput() const {
  const int64_t d = options_.head_dim * words_, heads = problem_.q_heads;
  const int64_t token = problem_.o.token_stride * words_, head = problem_.o.head_stride * words_;
  std::vector<uint16_t> all = o_->Get();
  Output output{.o = {}, .lse = lse_->Get()};
  const int64_t first = kPad * token;
  for (int64_t t = 0; t < problem_.total_q; ++t) {
    for (int64_t h = 0; h < heads; ++h) {
      uint16_t* at = &all[first + t * token + h * head];
      output.o.insert(output.o.end(), at, at + d);
      std::fill_n(at, d, 0xFFFF);
    }
  }
  const auto stray = std::find_if(all.begin(), all.end(), [](uint16_t x) { return x != 0xFFFF; });
  EXPECT_EQ(stray, all.end()) << "o was written at word " << stray - all.begin() - first
                              << ", which is no channel of a query; token stride " << token;
  return output;
}

void CudaCase::CheckNothingElseWritten() const {
  for (const auto& tensor : tensors_) tensor->ExpectGuardsIntact("an input");
  o_->ExpectGuardsIntact("o");
  lse_->ExpectGuardsIntact("lse");
  count_->ExpectGuardsIntact("count");
  index_->ExpectGuardsIntact("index");
  report_->ExpectGuardsIntact("report");
  attend_workspace_->ExpectGuardsIntact("the workspace of attend");
  if (selection_workspace_) selection_workspace_->ExpectGuardsIntact("the workspace of selection");
}

// One head of one sequence, or some of its rows of blocks, as a call of its own.
AttentionArgs CudaCase::HostArgs(const SparsityPolicy& policy, int sequence, int h, int64_t begin,
                                 int64_t end) const {
  const SequenceBlocks& blocks = blocks_[sequence];
  const int64_t d = options_.head_dim, g = h / (options_.q_heads / options_.kv_heads);
  AttentionArgs args;
  args.shape = {.dtype = options_.dtype,
                .q_heads = 1,
                .kv_heads = 1,
                .head_dim = options_.head_dim,
                .cu_seqlens_q = {0, end - begin},
                .cu_seqlens_k = {0, blocks.prefix + end}};
  args.policy = policy;
  args.policy.block_size = options_.block_size;
  args.softmax_scale = problem_.softmax_scale;
  const int64_t kv_first = (blocks.k_begin * options_.kv_heads + g) * d * words_;
  const int64_t q_first = ((blocks.q_begin + begin) * options_.q_heads + h) * d * words_;
  args.q = {&q_[q_first], options_.q_heads * d, d};
  args.k = {&k_[kv_first], options_.kv_heads * d, d};
  args.v = {&v_[kv_first], options_.kv_heads * d, d};
  return args;
}

Selected CudaCase::ReferenceSelect(const SparsityPolicy& policy) const {
  Selected selected;
  selected.rows.resize(problem_.q_heads * problem_.rows);
  selected.report.resize(problem_.sequences * problem_.q_heads);
  ForEach(problem_.sequences * problem_.q_heads, [&](int64_t task) {
    const int s = static_cast<int>(task / problem_.q_heads);
    const int h = static_cast<int>(task % problem_.q_heads);
    const SequenceBlocks& blocks = blocks_[s];
    AttentionArgs args = HostArgs(policy, s, h, 0, blocks.sq);
    std::vector<int32_t> count(blocks.q_blocks);
    std::vector<uint16_t> index(blocks.q_blocks * blocks.k_blocks);
    args.index = {count.data(), index.data(), blocks.q_blocks, blocks.k_blocks};
    args.report = &selected.report[task];
    cpu::ReferenceSelectBlocks(args);
    for (int64_t i = 0; i < blocks.q_blocks; ++i) {
      const uint16_t* row = args.index.row_at(0, i);
      selected.rows[h * problem_.rows + blocks.row_begin + i].assign(row, row + count[i]);
    }
  });
  return selected;
}

Selected CudaCase::ReferenceMeasure(const SparsityPolicy& policy, const Rows& rows) const {
  Selected selected{.rows = rows, .report = {}};
  selected.report.assign(problem_.sequences * problem_.q_heads, kUnmeasured);
  ForEach(problem_.sequences * problem_.q_heads, [&](int64_t task) {
    const int s = static_cast<int>(task / problem_.q_heads);
    const int h = static_cast<int>(task % problem_.q_heads);
    const SequenceBlocks& blocks = blocks_[s];
    AttentionArgs args = HostArgs(policy, s, h, 0, blocks.sq);
    std::vector<int32_t> count(blocks.q_blocks);
    std::vector<uint16_t> index(blocks.q_blocks * blocks.k_blocks);
    args.index = {count.data(), index.data(), blocks.q_blocks, blocks.k_blocks};
    args.report = &selected.report[task];
    for (int64_t i = 0; i < blocks.q_blocks; ++i) {
      const std::vector<int32_t>& row = rows[h * problem_.rows + blocks.row_begin + i];
      count[i] = static_cast<int32_t>(row.size());
      std::copy(row.begin(), row.end(), args.index.row_at(0, i));
    }
    cpu::ReferenceMeasureCapturedMass(args);
    for (int64_t i = 0; i < blocks.q_blocks; ++i) {
      const uint16_t* row = args.index.row_at(0, i);
      selected.rows[h * problem_.rows + blocks.row_begin + i].assign(row, row + count[i]);
    }
  });
  return selected;
}

CudaCase::Expected CudaCase::ReferenceAttend(const Rows& rows, int sequence, int h, int64_t begin,
                                             int64_t end) const {
  const SequenceBlocks& blocks = blocks_[sequence];
  AttentionArgs args = HostArgs({}, sequence, h, begin, end);
  const int64_t first = (blocks.prefix + begin) / options_.block_size;
  const int64_t last = (blocks.prefix + end - 1) / options_.block_size;
  std::vector<int32_t> count;
  std::vector<uint16_t> index((last - first + 1) * (last + 1));
  for (int64_t I = first; I <= last; ++I) {
    const int64_t at = h * problem_.rows + blocks.row_begin + I - blocks.first_q_block;
    count.push_back(static_cast<int32_t>(rows[at].size()));
    std::copy(rows[at].begin(), rows[at].end(), &index[(I - first) * (last + 1)]);
  }
  args.index = {count.data(), index.data(), last - first + 1, last + 1};
  cpu::ReferenceOutput output = cpu::ReferenceAttend(args);
  return {std::move(output.o), std::move(output.lse)};
}

void ExpectMatchesOracle(const CudaCase& input, const CudaCase::Rows& rows, const Output& output,
                         int sampled) {
  SCOPED_TRACE(Describe(input.options()));
  const Problem& p = input.problem();
  struct Span {
    int s, h;
    int64_t begin, end;
    CudaCase::Expected expected;
  };
  std::vector<Span> spans;
  for (int s = 0; s < p.sequences; ++s) {
    const SequenceBlocks& blocks = input.sequences()[s];
    for (int h = 0; h < p.q_heads; ++h) {
      if (sampled == 0) spans.push_back({s, h, 0, blocks.sq, {}});
      for (int x = 0; x < sampled; ++x) {
        // Spread, other blocks for other heads, the last one always.
        const int64_t i =
            blocks.q_blocks - 1 - (x * 2654435761LL + h * 40503LL * (x > 0)) % blocks.q_blocks;
        const int64_t block_begin = (blocks.first_q_block + i) * p.block_size - blocks.prefix;
        spans.push_back({s,
                         h,
                         std::max<int64_t>(0, block_begin),
                         std::min<int64_t>(blocks.sq, block_begin + p.block_size),
                         {}});
      }
    }
  }
  ForEach(static_cast<int64_t>(spans.size()), [&](int64_t x) {
    Span& span = spans[x];
    span.expected = input.ReferenceAttend(rows, span.s, span.h, span.begin, span.end);
  });

  const int d = p.head_dim;
  double error = 0, norm = 0, largest = 0, worst = 0, worst_lse = 0;
  std::string worst_at, worst_lse_at;
  const auto place = [](const Span& span, int64_t t) {
    return " at sequence " + std::to_string(span.s) + " head " + std::to_string(span.h) +
           " token " + std::to_string(span.begin + t);
  };
  for (const Span& span : spans) {
    const int64_t first = input.sequences()[span.s].q_begin + span.begin;
    for (int64_t t = 0; t < span.end - span.begin; ++t) {
      for (int c = 0; c < d; ++c) {
        const double want = span.expected.o[t * d + c];
        const int64_t at = ((first + t) * p.q_heads + span.h) * d + c;
        const double got = Widen(&output.o[at * Words(p.dtype)], p.dtype);
        const double off = Distance(got, want);
        error += off * off;
        norm += want * want;
        largest = std::max(largest, std::abs(want));
        if (off > worst) {
          worst = off;
          worst_at = place(span, t) + " channel " + std::to_string(c) + ": " + std::to_string(got) +
                     " for " + std::to_string(want);
        }
      }
      const double want = span.expected.lse[t];
      const double off = Distance(output.lse[span.h * p.total_q + first + t], want);
      if (off > worst_lse) worst_lse = off, worst_lse_at = place(span, t);
    }
  }
  const Tolerance& tolerance = ToleranceOf(p.dtype);
  EXPECT_LE(std::sqrt(error), tolerance.o * std::sqrt(norm))
      << "worst element off by " << worst << worst_at;
  EXPECT_LE(worst, tolerance.o * std::max(1.0, largest)) << worst_at;
  EXPECT_LE(worst_lse, tolerance.lse) << "lse" << worst_lse_at;
}

Difference Compare(const CudaCase& input, const Selected& got, const Selected& want) {
  Difference difference;
  std::ostringstream list;
  int listed = 0;
  for (size_t row = 0; row < want.rows.size(); ++row) {
    std::vector<int32_t> both, either, only;
    const std::vector<int32_t>&a = got.rows[row], &b = want.rows[row];
    std::set_intersection(a.begin(), a.end(), b.begin(), b.end(), std::back_inserter(both));
    std::set_union(a.begin(), a.end(), b.begin(), b.end(), std::back_inserter(either));
    std::set_symmetric_difference(a.begin(), a.end(), b.begin(), b.end(), std::back_inserter(only));
    difference.both += static_cast<int64_t>(both.size());
    difference.either += static_cast<int64_t>(either.size());
    for (int32_t J : only) {
      if (listed++ >= 12) continue;
      const bool surplus = std::binary_search(a.begin(), a.end(), J);
      list << (surplus ? " +" : " -") << "(head " << row / input.problem().rows << ", row "
           << row % input.problem().rows << ", block " << J << ")";
    }
  }
  if (listed > 12) list << " and " << listed - 12 << " more";
  difference.list = list.str();
  return difference;
}

void ExpectSelects(const CaseOptions& options, const SparsityPolicy& policy, Difference* sum) {
  std::ostringstream what;
  what << Name(policy.method) << " gamma " << policy.gamma << " tau " << policy.flexprefill.tau
       << " budget " << policy.min_budget_tokens << ".." << policy.max_budget_tokens << ", "
       << Describe(options);
  SCOPED_TRACE(what.str());
  CudaCase input(options);
  const Selected got = input.Select(policy), want = input.ReferenceSelect(policy);
  ExpectWellFormed(input, got);
  ExpectDensities(input, got);
  for (size_t x = 0; x < want.report.size(); ++x) {
    EXPECT_EQ(got.report[x].pattern, want.report[x].pattern) << "head " << x;
    EXPECT_EQ(got.report[x].dense_reason, want.report[x].dense_reason) << "head " << x;
  }
  const Difference difference = Compare(input, got, want);
  if (difference.both != difference.either) {
    std::cout << what.str() << ": IoU " << difference.iou() << " of " << difference.either << ":"
              << difference.list << std::endl;
  }
  sum->both += difference.both;
  sum->either += difference.either;
}

void ExpectClose(const Difference& sum) {
  EXPECT_GE(sum.iou(), 0.999) << sum.both << " of " << sum.either << " blocks";
}

void ExpectSameSelection(const Selected& a, const Selected& b) {
  EXPECT_EQ(a.rows, b.rows);
  ASSERT_EQ(a.report.size(), b.report.size());
  for (size_t x = 0; x < a.report.size(); ++x) {
    EXPECT_EQ(a.report[x].pattern, b.report[x].pattern) << "head " << x;
    EXPECT_EQ(a.report[x].dense_reason, b.report[x].dense_reason) << "head " << x;
    EXPECT_EQ(a.report[x].density, b.report[x].density) << "head " << x;
  }
}

void ExpectWellFormed(const CudaCase& input, const Selected& selected) {
  for (int h = 0; h < input.problem().q_heads; ++h) {
    for (const SequenceBlocks& blocks : input.sequences()) {
      for (int64_t i = 0; i < blocks.q_blocks; ++i) {
        const std::vector<int32_t>& row =
            selected.rows[h * input.problem().rows + blocks.row_begin + i];
        ASSERT_FALSE(row.empty()) << "head " << h << " row " << blocks.row_begin + i;
        ASSERT_EQ(row.front(), 0) << "head " << h << " row " << blocks.row_begin + i;
        ASSERT_EQ(row.back(), blocks.first_q_block + i)
            << "head " << h << " row " << blocks.row_begin + i;
        for (size_t x = 1; x < row.size(); ++x) ASSERT_LT(row[x - 1], row[x]);
      }
    }
  }
}

void ExpectDensities(const CudaCase& input, const Selected& selected) {
  for (int s = 0; s < input.problem().sequences; ++s) {
    const SequenceBlocks& blocks = input.sequences()[s];
    for (int h = 0; h < input.problem().q_heads; ++h) {
      int64_t kept = 0;
      for (int64_t i = 0; i < blocks.q_blocks; ++i) {
        kept += static_cast<int64_t>(
            selected.rows[h * input.problem().rows + blocks.row_begin + i].size());
      }
      EXPECT_NEAR(selected.report[s * input.problem().q_heads + h].density,
                  static_cast<double>(kept) / blocks.causal_blocks(), 1e-6)
          << "sequence " << s << " head " << h;
    }
  }
}

Graph::Graph(const std::function<void(cudaStream_t)>& enqueue) {
  EXPECT_CUDA_OK(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking));
  EXPECT_CUDA_OK(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal));
  enqueue(stream_);
  cudaGraph_t graph = nullptr;
  EXPECT_CUDA_OK(cudaStreamEndCapture(stream_, &graph));
  EXPECT_CUDA_OK(cudaGraphInstantiate(&exec_, graph, 0));
  EXPECT_CUDA_OK(cudaGraphDestroy(graph));
}

Graph::~Graph() {
  cudaGraphExecDestroy(exec_);
  cudaStreamDestroy(stream_);
}

void Graph::Replay() {
  EXPECT_CUDA_OK(cudaGraphLaunch(exec_, stream_));
  EXPECT_CUDA_OK(cudaStreamSynchronize(stream_));
}

}  // namespace prefilld::cuda

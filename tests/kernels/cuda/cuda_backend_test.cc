// The backend and its device through their interfaces: the whole of a call.
#include "kernels/cuda/cuda_backend.h"

#include <cuda.h>
#include <cuda_runtime_api.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "kernels/backend.h"
#include "kernels/convert.h"

namespace prefilld::cuda {
namespace {

std::unique_ptr<Backend> Gpu(const char* kernels = "auto") {
  auto backend = CreateBackend("cuda", 1, {.kernels = kernels});
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
  std::vector<float> value(kTokens * kDim), out(kTokens * kHeads * kDim);
  for (int64_t t = 500; t < kTokens; ++t) value[t * kDim] = 1;
  for (const DType dtype : {DType::kBF16, DType::kF32}) {
    const size_t size = SizeOf(dtype);
    const auto convert = [&](const void* src, DType from, void* dst, DType to, size_t count) {
      Convert(
          {.src = src, .from = from, .dst = dst, .to = to, .count = static_cast<int64_t>(count)});
    };
    std::vector<std::byte> narrow(value.size() * size), narrow_out(out.size() * size);
    convert(value.data(), DType::kF32, narrow.data(), dtype, value.size());
    Buffer q = Take(narrow_out.size()), k = Take(narrow.size()), v = Take(narrow.size()),
           o = Take(narrow_out.size());
    Buffer count = Take(kHeads * kRows * 4), index = Take(kHeads * kRows * kRows * 2);
    Buffer report = *device.AllocateHost(kHeads * sizeof(HeadReport));
    ASSERT_TRUE(device.Copy(v.data(), narrow.data(), v.bytes(), device.upload_stream()).ok());
    ASSERT_TRUE(device.Wait({}, device.upload_stream()).ok());
    for (Method method : {Method::kDense, Method::kFlexPrefill, Method::kJoint}) {
      SCOPED_TRACE(std::string(Name(dtype)) + " " + std::string(Name(method)));
      AttentionArgs args{.shape = {dtype, kHeads, 1, kDim, {0, kTokens}, {0, kTokens}},
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
      ASSERT_TRUE(device.Copy(narrow_out.data(), o.data(), narrow_out.size(), {}).ok());
      ASSERT_TRUE(device.Synchronize({}).ok());
      convert(narrow_out.data(), dtype, out.data(), DType::kF32, out.size());
      EXPECT_FLOAT_EQ(args.report[1].density, 1);
      EXPECT_NEAR(args.report[1].captured_mass, 1, 1e-3);
      for (int64_t t = 0; t < kTokens; ++t) {
        const double want = t < 500 ? 0 : static_cast<double>(t - 499) / static_cast<double>(t + 1);
        ASSERT_NEAR(out[(t * kHeads + 1) * kDim], want, dtype == DType::kF32 ? 1e-5 : 0.004) << t;
      }
    }
  }
}

// K and V in shuffled pages, pages of nobody and tails of NaN: bit for bit what rows give.
class PagedOnGpu : public CudaBackendOnGpu {
 protected:
  static constexpr int kHeads = 4, kKvHeads = 2, kDim = 128;
  struct Result {
    std::vector<int32_t> rows;  // count, then blocks, of each row
    std::vector<HeadReport> report;
    std::vector<uint16_t> o;
    std::vector<float> lse;
  };

  template <typename T>
  Buffer Upload(const std::vector<T>& from) {
    Buffer to = Take(from.size() * sizeof(T));
    EXPECT_TRUE(backend_->device().Copy(to.data(), from.data(), to.bytes(), {}).ok());
    EXPECT_TRUE(backend_->device().Synchronize({}).ok());
    return to;
  }
  template <typename T>
  void Download(const Buffer& from, std::vector<T>* to) {
    to->resize(from.bytes() / sizeof(T));
    EXPECT_TRUE(backend_->device().Copy(to->data(), from.data(), from.bytes(), {}).ok());
  }

  Result Run(AttentionArgs args) {
    Device& device = backend_->device();
    const auto blocks = SplitIntoBlocks(args.shape, args.policy.block_size);
    const int64_t rows = TotalRows(blocks), stride = MaxKeyBlocks(blocks);
    const int64_t total = args.shape.total_q();
    Buffer o = Take(total * kHeads * kDim * 2), lse = Take(total * kHeads * sizeof(float));
    Buffer count = Take(kHeads * rows * 4), index = Take(kHeads * rows * stride * 2);
    const int64_t reports = args.shape.sequences() * kHeads;
    Buffer report = *device.AllocateHost(reports * sizeof(HeadReport));
    std::fill_n(report.as<HeadReport>(), reports, HeadReport());
    args.o = {o.data(), kHeads * kDim, kDim};
    args.lse = lse.as<float>();
    args.index = {count.as<int32_t>(), index.as<uint16_t>(), rows, stride};
    args.report = report.as<HeadReport>();
    for (auto stage : {&Backend::EstimatePattern, &Backend::SelectBlocks,
                       &Backend::MeasureCapturedMass, &Backend::Attend}) {
      const absl::Status status = (backend_.get()->*stage)(args, {});
      EXPECT_TRUE(status.ok()) << status;
    }
    Result result;
    std::vector<int32_t> counts;
    std::vector<uint16_t> indices;
    Download(o, &result.o);
    Download(lse, &result.lse);
    Download(count, &counts);
    Download(index, &indices);
    EXPECT_TRUE(device.Synchronize({}).ok());
    for (size_t row = 0; row < counts.size(); ++row) {
      result.rows.push_back(counts[row]);
      const auto begin = indices.begin() + static_cast<int64_t>(row) * stride;
      result.rows.insert(result.rows.end(), begin,
                         begin + std::clamp<int64_t>(counts[row], 0, stride));
    }
    result.report.assign(args.report, args.report + reports);
    return result;
  }

  static void ExpectSameBits(const Result& a, const Result& b) {
    EXPECT_TRUE(a.rows == b.rows);
    ASSERT_EQ(a.report.size(), b.report.size());
    for (size_t x = 0; x < a.report.size(); ++x) {
      EXPECT_EQ(a.report[x].pattern, b.report[x].pattern);
      EXPECT_EQ(a.report[x].dense_reason, b.report[x].dense_reason);
      EXPECT_EQ(a.report[x].density, b.report[x].density);
      EXPECT_EQ(a.report[x].captured_mass, b.report[x].captured_mass);
      EXPECT_EQ(a.report[x].captured_mass_min, b.report[x].captured_mass_min);
    }
    EXPECT_TRUE(a.o == b.o);
    ASSERT_EQ(a.lse.size(), b.lse.size());
    EXPECT_EQ(std::memcmp(a.lse.data(), b.lse.data(), a.lse.size() * sizeof(float)), 0);
  }

  // BF16 of normal values.
  static std::vector<uint16_t> Random(int64_t count, unsigned seed) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    std::vector<uint16_t> values(count);
    for (uint16_t& value : values) {
      const float x = normal(random);
      uint32_t bits;
      std::memcpy(&bits, &x, 4);
      value = static_cast<uint16_t>(bits >> 16);
    }
    return values;
  }

  // Fills `arena`, all NaN before, and returns the pages of every sequence.
  static std::vector<int32_t> Page(const AttentionShape& shape, const std::vector<uint16_t>& k,
                                   const std::vector<uint16_t>& v, int page_tokens,
                                   std::vector<uint16_t>* arena) {
    const auto pages_of = [&](int s) {
      return (shape.cu_seqlens_k[s + 1] - shape.cu_seqlens_k[s] + page_tokens - 1) / page_tokens;
    };
    int64_t used = 0;
    for (int s = 0; s < shape.sequences(); ++s) used += pages_of(s);
    std::vector<int32_t> pages(used + 3);
    std::iota(pages.begin(), pages.end(), 0);
    std::shuffle(pages.begin(), pages.end(), std::mt19937(7));
    arena->assign(pages.size() * kKvHeads * 2 * page_tokens * kDim, 0xffff);
    int64_t first = 0;
    for (int s = 0; s < shape.sequences(); first += pages_of(s++)) {
      const int64_t begin = shape.cu_seqlens_k[s], sk = shape.cu_seqlens_k[s + 1] - begin;
      for (int64_t x = 0; x < sk * kKvHeads * 2; ++x) {
        const int64_t t = x / (kKvHeads * 2), g = x / 2 % kKvHeads, part = x % 2;
        const int64_t page = pages[first + t / page_tokens];
        const int64_t to = ((page * kKvHeads + g) * 2 + part) * page_tokens + t % page_tokens;
        std::copy_n((part == 0 ? k : v).begin() + ((begin + t) * kKvHeads + g) * kDim, kDim,
                    arena->begin() + to * kDim);
      }
    }
    pages.resize(used);
    return pages;
  }
};

TEST_F(PagedOnGpu, GivesWhatRowsGive) {
  const AttentionShape equal{DType::kBF16, kHeads,          kKvHeads,
                             kDim,         {0, 1000, 2700}, {0, 1000, 2700}};
  AttentionShape prefix = equal;
  prefix.cu_seqlens_q = {0, 300, 1001};
  const Buffer q = Upload(Random(equal.total_q() * kHeads * kDim, 1));
  const auto k = Random(equal.total_k() * kKvHeads * kDim, 2);
  const auto v = Random(equal.total_k() * kKvHeads * kDim, 3);
  const Buffer k_rows = Upload(k), v_rows = Upload(v);
  for (const AttentionShape& shape : {equal, prefix}) {
    for (const auto& [block_size, page_tokens] : {std::pair(64, 128), {128, 128}, {128, 256}}) {
      std::vector<uint16_t> wide;
      const std::vector<int32_t> numbers = Page(shape, k, v, page_tokens, &wide);
      const Buffer pages = Upload(numbers), arena = Upload(wide);
      for (const MethodRow& method : kMethodTable) {
        const SparsityPolicy policy{
            .method = method.method, .gamma = 0.7, .block_size = block_size};
        if (!backend_->Supports(shape, policy).ok()) continue;  // fewer queries than keys
        SCOPED_TRACE(std::string(method.name) + " blocks of " + std::to_string(block_size) +
                     " pages of " + std::to_string(page_tokens));
        AttentionArgs args{.shape = shape,
                           .policy = policy,
                           .softmax_scale = 0.088,
                           .q = {q.data(), kHeads * kDim, kDim},
                           .k = {k_rows.data(), kKvHeads * kDim, kDim},
                           .v = {v_rows.data(), kKvHeads * kDim, kDim}};
        const Result want = Run(args);
        args.k = args.v = {};
        args.kv_pages = {arena.data(), pages.as<int32_t>(),
                         static_cast<int64_t>(numbers.size()) + 3, page_tokens};
        ExpectSameBits(Run(args), want);
      }
    }
  }
}

TEST_F(PagedOnGpu, PagesOfPartsOfBlocksAreRefusedByName) {
  Buffer memory = Take(1 << 20);
  AttentionArgs args{.shape = {DType::kBF16, 1, 1, 64, {0, 100}, {0, 100}},
                     .policy = {.method = Method::kJoint, .block_size = 128},
                     .softmax_scale = 0.125,
                     .q = {memory.data(), 64, 64},
                     .kv_pages = {memory.data(), memory.as<int32_t>(), 8, 64},
                     .o = {memory.data(), 64, 64}};
  const absl::Status status = backend_->Attend(args, {});
  EXPECT_EQ(status.code(), absl::StatusCode::kUnimplemented);
  EXPECT_THAT(std::string(status.message()),
              testing::HasSubstr("page_tokens 64 with block_size 128 not supported"));
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
  EXPECT_EQ(device.Allocate(size_t{1} << 45).status().code(), absl::StatusCode::kResourceExhausted);
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

uint64_t SharedBytes(const Device& device) {
  for (const Device::Memory& memory : device.memory()) {
    if (memory.kind == std::string_view("shared")) return memory.bytes;
  }
  ADD_FAILURE() << "it tells nothing of shared memory";
  return 0;
}

// Another mapping of what a descriptor names, as another process makes it.
class Imported {
 public:
  Imported(int descriptor, size_t bytes) : bytes_(bytes) {
    const auto handle = reinterpret_cast<void*>(static_cast<uintptr_t>(descriptor));
    Call<decltype(&cuMemImportFromShareableHandle)>("cuMemImportFromShareableHandle", &handle_,
                                                    handle,
                                                    CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR);
    Call<decltype(&cuMemAddressReserve)>("cuMemAddressReserve", &at_, bytes, size_t{0},
                                         CUdeviceptr{0}, 0ull);
    Call<decltype(&cuMemMap)>("cuMemMap", at_, bytes, size_t{0}, handle_, 0ull);
    CUmemAccessDesc access{};
    access.location = {.type = CU_MEM_LOCATION_TYPE_DEVICE, .id = 0};
    access.flags = CU_MEM_ACCESS_FLAGS_PROT_READWRITE;
    Call<decltype(&cuMemSetAccess)>("cuMemSetAccess", at_, bytes, &access, size_t{1});
  }
  ~Imported() {
    Call<decltype(&cuMemUnmap)>("cuMemUnmap", at_, bytes_);
    Call<decltype(&cuMemAddressFree)>("cuMemAddressFree", at_, bytes_);
    Call<decltype(&cuMemRelease)>("cuMemRelease", handle_);
  }
  void* data() const { return reinterpret_cast<void*>(at_); }

 private:
  template <typename Function, typename... Arguments>
  static void Call(const char* name, Arguments... arguments) {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
    ASSERT_EQ(cudaGetDriverEntryPointByVersion(name, &found, 12000, cudaEnableDefault, &result),
              cudaSuccess);
    ASSERT_NE(found, nullptr) << name;
    ASSERT_EQ(reinterpret_cast<Function>(found)(arguments...), CUDA_SUCCESS) << name;
  }

  const size_t bytes_;
  CUmemGenericAllocationHandle handle_ = 0;
  CUdeviceptr at_ = 0;
};

// Of pools and of what is shared alike; what is kept for others is in nobody's way.
TEST_F(CudaBackendOnGpu, NoMoreIsTakenThanWasAllowed) {
  constexpr size_t kMiB = size_t{1} << 20;
  auto bounded = CreateBackend("cuda", 0, {.memory_bytes = 64 * kMiB});
  ASSERT_TRUE(bounded.ok()) << bounded.status();
  Device& device = (*bounded)->device();
  EXPECT_EQ(device.free_bytes(), 64 * kMiB);
  auto first = device.Allocate(48 * kMiB);
  ASSERT_TRUE(first.ok()) << first.status();
  EXPECT_EQ(device.free_bytes(), 16 * kMiB);
  EXPECT_TRUE(absl::IsResourceExhausted(device.Allocate(32 * kMiB).status()));
  EXPECT_TRUE(absl::IsResourceExhausted(device.AllocateShared(32 * kMiB).status()));
  { const Buffer gone = *std::move(first); }
  auto shared = device.AllocateShared(32 * kMiB);
  ASSERT_TRUE(shared.ok()) << shared.status();
  EXPECT_EQ(device.free_bytes(), 32 * kMiB);
}

TEST_F(CudaBackendOnGpu, SharedMemoryIsTheSameInBothMappings) {
  Device& device = backend_->device();
  EXPECT_THAT(std::string(device.uuid()), testing::StartsWith("GPU-"));
  auto buffer = device.AllocateShared(1000);
  ASSERT_TRUE(buffer.ok()) << buffer.status();
  EXPECT_GT(buffer->bytes(), 1000u) << "whole pages";
  EXPECT_EQ(SharedBytes(device), buffer->bytes());
  const size_t bytes = buffer->bytes();
  const auto descriptor = device.ExportShared(*buffer);
  ASSERT_TRUE(descriptor.ok()) << descriptor.status();
  Imported imported(*descriptor, bytes);
  close(*descriptor);
  std::vector<char> host(bytes, 1);
  const auto read = [&](const void* from) {
    EXPECT_TRUE(device.Copy(host.data(), from, bytes, {}).ok());
    EXPECT_TRUE(device.Synchronize({}).ok());
  };
  read(imported.data());
  EXPECT_EQ(std::count(host.begin(), host.end(), 0), static_cast<int64_t>(bytes)) << "zeroed";
  const std::vector<char> sevens(bytes, 7);
  ASSERT_TRUE(device.Copy(imported.data(), sevens.data(), bytes, {}).ok());
  read(buffer->data());
  EXPECT_EQ(host, sevens);
  ASSERT_TRUE(device.Zero(buffer->data(), bytes).ok());
  read(imported.data());
  EXPECT_EQ(std::count(host.begin(), host.end(), 0), static_cast<int64_t>(bytes));
  ASSERT_TRUE(device.Copy(buffer->data(), sevens.data(), bytes, {}).ok());
  { const Buffer gone = std::exchange(*buffer, Buffer()); }
  EXPECT_EQ(SharedBytes(device), 0u);
  read(imported.data());
  EXPECT_EQ(host, sevens) << "who has mapped it keeps it, and what was enqueued was waited for";
}

TEST_F(CudaBackendOnGpu, NoRoomForSharedMemoryIsToldAndTheNextWorks) {
  Device& device = backend_->device();
  EXPECT_EQ(device.AllocateShared(size_t{1} << 45).status().code(),
            absl::StatusCode::kResourceExhausted);
  EXPECT_TRUE(device.fault().empty());
  EXPECT_TRUE(device.AllocateShared(1 << 20).ok());
  EXPECT_FALSE(device.ExportShared(Take(1000)).ok()) << "of another kind";
}

}  // namespace
}  // namespace prefilld::cuda

// Device memory for tests: every array lies between two guards that no kernel may write, and starts
// as 0xFF bytes, which are NaN in every float type and no valid index.
#pragma once

#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <iostream>
#include <vector>

namespace prefilld::cuda {

// True where a GPU answers. Tests skip without one.
inline bool HasDevice() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess && count > 0;
}

// A failure of the test; where a kernel has lost the context, the end of the run, because every
// later test would fail for that alone.
inline void ExpectOk(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  ADD_FAILURE() << what << ": " << cudaGetErrorString(error);
  if (cudaDeviceSynchronize() == cudaSuccess) return;
  const testing::TestInfo* test = testing::UnitTest::GetInstance()->current_test_info();
  std::cerr << "The context is lost in " << test->test_suite_name() << "." << test->name() << ": "
            << cudaGetErrorString(error) << std::endl;
  std::exit(1);
}
#define EXPECT_CUDA_OK(call) ::prefilld::cuda::ExpectOk((call), #call)

template <typename T>
class DeviceArray {
 public:
  static constexpr size_t kGuardBytes = 1024;

  explicit DeviceArray(int64_t count) : count_(count) {
    EXPECT_CUDA_OK(cudaMalloc(reinterpret_cast<void**>(&base_), bytes() + 2 * kGuardBytes));
    EXPECT_CUDA_OK(cudaMemset(base_, 0xFF, bytes() + 2 * kGuardBytes));
  }
  explicit DeviceArray(const std::vector<T>& host)
      : DeviceArray(static_cast<int64_t>(host.size())) {
    Set(host);
  }
  ~DeviceArray() { cudaFree(base_); }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;

  T* data() const { return reinterpret_cast<T*>(base_ + kGuardBytes); }
  int64_t size() const { return count_; }
  size_t bytes() const { return static_cast<size_t>(count_) * sizeof(T); }

  void Set(const std::vector<T>& host) {
    EXPECT_CUDA_OK(cudaMemcpy(data(), host.data(), bytes(), cudaMemcpyHostToDevice));
  }
  // Before anything that is enqueued afterwards, on any stream.
  void Fill(int byte) {
    EXPECT_CUDA_OK(cudaMemset(data(), byte, bytes()));
    EXPECT_CUDA_OK(cudaDeviceSynchronize());
  }
  std::vector<T> Get() const {
    std::vector<T> host(static_cast<size_t>(count_));
    EXPECT_CUDA_OK(cudaMemcpy(host.data(), data(), bytes(), cudaMemcpyDeviceToHost));
    return host;
  }
  void ExpectGuardsIntact(const char* what) const {
    for (const uint8_t* guard : {base_, base_ + kGuardBytes + bytes()}) {
      uint8_t host[kGuardBytes];
      EXPECT_CUDA_OK(cudaMemcpy(host, guard, kGuardBytes, cudaMemcpyDeviceToHost));
      EXPECT_TRUE(std::all_of(host, host + kGuardBytes, [](uint8_t x) { return x == 0xFF; }))
          << what << " was written " << (guard == base_ ? "before its begin" : "beyond its end");
    }
  }

 private:
  int64_t count_;
  uint8_t* base_ = nullptr;
};

}  // namespace prefilld::cuda

// Device memory and the timing of device work, for benchmarks. An error of CUDA ends the process.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <functional>
#include <string>
#include <vector>

namespace prefilld::bench {

[[noreturn]] void Die(const std::string& what);
void Check(cudaError_t error, const char* what);
#define CHECK_CUDA(call) ::prefilld::bench::Check((call), #call)

// Zeroed. Copies wait for everything that is enqueued, on any stream.
class DeviceMemory {
 public:
  explicit DeviceMemory(size_t bytes) : bytes_(bytes) {
    CHECK_CUDA(cudaMalloc(&data_, std::max<size_t>(bytes, 256)));
    CHECK_CUDA(cudaMemset(data_, 0, std::max<size_t>(bytes, 256)));
    CHECK_CUDA(cudaDeviceSynchronize());
  }
  ~DeviceMemory() { cudaFree(data_); }
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;

  template <typename T>
  T* as() const {
    return static_cast<T*>(data_);
  }
  size_t bytes() const { return bytes_; }
  template <typename T>
  std::vector<T> Get() const {
    std::vector<T> host(bytes_ / sizeof(T));
    CHECK_CUDA(cudaDeviceSynchronize());
    CHECK_CUDA(cudaMemcpy(host.data(), data_, host.size() * sizeof(T), cudaMemcpyDeviceToHost));
    return host;
  }
  template <typename T>
  void Set(const std::vector<T>& host) {
    CHECK_CUDA(cudaMemcpy(data_, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice));
  }

 private:
  void* data_ = nullptr;
  size_t bytes_;
};

inline constexpr double kNone = NAN;  // a figure that does not apply

struct Milliseconds {
  double median = kNone, least = kNone, most = kNone;
};

// Times what is enqueued on a stream, every time with an L2 that holds nothing of it.
class Clock {
 public:
  Clock(cudaStream_t stream, int repetitions);
  ~Clock();
  Clock(const Clock&) = delete;
  Clock& operator=(const Clock&) = delete;

  Milliseconds Time(const std::function<void()>& enqueue) const;
  // The same of a graph of it.
  Milliseconds TimeGraph(const std::function<void()>& enqueue) const;

 private:
  cudaStream_t stream_;
  int repetitions_;
  DeviceMemory flush_;
  std::vector<cudaEvent_t> events_;
};

}  // namespace prefilld::bench

#include "tests/bench/attention/device_clock.h"

#include <cstdio>
#include <cstdlib>

#include "tests/bench/attention/attention_workload.h"

namespace prefilld::bench {
namespace {

constexpr size_t kFlushBytes = size_t{256} << 20;  // several times the L2 of any GPU

}  // namespace

void Die(const std::string& what) {
  std::fprintf(stderr, "attention_bench: %s\n", what.c_str());
  std::exit(1);
}

void Check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) Die(std::string(what) + ": " + cudaGetErrorString(error));
}

Clock::Clock(cudaStream_t stream, int repetitions)
    : stream_(stream), repetitions_(repetitions), flush_(kFlushBytes) {
  for (int i = 0; i < 2 * repetitions; ++i) {
    cudaEvent_t event;
    CHECK_CUDA(cudaEventCreate(&event));
    events_.push_back(event);
  }
}

Clock::~Clock() {
  for (cudaEvent_t event : events_) cudaEventDestroy(event);
}

Milliseconds Clock::Time(const std::function<void()>& enqueue) const {
  for (int warm = 0; warm < 2; ++warm) enqueue();
  for (int i = 0; i < repetitions_; ++i) {
    CHECK_CUDA(ReadThrough(flush_.as<void>(), flush_.bytes(), stream_));
    CHECK_CUDA(cudaEventRecord(events_[2 * i], stream_));
    enqueue();
    CHECK_CUDA(cudaEventRecord(events_[2 * i + 1], stream_));
  }
  CHECK_CUDA(cudaStreamSynchronize(stream_));
  std::vector<double> ms;
  for (int i = 0; i < repetitions_; ++i) {
    float elapsed = 0;
    CHECK_CUDA(cudaEventElapsedTime(&elapsed, events_[2 * i], events_[2 * i + 1]));
    ms.push_back(elapsed);
  }
  std::sort(ms.begin(), ms.end());
  return {.median = ms[ms.size() / 2], .least = ms.front(), .most = ms.back()};
}

Milliseconds Clock::TimeGraph(const std::function<void()>& enqueue) const {
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  CHECK_CUDA(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal));
  enqueue();
  CHECK_CUDA(cudaStreamEndCapture(stream_, &graph));
  CHECK_CUDA(cudaGraphInstantiate(&exec, graph, 0));
  const Milliseconds ms = Time([&] { CHECK_CUDA(cudaGraphLaunch(exec, stream_)); });
  CHECK_CUDA(cudaGraphExecDestroy(exec));
  CHECK_CUDA(cudaGraphDestroy(graph));
  return ms;
}

}  // namespace prefilld::bench

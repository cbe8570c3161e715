#include "client/cli/load_run.h"

#include <condition_variable>
#include <deque>
#include <mutex>
#include <random>
#include <thread>
#include <utility>

#include "client/cpp/errors.h"

namespace prefilld::cli {
namespace {

using client::SteadyNow;

// Beyond, requests wait for a sender. That counts, as their time runs from when they were to be
// sent.
constexpr size_t kSendersMax = 2048;

class Runner {
 public:
  explicit Runner(const LoadRun& run)
      : run_(run), cancellation_(*run.options.cancellation), end_(start_ + run.duration) {
    for (const LoadRun::Part& part : run.mix) weights_.push_back(part.weight);
  }

  Finished Run() {
    if (run_.rate > 0) {
      SendAtRandom();
    } else {
      for (uint32_t i = 0; i < run_.concurrency; ++i) {
        threads_.emplace_back([this, i] { SendInTurn(i); });
      }
    }
    for (std::thread& thread : threads_) thread.join();
    finished_.seconds = absl::ToDoubleSeconds(SteadyNow() - start_);
    return std::move(finished_);
  }

 private:
  struct Arrival {
    absl::Time at;
    size_t peer;
    uint32_t seed;
  };

  // Sends what was to be sent at `at`, which is not in the future.
  absl::Status Send(absl::Time at, size_t peer, std::mt19937& rng) {
    std::discrete_distribution<size_t> choose(weights_.begin(), weights_.end());
    const LoadRun::Part& part = run_.mix[choose(rng)];
    Outcome outcome{.peer = peer, .tokens = part.tokens};
    const absl::Time sent = SteadyNow();
    client::CallOptions options = run_.options;
    options.timeout = std::min(options.timeout, at + run_.deadline - sent);
    const auto client = run_.peers[peer]->Client();
    if (client.ok()) {
      const auto sample = part.load->Send(**client, rng, options);
      outcome.status = sample.status();
      if (sample.ok()) {
        outcome.ttft_seconds = sample->ttft_seconds + absl::ToDoubleSeconds(sent - at);
        outcome.density = sample->density;
      } else if (absl::IsUnavailable(outcome.status) && !client::RetryDelay(outcome.status)) {
        run_.peers[peer]->Drop(*client);  // nobody answered
      }
    } else {
      outcome.status = client.status();
    }
    const absl::Time now = SteadyNow();
    outcome.seconds = absl::ToDoubleSeconds(now - at);
    absl::Status status = outcome.status;
    {
      std::lock_guard lock(mutex_);
      finished_.outcomes.push_back(std::move(outcome));
    }
    if (run_.on_progress) run_.on_progress(now - start_);
    return status;
  }

  // One of a closed loop's.
  void SendInTurn(uint32_t number) {
    std::mt19937 rng(run_.seed + number);
    do {
      const absl::Status status = Send(SteadyNow(), number % run_.peers.size(), rng);
      // A server that asks for a pause gets it; one that fails at once is not hammered.
      if (!status.ok()) {
        cancellation_.WaitFor(client::RetryDelay(status).value_or(absl::Milliseconds(100)));
      }
    } while (SteadyNow() < end_ && !cancellation_.cancelled());
  }

  void SendAtRandom() {
    std::mt19937 rng(run_.seed);
    std::exponential_distribution<double> gap(run_.rate);
    absl::Time at = start_;
    for (size_t i = 0;; ++i) {
      at += absl::Seconds(gap(rng));
      if (at >= end_ || cancellation_.WaitFor(at - SteadyNow())) break;
      std::lock_guard lock(mutex_);
      arrivals_.push_back({at, i % run_.peers.size(), static_cast<uint32_t>(rng())});
      if (arrivals_.size() > idle_ && threads_.size() < kSendersMax) {
        threads_.emplace_back([this] { SendArrivals(); });
      }
      arrived_.notify_one();
    }
    std::lock_guard lock(mutex_);
    over_ = true;
    arrived_.notify_all();
  }

  void SendArrivals() {
    std::unique_lock lock(mutex_);
    while (true) {
      ++idle_;
      arrived_.wait(lock, [this] { return over_ || !arrivals_.empty(); });
      --idle_;
      if (arrivals_.empty()) return;
      const Arrival arrival = arrivals_.front();
      arrivals_.pop_front();
      lock.unlock();
      std::mt19937 rng(arrival.seed);
      (void)Send(arrival.at, arrival.peer, rng);
      lock.lock();
    }
  }

  const LoadRun& run_;
  client::Cancellation& cancellation_;
  const absl::Time start_ = SteadyNow(), end_;
  std::vector<double> weights_;
  std::vector<std::thread> threads_;
  std::mutex mutex_;  // of what follows
  std::condition_variable arrived_;
  std::deque<Arrival> arrivals_;
  size_t idle_ = 0;  // senders that wait for one
  bool over_ = false;
  Finished finished_;
};

}  // namespace

Finished RunLoad(const LoadRun& run) { return Runner(run).Run(); }

}  // namespace prefilld::cli

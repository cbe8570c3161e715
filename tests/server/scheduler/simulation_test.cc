// The order as a whole: policy, shares, promises and admission over 100,000 arrivals, in time that
// is only counted.
#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <map>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "server/scheduler/backlog.h"
#include "server/scheduler/fair_shares.h"
#include "server/scheduler/policy.h"
#include "server/scheduler/shared_limit.h"

namespace prefilld {
namespace {

constexpr double kStepSeconds = 0.1;
const SteadyTime kBegin = absl::FromUnixSeconds(5000);

struct Arrival {
  std::string peer;
  double at, seconds;   // when, and how much work by prediction
  double deadline = 0;  // after it; 0: none
};

struct Outcome {
  enum class End { kDone, kRefused, kDropped } end;
  std::string peer;
  double seconds = 0, took = 0;  // work, and from arrival to its end
  double promised = 0;           // at most
};

class Simulation {
 public:
  // truth: what work takes, of what is predicted.
  explicit Simulation(std::function<double()> truth = [] { return 1.0; })
      : truth_(std::move(truth)) {}

  std::vector<Outcome> Run(const std::vector<Arrival>& arrivals) {
    for (size_t next = 0; next < arrivals.size() || !jobs_.empty();) {
      if (jobs_.empty()) now_ = std::max(now_, At(arrivals[next].at));
      for (; next < arrivals.size() && At(arrivals[next].at) <= now_; ++next) Admit(arrivals[next]);
      Step();
    }
    return std::move(outcomes_);
  }
  double seconds() const { return absl::ToDoubleSeconds(now_ - kBegin); }
  double served(const std::string& peer) const { return served_.at(peer); }

 private:
  struct Job {
    std::string peer;
    Work work;
    double seconds, truth;
    bool begun = false;
  };
  static SteadyTime At(double seconds) { return kBegin + absl::Seconds(seconds); }

  void Admit(const Arrival& arrival) {
    Job job{.peer = arrival.peer,
            .work = {.arrival = At(arrival.at), .remaining = absl::Seconds(arrival.seconds)},
            .seconds = arrival.seconds,
            .truth = truth_()};
    if (arrival.deadline > 0) job.work.deadline = At(arrival.at + arrival.deadline);
    Backlog backlog;
    for (const Job& other : jobs_) backlog.Add(other.peer, other.work);
    const Outlook outlook = backlog.OutlookOf(job.peer, job.work, now_);
    if (outlook.answer != Outlook::Answer::kInTime || !places_.HasRoom(job.peer, 1)) {
      return End(job, Outcome::End::kRefused);
    }
    job.work.promise = outlook.promise;
    jobs_.push_back(job);
    places_.Take(job.peer, 1);
  }

  void Step() {
    for (size_t i = jobs_.size(); i-- > 0;) {
      if (jobs_[i].begun || !Hopeless(jobs_[i].work, now_)) continue;
      Leave(i, Outcome::End::kDropped);
    }
    std::set<std::string> busy;
    for (const Job& job : jobs_) busy.insert(job.peer);
    shares_.SetBusy(busy);
    std::map<std::string, double> served;
    for (const std::string& peer : busy) served[peer] = shares_.Served(peer);
    std::vector<StepView> views;
    for (const Job& job : jobs_) {
      views.push_back({.work = job.work, .served = served[job.peer]});
    }
    const auto choice = PickNext(views, now_, turns_.due());
    if (!choice) return;
    Job& job = jobs_[choice->view];
    const double seconds = std::min(kStepSeconds, absl::ToDoubleSeconds(job.work.remaining));
    job.begun = true;
    job.work.remaining -= absl::Seconds(seconds);
    now_ += absl::Seconds(seconds * job.truth);
    shares_.Serve(job.peer, seconds);
    served_[job.peer] += seconds;
    turns_.Ran(choice->promised, seconds);
    if (job.work.remaining > absl::Microseconds(1) && job.work.deadline > now_) return;
    Leave(choice->view, job.work.deadline > now_ ? Outcome::End::kDone : Outcome::End::kDropped);
  }

  void Leave(size_t index, Outcome::End end) {
    End(jobs_[index], end);
    places_.GiveBack(jobs_[index].peer, 1);
    jobs_.erase(jobs_.begin() + static_cast<std::ptrdiff_t>(index));
  }

  void End(const Job& job, Outcome::End end) {
    outcomes_.push_back({end, job.peer, job.seconds, absl::ToDoubleSeconds(now_ - job.work.arrival),
                         absl::ToDoubleSeconds(job.work.promise - job.work.arrival)});
  }

  const std::function<double()> truth_;
  SteadyTime now_ = kBegin;
  std::vector<Job> jobs_;
  SharedLimit places_{256};
  FairShares shares_;
  PromiseTurns turns_;
  std::map<std::string, double> served_;
  std::vector<Outcome> outcomes_;
};

class SimulationTest : public testing::Test {
 protected:
  double Uniform(double low, double high) {
    return std::uniform_real_distribution(low, high)(random_);
  }
  // Arrivals of one peer at `rate` a second, of such work.
  std::vector<Arrival> Poisson(const std::string& peer, double rate, size_t count,
                               const std::function<double()>& seconds, double deadline = 0) {
    std::exponential_distribution<double> gap(rate);
    std::vector<Arrival> arrivals;
    double at = 0;
    for (size_t i = 0; i < count; ++i) {
      at += gap(random_);
      arrivals.push_back({peer, at, seconds(), deadline});
    }
    return arrivals;
  }
  static std::vector<Arrival> Merge(const std::vector<std::vector<Arrival>>& many) {
    std::vector<Arrival> all;
    for (const auto& one : many) all.insert(all.end(), one.begin(), one.end());
    std::stable_sort(all.begin(), all.end(),
                     [](const Arrival& a, const Arrival& b) { return a.at < b.at; });
    return all;
  }

  std::mt19937 random_{1};
};

// What the engine does in time, of all that it could, whatever is offered.
TEST_F(SimulationTest, GoodputDoesNotFallWithTheLoad) {
  double peak = 0;
  for (const double load : {0.9, 1.0, 2.0, 3.0, 5.0, 20.0}) {
    // Predictions are off by a fifth either way.
    Simulation simulation([this] { return Uniform(0.8, 1.2); });
    const auto arrivals = Poisson(
        "a", load / 0.35, 5000, [this] { return Uniform(0.1, 0.6); }, 10);
    double good = 0;
    int dropped = 0, done = 0;
    for (const Outcome& outcome : simulation.Run(arrivals)) {
      if (outcome.end == Outcome::End::kDone) good += outcome.seconds;
      done += outcome.end == Outcome::End::kDone;
      dropped += outcome.end == Outcome::End::kDropped;
    }
    const double goodput = good / simulation.seconds();
    peak = std::max(peak, goodput);
    EXPECT_GE(goodput, std::max(0.8, 0.95 * peak)) << load;
    EXPECT_LE(dropped, done / 50) << load;
  }
}

// Four peers, long and short, some with deadlines, half as much again as the engine can do.
TEST_F(SimulationTest, NobodyWaitsForLongerThanPromised) {
  const auto mixed = [this] { return Uniform(0, 1) < 0.02 ? Uniform(2, 10) : Uniform(0.02, 0.2); };
  const auto arrivals = Merge({Poisson("a", 2, 25000, mixed), Poisson("b", 2, 25000, mixed, 30),
                               Poisson("c", 2, 25000, [this] { return Uniform(0.01, 0.3); }),
                               Poisson(
                                   "d", 2, 25000, [this] { return Uniform(0.1, 0.3); }, 5)});
  size_t done = 0;
  double worst = 0;
  for (const Outcome& outcome : Simulation().Run(arrivals)) {
    if (outcome.end != Outcome::End::kDone) continue;
    ++done;
    worst = std::max(worst, outcome.took / outcome.promised);
    ASSERT_LE(outcome.took, outcome.promised + 3 * kStepSeconds) << outcome.peer;
  }
  EXPECT_GE(done, arrivals.size() / 2);
  RecordProperty("worst_share_of_a_promise", std::to_string(worst));
}

TEST_F(SimulationTest, TwoPeersThatWantAllHaveHalfEach) {
  Simulation simulation;
  simulation.Run(Merge({Poisson(
                            "many", 10, 10000, [this] { return Uniform(0.05, 0.2); }, 20),
                        Poisson(
                            "long", 1, 1000, [this] { return Uniform(2, 8); }, 20)}));
  EXPECT_NEAR(simulation.served("many") / simulation.served("long"), 1, 0.05);
}

// The other's short prompts wait for a step, and for as long as they take themselves.
TEST_F(SimulationTest, AFloodDoesNotKeepAnotherPeerWaiting) {
  std::vector<Arrival> quiet;
  for (int second = 1; second < 400; ++second) {
    quiet.push_back({"quiet", 1.0 * second, Uniform(0.05, 0.3)});
  }
  const auto arrivals = Merge({Poisson("flood", 50, 20000, [] { return 2.0; }), quiet});
  for (const Outcome& outcome : Simulation().Run(arrivals)) {
    if (outcome.peer != "quiet") continue;
    ASSERT_EQ(outcome.end, Outcome::End::kDone);
    EXPECT_LE(outcome.took, 2 * outcome.seconds + 2 * kStepSeconds);
  }
}

// One peer's short prompts pass its long ones, also when those have waited for long: promises are
// kept beside them.
TEST_F(SimulationTest, LongPromptsDoNotKeepShortOnesWaiting) {
  std::vector<Arrival> arrivals(60, {"a", 0, 2.0});
  for (int second = 1; second < 100; ++second) {
    arrivals.push_back({"a", 1.0 * second, Uniform(0.05, 0.3)});
  }
  for (const Outcome& outcome : Simulation().Run(arrivals)) {
    if (outcome.seconds > 1) continue;
    EXPECT_LE(outcome.took, 2 * outcome.seconds + 2 * kStepSeconds);
  }
}

}  // namespace
}  // namespace prefilld

// The engine: owns the device and runs one step after the other on it, a layer of a batch of
// prompts, a part of one where that is long, or one Attend; measures phases, density and captured
// mass while it does. The scheduler's thread alone calls it, but for what says otherwise. On a
// device with memory of its own a step is enqueued before the engine waits for the one before it,
// so that the device is never without work; what was learned of a step comes one step later. What
// follows a layer, its commit and the sinks, runs on the completion queue's thread.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "kernels/backend.h"
#include "server/engine/arena.h"
#include "server/engine/completion_queue.h"
#include "server/engine/cost.h"
#include "server/engine/fit.h"
#include "server/engine/layer_parts.h"
#include "server/engine/memory_plan.h"
#include "server/engine/stages.h"
#include "server/engine/step_clock.h"
#include "server/job.h"
#include "server/model/transformer.h"
#include "server/record/metrics.h"

namespace prefilld {

// What a step should take at most: who arrives meanwhile waits for two. More parts than it takes
// cost a long prompt a few percent.
inline constexpr double kStepSeconds = 0.1;
// On a CPU, and of a head of an Attend: its keys are converted anew for every part of it.
inline constexpr double kHostStepSeconds = 0.5;

// q, k, v and o of the layer that a batch is in the middle of, and of the one before where layers
// have them in turn (ScratchTurns).
struct ActiveScratch {
  Buffer memory;  // grows to the largest batch seen
  LayerScratch rows{};
  bool in_use = false;
  int turn = 0;                             // of rows
  std::unique_ptr<Device::Mark> stored[2];  // the last K and V of a turn are in their caches

  struct Leave {
    void operator()(ActiveScratch* scratch) const { scratch->in_use = false; }
  };
  using Use = std::unique_ptr<ActiveScratch, Leave>;
};

// Prompts of one model and one policy that go through the layers together, ragged.
struct Batch {
  std::vector<std::shared_ptr<Job>> jobs;  // sequence s of `prompts` is jobs[s]
  PrefillBatch prompts;
  Transformer* model = nullptr;
  SparsityPolicy policy;
  DenseReason dense_reason = DenseReason::kNone;  // set when dense replaced an unspecified method
  bool open = false;    // the method was left open and is sparse: dense may take its place
  double density = 0;   // the sum over the layers done
  int next_layer = 0;   // to be enqueued, all of it or what is left
  int layers_done = 0;  // and collected
  // Of next_layer, once it has begun; the engine's.
  std::vector<LayerPart> parts;
  size_t next_part = 0;
  ActiveScratch::Use scratch;
  // Of the layer that is being collected, part by part.
  PhaseSeconds part_phases{};
  std::vector<HeadReport> part_report;   // [prompts, heads]
  std::unique_ptr<Device::Mark> stored;  // its K and V are in their caches
  absl::Status status;                   // the first failure; no layer runs after it
  PhaseSeconds phases{};  // of the layers done; every job of the batch waited for all of it
  // Of the last layer done whose phases were measured one by one, under this policy.
  std::optional<PhaseSeconds> layer_phases;
  // A layer of the job could not be committed, and no later one will be. Completion thread.
  std::function<void(const std::shared_ptr<Job>& job, const absl::Status& why)> on_failed;

  bool done() const { return next_layer == model->info().layers; }
};

// An Attend, in as many steps as it has parts.
struct AttendRun {
  std::shared_ptr<Job> job;
  SparsityPolicy policy;
  DenseReason dense_reason = DenseReason::kNone;  // set when dense replaced an unspecified method
  bool open = false;  // the method was left open and is sparse: dense may take its place
  std::vector<AttendRange> parts;
  size_t next_part = 0;
  std::vector<HeadReport> report;  // [sequences, heads], of the parts done
  // Of the head that is divided by rows and not done.
  KeptIndex kept;
  PhaseSeconds head_phases{};

  bool done() const { return next_part == parts.size(); }
};

// What one head adds to the metrics: of a layer by the engine's completion, of an Attend by whoever
// answers it, for they may be many. Thread: any.
void ObserveHead(Metrics& metrics, const std::string& model, const HeadReport& head, bool measured);

class Engine {
 public:
  // step_seconds: what a step should take at most, where a layer can be divided.
  Engine(Backend& backend, Metrics& metrics, double step_seconds = kStepSeconds,
         double host_step_seconds = kHostStepSeconds)
      : backend_(backend),
        metrics_(metrics),
        step_seconds_(step_seconds),
        host_step_seconds_(host_step_seconds) {}
  // Times calls of a few lengths to learn this device's rates, of linear layers too where it serves
  // models; less than two seconds.
  absl::Status Calibrate(bool models);
  // Whether Recalibrate finds out anything.
  bool recalibrates() const { return calibrated_models_.has_value(); }
  // Looks again how fast a device is that computes in host memory, as others may have kept it busy:
  // while there is nothing to do, less than a tenth of a second. Not before Calibrate.
  void Recalibrate();

  // Takes all that the plan holds, before the first job: prompts that are of it take nothing then.
  // A plan without models holds nothing, and says what is spare.
  absl::Status Reserve(const MemoryPlan& plan);
  // fit.h's, of what is reserved. What passes may have to wait (HasRoom), and then runs, whatever
  // has run before. Thread: any.
  absl::Status CheckFits(const Job& job) const {
    return reserved_ ? prefilld::CheckFits(backend_, *reserved_, job) : absl::OkStatus();
  }
  // Whether a batch of so many tokens can Begin now, beside those that run.
  bool HasRoom(const Transformer& model, int64_t tokens) const;
  // Whether a batch can take a step, or one of so many tokens its first: not where another of its
  // size is in the middle of a layer.
  bool CanStep(const Batch& batch) const {
    return batch.scratch != nullptr || CanStep(batch.prompts.tokens());
  }
  // Whether a batch of so many tokens passes longer ones in the middle of a layer.
  static bool Passes(int64_t tokens) { return tokens <= kShortBatchTokens; }
  bool CanStep(int64_t tokens) const { return !scratch_[SlotOf(tokens)].in_use; }

  // Seconds the rest of a job will take, by the cost model, when `layers_done` are behind it; of an
  // Attend all of it. Thread: any.
  double PredictSeconds(const Job& job, int layers_done = 0) const;
  double PredictLayerSeconds(const Job& prefill) const;

  // Enqueues the embedding of the prompts; the batch owns its residual stream from now on.
  absl::StatusOr<std::unique_ptr<Batch>> Begin(std::vector<std::shared_ptr<Job>> jobs);
  // Enqueues next_layer, or the next part of it, and collects the steps before, of whichever batch.
  // K and V of a layer that is collected are committed to each job's cache, and the sinks told, by
  // a completion. Every cache CanCompute it, and the batch CanStep. A failure is the batch's first,
  // perhaps of an earlier step; then nothing of it is on its way.
  absl::Status RunStep(Batch& batch);
  // After the last layer: collects them all, and the logits of the jobs that asked for them.
  absl::Status Finish(Batch& batch);
  // Takes a job out of a batch, so that the others go on without its rows.
  void Remove(Batch& batch, size_t job);
  // A batch goes, wherever it is: what is on its way is collected, and whatever is posted to
  // completions() from now on runs behind the last of its copies.
  void Leave(std::unique_ptr<Batch> batch);
  // Collects what is on its way: before a batch goes, and when there is nothing else to do. False:
  // nothing was.
  bool Settle();

  std::unique_ptr<AttendRun> BeginAttend(std::shared_ptr<Job> job);
  // The next part of it, and waits for that; after the last the job has its results.
  absl::Status RunStep(AttendRun& run);

  // Layers of which something was enqueued and is not collected, in that order: what a step may
  // wait for.
  std::vector<std::pair<const Batch*, int>> OnTheirWay() const;

  // Where a job's end goes: behind the commits of its layers.
  CompletionQueue& completions() { return completions_; }

  // UNAVAILABLE once a fault has taken the device: no job can run any more. Thread: any.
  absl::Status CheckDevice() const;

 private:
  // A layer on its way to its caches and sinks; it owns what it needs of the batch.
  struct LayerTicket {
    struct Part {
      std::shared_ptr<Job> job;
      double density = 0, captured_mass = 0;  // means over the heads
    };
    int layer = 0;
    std::vector<Part> parts;
    std::vector<HeadReport> report;  // [parts, heads]
    std::function<void(const std::shared_ptr<Job>&, const absl::Status&)> on_failed;
  };

  // What a job's policy becomes.
  struct Decision {
    SparsityPolicy policy;
    DenseReason dense_reason = DenseReason::kNone;  // why it is not the one that was asked for
    bool open = false;  // was left open and is sparse: dense may still take its place
  };

  // A step of a batch that was enqueued and is not collected.
  struct Flight {
    Batch* batch = nullptr;
    int layer = 0;
    LayerPart part;
    bool ends_layer = true;
    StagesCall call;                       // of the part's heads
    bool measured = true;                  // phase by phase
    std::unique_ptr<Device::Mark> stored;  // of a part that stores
  };

  Decision Decide(const Job& job, const AttentionShape& shape);
  void Reconsider(Batch& batch);
  void NoteFault();
  absl::Status AfterStep(absl::Status step);
  absl::Status CheckStep();  // before any work of a step
  absl::Status ReserveStages();
  absl::Status Prepare(StagesCall& call);
  bool MeasuresPhases(const Batch& batch) const;
  bool DividesQueries(const SparsityPolicy& policy) const;
  static size_t SlotOf(int64_t tokens) { return Passes(tokens) ? 0 : 1; }
  absl::Status BeginLayer(Batch& batch);
  std::vector<LayerPart> PartsOf(const Batch& batch) const;
  absl::Status StoreKv(Flight& flight);
  absl::Status WriteKv(Batch& batch, int layer, Stream stream);
  absl::Status Record(Stream stream, std::unique_ptr<Device::Mark>& mark);
  AttentionShape ShapeOf(const Batch& batch) const;
  StagesCall PartCall(const Batch& batch, const AttendRange& range);
  absl::Status Launch(Batch& batch);
  absl::Status EnqueuePart(Flight& flight);
  void Observe(const Flight& flight);
  StagesCall PartCall(AttendRun& run);
  static void SetOutputs(const AttendRun& run, StagesCall& call);
  absl::Status EnqueueAttend(const AttendRun& run, StagesCall& call);
  void CollectAttend(AttendRun& run, StagesCall& call);
  void CollectUntil(size_t left);
  absl::Status Collect(Flight& flight);
  static std::vector<RowRange> RowsToFinish(const Batch& batch, const Flight& flight);
  void PostCommit(Flight& flight);
  void Commit(const LayerTicket& ticket, const absl::Status& work);

  Backend& backend_;
  Metrics& metrics_;
  const double step_seconds_, host_step_seconds_;
  CostModel cost_;
  // Steps that may be on their way when the engine waits for one.
  const size_t ahead_ = backend_.device().host_memory() ? 0 : 1;
  StepClock clock_{backend_.device(), Stream{}};
  // Of the step that is enqueued, the one on its way, and the one whose end is that one's begin.
  StepClock layer_clocks_[3] = {
      {backend_.device(), Stream{}}, {backend_.device(), Stream{}}, {backend_.device(), Stream{}}};
  size_t next_clock_ = 0;
  Stages stages_{backend_, cost_};
  std::deque<Flight> flights_;  // at most ahead_ + 1
  ActiveScratch scratch_[2];    // of batches of up to kShortBatchTokens, and of longer ones
  std::optional<Reserved> reserved_;
  std::unique_ptr<Arena> batches_;         // what batches hold; null: nothing is reserved for them
  std::optional<bool> calibrated_models_;  // of the host, with models or without
  bool fault_noted_ = false;
  CompletionQueue completions_;  // goes first: what it runs uses the others
};

}  // namespace prefilld

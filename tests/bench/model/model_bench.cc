// A whole model in this process, as the server's engine runs it: what a prefill takes, phase by
// phase, beside its bare products.
//
//   model_bench --model=DIR [--backend=cuda] [--lengths=512,2048,8192,32768]
//               [--methods=dense,joint] [--batch=1] [--rounds=5] [--structured] [--json=FILE]
//
// Prompts are random tokens; in every round each method runs once, in turn with the products. All
// figures are medians of the rounds, ms:
//
//   total      until K and V of the last layer are in the cache and the logits here; wall clock
//   linear ... the engine's phases, on the device's clock; select includes measuring the mass
//   rest       total less the phases: what the device waited for the host, and the last copies
//   products   all of them alone, by the same tiles and algorithms (CUDA): of the last layer and of
//              the logits what the last position needs
//   handoff    of K and V on a CPU; a GPU copies them beside the layers
//   floor      by the fastest of all algorithms that cuBLASLt offers
//   x floor    linear / floor
//
// --structured fills in other q, k and v before attention, of heads with the structure of real ones
// (attention_workload.h): with random weights attention is diffuse and nothing can be skipped.
// What filling in takes is in no figure. A part that fails is said in its line, and the rest goes
// on.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "server/engine/engine.h"
#include "server/kv/kv_cache.h"
#include "tests/bench/model/product_floor.h"
#include "tests/bench/model/structured_backend.h"

namespace prefilld::bench {
namespace {

constexpr Phase kPhases[] = {Phase::kLinear, Phase::kEstimate, Phase::kSelect, Phase::kAttention,
                             Phase::kHandoff};

struct Options {
  std::string model, backend = "cuda", json;
  std::vector<int64_t> lengths{512, 2048, 8192, 32768};
  std::vector<std::string> methods{"dense", "joint"};
  double gamma = 0.9, strength = 1;
  int rounds = 5, batch = 1, threads = 0;
  bool structured = false;
};

// The policy of a method as a request that names it would have it, or leaves it open.
SparsityPolicy PolicyOf(const std::string& method, double gamma) {
  SparsityPolicy policy;
  policy.gamma = gamma;
  policy.method = kOpenMethod;
  for (const MethodRow& row : kMethodTable) {
    if (method == row.name) policy.method = row.method;
  }
  policy.min_budget_tokens = RowOf(policy.method).min_budget_tokens;
  policy.measure_captured_mass = RowOf(policy.method).measures_by_default;
  return policy;
}

double Median(std::vector<double> values) {
  if (values.empty()) return NAN;
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

// One prefill of a batch.
struct Sample {
  double seconds = 0;
  PhaseSeconds phases{};
  double density = 1, mass = NAN;
};

class Silent : public JobSink {
 public:
  void OnLayerReady(int, double, double) override {}
  void OnFinished(const absl::Status&) override {}
};

// What a method has shown at one length.
struct Line {
  std::string method;
  std::vector<Sample> samples;
  absl::Status status;

  double MedianOf(double (*of)(const Sample&, Phase), Phase phase = Phase::kLinear) const {
    std::vector<double> values;
    for (const Sample& sample : samples) values.push_back(of(sample, phase));
    return Median(values);
  }
  double seconds() const {
    return MedianOf([](const Sample& s, Phase) { return s.seconds; });
  }
  double phase(Phase phase) const {
    return MedianOf([](const Sample& s, Phase p) { return Of(s.phases, p); }, phase);
  }
  double rest() const {
    return MedianOf([](const Sample& s, Phase) {
      double rest = s.seconds;
      for (const double in_phase : s.phases) rest -= in_phase;
      return rest;
    });
  }
};

class ModelBench {
 public:
  static absl::StatusOr<std::unique_ptr<ModelBench>> Create(const Options& options) {
    std::unique_ptr<ModelBench> bench(new ModelBench(options));
    auto backend = CreateBackend(options.backend, options.threads);
    if (!backend.ok()) return backend.status();
    bench->backend_ = *std::move(backend);
    if (options.structured) {
      auto structured = StructuredBackend::Create(*bench->backend_, options.strength);
      if (!structured.ok()) return structured.status();
      bench->structured_ = *std::move(structured);
    }
    auto model = Transformer::Load("model", options.model, bench->computing());
    if (!model.ok()) return model.status();
    bench->model_ = *std::move(model);
    bench->metrics_.AddModel("model");
    bench->engine_ = std::make_unique<Engine>(bench->computing(), bench->metrics_);
    if (std::count(options.methods.begin(), options.methods.end(), "open") > 0) {
      if (absl::Status s = bench->engine_->Calibrate(/*models=*/true); !s.ok()) return s;
    }
    auto floor = ProductFloor::Create(*bench->backend_, bench->model_->info());
    if (floor.ok()) bench->floor_ = *std::move(floor);
    return bench;
  }

  // False: a part failed.
  bool Run() {
    Header();
    bool ok = true;
    for (const int64_t length : options_.lengths) ok = RunLength(length) && ok;
    if (!options_.json.empty()) std::ofstream(options_.json) << records_.dump(1) << "\n";
    return ok;
  }

 private:
  explicit ModelBench(Options options) : options_(std::move(options)) {}

  Backend& computing() { return structured_ ? *structured_ : *backend_; }

  bool RunLength(int64_t length) {
    std::vector<Line> lines;
    for (const std::string& method : options_.methods) lines.push_back({.method = method});
    std::vector<double> floors[2];
    const KvGeometry geometry = GeometryOf(length);
    const size_t blocks = geometry.blocks_per_layer() * geometry.layers * options_.batch;
    auto pool = BlockPool::Create(backend_->device(), blocks * geometry.block_bytes(),
                                  geometry.block_bytes());
    for (int round = -1; round < options_.rounds; ++round) {  // the first is a warm-up
      for (const auto algorithms : {ProductFloor::kOfTheModel, ProductFloor::kFastest}) {
        if (!floor_) break;
        const auto seconds = floor_->Seconds(length * options_.batch, algorithms);
        if (seconds.ok() && round >= 0) floors[algorithms].push_back(*seconds);
      }
      for (Line& line : lines) {
        if (line.status.ok()) line.status = pool.status();
        if (!line.status.ok()) continue;
        auto sample = Prefill(line.method, length, **pool, round);
        line.status = sample.status();
        if (sample.ok() && round >= 0) line.samples.push_back(*sample);
      }
    }
    bool ok = true;
    for (const Line& line : lines) {
      Print(length, line, Median(floors[ProductFloor::kOfTheModel]),
            Median(floors[ProductFloor::kFastest]));
      ok = ok && line.status.ok();
    }
    return ok;
  }

  KvGeometry GeometryOf(int64_t length) const {
    const ModelInfo& info = model_->info();
    return {info.layers, info.kv_heads, info.head_dim, info.dtype, length};
  }

  absl::StatusOr<Sample> Prefill(const std::string& method, int64_t length, BlockPool& pool,
                                 int round) {
    std::vector<std::shared_ptr<Job>> jobs;
    std::minstd_rand random(static_cast<unsigned>(length * 100 + round + 2));
    for (int i = 0; i < options_.batch; ++i) {
      auto cache = KvCache::Create(pool, GeometryOf(length), /*retain=*/true);
      if (!cache.ok()) return cache.status();
      jobs.push_back(MakeJob(method, length, *std::move(cache), random));
    }
    const SteadyTime begin = SteadyNow();
    const absl::Status status = RunBatch(jobs);
    engine_->completions().Flush();
    Sample sample{.seconds = absl::ToDoubleSeconds(Since(begin))};
    const double filling = structured_ ? structured_->TakeSeconds() : 0;
    for (const auto& job : jobs) job->prefill->cache->Close(absl::CancelledError("measured"));
    if (!status.ok()) return status;
    sample.seconds -= filling;
    sample.phases = jobs[0]->phases;
    const bool selected = Of(sample.phases, Phase::kEstimate) > 0;  // dense has no such phase
    Of(sample.phases, selected ? Phase::kEstimate : Phase::kAttention) -= filling;
    sample.density = 0;
    for (const auto& job : jobs) sample.density += job->report.MeanDensity() / options_.batch;
    if (jobs[0]->report.captured_mass_measured) {
      sample.mass = 0;
      for (const auto& job : jobs) sample.mass += job->report.MeanCapturedMass() / options_.batch;
    }
    return sample;
  }

  std::shared_ptr<Job> MakeJob(const std::string& method, int64_t length,
                               std::shared_ptr<KvCache> cache, std::minstd_rand& random) {
    auto job = std::make_shared<Job>();
    job->policy = PolicyOf(method, options_.gamma);
    job->method_unspecified = method == "open";
    job->sink = std::make_shared<Silent>();
    job->prefill = std::make_unique<PrefillWork>();
    job->prefill->model = model_.get();
    job->prefill->cache = std::move(cache);
    job->prefill->return_logits = true;
    job->prefill->token_ids.resize(static_cast<size_t>(length));
    for (uint32_t& id : job->prefill->token_ids) {
      id = static_cast<uint32_t>(random() % model_->info().vocab_size);
    }
    return job;
  }

  absl::Status RunBatch(const std::vector<std::shared_ptr<Job>>& jobs) {
    auto batch = engine_->Begin(jobs);
    if (!batch.ok()) return batch.status();
    while (!(*batch)->done()) {
      if (absl::Status status = engine_->RunStep(**batch); !status.ok()) return status;
    }
    return engine_->Finish(**batch);
  }

  void Header() const {
    const ModelInfo& info = model_->info();
    absl::PrintF("%s | %s | %s, %d layers, heads %d/%d d %d, hidden %d, %s%s | medians of %d\n",
                 backend_->device().name(), backend_->name(), info.model_type, info.layers,
                 info.q_heads, info.kv_heads, info.head_dim, info.hidden_size, Name(info.dtype),
                 structured_ ? absl::StrFormat(", structure of strength %g", options_.strength)
                             : std::string(),
                 options_.rounds);
    absl::PrintF("%9s %-11s %10s %9s %9s %8s %9s %8s %7s %9s %7s %7s %9s %9s %7s\n", "tokens",
                 "method", "total", "linear", "estimate", "select", "attention", "handoff", "rest",
                 "tokens/s", "density", "mass", "products", "floor", "x floor");
  }

  void Print(int64_t length, const Line& line, double products, double floor) {
    const std::string tokens =
        (options_.batch > 1 ? absl::StrCat(options_.batch, "x") : "") + absl::StrCat(length);
    nlohmann::json record{{"tokens", length}, {"batch", options_.batch}, {"method", line.method}};
    if (!line.status.ok()) {
      absl::PrintF("%9s %-11s %s\n", tokens, line.method, line.status.ToString());
      record["error"] = line.status.ToString();
    } else {
      const double total = line.seconds(), linear = line.phase(Phase::kLinear);
      const double rate = static_cast<double>(length) * options_.batch / total;
      const Sample& last = line.samples.back();
      absl::PrintF("%9s %-11s %10.2f", tokens, line.method, 1e3 * total);
      for (const Phase phase : kPhases) {
        const double ms = 1e3 * line.phase(phase);
        record[absl::StrCat(kPhaseNames[static_cast<int>(phase)], "_ms")] = ms;
        absl::PrintF(" %*.2f", phase == Phase::kSelect || phase == Phase::kHandoff ? 8 : 9, ms);
      }
      absl::PrintF(" %7.2f %9.0f %7.4f %7s %9s %9s %7s\n", 1e3 * line.rest(), rate, last.density,
                   Cell(last.mass, "%.4f"), Cell(1e3 * products, "%.2f"), Cell(1e3 * floor, "%.2f"),
                   Cell(linear / floor, "%.3f"));
      record.update({{"total_ms", 1e3 * total},
                     {"rest_ms", 1e3 * line.rest()},
                     {"tokens_per_second", rate},
                     {"density", last.density},
                     {"captured_mass", last.mass},
                     {"products_ms", 1e3 * products},
                     {"floor_ms", 1e3 * floor},
                     {"linear_over_floor", linear / floor}});
    }
    std::fflush(stdout);
    records_.push_back(std::move(record));
  }

  static std::string Cell(double value, const char* format) {
    char text[32];
    std::snprintf(text, sizeof(text), format, value);
    return std::isnan(value) ? "-" : text;
  }

  const Options options_;
  std::unique_ptr<Backend> backend_;
  std::unique_ptr<StructuredBackend> structured_;  // null: q, k and v are the model's
  std::unique_ptr<Transformer> model_;
  Metrics metrics_;
  std::unique_ptr<Engine> engine_;
  std::unique_ptr<ProductFloor> floor_;  // null: there is none here
  nlohmann::json records_ = nlohmann::json::array();
};

int Main(int argc, char** argv) {
  Options options;
  CLI::App app{"A whole model on one device: what a prefill takes, phase by phase"};
  std::vector<std::string> methods{"open"};
  for (const MethodRow& row : kMethodTable) methods.push_back(row.name);
  app.add_option("--model", options.model, "a Hugging Face directory")->required();
  app.add_option("--backend", options.backend, "cuda, cpu")->capture_default_str();
  app.add_option("--lengths", options.lengths, "tokens of a prompt")->delimiter(',');
  app.add_option("--methods", options.methods, "of the table, or open")
      ->delimiter(',')
      ->check(CLI::IsMember(methods));
  app.add_option("--gamma", options.gamma, "coverage")->capture_default_str();
  app.add_option("--batch", options.batch, "prompts at a time")->check(CLI::PositiveNumber);
  app.add_option("--rounds", options.rounds, "of every figure")->check(CLI::PositiveNumber);
  app.add_option("--threads", options.threads, "of the CPU; 0: all");
  app.add_flag("--structured", options.structured, "attend to heads like real ones");
  app.add_option("--strength", options.strength, "of the structure; more is sparser");
  app.add_option("--json", options.json, "also write the lines to this file");
  CLI11_PARSE(app, argc, argv);
  auto bench = ModelBench::Create(options);
  if (!bench.ok()) {
    absl::FPrintF(stderr, "model_bench: %s\n", bench.status().ToString());
    return 1;
  }
  return (*bench)->Run() ? 0 : 1;
}

}  // namespace
}  // namespace prefilld::bench

int main(int argc, char** argv) { return prefilld::bench::Main(argc, argv); }

// What sparse prefill costs in quality, on a real text, by the engine itself:
//
//   quality --model=DIR --tokens=ids.json [--gammas=.8,.9,.95] [--threads=2] [--json]
//
// Prefills the text dense, then with flexprefill and joint at every gamma, each layer selecting on
// the sparse model's own activations, and compares the next-token distributions of every position
// with the dense ones. Prints a table, then the figures that must hold; exits 1 when one does not.
//
//   density  computed / causal blocks, over all layers and heads
//   mass     exact softmax mass captured, on rows that no method has chosen by; worst: of any head
//   KL       KL(dense || sparse) of the next-token distribution in nats, over positions
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <fstream>
#include <nlohmann/json.hpp>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "server/engine/engine.h"
#include "server/kv/kv_cache.h"
#include "tests/bench/quality/divergence.h"

namespace prefilld {
namespace {

// What must hold.
constexpr double kMassBelowGamma = 0.02;  // joint's captured mass may lie this far below gamma
constexpr double kKlShare = 0.6;          // of flexprefill's KL at the same gamma
constexpr double kDensityMargin = 0.03;   // joint's density over flexprefill's
constexpr double kKlFromGamma = 0.9;      // at gammas from here up

struct Options {
  std::string model, tokens;
  std::vector<double> gammas{.8, .9, .95};
  int threads = 2;
  bool json = false;
};

// One prefill of the text. `batch` keeps the activations after the last layer.
struct Run {
  SparsityPolicy policy;
  std::unique_ptr<Batch> batch;
  double density = 1, mass = 1, worst_head = 1;
  double seconds = 0;      // of every phase; selection includes measuring the mass
  std::vector<double> kl;  // [tokens] nats
  double kl_mean = 0, kl_median = 0, kl_second_half = 0;

  std::string name() const {
    return policy.method == Method::kDense
               ? "dense"
               : absl::StrFormat("%s %.2f", Name(policy.method), policy.gamma);
  }
};

// Shows the layers go by, where somebody looks.
class Progress : public JobSink {
 public:
  Progress(std::string name, int layers) : name_(std::move(name)), layers_(layers) {}
  void OnLayerReady(int layer, double density, double) override {
    if (isatty(STDERR_FILENO)) {
      absl::FPrintF(stderr, "\r%-18s layer %2d/%d density %.3f ", name_, layer + 1, layers_,
                    density);
    }
    if (layer + 1 == layers_) absl::FPrintF(stderr, "\r%-18s done%20s\n", name_, "");
  }
  void OnFinished(const absl::Status&) override {}

 private:
  const std::string name_;
  const int layers_;
};

// The model, its backend and an engine around one text.
class Laboratory {
 public:
  static absl::StatusOr<std::unique_ptr<Laboratory>> Create(const Options& options,
                                                            std::vector<uint32_t> text) {
    auto backend = CreateBackend("cpu", options.threads);
    if (!backend.ok()) return backend.status();
    auto model = Transformer::Load("model", options.model, **backend);
    if (!model.ok()) return model.status();
    const ModelInfo& info = (*model)->info();
    const KvGeometry geometry{info.layers, info.kv_heads, info.head_dim, info.dtype,
                              static_cast<int64_t>(text.size())};
    // The cache goes nowhere: two layers' worth of blocks, used in turn.
    const size_t pool_bytes = 2 * geometry.blocks_per_layer() * geometry.block_bytes();
    auto pool = BlockPool::Create((*backend)->device(), pool_bytes, geometry.block_bytes());
    if (!pool.ok()) return pool.status();
    return std::unique_ptr<Laboratory>(new Laboratory(*std::move(backend), *std::move(model),
                                                      *std::move(pool), geometry, std::move(text)));
  }

  absl::StatusOr<Run> Prefill(const SparsityPolicy& policy) {
    Run run;
    run.policy = policy;
    auto cache = KvCache::Create(*pool_, geometry_, /*retain=*/false);
    if (!cache.ok()) return cache.status();
    auto job = std::make_shared<Job>();
    job->policy = policy;
    job->prefill = std::make_unique<PrefillWork>();
    job->prefill->model = model_.get();
    job->prefill->token_ids = text_;
    job->prefill->cache = *cache;
    job->sink = std::make_shared<Progress>(run.name(), geometry_.layers);
    auto batch = engine_.Begin({job});
    if (!batch.ok()) return batch.status();
    while (!(*batch)->done()) {
      const int layer = (*batch)->next_layer;
      if (absl::Status status = engine_.RunStep(**batch); !status.ok()) return status;
      engine_.completions().Flush();
      if ((*batch)->next_layer > layer) (*cache)->Delivered(layer);
    }
    job->prefill->cache = nullptr;  // its blocks are the next run's
    run.batch = *std::move(batch);
    for (const double seconds : run.batch->phases) run.seconds += seconds;
    run.density = job->report.MeanDensity();
    if (job->report.captured_mass_measured) {
      run.mass = job->report.MeanCapturedMass();
      for (const HeadReport& head : job->report.entries) {
        run.worst_head = std::min<double>(run.worst_head, head.captured_mass);
      }
    }
    return run;
  }

  // Fills the divergences of every run from `dense`.
  absl::Status Compare(const Run& dense, std::vector<Run>& runs) {
    std::vector<const PrefillBatch*> batches;
    for (const Run& run : runs) batches.push_back(&run.batch->prompts);
    auto divergence = Divergence(*model_, dense.batch->prompts, batches);
    if (!divergence.ok()) return divergence.status();
    for (size_t i = 0; i < runs.size(); ++i) {
      Run& run = runs[i];
      run.kl = std::move((*divergence)[i]);
      const auto middle = run.kl.begin() + static_cast<std::ptrdiff_t>(run.kl.size() / 2);
      run.kl_mean = Mean(run.kl.begin(), run.kl.end());
      run.kl_second_half = Mean(middle, run.kl.end());
      std::nth_element(run.kl.begin(), middle, run.kl.end());
      run.kl_median = *middle;
    }
    return absl::OkStatus();
  }

 private:
  using Place = std::vector<double>::const_iterator;
  static double Mean(Place begin, Place end) {
    double sum = 0;
    for (Place at = begin; at != end; ++at) sum += *at;
    return sum / static_cast<double>(end - begin);
  }

  Laboratory(std::unique_ptr<Backend> backend, std::unique_ptr<Transformer> model,
             std::unique_ptr<BlockPool> pool, const KvGeometry& geometry,
             std::vector<uint32_t> text)
      : backend_(std::move(backend)),
        model_(std::move(model)),
        pool_(std::move(pool)),
        geometry_(geometry),
        text_(std::move(text)),
        engine_(*backend_, metrics_) {
    metrics_.AddModel(model_->info().name);
  }

  const std::unique_ptr<Backend> backend_;
  const std::unique_ptr<Transformer> model_;
  const std::unique_ptr<BlockPool> pool_;
  const KvGeometry geometry_;
  const std::vector<uint32_t> text_;
  Metrics metrics_;
  Engine engine_;
};

struct Check {
  std::string what;
  double value;
  double limit;
  bool at_least;  // value >= limit, else value <= limit

  bool holds() const { return at_least ? value >= limit : value <= limit; }
};

// `runs`: flexprefill, then joint, for every gamma.
std::vector<Check> Checks(const std::vector<Run>& runs) {
  std::vector<Check> checks;
  for (size_t i = 0; i + 1 < runs.size(); i += 2) {
    const Run& flex = runs[i];
    const Run& joint = runs[i + 1];
    const double gamma = joint.policy.gamma;
    checks.push_back({absl::StrFormat("captured mass of joint %.2f", gamma), joint.mass,
                      gamma - kMassBelowGamma, true});
    if (gamma < kKlFromGamma) continue;
    checks.push_back({absl::StrFormat("KL of joint %.2f, %.1f of flexprefill's", gamma, kKlShare),
                      joint.kl_mean, kKlShare * flex.kl_mean, false});
    checks.push_back(
        {absl::StrFormat("density of joint %.2f, flexprefill's + %.2f", gamma, kDensityMargin),
         joint.density, flex.density + kDensityMargin, false});
  }
  return checks;
}

void PrintTable(const std::vector<Run>& runs, const std::vector<Check>& checks) {
  absl::PrintF("%-18s %8s %8s %8s %9s %9s %9s %8s\n", "method", "density", "mass", "worst",
               "KL mean", "median", "2nd half", "seconds");
  for (const Run& run : runs) {
    absl::PrintF("%-18s %8.3f %8.3f %8.3f %9.4f %9.4f %9.4f %8.1f\n", run.name(), run.density,
                 run.mass, run.worst_head, run.kl_mean, run.kl_median, run.kl_second_half,
                 run.seconds);
  }
  for (const Check& check : checks) {
    absl::PrintF("%s  %-42s %.4f (%s %.4f)\n", check.holds() ? "ok    " : "MISSED", check.what,
                 check.value, check.at_least ? "at least" : "at most", check.limit);
  }
}

void PrintJson(const std::vector<Run>& runs, const std::vector<Check>& checks) {
  nlohmann::json out{{"runs", nlohmann::json::array()}, {"checks", nlohmann::json::array()}};
  for (const Run& run : runs) {
    out["runs"].push_back({{"method", Name(run.policy.method)},
                           {"gamma", run.policy.method == Method::kDense ? 1 : run.policy.gamma},
                           {"density", run.density},
                           {"captured_mass", run.mass},
                           {"worst_head", run.worst_head},
                           {"kl_mean", run.kl_mean},
                           {"kl_median", run.kl_median},
                           {"kl_second_half", run.kl_second_half},
                           {"seconds", run.seconds}});
  }
  for (const Check& check : checks) {
    out["checks"].push_back({{"what", check.what},
                             {"value", check.value},
                             {"limit", check.limit},
                             {"at_least", check.at_least},
                             {"ok", check.holds()}});
  }
  absl::PrintF("%s\n", out.dump());
}

absl::Status Measure(const Options& options, bool* all_hold) {
  const auto text = nlohmann::json::parse(std::ifstream(options.tokens), nullptr, false);
  if (!text.is_array() || text.empty()) {
    return absl::InvalidArgumentError(absl::StrCat(options.tokens, " is no array of token IDs"));
  }
  auto laboratory = Laboratory::Create(options, text.get<std::vector<uint32_t>>());
  if (!laboratory.ok()) return laboratory.status();

  SparsityPolicy policy;
  policy.method = Method::kDense;
  policy.measure_captured_mass = false;
  auto dense = (*laboratory)->Prefill(policy);
  if (!dense.ok()) return dense.status();

  std::vector<Run> runs;
  policy.measure_captured_mass = true;
  for (const double gamma : options.gammas) {
    policy.gamma = gamma;
    for (const Method method : {Method::kFlexPrefill, Method::kJoint}) {
      policy.method = method;
      policy.min_budget_tokens = method == Method::kFlexPrefill ? kFlexPrefillMinBudget : 0;
      auto run = (*laboratory)->Prefill(policy);
      if (!run.ok()) return run.status();
      runs.push_back(*std::move(run));
    }
  }
  if (absl::Status status = (*laboratory)->Compare(*dense, runs); !status.ok()) return status;

  const std::vector<Check> checks = Checks(runs);
  *all_hold = std::all_of(checks.begin(), checks.end(), [](const Check& c) { return c.holds(); });
  runs.insert(runs.begin(), *std::move(dense));
  options.json ? PrintJson(runs, checks) : PrintTable(runs, checks);
  return absl::OkStatus();
}

}  // namespace
}  // namespace prefilld

int main(int argc, char** argv) {
  prefilld::Options options;
  CLI::App app("Density, captured mass and drift of flexprefill and joint on a text");
  app.add_option("--model", options.model, "Hugging Face directory")->required();
  app.add_option("--tokens", options.tokens, "JSON array of token IDs")->required();
  app.add_option("--gammas", options.gammas, "coverages")->delimiter(',');
  app.add_option("--threads", options.threads, "of the engine");
  app.add_flag("--json", options.json, "one JSON object instead of the table");
  CLI11_PARSE(app, argc, argv);
  bool all_hold = false;
  const absl::Status status = prefilld::Measure(options, &all_hold);
  if (!status.ok()) absl::FPrintF(stderr, "quality: %s\n", status.ToString());
  return status.ok() && all_hold ? 0 : 1;
}

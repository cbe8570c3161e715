// Attention on one GPU: every method, every kernel set and cuDNN's dense attention in one run.
//
//   attention_bench [--lengths=32768,65536,131072] [--densities=.05,.1,.2,.4] [--json=FILE] ...
//
// Three workloads; a line of the table is one method on one kernel set.
//   random      a random block index of an exact density: the attention kernels alone. Rows hold
//               block 0, the diagonal and a random rest
//   structured  heads with sinks, neighbourhoods, bands, verticals and topics, at the strength at
//               which joint at --gamma has the density asked for (attention_workload.h)
//   saved       tensors q, k, v [tokens, heads, d] of a safetensors file, bf16 or fp16
// and, on request, a ragged batch against one sequence, and one layer of a very long prompt.
//
//   ms        of stage 3: median, least and most of --repetitions; L2 is emptied before each
//   TFLOP/s   executed: 4 d FLOPs per (query, key) pair of the blocks, diagonal blocks in half
//   %cudnn    of the rate of cuDNN's dense attention at this length, in this run
//   select    stages 1 and 2 in a CUDA graph, us; an empty graph's time stands in the header
//   mass us   the measurement of captured mass in a graph
//   density   computed / causal blocks
//   err       relative error of o against exact dense attention: 64 sampled queries, every head
//   kernel    the same against exact attention over the same blocks
//   captured  captured mass: mean over heads / the worst head / the worst sampled row
//   pipeline  all stages in one graph, ms; +mass: with the measurement
//   bound     density x cuDNN's dense time / 0.85 + 1 ms
#include <cuda_runtime_api.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "kernels/attention.h"
#include "kernels/cuda/device/cuda_device.h"
#include "tests/bench/attention/attention_problem.h"
#include "tests/bench/attention/attention_record.h"
#include "tests/bench/attention/device_clock.h"
#include "tests/bench/attention/saved_tensors.h"

namespace prefilld::bench {
namespace {

using nlohmann::json;

struct Options {
  Settings settings{.methods = {Method::kDense, Method::kFlexPrefill, Method::kJoint},
                    .kernels = {"sm90", "sm80", "f32"}};
  std::vector<int64_t> lengths{32768, 65536, 131072};
  std::vector<double> densities{.05, .1, .2, .4};
  std::vector<std::string> workloads{"random", "structured"};
  double strength = 0;  // 0: found from the densities
  int repetitions = 10;
  int ragged = 0;  // sequences of ragged_tokens; 0: none
  int64_t ragged_tokens = 8192;
  int64_t layer_tokens = 0;
  std::string saved, json, commit;
};

std::string FirstLine(const std::string& path_or_command, bool command) {
  FILE* from = command ? popen(path_or_command.c_str(), "r") : fopen(path_or_command.c_str(), "r");
  if (from == nullptr) return "";
  char line[256] = "";
  if (std::fgets(line, sizeof(line), from) == nullptr) line[0] = 0;
  command ? pclose(from) : std::fclose(from);
  std::string text = line;
  while (!text.empty() && text.back() == '\n') text.pop_back();
  return text;
}

class Run {
 public:
  Run(const Options& options, cuda::CudaDevice* device)
      : options_(options), device_(device), clock_(device->stream({}), options.repetitions) {}

  void All() {
    Header();
    if (options_.saved.empty()) {
      for (int64_t length : options_.lengths) Length(length);
    } else {
      Saved();
    }
    if (options_.ragged > 0) Ragged();
    if (options_.layer_tokens > 0) Layer();
    if (!options_.json.empty()) {
      std::ofstream file(options_.json);
      file << json{{"machine", machine_}, {"records", table_.records()}}.dump(1) << "\n";
    }
    if (table_.wrong()) Die("a kernel is wrong: see the column kernel");
  }

 private:
  void Header() {
    int runtime = 0;
    CHECK_CUDA(cudaRuntimeGetVersion(&runtime));
    const DeviceMemory word(256);
    const auto empty = [&] {
      CHECK_CUDA(cudaMemsetAsync(word.as<void>(), 0, word.bytes(), device_->stream({})));
    };
    const double empty_us = 1e3 * clock_.TimeGraph(empty).median;
    const std::string gpu(device_->name());
    const std::string driver = FirstLine("/proc/driver/nvidia/version", false);
    machine_ = {{"gpu", gpu},
                {"driver", driver},
                {"cuda", runtime},
                {"commit", options_.commit},
                {"empty_graph_us", empty_us}};
    std::printf("%s | %s | CUDA %d.%d | commit %s\n", gpu.c_str(), driver.c_str(), runtime / 1000,
                runtime % 1000 / 10, options_.commit.c_str());
    const Settings& settings = options_.settings;
    std::printf(
        "heads %d/%d d %d block %d %s; joint gamma %.2f, flexprefill gamma %.2f budget %d; "
        "an empty graph takes %.1f us\n",
        settings.q_heads, settings.kv_heads, settings.head_dim, settings.block_size,
        Name(settings.dtype), settings.gamma, settings.flexprefill_gamma,
        static_cast<int>(settings.min_budget), empty_us);
    table_.Header();
  }

  AttentionProblem Make(const std::vector<int64_t>& lengths) {
    return AttentionProblem(options_.settings, lengths, device_, &clock_);
  }

  void Dense(AttentionProblem* problem) {
    table_.Add(problem->Cudnn());
    if (problem->Wants(Method::kDense)) problem->Run("any", Method::kDense, &table_);
  }

  void Sparse(AttentionProblem* problem, const std::string& workload) {
    for (Method method : {Method::kFlexPrefill, Method::kJoint}) {
      if (problem->Wants(method)) problem->Run(workload, method, &table_);
    }
  }

  bool Has(const char* workload) const {
    return std::count(options_.workloads.begin(), options_.workloads.end(), workload) > 0;
  }

  void Length(int64_t tokens) {
    AttentionProblem problem = Make({tokens});
    problem.FillRandom();
    Dense(&problem);
    for (double density : options_.densities) {
      if (!Has("random")) break;
      problem.SetRandomIndex(density);
      for (const KernelSet& set : kKernelSets) {
        if (problem.Runs(set)) table_.Add(problem.Attend(Label("random", density), "-", set));
      }
    }
    if (!Has("structured")) return;
    if (options_.strength > 0) {
      problem.FillStructured(options_.strength);
      Sparse(&problem, "structured");
      return;
    }
    for (double density : options_.densities) {
      problem.FillForDensity(density);
      Sparse(&problem, Label("structured", density));
    }
  }

  void Saved() {
    const SavedTensors file(options_.saved);
    const SavedTensors::View q = file.Find("q"), k = file.Find("k"), v = file.Find("v");
    if (k.shape != v.shape || q.shape[0] != k.shape[0] || q.shape[2] != k.shape[2] ||
        q.dtype != k.dtype || q.dtype != v.dtype) {
      Die("q, k and v are not [S, Hq, d], [S, Hkv, d] and [S, Hkv, d] of one dtype");
    }
    Settings& settings = options_.settings;
    settings.q_heads = static_cast<int>(q.shape[1]);
    settings.kv_heads = static_cast<int>(k.shape[1]);
    settings.head_dim = static_cast<int>(q.shape[2]);
    settings.dtype = q.dtype == "BF16" ? DType::kBF16 : DType::kF16;
    AttentionProblem problem = Make({q.shape[0]});
    problem.FillSaved(q.data, k.data, v.data);
    Dense(&problem);
    Sparse(&problem, "saved");
  }

  // A batch of short sequences against one of four times their length, at the same densities.
  void Ragged() {
    const std::vector<int64_t> batch(options_.ragged, options_.ragged_tokens);
    const int64_t one = 4 * options_.ragged_tokens;
    for (double density : {.2, 1.0}) {
      std::vector<double> rates;
      for (const std::vector<int64_t>& lengths : {std::vector<int64_t>{one}, batch}) {
        AttentionProblem problem = Make(lengths);
        problem.FillRandom();
        problem.SetRandomIndex(density);
        const Record record = problem.Attend(Label("random", density), "-", kKernelSets[0]);
        table_.Add(record);
        rates.push_back(record.tflops);
      }
      std::printf("  the batch runs at %.1f%% of the executed rate of the one sequence\n",
                  100 * rates[1] / rates[0]);
    }
    AttentionProblem problem = Make(batch);
    problem.FillStructured(1);
    Sparse(&problem, "structured");
  }

  // One layer of a very long prompt, all stages.
  void Layer() {
    AttentionProblem problem = Make({options_.layer_tokens});
    problem.FillStructured(1.5);
    std::printf("  one layer of %lld tokens takes %.2f GiB of workspace, its index included\n",
                static_cast<long long>(options_.layer_tokens),
                static_cast<double>(problem.WorkspaceBytes()) / (1 << 30));
    problem.Run("structured", Method::kJoint, &table_);
  }

  static std::string Label(const char* workload, double density) {
    char text[32];
    std::snprintf(text, sizeof(text), "%s %.2f", workload, density);
    return text;
  }

  Options options_;
  cuda::CudaDevice* device_;
  Clock clock_;
  Table table_;
  json machine_;
};

int Main(int argc, char** argv) {
  Options o;
  Settings& s = o.settings;
  const std::map<std::string, Method> methods = {
      {"dense", Method::kDense}, {"flexprefill", Method::kFlexPrefill}, {"joint", Method::kJoint}};
  const std::map<std::string, DType> dtypes = {
      {"bf16", DType::kBF16}, {"fp16", DType::kF16}, {"fp32", DType::kF32}};
  CLI::App app{"Attention on one GPU: every method and kernel set, in ms, TFLOP/s and error"};
  app.add_option("--lengths", o.lengths, "tokens of the sequence")->delimiter(',');
  app.add_option("--densities", o.densities, "of the random index, and of joint")->delimiter(',');
  app.add_option("--workloads", o.workloads, "random, structured")
      ->delimiter(',')
      ->check(CLI::IsMember({"random", "structured"}));
  app.add_option("--methods", s.methods, "dense, flexprefill, joint")
      ->delimiter(',')
      ->transform(CLI::CheckedTransformer(methods).description("NAME"));
  app.add_option("--kernels", s.kernels, "sm90, sm80, f32")
      ->delimiter(',')
      ->check(CLI::IsMember({"sm90", "sm80", "f32"}));
  app.add_option("--heads", s.q_heads, "query heads");
  app.add_option("--kv-heads", s.kv_heads, "key and value heads");
  app.add_option("--head-dim", s.head_dim, "channels of a head")
      ->check(CLI::IsMember({64, 96, 128, 256}));
  app.add_option("--block", s.block_size, "tokens of a block")->check(CLI::IsMember({64, 128}));
  app.add_option("--dtype", s.dtype, "bf16, fp16, fp32")
      ->transform(CLI::CheckedTransformer(dtypes).description("NAME"));
  app.add_option("--gamma", s.gamma, "joint's coverage");
  app.add_option("--flexprefill-gamma", s.flexprefill_gamma, "flexprefill's");
  app.add_option("--tau", s.tau, "flexprefill: heads below it are query-aware");
  app.add_option("--min-budget", s.min_budget, "flexprefill's, tokens");
  app.add_option("--strength", o.strength, "of the structure; 0: found from the densities");
  app.add_option("--repetitions", o.repetitions, "of every timing")->check(CLI::PositiveNumber);
  app.add_option("--ragged", o.ragged, "sequences of a ragged batch; 0: none");
  app.add_option("--ragged-tokens", o.ragged_tokens, "of each of them");
  app.add_option("--layer", o.layer_tokens, "one layer of so many tokens, e.g. 1048576");
  app.add_option("--saved", o.saved, "a safetensors file with q, k and v")
      ->check(CLI::ExistingFile);
  app.add_option("--dense-ms", s.dense_ms, "cuDNN's time, where it cannot be loaded");
  app.add_option("--json", o.json, "also write the lines to this file");
  app.add_option("--commit", o.commit, "of the header");
  CLI11_PARSE(app, argc, argv);
  if (s.kv_heads < 1 || s.q_heads % s.kv_heads != 0) Die("--heads is no multiple of --kv-heads");
  if (o.commit.empty()) o.commit = FirstLine("git describe --always --dirty 2>/dev/null", true);

  auto device = cuda::CudaDevice::Open();
  if (!device.ok()) Die(std::string(device.status().message()));
  Run(o, device->get()).All();
  return 0;
}

}  // namespace
}  // namespace prefilld::bench

int main(int argc, char** argv) { return prefilld::bench::Main(argc, argv); }

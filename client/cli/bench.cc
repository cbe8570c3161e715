// prefillctl bench: a closed loop of `concurrency` requests at a time, for each prompt length.
#include <algorithm>
#include <map>
#include <memory>
#include <optional>
#include <thread>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "client/cli/command.h"
#include "client/cli/load.h"
#include "client/cli/policy.h"
#include "client/cli/progress.h"
#include "client/cli/report.h"
#include "client/cpp/errors.h"

namespace prefilld::cli {
namespace {

struct BenchFlags {
  std::string model, shape, transport;
  std::vector<uint32_t> tokens, concurrency = {1};
  double duration_s = 10;
  PolicyFlags policy;
};

// What a loop of requests showed.
struct Row {
  uint32_t tokens = 0, concurrency = 0;
  double seconds = 0;
  std::vector<double> ttft;  // seconds, ascending
  double density_sum = 0;
  std::map<std::string, int> errors;  // by code
  absl::Status last_error;

  size_t requests() const { return ttft.size(); }
  double requests_per_second() const { return static_cast<double>(requests()) / seconds; }
  double density() const {
    return requests() == 0 ? 0 : density_sum / static_cast<double>(requests());
  }
  // The least value that `fraction` of the requests do not exceed; 0 without requests.
  double Ttft(double fraction) const {
    if (ttft.empty()) return 0;
    const auto rank = static_cast<size_t>(fraction * static_cast<double>(ttft.size() - 1) + 0.5);
    return ttft[rank];
  }
};

Row RunLoop(client::PrefillClient& client, const Session& session, Load& load, uint32_t tokens,
            uint32_t concurrency, double duration_s) {
  client::CallOptions options = session.Options();
  options.retry.tries_max = 1;  // refusals are part of the result
  Row row{.tokens = tokens, .concurrency = concurrency};
  absl::Mutex mutex;  // of `row`
  Progress progress(session.io.err, session.io.err_is_terminal);
  const absl::Time start = client::SteadyNow();
  const absl::Time end = start + absl::Seconds(duration_s);
  const auto work = [&](uint32_t seed) {
    std::mt19937 rng(seed);
    do {
      const auto sample = load.Send(client, rng, options);
      {
        absl::MutexLock lock(&mutex);
        if (sample.ok()) {
          row.ttft.push_back(sample->ttft_seconds);
          row.density_sum += sample->density;
        } else {
          ++row.errors[absl::StatusCodeToString(sample.status().code())];
          row.last_error = sample.status();
        }
      }
      progress.Update(absl::StrCat(tokens, " x ", concurrency),
                      absl::ToDoubleSeconds(client::SteadyNow() - start), duration_s);
      // A server that asks for a pause gets it; one that fails at once is not hammered.
      if (!sample.ok()) {
        session.io.cancellation.WaitFor(
            client::RetryDelay(sample.status()).value_or(absl::Milliseconds(100)));
      }
    } while (client::SteadyNow() < end && !session.io.cancellation.cancelled());
  };
  std::vector<std::thread> workers;
  for (uint32_t i = 0; i < concurrency; ++i) workers.emplace_back(work, i);
  for (std::thread& worker : workers) worker.join();
  row.seconds = absl::ToDoubleSeconds(client::SteadyNow() - start);
  std::sort(row.ttft.begin(), row.ttft.end());
  return row;
}

nlohmann::ordered_json ToJson(const Row& row) {
  return {{"tokens", row.tokens},
          {"concurrency", row.concurrency},
          {"requests", row.requests()},
          {"seconds", row.seconds},
          {"requests_per_second", row.requests_per_second()},
          {"tokens_per_second", row.requests_per_second() * row.tokens},
          {"ttft_seconds", {{"p50", row.Ttft(.5)}, {"p95", row.Ttft(.95)}, {"p99", row.Ttft(.99)}}},
          {"density", row.density()},
          {"errors", row.errors}};
}

void PrintHeader(std::ostream& out) {
  out << absl::StrFormat("%8s %11s %8s %10s %10s %9s %9s %9s %8s  %s\n", "tokens", "concurrency",
                         "requests", "requests/s", "tokens/s", "TTFT p50", "p95", "p99 (s)",
                         "density", "errors");
}

void PrintRow(const Row& row, std::ostream& out) {
  const std::string errors = absl::StrJoin(row.errors, " ", absl::PairFormatter("="));
  out << absl::StrFormat("%8d %11d %8d %10.2f %10.0f %9.4f %9.4f %9.4f %8.4f  %s\n", row.tokens,
                         row.concurrency, row.requests(), row.requests_per_second(),
                         row.requests_per_second() * row.tokens, row.Ttft(.5), row.Ttft(.95),
                         row.Ttft(.99), row.density(), errors.empty() ? "-" : errors)
      << std::flush;
}

absl::Status RunBench(client::PrefillClient& client, const Session& session,
                      const BenchFlags& flags) {
  const auto policy = ToPolicy(flags.policy);
  if (!policy.ok()) return policy.status();
  v1::Transport transport = v1::TRANSPORT_UNSPECIFIED;
  if (!flags.transport.empty() &&
      !v1::Transport_Parse("TRANSPORT_" + absl::AsciiStrToUpper(flags.transport), &transport)) {
    return absl::InvalidArgumentError(absl::StrCat("there is no transport ", flags.transport));
  }
  v1::Model model;
  AttendLoadShape shape;
  if (!flags.model.empty()) {
    auto found = client.GetModel(flags.model, session.Options());
    if (!found.ok()) return found.status();
    model = *std::move(found);
    if (model.vocab_size() == 0) return absl::DataLossError("the model has no vocabulary");
  } else {
    const auto parsed = ParseShape(flags.shape);
    if (!parsed.ok()) return parsed.status();
    shape = *parsed;
  }

  nlohmann::ordered_json rows = nlohmann::ordered_json::array();
  absl::Status status;
  if (!session.json) PrintHeader(session.io.out);
  for (uint32_t tokens : flags.tokens) {
    const auto load = flags.model.empty() ? MakeAttendLoad(shape, tokens, *policy)
                                          : MakePrefillLoad(model, tokens, transport, *policy);
    for (uint32_t concurrency : flags.concurrency) {
      const Row row = RunLoop(client, session, *load, tokens, concurrency, flags.duration_s);
      if (session.io.cancellation.cancelled()) return absl::CancelledError("bench was stopped");
      if (row.requests() == 0) {
        status.Update(absl::Status(
            row.last_error.code(),
            absl::StrCat("no request of ", tokens, " tokens, ", concurrency,
                         " at a time, succeeded; the last: ", row.last_error.message())));
      }
      rows.push_back(ToJson(row));
      if (!session.json) PrintRow(row, session.io.out);
    }
  }
  if (session.json) PrintJson({{"runs", rows}}, session.io.out);
  return status;
}

}  // namespace

void AddBench(CLI::App& app, Session& session) {
  CLI::App* command =
      app.add_subcommand("bench", "Load: requests per second, time to first token, density");
  command->footer(
      "Example: prefillctl bench --model=smol --tokens=256,1024 --concurrency=1,2 --duration=2");
  const auto flags = std::make_shared<BenchFlags>();
  CLI::App* what = command->add_option_group("Load");
  what->add_option("--model", flags->model, "Prefill random prompts through this model");
  what->add_option("--shape", flags->shape,
                   "Or attend random BF16 tensors: Q_HEADS/KV_HEADS/HEAD_DIM, e.g. 32/8/128");
  what->require_option(1);
  command->add_option("--tokens", flags->tokens, "Lengths of prompts in tokens, e.g. 1024,4096")
      ->type_name("N,...")
      ->delimiter(',')
      ->check(CLI::Range(1u, 1u << 24))
      ->required();
  command->add_option("--concurrency", flags->concurrency, "Requests at a time, e.g. 1,4")
      ->type_name("N,...")
      ->delimiter(',')
      ->check(CLI::Range(1u, 1024u))
      ->capture_default_str();
  command->add_option("--duration", flags->duration_s, "For each pair of length and concurrency")
      ->type_name("SECONDS")
      ->capture_default_str();
  command->add_option("--transport", flags->transport,
                      "How caches could be pulled: grpc or posix_shm [in every way that the server "
                      "has memory for]");
  AddPolicyFlags(*command, flags->policy);
  command->callback([&session, flags] {
    session.action = [&session, flags](client::PrefillClient& client) {
      return RunBench(client, session, *flags);
    };
  });
}

}  // namespace prefilld::cli

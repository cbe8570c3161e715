// prefillctl bench: closed loops of `concurrency` requests at a time or open loops of `rate`
// requests a second, for each prompt length or a mix of lengths.
#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "client/cli/command.h"
#include "client/cli/load.h"
#include "client/cli/load_report.h"
#include "client/cli/load_run.h"
#include "client/cli/policy.h"
#include "client/cli/progress.h"
#include "client/cli/report.h"

namespace prefilld::cli {
namespace {

struct BenchFlags {
  std::string model, shape, transport;
  std::vector<std::string> tokens;
  std::vector<uint32_t> concurrency;
  std::vector<double> rates;
  double duration_s = 10;
  std::string deadline;
  uint32_t peers = 1, seed = 1;
  bool retry = false;
  PolicyFlags policy;
};

// Lengths of one run.
struct Mix {
  struct Part {
    uint32_t tokens;
    double weight;
  };
  std::string text;  // as it was given
  std::vector<Part> parts;
};

// "1024,4096": a run each. "512:8,2048:1": one run, of eight times as many short ones.
absl::StatusOr<std::vector<Mix>> ParseTokens(const std::vector<std::string>& texts) {
  constexpr uint32_t kTokensMax = 1 << 24;
  std::vector<Mix> runs;
  Mix mix{.text = absl::StrJoin(texts, ",")};
  for (const std::string& text : texts) {
    const std::vector<std::string> fields = absl::StrSplit(text, ':');
    Mix::Part part{.tokens = 0, .weight = 1};
    if (fields.size() > 2 || !absl::SimpleAtoi(fields[0], &part.tokens) || part.tokens < 1 ||
        part.tokens > kTokensMax ||
        (fields.size() == 2 &&
         !(absl::SimpleAtod(fields[1], &part.weight) && part.weight > 0 && part.weight <= 1e9))) {
      return absl::InvalidArgumentError(absl::StrCat("--tokens: '", text,
                                                     "' is neither a length from 1 to ", kTokensMax,
                                                     " nor LENGTH:WEIGHT"));
    }
    fields.size() == 2 ? mix.parts.push_back(part) : runs.push_back({text, {part}});
  }
  if (mix.parts.empty()) return runs;
  if (!runs.empty()) {
    return absl::InvalidArgumentError("--tokens: all lengths have a weight, or none");
  }
  return std::vector<Mix>{mix};
}

// The server's callers and what they send, for all runs.
struct Bench {
  std::function<std::unique_ptr<Load>(uint32_t tokens)> make_load;
  std::vector<std::unique_ptr<Peer>> peers;
  absl::Duration deadline = absl::InfiniteDuration();
};

LoadRow RunRow(const Bench& bench, const Session& session, const BenchFlags& flags, const Mix& mix,
               LoadRow row) {
  std::vector<std::unique_ptr<Load>> loads;
  LoadRun run;
  for (const Mix::Part& part : mix.parts) {
    loads.push_back(bench.make_load(part.tokens));
    run.mix.push_back({loads.back().get(), part.tokens, part.weight});
  }
  for (const auto& peer : bench.peers) run.peers.push_back(peer.get());
  run.concurrency = row.concurrency;
  run.rate = row.rate;
  run.duration = absl::Seconds(flags.duration_s);
  run.deadline = bench.deadline;
  run.options = session.Options();
  if (!flags.retry) run.options.retry.tries_max = 1;  // refusals are part of the result
  run.seed = flags.seed;
  row.tokens = mix.text;
  Progress progress(session.io.err, session.io.err_is_terminal);
  run.on_progress = [&](absl::Duration since) {
    progress.Update(absl::StrCat(row.tokens, " x ", LoadText(row)), absl::ToDoubleSeconds(since),
                    flags.duration_s);
  };
  const Finished finished = RunLoad(run);
  row.seconds = finished.seconds;
  row.stats = Summarize(finished.outcomes, bench.deadline);
  for (size_t i = 0; bench.peers.size() > 1 && i < bench.peers.size(); ++i) {
    row.peers.emplace_back(bench.peers[i]->source(),
                           SummarizePeer(finished.outcomes, bench.deadline, i));
  }
  return row;
}

// What is to be sent, by the flags and the server's word.
absl::StatusOr<Bench> MakeBench(client::PrefillClient& client, const Session& session,
                                const BenchFlags& flags) {
  const auto policy = ToPolicy(flags.policy);
  if (!policy.ok()) return policy.status();
  Bench bench;
  if (!flags.deadline.empty() && (!absl::ParseDuration(flags.deadline, &bench.deadline) ||
                                  bench.deadline <= absl::ZeroDuration())) {
    return absl::InvalidArgumentError(
        absl::StrCat("--deadline: '", flags.deadline, "' is no duration such as 10s or 500ms"));
  }
  if (flags.peers > 1) {
    auto peers = MakePeers(session.target, flags.peers);
    if (!peers.ok()) return peers.status();
    bench.peers = *std::move(peers);
  } else {
    bench.peers.push_back(std::make_unique<Peer>(client));
  }
  v1::Transport transport = v1::TRANSPORT_UNSPECIFIED;
  if (!flags.transport.empty() &&
      !v1::Transport_Parse("TRANSPORT_" + absl::AsciiStrToUpper(flags.transport), &transport)) {
    return absl::InvalidArgumentError(absl::StrCat("there is no transport ", flags.transport));
  }
  if (flags.model.empty()) {
    const auto shape = ParseShape(flags.shape);
    if (!shape.ok()) return shape.status();
    bench.make_load = [=](uint32_t tokens) { return MakeAttendLoad(*shape, tokens, *policy); };
    return bench;
  }
  const auto model = client.GetModel(flags.model, session.Options());
  if (!model.ok()) return model.status();
  if (model->vocab_size() == 0) return absl::DataLossError("the model has no vocabulary");
  bench.make_load = [=](uint32_t tokens) {
    return MakePrefillLoad(*model, tokens, transport, *policy);
  };
  return bench;
}

absl::Status RunBench(client::PrefillClient& client, const Session& session,
                      const BenchFlags& flags) {
  const auto mixes = ParseTokens(flags.tokens);
  if (!mixes.ok()) return mixes.status();
  const auto bench = MakeBench(client, session, flags);
  if (!bench.ok()) return bench.status();
  std::vector<LoadRow> loads;
  for (const double rate : flags.rates) loads.push_back({.rate = rate});
  for (const uint32_t concurrency : flags.concurrency) {
    loads.push_back({.concurrency = concurrency});
  }
  if (loads.empty()) loads.push_back({.concurrency = 1});

  nlohmann::ordered_json rows = nlohmann::ordered_json::array();
  absl::Status status;
  if (!session.json) PrintHeader(session.io.out);
  for (const Mix& mix : *mixes) {
    for (const LoadRow& load : loads) {
      const LoadRow row = RunRow(*bench, session, flags, mix, load);
      if (session.io.cancellation.cancelled()) return absl::CancelledError("bench was stopped");
      if (row.stats.sent > 0 && row.stats.succeeded() == 0) {
        status.Update(absl::Status(
            row.stats.last_failure.code(),
            absl::StrCat("no request of ", row.tokens, " tokens, ", LoadText(row),
                         row.rate > 0 ? "" : " at a time",
                         ", succeeded; the last: ", row.stats.last_failure.message())));
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
  CLI::App* command = app.add_subcommand(
      "bench", "Load: goodput, time to first token, latency, refusals by their reason");
  command->footer(
      "Example: prefillctl bench --model=smol --tokens=256:8,2048:1 --rate=5 --deadline=10s");
  const auto flags = std::make_shared<BenchFlags>();
  CLI::App* what = command->add_option_group("Load");
  what->add_option("--model", flags->model, "Prefill random prompts through this model");
  what->add_option("--shape", flags->shape,
                   "Or attend random BF16 tensors: Q_HEADS/KV_HEADS/HEAD_DIM, e.g. 32/8/128");
  what->require_option(1);
  command
      ->add_option("--tokens", flags->tokens,
                   "Lengths of prompts in tokens, a run each, e.g. 1024,4096; or with weights one "
                   "run of a mix, e.g. 512:8,2048:1")
      ->type_name("N,...")
      ->delimiter(',')
      ->required();
  CLI::Option* concurrency = command
                                 ->add_option("--concurrency", flags->concurrency,
                                              "A closed loop: requests at a time, e.g. 1,4 [1]")
                                 ->type_name("N,...")
                                 ->delimiter(',')
                                 ->check(CLI::Range(1u, 1024u));
  command
      ->add_option(
          "--rate", flags->rates,
          "Or an open loop: requests a second at random moments, whatever becomes of them; "
          "times are counted from those moments [no open loop]")
      ->type_name("R,...")
      ->delimiter(',')
      ->check(CLI::Range(1e-3, 1e5))
      ->excludes(concurrency);
  command
      ->add_option("--duration", flags->duration_s,
                   "For each run; an open loop waits for what it has sent")
      ->type_name("SECONDS")
      ->capture_default_str();
  command->add_option("--deadline", flags->deadline, "Of each request, e.g. 10s [none]")
      ->type_name("DURATION");
  command
      ->add_option("--peers", flags->peers,
                   "Connections that requests go to in turn; to a server on loopback each from an "
                   "address of its own (127.0.1.1, ...)")
      ->type_name("N")
      ->check(CLI::Range(1u, 1024u))
      ->capture_default_str();
  command->add_flag("--retry", flags->retry,
                    "Try again as the C++ client does, where the server asks for it");
  command->add_option("--seed", flags->seed, "Of prompts, lengths and moments")
      ->type_name("N")
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

// prefillctl health: is the server live, and does it take work?
#include <limits>
#include <memory>
#include <optional>

#include "client/cli/command.h"
#include "client/cli/report.h"
#include "client/cpp/call.h"

namespace prefilld::cli {
namespace {

struct Answer {
  bool live, ready;
};

// UNAVAILABLE where the server does not take work; `answer` is empty where it could not be asked.
absl::Status Ask(client::PrefillClient& client, client::CallOptions options,
                 std::optional<Answer>& answer) {
  answer.reset();
  options.retry.tries_max = 1;  // an answer about now
  const auto live = client.Health("", options);
  if (!live.ok()) return live.status();
  const auto ready = client.Health("prefilld.v1.PrefillService", options);
  if (!ready.ok()) return ready.status();
  answer = Answer{*live, *ready};
  return *live && *ready ? absl::OkStatus() : absl::UnavailableError("the server is not ready");
}

absl::Status RunHealth(client::PrefillClient& client, const Session& session, bool wait) {
  client::CallOptions options = session.Options();
  options.retry = {.tries_max = wait ? std::numeric_limits<int>::max() : 1,
                   .delay_max = absl::Seconds(1)};
  std::optional<Answer> answer;
  const absl::Status status = client::RunWithRetries(
      options, [&](client::Try&) { return Ask(client, session.Options(), answer); });
  if (!answer) return status;
  if (session.json) {
    PrintJson({{"live", answer->live}, {"ready", answer->ready}}, session.io.out);
  } else {
    session.io.out << "live   " << (answer->live ? "yes" : "no") << "\n"
                   << "ready  " << (answer->ready ? "yes" : "no") << "\n";
  }
  return status;
}

}  // namespace

void AddHealth(CLI::App& app, Session& session) {
  CLI::App* command =
      app.add_subcommand("health", "Whether the server is live and ready; fails when it is not");
  command->footer("Example: prefillctl health --wait --timeout=60");
  const auto wait = std::make_shared<bool>(false);
  command->add_flag("--wait", *wait, "Ask until it is ready, as long as --timeout allows");
  command->callback([&session, wait] {
    session.action = [&session, wait](client::PrefillClient& client) {
      return RunHealth(client, session, *wait);
    };
  });
}

}  // namespace prefilld::cli

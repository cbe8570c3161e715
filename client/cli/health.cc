// prefillctl health: is the server live, and does it take work?
#include "client/cli/command.h"
#include "client/cli/report.h"

namespace prefilld::cli {
namespace {

absl::Status RunHealth(client::PrefillClient& client, const Session& session) {
  client::CallOptions options = session.Options();
  options.retry.tries_max = 1;  // an answer about now
  const auto live = client.Health("", options);
  if (!live.ok()) return live.status();
  const auto ready = client.Health("prefilld.v1.PrefillService", options);
  if (!ready.ok()) return ready.status();
  if (session.json) {
    PrintJson({{"live", *live}, {"ready", *ready}}, session.io.out);
  } else {
    session.io.out << "live   " << (*live ? "yes" : "no") << "\n"
                   << "ready  " << (*ready ? "yes" : "no") << "\n";
  }
  return *live && *ready ? absl::OkStatus() : absl::UnavailableError("the server is not ready");
}

}  // namespace

void AddHealth(CLI::App& app, Session& session) {
  CLI::App* command =
      app.add_subcommand("health", "Whether the server is live and ready; fails when it is not");
  command->callback([&session] {
    session.action = [&session](client::PrefillClient& client) {
      return RunHealth(client, session);
    };
  });
}

}  // namespace prefilld::cli

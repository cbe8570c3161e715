#include "client/cli/app.h"

#include "absl/strings/match.h"
#include "client/cli/command.h"
#include "client/cpp/errors.h"

namespace prefilld::cli {
namespace {

constexpr int kExitFailure = 1;
constexpr int kExitUsage = 2;

void PrintError(const absl::Status& status, std::ostream& err) {
  err << "prefillctl: " << absl::StatusCodeToString(status.code()) << ": "
      << std::string(status.message()) << "\n";
  for (const std::string& line : client::DetailLines(status)) {
    if (!absl::StrContains(status.message(), line)) err << "  " << line << "\n";
  }
}

}  // namespace

int RunApp(int argc, const char* const* argv, const AppIo& io) {
  Session session{.io = io};
  CLI::App app("Talks to a prefilld server.", "prefillctl");
  app.set_help_all_flag("--help_all", "Help of every command");
  app.require_subcommand(1);
  app.fallthrough();  // global flags may follow the command
  app.footer("`prefillctl COMMAND --help` has the flags of a command and an example.");
  app.add_option("--target", session.target, "Address of the server")
      ->type_name("HOST:PORT")
      ->capture_default_str();
  app.add_flag("--json", session.json, "Print one JSON object instead of text");
  app.add_option("--timeout", session.timeout_s,
                 "For the whole command, retries included [no limit]")
      ->type_name("SECONDS");
  AddHealth(app, session);
  AddModels(app, session);
  AddAttend(app, session);
  AddPrefill(app, session);
  AddSparsity(app, session);
  AddBench(app, session);

  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error, io.out, io.err) == 0 ? 0 : kExitUsage;
  }
  client::PrefillClient client(session.target);
  const absl::Status status = session.action(client);
  io.out.flush();
  if (!status.ok()) {
    PrintError(status, io.err);
    return kExitFailure;
  }
  return 0;
}

}  // namespace prefilld::cli

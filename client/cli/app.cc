#include "client/cli/app.h"

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
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

// What gRPC would look up as a name, or knock at port 0 for, in the user's words.
std::string CheckTarget(const std::string& target) {
  const size_t scheme = target.find("://");
  const std::string name = target.substr(0, scheme == std::string::npos ? 0 : scheme);
  if (name == "http" || name == "https" || name == "grpc" || name == "grpcs") {
    return absl::StrCat("'", target, "': HOST:PORT is enough, without ", name, "://");
  }
  const bool has_scheme = scheme != std::string::npos || absl::StartsWith(target, "unix:") ||
                          absl::StartsWith(target, "unix-abstract:");
  const size_t colon = target.rfind(':');
  if (!has_scheme && (colon == std::string::npos || colon + 1 == target.size() ||
                      target.find(']', colon) != std::string::npos)) {
    return absl::StrCat("'", target, "' has no port; prefilld's is 50051 where none was chosen");
  }
  return "";
}

void AddCredentials(CLI::App& app, client::Credentials* credentials) {
  const auto add = [&](const char* flag, const char* variable, const char* type, std::string* value,
                       const char* help) {
    app.add_option(flag, *value, help)->type_name(type)->envname(variable)->group("Credentials");
  };
  add("--tls_ca", "PREFILLD_TLS_CA", "FILE", &credentials->tls_ca,
      "PEM of who signed the server's certificate; none: in the clear");
  add("--tls_cert", "PREFILLD_TLS_CERT", "FILE", &credentials->tls_cert,
      "PEM of a certificate of ours, for a server that asks for one");
  add("--tls_key", "PREFILLD_TLS_KEY", "FILE", &credentials->tls_key,
      "PEM of its key, without a passphrase");
  add("--token_file", "PREFILLD_TOKEN_FILE", "FILE", &credentials->token_file,
      "A bearer token for every call; only over TLS, or to this host");
  add("--server_name", "PREFILLD_SERVER_NAME", "NAME", &credentials->server_name,
      "That the server's certificate must be of [the target's host]");
}

}  // namespace

int RunApp(int argc, const char* const* argv, const AppIo& io) {
  Session session{.io = io};
  CLI::App app("Talks to a prefilld server.", "prefillctl");
  app.set_help_all_flag("--help_all", "Help of every command");
  app.require_subcommand(1);
  app.set_version_flag("--version", "prefillctl " PREFILLD_VERSION);
  app.fallthrough();  // global flags may follow the command
  app.footer("`prefillctl COMMAND --help` has the flags of a command and an example.");
  app.add_option("--target", session.target, "Address of the server")
      ->type_name("HOST:PORT")
      ->check(CLI::Validator(CheckTarget, ""))
      ->capture_default_str();
  AddCredentials(app, &session.credentials);
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
  client::PrefillClient client(session.target, session.credentials);
  absl::Status status = session.action(client);
  io.out.flush();
  if (absl::IsCancelled(status) && io.cancellation.cancelled()) {
    status = absl::CancelledError("interrupted");  // gRPC's word for it is none
  }
  if (!status.ok()) {
    PrintError(status, io.err);
    return kExitFailure;
  }
  return 0;
}

}  // namespace prefilld::cli

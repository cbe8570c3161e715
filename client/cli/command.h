// What the commands share: the global flags and streams they are given, and how each is added to
// the command line.
#pragma once

#include <CLI/CLI.hpp>
#include <functional>
#include <limits>
#include <string>

#include "absl/status/status.h"
#include "client/cli/app.h"
#include "client/cpp/client.h"

namespace prefilld::cli {

struct Session {
  AppIo io;
  std::string target = "127.0.0.1:50051";
  client::Credentials credentials;
  bool json = false;
  double timeout_s = std::numeric_limits<double>::infinity();

  // The command that was given, set while the command line is parsed.
  std::function<absl::Status(client::PrefillClient&)> action;

  client::CallOptions Options() const {
    return {.timeout = absl::Seconds(timeout_s), .cancellation = &io.cancellation};
  }
};

// Each adds one command, whose flags live as long as `app`. `session` outlives `app`.
void AddHealth(CLI::App& app, Session& session);
void AddModels(CLI::App& app, Session& session);
void AddAttend(CLI::App& app, Session& session);
void AddPrefill(CLI::App& app, Session& session);
void AddSparsity(CLI::App& app, Session& session);
void AddBench(CLI::App& app, Session& session);

}  // namespace prefilld::cli

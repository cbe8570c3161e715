// prefillctl as a function: parses the command line, runs one command, prints its result or error.
#pragma once

#include <ostream>

#include "client/cpp/call.h"

namespace prefilld::cli {

struct AppIo {
  std::ostream& out;  // results
  std::ostream& err;  // errors, and progress bars where it is a terminal
  bool err_is_terminal = false;
  client::Cancellation& cancellation;  // stops the command from another thread
};

// The exit status: 0 success, 1 the command failed, 2 a wrong command line. Blocks.
int RunApp(int argc, const char* const* argv, const AppIo& io);

}  // namespace prefilld::cli

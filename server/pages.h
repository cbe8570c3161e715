// What is at the HTTP port: /metrics (Prometheus text), /debug/sparsity (JSON: density and pattern
// of every layer and head of the last requests), /healthz and /readyz (200, or 503 and why). Pages
// under /debug need the credentials of a GetSparsityReport, and show what that would; the others
// none.
#pragma once

#include <string>

#include "absl/strings/string_view.h"
#include "server/health.h"
#include "server/record/metrics.h"
#include "server/record/reports.h"
#include "server/rpc/access.h"

namespace prefilld {

struct Pages {
  Metrics& metrics;
  const ReportTable& reports;
  const Health& health;
  Access& access;
};

struct HttpAnswer {
  const char* status = "200 OK";
  const char* type = "text/plain; charset=utf-8";
  std::string body;
};

// target: a path, and perhaps a query. Only reads; may take some milliseconds.
HttpAnswer Show(const Pages& pages, absl::string_view target, const Credentials& credentials);

}  // namespace prefilld

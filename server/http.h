// The HTTP port for people and scrapers: /metrics (Prometheus text), /debug/sparsity (JSON: density
// and pattern of every layer and head of the last requests), /healthz and /readyz (200, or 503 and
// why). GET and HEAD. Owns its threads; handlers only read.
#pragma once

#include <memory>

#include "absl/status/statusor.h"
#include "server/config.h"
#include "server/health.h"
#include "server/record/metrics.h"
#include "server/record/reports.h"

namespace prefilld {

class HttpServer {
 public:
  // UNAVAILABLE when the address cannot be listened on.
  static absl::StatusOr<std::unique_ptr<HttpServer>> Start(const Endpoint& listen, Metrics& metrics,
                                                           const ReportTable& reports,
                                                           const Health& health);
  ~HttpServer();  // stops; waits for running handlers

  const Endpoint& endpoint() const { return endpoint_; }  // with the real port

 private:
  struct Parts;
  HttpServer(Endpoint endpoint, std::unique_ptr<Parts> parts);

  const Endpoint endpoint_;
  const std::unique_ptr<Parts> parts_;
};

}  // namespace prefilld

#include "server/http.h"

#include <CivetServer.h>
#include <netdb.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cstring>
#include <nlohmann/json.hpp>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "prometheus/text_serializer.h"
#include "server/clock.h"

namespace prefilld {
namespace {

constexpr char kMetrics[] = "/metrics";
constexpr char kSparsity[] = "/debug/sparsity";

void Respond(mg_connection* connection, const char* status, const char* type,
             const std::string& body) {
  mg_printf(connection,
            "HTTP/1.1 %s\r\nContent-Type: %s\r\nContent-Length: %zu\r\nConnection: close\r\n\r\n",
            status, type, body.size());
  mg_write(connection, body.data(), body.size());
}

// civetweb also calls a handler for the paths below its own.
bool IsExactly(const char* path, mg_connection* connection) {
  return std::strcmp(mg_get_request_info(connection)->local_uri, path) == 0;
}

class MetricsHandler : public CivetHandler {
 public:
  explicit MetricsHandler(Metrics& metrics) : metrics_(metrics) {}
  bool handleGet(CivetServer*, mg_connection* connection) override {
    if (!IsExactly(kMetrics, connection)) return false;
    Respond(connection, "200 OK", "text/plain; version=0.0.4; charset=utf-8",
            prometheus::TextSerializer().Serialize(metrics_.Collect()));
    return true;
  }

 private:
  Metrics& metrics_;
};

nlohmann::ordered_json ToJson(const RequestReport& request) {
  const JobReport& report = request.report;
  nlohmann::ordered_json json;
  json["request_id"] = request.request_id;
  json["model"] = request.model;
  json["method"] = Name(request.method);
  json["gamma"] = request.gamma;
  json["tokens"] = request.tokens;
  json["layers"] = report.layers;
  json["heads"] = report.heads;
  json["mean_density"] = report.MeanDensity();
  json["captured_mass_measured"] = report.captured_mass_measured;
  json["mean_captured_mass"] = report.MeanCapturedMass();
  auto& density = json["density"] = nlohmann::json::array();  // [layer][head]
  auto& pattern = json["pattern"] = nlohmann::json::array();
  auto& captured = json["captured_mass"] = nlohmann::json::array();
  for (int layer = 0; layer < report.layers; ++layer) {
    nlohmann::ordered_json densities, patterns, masses;
    for (int head = 0; head < report.heads; ++head) {
      const HeadReport& entry = report.entries[size_t(layer) * report.heads + head];
      densities.push_back(entry.density);
      patterns.push_back(Name(entry.pattern));
      masses.push_back(entry.captured_mass);
    }
    density.push_back(std::move(densities));
    pattern.push_back(std::move(patterns));
    if (report.captured_mass_measured) captured.push_back(std::move(masses));
  }
  return json;
}

// ?format=json is all there is; ?request=ID shows one request only.
class SparsityHandler : public CivetHandler {
 public:
  explicit SparsityHandler(const ReportTable& reports) : reports_(reports) {}
  bool handleGet(CivetServer*, mg_connection* connection) override {
    if (!IsExactly(kSparsity, connection)) return false;
    std::string format, id;
    if (CivetServer::getParam(connection, "format", format) && format != "json") {
      Respond(connection, "400 Bad Request", "text/plain", "format: only json\n");
      return true;
    }
    const bool one = CivetServer::getParam(connection, "request", id);
    nlohmann::ordered_json json;
    json["requests"] = nlohmann::json::array();  // newest first
    for (const auto& report : reports_.All()) {
      if (!one || report->request_id == id) json["requests"].push_back(ToJson(*report));
    }
    Respond(connection, "200 OK", "application/json", json.dump() + "\n");
    return true;
  }

 private:
  const ReportTable& reports_;
};

// civetweb complains in its own format; a failed start is told by our one line.
int DropMessage(const mg_connection*, const char*) { return 1; }

// Connects and hangs up.
void Knock(const Endpoint& endpoint) {
  addrinfo hints{}, *found = nullptr;
  hints.ai_socktype = SOCK_STREAM;
  const std::string port = std::to_string(endpoint.port);
  if (getaddrinfo(endpoint.host.c_str(), port.c_str(), &hints, &found) != 0) return;
  const int fd = socket(found->ai_family, found->ai_socktype, found->ai_protocol);
  if (fd >= 0) {
    (void)!connect(fd, found->ai_addr, found->ai_addrlen);
    close(fd);
  }
  freeaddrinfo(found);
}

}  // namespace

struct HttpServer::Parts {
  Parts(Metrics& metrics, const ReportTable& reports) : on_metrics(metrics), on_sparsity(reports) {}
  MetricsHandler on_metrics;
  SparsityHandler on_sparsity;
  std::unique_ptr<CivetServer> civet;  // last: stops before its handlers go
};

HttpServer::HttpServer(Endpoint endpoint, std::unique_ptr<Parts> parts)
    : endpoint_(std::move(endpoint)), parts_(std::move(parts)) {}

// civetweb's acceptor sees that it shall stop when it wakes, which is every 2 s or at a connection.
HttpServer::~HttpServer() {
  Bell stopped;
  std::thread stopper([&] {
    parts_->civet.reset();
    stopped.Ring();
  });
  do {
    Knock(endpoint_);
  } while (!stopped.Await(SteadyNow() + absl::Milliseconds(10)));
  stopper.join();
}

absl::StatusOr<std::unique_ptr<HttpServer>> HttpServer::Start(const Endpoint& listen,
                                                              Metrics& metrics,
                                                              const ReportTable& reports) {
  auto parts = std::make_unique<Parts>(metrics, reports);
  CivetCallbacks callbacks;
  callbacks.log_message = DropMessage;
  // A connection has a thread, also one that says nothing: many threads, and not for long.
  const std::vector<std::string> options = {
      "listening_ports",
      listen.host == "localhost" ? absl::StrCat("127.0.0.1:", listen.port) : listen.ToString(),
      "num_threads",
      "16",
      "request_timeout_ms",
      "2000"};
  try {
    parts->civet = std::make_unique<CivetServer>(options, &callbacks);
  } catch (const CivetException&) {
    return absl::UnavailableError(
        absl::StrCat("cannot listen on ", listen.ToString(), ": is the port in use?"));
  }
  parts->civet->addHandler(kMetrics, parts->on_metrics);
  parts->civet->addHandler(kSparsity, parts->on_sparsity);
  Endpoint endpoint = listen;
  endpoint.port = parts->civet->getListeningPorts().at(0);
  return std::unique_ptr<HttpServer>(new HttpServer(std::move(endpoint), std::move(parts)));
}

}  // namespace prefilld

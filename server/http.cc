#include "server/http.h"

#include <CivetServer.h>
#include <netdb.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cstring>
#include <functional>
#include <nlohmann/json.hpp>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/notification.h"
#include "absl/time/time.h"
#include "prometheus/text_serializer.h"

namespace prefilld {
namespace {

constexpr char kText[] = "text/plain; charset=utf-8";

struct Answer {
  const char* status = "200 OK";
  const char* type = kText;
  std::string body;
};

// What is at one path; HEAD is answered as GET, without the body.
class Page : public CivetHandler {
 public:
  using Show = std::function<Answer(mg_connection* connection)>;
  Page(const char* path, Show show) : path_(path), show_(std::move(show)) {}

  const char* path() const { return path_; }
  bool handleGet(CivetServer*, mg_connection* connection) override {
    return Respond(connection, /*body=*/true);
  }
  bool handleHead(CivetServer*, mg_connection* connection) override {
    return Respond(connection, /*body=*/false);
  }

 private:
  bool Respond(mg_connection* connection, bool body) const {
    // civetweb also calls a handler for the paths below its own.
    if (std::strcmp(mg_get_request_info(connection)->local_uri, path_) != 0) return false;
    const Answer answer = show_(connection);
    mg_printf(connection,
              "HTTP/1.1 %s\r\nContent-Type: %s\r\nContent-Length: %zu\r\n"
              "Connection: close\r\n\r\n",
              answer.status, answer.type, answer.body.size());
    if (body) mg_write(connection, answer.body.data(), answer.body.size());
    return true;
  }

  const char* const path_;
  const Show show_;
};

Answer Tell(const absl::Status& health) {
  if (health.ok()) return {.body = "ok\n"};
  return {"503 Service Unavailable", kText, std::string(health.message()) + "\n"};
}

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
Answer Sparsity(const ReportTable& reports, mg_connection* connection) {
  std::string format, id;
  if (CivetServer::getParam(connection, "format", format) && format != "json") {
    return {"400 Bad Request", kText, "format: only json\n"};
  }
  const bool one = CivetServer::getParam(connection, "request", id);
  nlohmann::ordered_json json;
  json["requests"] = nlohmann::json::array();  // newest first
  for (const auto& report : reports.All()) {
    if (!one || report->request_id == id) json["requests"].push_back(ToJson(*report));
  }
  return {.type = "application/json", .body = json.dump() + "\n"};
}

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
  Parts(Metrics& metrics, const ReportTable& reports, const Health& health)
      : pages{{"/metrics",
               [&](auto*) {
                 return Answer{.type = "text/plain; version=0.0.4; charset=utf-8",
                               .body = prometheus::TextSerializer().Serialize(metrics.Collect())};
               }},
              {"/debug/sparsity", [&](auto* connection) { return Sparsity(reports, connection); }},
              {"/healthz", [&](auto*) { return Tell(health.alive()); }},
              {"/readyz", [&](auto*) { return Tell(health.ready()); }}} {}
  Page pages[4];
  std::unique_ptr<CivetServer> civet;  // last: stops before its handlers go
};

HttpServer::HttpServer(Endpoint endpoint, std::unique_ptr<Parts> parts)
    : endpoint_(std::move(endpoint)), parts_(std::move(parts)) {}

// civetweb's acceptor sees that it shall stop when it wakes, which is every 2 s or at a connection.
HttpServer::~HttpServer() {
  absl::Notification stopped;
  std::thread stopper([&] {
    parts_->civet.reset();
    stopped.Notify();
  });
  do {
    Knock(endpoint_);
  } while (!stopped.WaitForNotificationWithTimeout(absl::Milliseconds(10)));
  stopper.join();
}

absl::StatusOr<std::unique_ptr<HttpServer>> HttpServer::Start(const Endpoint& listen,
                                                              Metrics& metrics,
                                                              const ReportTable& reports,
                                                              const Health& health) {
  auto parts = std::make_unique<Parts>(metrics, reports, health);
  CivetCallbacks callbacks;
  callbacks.log_message = DropMessage;
  // A connection has a thread, also one that says nothing: many threads, and not for long.
  const std::vector<std::string> options = {
      "listening_ports",
      listen.host == "localhost" ? absl::StrCat("127.0.0.1:", listen.port) : listen.ToString(),
      "num_threads",
      "64",
      "request_timeout_ms",
      "2000"};
  try {
    parts->civet = std::make_unique<CivetServer>(options, &callbacks);
  } catch (const CivetException&) {
    return absl::UnavailableError(
        absl::StrCat("cannot listen on ", listen.ToString(), ": is the port in use?"));
  }
  for (Page& page : parts->pages) parts->civet->addHandler(page.path(), page);
  Endpoint endpoint = listen;
  endpoint.port = parts->civet->getListeningPorts().at(0);
  return std::unique_ptr<HttpServer>(new HttpServer(std::move(endpoint), std::move(parts)));
}

}  // namespace prefilld

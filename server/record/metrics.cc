#include "server/record/metrics.h"

#include <algorithm>
#include <array>
#include <map>
#include <string>
#include <utility>

#include "prometheus/metric_family.h"
#include "server/record/errors.h"
#include "server/version.h"

namespace prefilld {
namespace {

using prometheus::Counter;
using prometheus::Gauge;
using prometheus::Histogram;
using prometheus::Labels;
using prometheus::Registry;
using Buckets = Histogram::BucketBoundaries;

constexpr const char* kMethods[] = {"Attend",       "Prefill",  "GetSparsityReport",
                                    "Negotiate",    "PullKv",   "RenewLease",
                                    "ReleaseLease", "GetModel", "ListModels"};
constexpr const char* kCodes[] = {
    "OK",        "CANCELLED",      "UNKNOWN",           "INVALID_ARGUMENT",   "DEADLINE_EXCEEDED",
    "NOT_FOUND", "ALREADY_EXISTS", "PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION",
    "ABORTED",   "OUT_OF_RANGE",   "UNIMPLEMENTED",     "INTERNAL",           "UNAVAILABLE",
    "DATA_LOSS", "UNAUTHENTICATED"};
constexpr const char* kRejections[] = {"queue_full",
                                       "backlog",
                                       "uploads",
                                       "unretained",
                                       "kv_memory",
                                       "attend_memory",
                                       "shm_memory",
                                       "draining",
                                       "device_lost",
                                       "model_changed",
                                       "deadline_infeasible",
                                       "deadline_passed",
                                       "invalid_argument",
                                       "not_found",
                                       "unimplemented",
                                       "other"};

// 1-2.5-5 from a millisecond to 160 s.
const Buckets& Seconds() {
  static const Buckets buckets = {.001, .0025, .005, .01, .025, .05, .1,  .25, .5,
                                  1,    2.5,   5,    10,  25,   50,  100, 160};
  return buckets;
}
const Buckets& Density() {
  static const Buckets buckets = {.01, .02, .05, .1, .15, .2, .3, .4, .5, .7, .9, 1};
  return buckets;
}
const Buckets& Mass() {  // fine where coverage is asked for
  static const Buckets buckets = {.5, .6, .7, .75, .8, .85, .9, .92, .94, .96, .98, .99, 1};
  return buckets;
}
const Buckets& Tokens() {
  static const Buckets buckets = {16,   64,   128,   256,   512,   1024,  2048,
                                  4096, 8192, 16384, 32768, 65536, 131072};
  return buckets;
}

auto& Counters(Registry& registry, const char* name, const char* help) {
  return prometheus::BuildCounter().Name(name).Help(help).Register(registry);
}
auto& Gauges(Registry& registry, const char* name, const char* help) {
  return prometheus::BuildGauge().Name(name).Help(help).Register(registry);
}
auto& Histograms(Registry& registry, const char* name, const char* help) {
  return prometheus::BuildHistogram().Name(name).Help(help).Register(registry);
}

Gauge& Stale(Registry& registry, const char* kind) {
  return Gauges(registry, "prefilld_credentials_stale",
                "Files that have changed and cannot be used: what was there before is")
      .Add({{"kind", kind}});
}

template <typename Names>
const char* OneOf(const Names& names, absl::string_view name, const char* otherwise) {
  const auto found = std::find(std::begin(names), std::end(names), name);
  return found == std::end(names) ? otherwise : *found;
}

const char* RejectionOf(const absl::Status& why) {
  const std::string reason = FactsOf(why).reason;
  if (!reason.empty()) return OneOf(kRejections, reason, "other");
  switch (why.code()) {
    case absl::StatusCode::kInvalidArgument:
      return "invalid_argument";
    case absl::StatusCode::kNotFound:
      return "not_found";
    case absl::StatusCode::kUnimplemented:
      return "unimplemented";
    case absl::StatusCode::kDeadlineExceeded:
      return "deadline_passed";
    default:
      return "other";
  }
}

}  // namespace

ConnectionMetrics::ConnectionMetrics(Registry& registry)
    : open(Gauges(registry, "prefilld_connections", "Open connections of gRPC").Add({})),
      accepted(Counters(registry, "prefilld_connections_accepted_total",
                        "Connections that gRPC was given")
                   .Add({})),
      refused_(Counters(registry, "prefilld_connections_refused_total",
                        "Connections closed at once or cut off, by the limit that they were over")),
      descriptors_(Gauges(registry, "prefilld_descriptors",
                          "Descriptors of the process: used, and how many may be")) {
  for (const char* reason : kConnectionRefusals) refused_.Add({{"reason", reason}});
}

void ConnectionMetrics::Refused(const std::string& reason) {
  refused_.Add({{"reason", reason}}).Increment();
}

void ConnectionMetrics::SetDescriptors(const std::string& kind, int64_t used, int64_t limit) {
  descriptors_.Add({{"kind", kind}, {"state", "used"}}).Set(static_cast<double>(used));
  descriptors_.Add({{"kind", kind}, {"state", "limit"}}).Set(static_cast<double>(limit));
}

AccessMetrics::AccessMetrics(Registry& registry)
    : stale_tls(Stale(registry, "tls")),
      stale_tokens(Stale(registry, "tokens")),
      refused_(Counters(registry, "prefilld_access_refused_total",
                        "Calls, pages and handshakes refused for who asked")) {
  for (const char* reason : kRefusals) refused_.Add({{"reason", reason}});
}

void AccessMetrics::Refused(const std::string& reason) {
  refused_.Add({{"reason", reason}}).Increment();
}

Metrics::Metrics()
    : registry_(std::make_shared<Registry>()),
      connections(*registry_),
      access(*registry_),
      running(Gauges(*registry_, "prefilld_requests_running", "Jobs being computed").Add({})),
      waiting(Gauges(*registry_, "prefilld_requests_waiting", "Admitted jobs not started").Add({})),
      uploads(Gauges(*registry_, "prefilld_requests_uploading", "Attends to arrive").Add({})),
      queue_tokens(Gauges(*registry_, "prefilld_queue_tokens", "Tokens of waiting jobs").Add({})),
      upload_bytes_inflight(
          Gauges(*registry_, "prefilld_upload_bytes_inflight", "Tensor bytes to come").Add({})),
      prompt_tokens(Histograms(*registry_, "prefilld_prompt_tokens", "Tokens of admitted prompts")
                        .Add({}, Tokens())),
      tokens_total(
          Counters(*registry_, "prefilld_tokens_total", "Query tokens of finished jobs").Add({})),
      time_to_first_layer(Histograms(*registry_, "prefilld_time_to_first_layer_seconds",
                                     "From a prompt's arrival to its first layer's KV")
                              .Add({}, Seconds())),
      leases_granted(
          Counters(*registry_, "prefilld_leases_granted_total", "Leases, ended or alive").Add({})),
      leases_active(
          Gauges(*registry_, "prefilld_leases_active", "Leases that live: granted and not ended")
              .Add({})),
      ready(Gauges(*registry_, "prefilld_ready", "1 while new work is taken").Add({})),
      log_lines_dropped(Counters(*registry_, "prefilld_log_lines_dropped_total",
                                 "Lines that found the queue to stderr full: its reader is slow")
                            .Add({})),
      requests_(Counters(*registry_, "prefilld_requests_total", "Finished calls")),
      request_duration_(
          Histograms(*registry_, "prefilld_request_duration_seconds", "Length of a call")),
      rejected_(Counters(*registry_, "prefilld_requests_rejected_total",
                         "Requests refused at admission")),
      phase_duration_(
          Histograms(*registry_, "prefilld_phase_duration_seconds", "Where a request's time went")),
      head_density_(Histograms(*registry_, "prefilld_head_density_ratio",
                               "Computed / causal blocks of each head of each layer")),
      layer_density_(Gauges(*registry_, "prefilld_layer_density_ratio",
                            "Mean density of a layer in the last request")),
      captured_mass_(Histograms(*registry_, "prefilld_captured_mass_ratio",
                                "Attention mass on the computed blocks, of each head")),
      dense_fallback_(Counters(*registry_, "prefilld_dense_fallback_heads_total",
                               "Heads run dense although a sparse method was asked for")),
      leases_ended_(Counters(*registry_, "prefilld_leases_ended_total",
                             "Leases that ended, each once: consumed, abandoned or expired")),
      kv_blocks_(Gauges(*registry_, "prefilld_kv_blocks", "Blocks of the KV pool")),
      segments_(Gauges(*registry_, "prefilld_kv_segment_bytes",
                       "Of the pools of segments that KV caches over posix_shm and cuda_ipc lie "
                       "in")),
      handoff_bytes_(Counters(*registry_, "prefilld_handoff_bytes_total",
                              "KV payload bytes sent, or named to be mapped")),
      handoff_duration_(
          Histograms(*registry_, "prefilld_handoff_duration_seconds", "Length of a complete pull")),
      handoff_failures_(
          Counters(*registry_, "prefilld_handoff_failures_total", "Pulls that did not complete")),
      transport_refused_(Counters(*registry_, "prefilld_transport_refused_total",
                                  "Transports that callers were offered and could not use, as "
                                  "they say; memory: the server had none for a call")),
      descriptors_(Counters(*registry_, "prefilld_descriptor_connections_total",
                            "Connections to --memory_socket, by what became of them")),
      handoff_transport_info_(
          Gauges(*registry_, "prefilld_handoff_transport_info", "Transports this server offers")),
      model_bytes_(Gauges(*registry_, "prefilld_model_bytes",
                          "Weights of a model: all, and loaded so far while the server starts")),
      planned_memory_(Gauges(*registry_, "prefilld_memory_plan_bytes",
                             "What the server holds or may hold, as planned at start")),
      gpu_memory_(Gauges(*registry_, "prefilld_gpu_memory_bytes",
                         "Held by the server on the device, and of the host pinned for it")),
      gpu_faults_(Counters(*registry_, "prefilld_gpu_faults_total",
                           "Faults that no CUDA context survives: the server ends")) {
  AddKnown();
}

// What is counted from the start, at zero.
void Metrics::AddKnown() {
  for (const char* method : kMethods) {
    for (const char* code : kCodes) requests_.Add({{"method", method}, {"code", code}});
    request_duration_.Add({{"method", method}}, Seconds());
  }
  for (const char* reason : kRejections) rejected_.Add({{"reason", reason}});
  for (const char* phase : kPhaseNames) phase_duration_.Add({{"phase", phase}}, Seconds());
  for (DenseReason reason :
       {DenseReason::kShortPrompt, DenseReason::kMinCapturedMass, DenseReason::kBelowCrossover}) {
    DenseFallback(reason, 0);
  }
  for (const char* reason : kLeaseEnds) leases_ended_.Add({{"reason", reason}});
  for (const char* state : kBlockStateNames) kv_blocks_.Add({{"state", state}});
  for (const char* outcome : kDescriptorOutcomes) descriptors_.Add({{"outcome", outcome}});
  for (const char* kind : Device::kFaultKinds) gpu_faults_.Add({{"kind", kind}});
  AddModel(kAttendModel);
  Gauges(*registry_, "prefilld_build_info", "The version that runs")
      .Add({{"version", kVersion}})
      .Set(1);
}

void Metrics::AddModel(const std::string& model) {
  for (const char* pattern : kPatternNames) {
    head_density_.Add({{"model", model}, {"pattern", pattern}}, Density());
  }
  captured_mass_.Add({{"model", model}}, Mass());
}

void Metrics::ModelBytes(const std::string& model, uint64_t loaded, uint64_t of_bytes) {
  model_bytes_.Add({{"model", model}, {"state", "all"}}).Set(static_cast<double>(of_bytes));
  model_bytes_.Add({{"model", model}, {"state", "loaded"}}).Set(static_cast<double>(loaded));
}

void Metrics::PlannedMemory(const std::string& what, const std::string& model, bool device,
                            uint64_t bytes) {
  std::map<std::string, std::string> labels = {{"what", what},
                                               {"place", device ? "device" : "host"}};
  if (!model.empty()) labels["model"] = model;  // of none there is no label, not an empty one
  planned_memory_.Add(labels).Set(static_cast<double>(bytes));
}

void Metrics::Request(const std::string& method, const std::string& code, double seconds) {
  requests_.Add({{"method", method}, {"code", code}}).Increment();
  request_duration_.Add({{"method", method}}, Seconds()).Observe(seconds);
}

void Metrics::Rejected(const absl::Status& why) {
  rejected_.Add({{"reason", RejectionOf(why)}}).Increment();
}

void Metrics::AddTransport(const std::string& transport, bool offered) {
  HandoffBytes(transport, 0);
  handoff_duration_.Add({{"transport", transport}}, Seconds());
  for (const char* reason : kHandoffFailures) {
    handoff_failures_.Add({{"transport", transport}, {"reason", reason}});
  }
  for (const char* reason : kTransportRefusals) {
    transport_refused_.Add({{"transport", transport}, {"reason", reason}});
  }
  if (offered) handoff_transport_info_.Add({{"transport", transport}}).Set(1);
}

void Metrics::HandoffBytes(const std::string& transport, uint64_t bytes) {
  handoff_bytes_.Add({{"transport", transport}, {"direction", "out"}})
      .Increment(static_cast<double>(bytes));
}

void Metrics::HandoffFinished(const std::string& transport, double seconds) {
  handoff_duration_.Add({{"transport", transport}}, Seconds()).Observe(seconds);
}

void Metrics::HandoffFailed(const std::string& transport, const std::string& reason) {
  handoff_failures_.Add({{"transport", transport}, {"reason", reason}}).Increment();
}

void Metrics::ObservePhase(Phase phase, double seconds) {
  phase_duration_.Add({{"phase", kPhaseNames[static_cast<size_t>(phase)]}}, Seconds())
      .Observe(seconds);
}

void Metrics::HeadDensity(const std::string& model, Pattern pattern, double density) {
  head_density_.Add({{"model", model}, {"pattern", Name(pattern)}}, Density()).Observe(density);
}

void Metrics::LayerDensity(const std::string& model, int layer, double density) {
  layer_density_.Add({{"model", model}, {"layer", std::to_string(layer)}}).Set(density);
}

void Metrics::CapturedMass(const std::string& model, double mass) {
  captured_mass_.Add({{"model", model}}, Mass()).Observe(mass);
}

void Metrics::DenseFallback(DenseReason reason, int64_t heads) {
  dense_fallback_.Add({{"reason", Name(reason)}}).Increment(static_cast<double>(heads));
}

void Metrics::LeaseEnded(const std::string& reason) {
  leases_ended_.Add({{"reason", reason}}).Increment();
}

void Metrics::SetKvBlocks(BlockState state, int64_t blocks) {
  kv_blocks_.Add({{"state", kBlockStateNames[static_cast<size_t>(state)]}})
      .Set(static_cast<double>(blocks));
}

void Metrics::SetSegments(const std::string& transport, const char* state, uint64_t bytes) {
  segments_.Add({{"transport", transport}, {"state", state}}).Set(static_cast<double>(bytes));
}

void Metrics::TransportRefused(const std::string& transport, const std::string& reason) {
  transport_refused_.Add({{"transport", transport}, {"reason", reason}}).Increment();
}

void Metrics::DescriptorAsked(const std::string& outcome) {
  descriptors_.Add({{"outcome", outcome}}).Increment();
}

void Metrics::GpuFault(std::string_view kind) {
  gpu_faults_.Add({{"kind", std::string(kind)}}).Increment();
}

void Metrics::SetGpuMemory(const char* kind, uint64_t bytes) {
  gpu_memory_.Add({{"kind", kind}}).Set(static_cast<double>(bytes));
}

std::vector<prometheus::MetricFamily> Metrics::Collect() {
  if (on_scrape) on_scrape(*this);
  return registry_->Collect();
}

}  // namespace prefilld

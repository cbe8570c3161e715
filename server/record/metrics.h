// Every metric of the server, in one struct: names, label sets and buckets are here and nowhere
// else. Owned by the server; whoever knows a fact calls the method or the metric named after it.
// All label sets are closed and exist from the start, so that a zero is seen as zero. Thread-safe;
// no call blocks for longer than a map look-up.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "kernels/attention.h"
#include "kernels/backend.h"
#include "prometheus/counter.h"
#include "prometheus/family.h"
#include "prometheus/gauge.h"
#include "prometheus/histogram.h"
#include "prometheus/registry.h"
#include "server/job.h"
#include "server/kv/block_pool.h"

namespace prefilld {

// The model label of requests that bring their own tensors.
inline constexpr char kAttendModel[] = "attend";

// Of gRPC's port, by the acceptor; and of the process's descriptors.
struct ConnectionMetrics {
  explicit ConnectionMetrics(prometheus::Registry& registry);

  static constexpr const char* kConnectionRefusals[] = {
      "limit",        // all that there may be are there
      "address",      // of its address likewise
      "rate",         // too many new ones of its address
      "descriptors",  // the process has none left
      "rapid_reset",  // cut off: it begins calls and takes them back
      "streams",      // cut off: it has more open than it was told it may
  };

  void Refused(const std::string& reason);  // or cut off; one of kConnectionRefusals
  // What of the descriptors is used, by kind, and what may be; by on_scrape.
  void SetDescriptors(const std::string& kind, int64_t used, int64_t limit);

  prometheus::Gauge& open;
  prometheus::Counter& accepted;  // handed to gRPC

 private:
  prometheus::Family<prometheus::Counter>& refused_;
  prometheus::Family<prometheus::Gauge>& descriptors_;
};

// Of who may do what, by rpc/access and the server.
struct AccessMetrics {
  explicit AccessMetrics(prometheus::Registry& registry);

  static constexpr const char* kRefusals[] = {
      // in the order of Denial
      "no_credentials",  // and some are needed
      "certificate",     // is no identity's
      "token",           // likewise
      "clear",           // a token that came without TLS
      "tenant",          // not named by a proxy, or by who is none
      "method",          // not this identity's
      "model",           // likewise
      "lease",           // another's
      "report",          // of another tenant
      "handshake",       // of TLS: another CA, an expired certificate, no TLS at all
      "metadata",        // more of it than a call may have
  };

  void Refused(const std::string& reason);  // one of kRefusals
  // Files that have changed and cannot be used, so that what was there before is.
  prometheus::Gauge& stale_tls;
  prometheus::Gauge& stale_tokens;

 private:
  prometheus::Family<prometheus::Counter>& refused_;
};

struct Metrics {
 private:
  std::shared_ptr<prometheus::Registry> registry_;  // before everything that registers with it

 public:
  Metrics();

  // Makes the series of a model exist. Before serving.
  void AddModel(const std::string& model);
  // Of a model's weights, while the server starts.
  void ModelBytes(const std::string& model, uint64_t loaded, uint64_t of_bytes);
  // A row of the plan of memory that was made at start.
  void PlannedMemory(const std::string& what, const std::string& model, bool device,
                     uint64_t bytes);
  // Makes the series of a transport exist; `offered`: this server has it. Before serving.
  void AddTransport(const std::string& transport, bool offered);

  // --- rpc ---
  // method: an RPC's name ("Attend"); code: a gRPC code's name ("OK"). Once per call, at its end.
  void Request(const std::string& method, const std::string& code, double seconds);
  // An Attend or a Prefill that got no place; the label is FactsOf(why).reason or follows its code.
  void Rejected(const absl::Status& why);

  ConnectionMetrics connections;

  AccessMetrics access;

  // --- engine and scheduler ---
  void ObservePhase(Phase phase, double seconds);
  void HeadDensity(const std::string& model, Pattern pattern, double density);
  void LayerDensity(const std::string& model, int layer, double density);  // mean over its heads
  void CapturedMass(const std::string& model, double mass);                // of one head
  void DenseFallback(DenseReason reason, int64_t heads = 1);

  prometheus::Gauge& running;                  // jobs
  prometheus::Gauge& waiting;                  // jobs
  prometheus::Gauge& uploads;                  // Attends whose tensors are on their way
  prometheus::Gauge& queue_tokens;             // of waiting jobs
  prometheus::Gauge& upload_bytes_inflight;    // admitted and not arrived; by rpc
  prometheus::Histogram& prompt_tokens;        // of every admitted Prefill; by rpc
  prometheus::Counter& tokens_total;           // query tokens of finished jobs; by the scheduler
  prometheus::Histogram& time_to_first_layer;  // seconds from a Prefill's arrival; by the engine

  // --- hand-off and leases ---
  // transport: a name that was added.
  void HandoffBytes(const std::string& transport, uint64_t bytes);  // sent, or named to be mapped
  void HandoffFinished(const std::string& transport, double seconds);  // a whole PullKv
  void HandoffFailed(const std::string& transport,
                     const std::string& reason);  // a kHandoffFailures
  // At rest granted leases are those that ended, for whatever reason, and those that live.
  prometheus::Counter& leases_granted;                 // by rpc
  void LeaseEnded(const std::string& reason);          // one of kLeaseEnds, once a lease
  prometheus::Gauge& leases_active;                    // set by on_scrape
  void SetKvBlocks(BlockState state, int64_t blocks);  // by on_scrape

  // state: ready, lent or free. No series where caches in segments take blocks.
  void SetSegments(const std::string& transport, const char* state,
                   uint64_t bytes);  // by on_scrape
  // What a caller that was offered a transport has against it, or, for one call, its server: one of
  // kTransportRefusals.
  void TransportRefused(const std::string& transport, const std::string& reason);
  void DescriptorAsked(const std::string& outcome);  // a connection; one of kDescriptorOutcomes

  // --- device; no series where there is no GPU but the faults' ---
  void GpuFault(std::string_view kind);                 // one of Device::kFaultKinds; by the engine
  void SetGpuMemory(const char* kind, uint64_t bytes);  // one of Device::memory's; by on_scrape

  prometheus::Gauge& ready;                // 1 while the server takes new work
  prometheus::Counter& log_lines_dropped;  // by on_scrape

  // Runs before every collection, to set what is only looked at then. Set before serving.
  std::function<void(Metrics&)> on_scrape;
  std::vector<prometheus::MetricFamily> Collect();

  static constexpr const char* kLeaseEnds[] = {
      // in the order of LeaseEnd
      "consumed",   // released by who has all he wants
      "abandoned",  // released without that, or the callers left
      "expired",    // its time ran out
  };
  static constexpr const char* kNoMemory = "memory";
  static constexpr const char* kOutOfReach = "reach";  // of every GPU of the caller's
  static constexpr const char* kTransportRefusals[] = {
      // in the order of v1::TransportRefusal::Reason
      "unspecified", "socket", "peer", "descriptor", "driver", "segment",
      // and ours
      kNoMemory, kOutOfReach};
  static constexpr const char* kDescriptorOutcomes[] = {
      // in the order of DescriptorSocket::Outcome
      "given",    // the descriptor
      "unknown",  // no memory has the name
      "peer",     // of another user
      "silent",   // no name in time
      "full",     // too many connections
      "failed",   // there was no descriptor to be had
  };
  static constexpr const char* kHandoffFailures[] = {
      "cancelled",    // the caller went away
      "deadline",     // the call's deadline passed
      "stalled",      // no progress after the lease had ended
      "refused",      // no such lease, layer or layout
      "computation",  // a layer will never come
  };

 private:
  void AddKnown();
  template <typename T>
  using Family = prometheus::Family<T>;

  Family<prometheus::Counter>& requests_;
  Family<prometheus::Histogram>& request_duration_;
  Family<prometheus::Counter>& rejected_;
  Family<prometheus::Histogram>& phase_duration_;
  Family<prometheus::Histogram>& head_density_;
  Family<prometheus::Gauge>& layer_density_;
  Family<prometheus::Histogram>& captured_mass_;
  Family<prometheus::Counter>& dense_fallback_;
  Family<prometheus::Counter>& leases_ended_;
  Family<prometheus::Gauge>& kv_blocks_;
  Family<prometheus::Gauge>& segments_;
  Family<prometheus::Counter>& handoff_bytes_;
  Family<prometheus::Histogram>& handoff_duration_;
  Family<prometheus::Counter>& handoff_failures_;
  Family<prometheus::Counter>& transport_refused_;
  Family<prometheus::Counter>& descriptors_;
  Family<prometheus::Gauge>& handoff_transport_info_;
  Family<prometheus::Gauge>& model_bytes_;
  Family<prometheus::Gauge>& planned_memory_;
  Family<prometheus::Gauge>& gpu_memory_;
  Family<prometheus::Counter>& gpu_faults_;
};

}  // namespace prefilld

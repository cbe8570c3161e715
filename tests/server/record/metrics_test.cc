#include "server/record/metrics.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <optional>
#include <set>
#include <string>

#include "server/record/errors.h"

namespace prefilld {
namespace {

using Labels = std::map<std::string, std::string>;

class MetricsTest : public testing::Test {
 protected:
  std::optional<prometheus::ClientMetric> Find(const std::string& name, const Labels& labels = {}) {
    for (const auto& family : metrics_.Collect()) {
      if (family.name != name) continue;
      for (const auto& metric : family.metric) {
        Labels found;
        for (const auto& label : metric.label) found[label.name] = label.value;
        if (found == labels) return metric;
      }
    }
    return std::nullopt;
  }
  MetricsTest() {
    metrics_.AddTransport("grpc", true);
    for (const char* other : {"posix_shm", "cuda_ipc"}) metrics_.AddTransport(other, false);
  }
  double Counter(const std::string& name, const Labels& labels = {}) {
    const auto metric = Find(name, labels);
    EXPECT_TRUE(metric) << name << " has no such series";
    return metric ? metric->counter.value : -1;
  }

  Metrics metrics_;
};

TEST_F(MetricsTest, ZerosAreThereFromTheStart) {
  EXPECT_EQ(Counter("prefilld_requests_total", {{"method", "PullKv"}, {"code", "DATA_LOSS"}}), 0);
  EXPECT_EQ(Counter("prefilld_requests_rejected_total", {{"reason", "queue_full"}}), 0);
  EXPECT_EQ(Counter("prefilld_dense_fallback_heads_total", {{"reason", "short_prompt"}}), 0);
  EXPECT_EQ(Counter("prefilld_requests_rejected_total", {{"reason", "shm_memory"}}), 0);
  for (const char* transport : {"grpc", "posix_shm", "cuda_ipc"}) {
    EXPECT_EQ(
        Counter("prefilld_handoff_bytes_total", {{"transport", transport}, {"direction", "out"}}),
        0);
    EXPECT_TRUE(Find("prefilld_handoff_duration_seconds", {{"transport", transport}}));
    for (const char* reason : Metrics::kTransportRefusals) {
      EXPECT_EQ(Counter("prefilld_transport_refused_total",
                        {{"transport", transport}, {"reason", reason}}),
                0);
    }
    for (const char* reason : Metrics::kHandoffFailures) {
      EXPECT_EQ(Counter("prefilld_handoff_failures_total",
                        {{"transport", transport}, {"reason", reason}}),
                0);
    }
  }
  for (const char* outcome : Metrics::kDescriptorOutcomes) {
    EXPECT_EQ(Counter("prefilld_descriptor_connections_total", {{"outcome", outcome}}), 0);
  }
  EXPECT_EQ(Counter("prefilld_leases_granted_total"), 0);
  for (const char* reason : Metrics::kLeaseEnds) {
    EXPECT_EQ(Counter("prefilld_leases_ended_total", {{"reason", reason}}), 0) << reason;
  }
  for (const char* state : kBlockStateNames) {
    EXPECT_TRUE(Find("prefilld_kv_blocks", {{"state", state}})) << state;
  }
  for (const char* kind : Device::kFaultKinds) {
    EXPECT_EQ(Counter("prefilld_gpu_faults_total", {{"kind", kind}}), 0);
  }
  EXPECT_EQ(Counter("prefilld_requests_rejected_total", {{"reason", "device_lost"}}), 0);
  for (const char* phase : kPhaseNames) {
    EXPECT_TRUE(Find("prefilld_phase_duration_seconds", {{"phase", phase}})) << phase;
  }
}

TEST_F(MetricsTest, ObservationsAddNoSeries) {
  metrics_.AddModel("m");
  const auto series = [&] {
    size_t count = 0;
    for (const auto& family : metrics_.Collect()) count += family.metric.size();
    return count;
  };
  const size_t before = series();
  metrics_.Request("Attend", "OK", 0.1);
  metrics_.Rejected(absl::InvalidArgumentError("x"));
  metrics_.Rejected(
      RetryLater(absl::StatusCode::kUnavailable, "a new reason", "x", absl::Seconds(1)));
  for (const char* transport : {"grpc", "posix_shm"}) {
    metrics_.HandoffBytes(transport, 10);
    metrics_.HandoffFinished(transport, 0.1);
    for (const char* reason : Metrics::kHandoffFailures) metrics_.HandoffFailed(transport, reason);
  }
  metrics_.ObservePhase(Phase::kLinear, 1);
  metrics_.HeadDensity("m", Pattern::kJoint, 0.3);
  metrics_.CapturedMass("m", 0.9);
  metrics_.DenseFallback(DenseReason::kMinCapturedMass);
  metrics_.SetKvBlocks(BlockState::kLeased, 3);
  for (const char* reason : Metrics::kTransportRefusals) {
    metrics_.TransportRefused("cuda_ipc", reason);
  }
  for (const char* outcome : Metrics::kDescriptorOutcomes) metrics_.DescriptorAsked(outcome);
  for (const char* reason : Metrics::kLeaseEnds) metrics_.LeaseEnded(reason);
  for (const char* kind : Device::kFaultKinds) metrics_.GpuFault(kind);
  EXPECT_EQ(series(), before);
  metrics_.LayerDensity("m", 0, 0.3);
  metrics_.LayerDensity("m", 0, 0.4);
  EXPECT_EQ(series(), before + 1) << "one for each layer of a model";
}

TEST_F(MetricsTest, RejectionsAreLabelledByTheirFacts) {
  metrics_.Rejected(
      RetryLater(absl::StatusCode::kResourceExhausted, "kv_memory", "x", absl::Seconds(1)));
  metrics_.Rejected(
      RetryLater(absl::StatusCode::kResourceExhausted, "shm_memory", "x", absl::Seconds(1)));
  metrics_.Rejected(DeadlineInfeasible("x"));
  metrics_.Rejected(absl::DeadlineExceededError("x"));
  metrics_.Rejected(ResourceNotFound("model", "x"));
  metrics_.Rejected(absl::UnimplementedError("x"));
  metrics_.Rejected(InvalidField("f", "x"));
  metrics_.Rejected(absl::DataLossError("x"));
  for (const char* reason : {"kv_memory", "shm_memory", "deadline_infeasible", "deadline_passed",
                             "not_found", "unimplemented", "invalid_argument", "other"}) {
    EXPECT_EQ(Counter("prefilld_requests_rejected_total", {{"reason", reason}}), 1) << reason;
  }
}

TEST_F(MetricsTest, HandoffsAreToldApartByTransport) {
  const Labels grpc = {{"transport", "grpc"}}, shm = {{"transport", "posix_shm"}};
  EXPECT_TRUE(Find("prefilld_handoff_transport_info", grpc));
  EXPECT_FALSE(Find("prefilld_handoff_transport_info", shm)) << "not offered";
  metrics_.AddTransport("posix_shm", true);
  EXPECT_EQ(Find("prefilld_handoff_transport_info", shm)->gauge.value, 1);
  metrics_.HandoffBytes("posix_shm", 7);
  metrics_.HandoffFinished("posix_shm", 0.1);
  metrics_.HandoffFailed("posix_shm", "refused");
  EXPECT_EQ(
      Counter("prefilld_handoff_bytes_total", {{"transport", "posix_shm"}, {"direction", "out"}}),
      7);
  EXPECT_EQ(Counter("prefilld_handoff_bytes_total", {{"transport", "grpc"}, {"direction", "out"}}),
            0);
  EXPECT_EQ(Find("prefilld_handoff_duration_seconds", shm)->histogram.sample_count, 1u);
  EXPECT_EQ(Counter("prefilld_handoff_failures_total",
                    {{"transport", "posix_shm"}, {"reason", "refused"}}),
            1);
}

TEST_F(MetricsTest, BucketsAreThoseOfTheContract) {
  metrics_.HeadDensity(kAttendModel, Pattern::kDense, 0.2);
  const auto metric =
      Find("prefilld_head_density_ratio", {{"model", "attend"}, {"pattern", "dense"}});
  ASSERT_TRUE(metric);
  std::vector<double> bounds;
  for (const auto& bucket : metric->histogram.bucket) bounds.push_back(bucket.upper_bound);
  bounds.pop_back();  // +Inf
  EXPECT_EQ(bounds, (std::vector<double>{.01, .02, .05, .1, .15, .2, .3, .4, .5, .7, .9, 1}));
  EXPECT_EQ(metric->histogram.bucket[5].cumulative_count, 1u) << "a bound belongs to its bucket";
}

TEST_F(MetricsTest, LooksAtGaugesWhenAsked) {
  int64_t blocks = 5;
  metrics_.on_scrape = [&](Metrics& m) { m.SetKvBlocks(BlockState::kFree, blocks); };
  EXPECT_EQ(Find("prefilld_kv_blocks", {{"state", "free"}})->gauge.value, 5);
  blocks = 6;
  EXPECT_EQ(Find("prefilld_kv_blocks", {{"state", "free"}})->gauge.value, 6);
}

}  // namespace
}  // namespace prefilld

// Who may call what: the one place that every call goes through before anything of it is looked at
// (CallRecord does it), and that the HTTP port asks too. What is refused is counted and has one
// line in the log, with no secret in it. Thread-safe; never blocks.
#pragma once

#include <atomic>
#include <cstdint>
#include <iterator>
#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/synchronization/mutex.h"
#include "server/caller.h"
#include "server/clock.h"
#include "server/kv/lease_table.h"
#include "server/record/metrics.h"
#include "server/rpc/access_policy.h"
#include "server/rpc/rpcs.h"

namespace prefilld {

class Access {
 public:
  // policy: null: everybody may do everything, with a certificate where one is asked for.
  explicit Access(Metrics& metrics, std::unique_ptr<AccessPolicy> policy = nullptr)
      : metrics_(metrics.access), policy_(std::move(policy)) {}

  // Of the policy in this file; empty: none. verifies: clients' certificates are.
  static absl::StatusOr<std::unique_ptr<Access>> Open(Metrics& metrics,
                                                      const std::string& policy_file,
                                                      bool verifies);

  bool has_policy() const { return policy_ != nullptr; }

  // RESOURCE_EXHAUSTED: more bytes than a call may have, whoever it is of. Before Admit.
  absl::Status CheckMetadata(Rpc rpc, const std::string& peer, size_t bytes);
  // UNAUTHENTICATED, or PERMISSION_DENIED for who may not call this.
  absl::StatusOr<Caller> Admit(Rpc rpc, const Credentials& credentials);
  // PERMISSION_DENIED.
  absl::Status CheckModel(Rpc rpc, const Caller& caller, const std::string& model);
  // NOT_FOUND, as of a lease that is none: nobody hears that another's lives.
  absl::Status CheckLease(Rpc rpc, const Caller& caller, const LeaseTable& leases,
                          absl::string_view name);
  // The same of a report.
  void ReportDenied(Rpc rpc, const Caller& caller, absl::string_view request_id);
  // By who sees that a TLS handshake fails. peer: its address, or empty where that is not known.
  void HandshakeFailed(absl::string_view port, absl::string_view peer, absl::string_view why);

  // Looks whether files of tokens have changed, and tells how many lines the log was spared. Once a
  // second.
  void Refresh();

 private:
  struct Refused;  // what its line says
  void Refuse(const Refused& refused);

  AccessMetrics& metrics_;
  const std::unique_ptr<AccessPolicy> policy_;
  absl::Mutex mutex_;
  // Lines that the log may have at once; as many come back as time passes.
  double lines_ ABSL_GUARDED_BY(mutex_) = kLinesAtOnce;
  SteadyTime counted_ ABSL_GUARDED_BY(mutex_) = SteadyNow();
  int64_t unlogged_ ABSL_GUARDED_BY(mutex_) = 0;

  static constexpr double kLinesAtOnce = 100, kLinesPerSecond = 20;
};

}  // namespace prefilld

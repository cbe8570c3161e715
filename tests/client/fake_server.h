// A prefilld in this process for the tests of its clients: answers as the contract says, from the
// generated code alone (no ByteBuffer, no wire codec of ours), and misbehaves on request. It
// computes nothing: o is q, K and V are bytes that depend on their place.
#pragma once

#include <grpcpp/grpcpp.h>

#include <functional>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "prefilld/v1/kv_handoff_service.grpc.pb.h"
#include "prefilld/v1/model_service.grpc.pb.h"
#include "prefilld/v1/prefill_service.grpc.pb.h"

namespace prefilld {

// A status with one google.rpc detail, as a server sends it.
grpc::Status StatusWithDetail(grpc::StatusCode code, const std::string& message,
                              const google::protobuf::Message& detail);
// RESOURCE_EXHAUSTED or UNAVAILABLE with RetryInfo.
grpc::Status RetryLaterStatus(grpc::StatusCode code, int delay_ms);

// Byte `i` of K (0) or V (1) of a layer.
char KvByte(uint32_t layer, uint32_t tensor_index, uint64_t i);

class FakeServer {
 public:
  // What it does and what it saw. Set before the first call; read after the last. The hooks are
  // called with a lock held.
  struct Script {
    // Statuses for the next calls of any method, in order; an OK one lets the call through.
    std::vector<grpc::Status> refusals;
    // Sees each chunk before it is sent: may change it. False ends the stream with UNAVAILABLE.
    std::function<bool(v1::TensorChunk&)> before_chunk;
    bool skip_summary = false;
    bool hang_after_admission = false;  // until the call is cancelled
    uint32_t chunk_bytes = 1000;
    std::string boot_id = "boot";

    std::vector<v1::AttendHeader> attends;
    std::vector<std::string> uploads;  // bytes of each input tensor of the last Attend
    std::vector<v1::PrefillRequest> prefills;
    std::vector<v1::PullKvRequest> pulls;
    std::vector<v1::ReleaseLeaseRequest> releases;
    std::vector<std::string> models_asked;
    std::set<std::string> sources;           // addresses that Prefills came from, without ports
    std::vector<std::string> authorization;  // of each call to ModelService; empty: none
  };

  explicit FakeServer(const std::shared_ptr<grpc::ServerCredentials>& credentials =
                          grpc::InsecureServerCredentials());
  ~FakeServer();

  const std::string& target() const { return target_; }
  Script& script() { return script_; }
  const v1::Model& model() const { return model_; }
  // grpc.health.v1 of prefilld.v1.PrefillService.
  void SetReady(bool ready);

 private:
  class Prefills;
  class Handoffs;
  class Models;

  grpc::Status NextRefusal();

  std::mutex mutex_;  // of script_ while calls run
  Script script_;
  v1::Model model_;
  std::unique_ptr<Prefills> prefills_;
  std::unique_ptr<Handoffs> handoffs_;
  std::unique_ptr<Models> models_;
  std::unique_ptr<grpc::Server> server_;
  std::string target_;
};

}  // namespace prefilld

// The generated stubs behind a PrefillClient; included only by its .cc files.
#pragma once

#include <memory>
#include <utility>

#include "client/cpp/client.h"
#include "grpc/health/v1/health.grpc.pb.h"
#include "prefilld/v1/kv_handoff_service.grpc.pb.h"
#include "prefilld/v1/model_service.grpc.pb.h"
#include "prefilld/v1/prefill_service.grpc.pb.h"

namespace prefilld::client {

struct PrefillClient::Stubs {
  explicit Stubs(std::shared_ptr<grpc::Channel> connected)
      : channel(std::move(connected)),
        prefill(channel),
        handoff(channel),
        models(channel),
        health(channel) {}

  const std::shared_ptr<grpc::Channel> channel;
  v1::PrefillService::Stub prefill;
  v1::KvHandoffService::Stub handoff;
  v1::ModelService::Stub models;
  grpc::health::v1::Health::Stub health;
};

}  // namespace prefilld::client

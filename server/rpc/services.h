// The three services of prefilld.v1. Streams go to their reactors; what can be answered at once is
// answered here. All of them get bytes: see Parse. Threads: gRPC's.
#pragma once

#include <grpcpp/server_context.h>
#include <grpcpp/support/byte_buffer.h>
#include <grpcpp/support/server_callback.h>

#include "prefilld/v1/kv_handoff_service.grpc.pb.h"
#include "prefilld/v1/model_service.grpc.pb.h"
#include "prefilld/v1/prefill_service.grpc.pb.h"
#include "server/rpc/context.h"

namespace prefilld {

class PrefillServiceImpl final
    : public v1::PrefillService::WithRawCallbackMethod_Attend<
          v1::PrefillService::WithRawCallbackMethod_Prefill<
              v1::PrefillService::WithRawCallbackMethod_GetSparsityReport<
                  v1::PrefillService::Service>>> {
 public:
  explicit PrefillServiceImpl(RpcContext& rpc) : rpc_(rpc) {}

  grpc::ServerBidiReactor<grpc::ByteBuffer, grpc::ByteBuffer>* Attend(
      grpc::CallbackServerContext* context) override;
  grpc::ServerWriteReactor<grpc::ByteBuffer>* Prefill(grpc::CallbackServerContext* context,
                                                      const grpc::ByteBuffer* request) override;
  grpc::ServerUnaryReactor* GetSparsityReport(grpc::CallbackServerContext* context,
                                              const grpc::ByteBuffer* request,
                                              grpc::ByteBuffer* response) override;

 private:
  RpcContext& rpc_;
};

class KvHandoffServiceImpl final
    : public v1::KvHandoffService::WithRawCallbackMethod_Negotiate<
          v1::KvHandoffService::WithRawCallbackMethod_PullKv<
              v1::KvHandoffService::WithRawCallbackMethod_RenewLease<
                  v1::KvHandoffService::WithRawCallbackMethod_ReleaseLease<
                      v1::KvHandoffService::Service>>>> {
 public:
  explicit KvHandoffServiceImpl(RpcContext& rpc) : rpc_(rpc) {}

  grpc::ServerUnaryReactor* Negotiate(grpc::CallbackServerContext* context,
                                      const grpc::ByteBuffer* request,
                                      grpc::ByteBuffer* response) override;
  grpc::ServerWriteReactor<grpc::ByteBuffer>* PullKv(grpc::CallbackServerContext* context,
                                                     const grpc::ByteBuffer* request) override;
  grpc::ServerUnaryReactor* RenewLease(grpc::CallbackServerContext* context,
                                       const grpc::ByteBuffer* request,
                                       grpc::ByteBuffer* response) override;
  grpc::ServerUnaryReactor* ReleaseLease(grpc::CallbackServerContext* context,
                                         const grpc::ByteBuffer* request,
                                         grpc::ByteBuffer* response) override;

 private:
  RpcContext& rpc_;
};

class ModelServiceImpl final
    : public v1::ModelService::WithRawCallbackMethod_GetModel<
          v1::ModelService::WithRawCallbackMethod_ListModels<v1::ModelService::Service>> {
 public:
  explicit ModelServiceImpl(RpcContext& rpc) : rpc_(rpc) {}

  grpc::ServerUnaryReactor* GetModel(grpc::CallbackServerContext* context,
                                     const grpc::ByteBuffer* request,
                                     grpc::ByteBuffer* response) override;
  grpc::ServerUnaryReactor* ListModels(grpc::CallbackServerContext* context,
                                       const grpc::ByteBuffer* request,
                                       grpc::ByteBuffer* response) override;

 private:
  RpcContext& rpc_;
};

}  // namespace prefilld

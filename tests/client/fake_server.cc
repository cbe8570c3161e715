#include "tests/client/fake_server.h"

#include <gtest/gtest.h>

#include <chrono>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "google/rpc/error_details.pb.h"
#include "proto/wire/chunk.h"

namespace prefilld {
namespace {

using grpc::ServerContext;
using grpc::Status;
using grpc::StatusCode;

constexpr uint64_t kGeneration = 7;

Status NotFound(const std::string& type, const std::string& name) {
  google::rpc::ResourceInfo info;
  info.set_resource_type(type);
  info.set_resource_name(name);
  return StatusWithDetail(StatusCode::NOT_FOUND, absl::StrCat("no ", type, " ", name), info);
}

// The chunks of one tensor from `offset` on, through `send`; false when that says so.
bool SendTensor(const std::string& bytes, uint32_t tensor_index, uint32_t layer, uint64_t offset,
                uint64_t chunk_bytes, const std::function<bool(v1::TensorChunk&)>& send) {
  while (offset < bytes.size()) {
    v1::TensorChunk chunk;
    chunk.set_tensor_index(tensor_index);
    chunk.set_layer(layer);
    chunk.set_byte_offset(offset);
    chunk.set_data(bytes.substr(offset, chunk_bytes));
    chunk.set_crc32c(Crc32c(0, chunk.data().data(), chunk.data().size()));
    offset += chunk.data().size();
    chunk.set_last(offset == bytes.size());
    if (!send(chunk)) return false;
  }
  return true;
}

v1::TensorSpec Spec(const std::string& name, v1::DataType type, std::vector<int64_t> shape) {
  v1::TensorSpec spec;
  spec.set_name(name);
  spec.set_data_type(type);
  spec.mutable_shape()->Add(shape.begin(), shape.end());
  return spec;
}

void FillSummary(const std::string& request_id, uint64_t tokens, v1::Summary* summary) {
  summary->set_request_id(request_id);
  summary->set_tokens(tokens);
  summary->set_bytes_in(1000);
  summary->set_bytes_out(2000);
  summary->mutable_attention()->set_nanos(250000000);
  summary->mutable_sparsity()->set_mean_density(0.25);
  summary->mutable_sparsity()->set_mean_captured_mass(0.93);
  summary->mutable_sparsity()->set_captured_mass_measured(true);
  summary->mutable_sparsity()->set_pattern_u8(std::string("\3\0\3\3", 4));
  summary->mutable_sparsity()->set_dense_fallback_heads(1);
  summary->mutable_sparsity()->add_reasons("below_crossover");
}

void WaitUntilCancelled(ServerContext* context) {
  while (!context->IsCancelled()) std::this_thread::sleep_for(std::chrono::milliseconds(1));
}

}  // namespace

Status StatusWithDetail(StatusCode code, const std::string& message,
                        const google::protobuf::Message& detail) {
  google::rpc::Status status;
  status.set_code(code);
  status.set_message(message);
  status.add_details()->PackFrom(detail);
  return Status(code, message, status.SerializeAsString());
}

Status RetryLaterStatus(StatusCode code, int delay_ms) {
  google::rpc::RetryInfo info;
  info.mutable_retry_delay()->set_nanos(delay_ms * 1000000);
  return StatusWithDetail(code, "later", info);
}

char KvByte(uint32_t layer, uint32_t tensor_index, uint64_t i) {
  return static_cast<char>(i * 31 + i / 256 + layer * 7 + tensor_index * 101);
}

class FakeServer::Prefills : public v1::PrefillService::Service {
 public:
  explicit Prefills(FakeServer& server) : server_(server) {}

  Status Attend(ServerContext* context,
                grpc::ServerReaderWriter<v1::AttendResponse, v1::AttendRequest>* stream) override {
    v1::AttendRequest request;
    if (!stream->Read(&request) || !request.has_header()) {
      return Status(StatusCode::INVALID_ARGUMENT, "no header");
    }
    const v1::AttendHeader header = request.header();
    bool hang = false;
    {
      std::lock_guard lock(server_.mutex_);
      server_.script_.attends.push_back(header);
      hang = server_.script_.hang_after_admission;
      if (Status refusal = server_.NextRefusal(); !refusal.ok()) return refusal;
    }
    v1::AttendResponse response;
    response.mutable_admission()->set_request_id(header.request_id());
    stream->Write(response);
    if (hang) {
      WaitUntilCancelled(context);
      return Status::CANCELLED;
    }
    std::vector<std::string> uploads(header.tensors_size());
    while (stream->Read(&request)) {
      const v1::TensorChunk& chunk = request.chunk();
      if (!request.has_chunk() || chunk.tensor_index() >= uploads.size()) {
        return Status(StatusCode::DATA_LOSS, "no chunk");
      }
      std::string& upload = uploads[chunk.tensor_index()];
      if (chunk.byte_offset() != upload.size() ||
          chunk.crc32c() != Crc32c(0, chunk.data().data(), chunk.data().size())) {
        return Status(StatusCode::DATA_LOSS, "chunk out of order or damaged");
      }
      upload += chunk.data();
    }

    std::lock_guard lock(server_.mutex_);
    Script& script = server_.script_;
    script.uploads = uploads;
    const v1::TensorSpec& q = header.tensors(0);
    std::vector<std::pair<v1::TensorSpec, std::string>> outputs = {
        {Spec("o", q.data_type(), {q.shape().begin(), q.shape().end()}), uploads[0]}};
    if (header.return_lse()) {
      outputs.emplace_back(Spec("lse", v1::DATA_TYPE_F32, {q.shape(1), q.shape(0)}),
                           std::string(4 * q.shape(0) * q.shape(1), '\1'));
    }
    if (header.return_block_index()) {
      outputs.emplace_back(Spec("block_count", v1::DATA_TYPE_I32, {q.shape(1), 1}),
                           std::string(4 * q.shape(1), '\2'));
      outputs.emplace_back(Spec("pattern", v1::DATA_TYPE_U8, {q.shape(1)}),
                           std::string(q.shape(1), '\3'));
    }
    for (const auto& [spec, bytes] : outputs) {
      *response.mutable_outputs()->add_tensors() = spec;
    }
    stream->Write(response);
    for (size_t i = 0; i < outputs.size(); ++i) {
      const bool sent = SendTensor(outputs[i].second, static_cast<uint32_t>(i), 0, 0,
                                   script.chunk_bytes, [&](v1::TensorChunk& chunk) {
                                     if (script.before_chunk && !script.before_chunk(chunk)) {
                                       return false;
                                     }
                                     *response.mutable_chunk() = chunk;
                                     return stream->Write(response);
                                   });
      if (!sent) return Status(StatusCode::UNAVAILABLE, "stream broken by the script");
    }
    if (script.skip_summary) return Status::OK;
    FillSummary(header.request_id(), static_cast<uint64_t>(q.shape(0)), response.mutable_summary());
    stream->Write(response);
    return Status::OK;
  }

  Status Prefill(ServerContext* context, const v1::PrefillRequest* request,
                 grpc::ServerWriter<v1::PrefillEvent>* stream) override {
    bool hang = false;
    v1::Lease lease;
    {
      std::lock_guard lock(server_.mutex_);
      server_.script_.prefills.push_back(*request);
      const std::string peer = context->peer();  // "ipv4:127.0.0.1:40000"
      const size_t begin = peer.find(':') + 1;
      server_.script_.sources.insert(peer.substr(begin, peer.rfind(':') - begin));
      hang = server_.script_.hang_after_admission;
      if (Status refusal = server_.NextRefusal(); !refusal.ok()) return refusal;
      lease.set_boot_id(server_.script_.boot_id);
    }
    if (request->model() != server_.model_.name()) return NotFound("model", request->model());
    lease.set_name("lease-" + request->request_id());
    lease.set_generation(kGeneration);
    lease.set_layers(server_.model_.layers());
    lease.set_tokens(static_cast<uint64_t>(request->token_ids_size()));
    v1::PrefillEvent event;
    *event.mutable_admission()->mutable_lease() = lease;
    event.mutable_admission()->set_request_id(request->request_id());
    stream->Write(event);
    if (hang) {
      WaitUntilCancelled(context);
      return Status::CANCELLED;
    }
    for (uint32_t layer = 0; layer < server_.model_.layers(); ++layer) {
      event.mutable_layer_ready()->set_layer(layer);
      stream->Write(event);
    }
    if (request->return_logits()) {
      event.mutable_logits()->set_vocab_size(server_.model_.vocab_size());
      event.mutable_logits()->set_f32(std::string(4 * server_.model_.vocab_size(), '\5'));
      stream->Write(event);
    }
    *event.mutable_kv_ready() = lease;
    stream->Write(event);
    FillSummary(request->request_id(), lease.tokens(), event.mutable_summary());
    stream->Write(event);
    return Status::OK;
  }

  Status GetSparsityReport(ServerContext*, const v1::GetSparsityReportRequest* request,
                           v1::SparsityReport* report) override {
    if (request->request_id() != "known") return NotFound("request", request->request_id());
    report->set_layers(2);
    report->set_heads(3);
    report->set_mean_density(0.5);
    report->set_density_u16(std::string(12, '\xff'));
    report->set_pattern_u8(std::string("\0\1\3\3\3\3", 6));
    report->add_reasons("short_prompt");
    return Status::OK;
  }

 private:
  FakeServer& server_;
};

class FakeServer::Handoffs : public v1::KvHandoffService::Service {
 public:
  explicit Handoffs(FakeServer& server) : server_(server) {}

  Status Negotiate(ServerContext*, const v1::NegotiateRequest* request,
                   v1::NegotiateResponse* response) override {
    response->set_transport(v1::TRANSPORT_GRPC);
    response->set_fingerprint(request->fingerprint());
    return Status::OK;
  }

  Status PullKv(ServerContext*, const v1::PullKvRequest* request,
                grpc::ServerWriter<v1::TensorChunk>* stream) override {
    std::lock_guard lock(server_.mutex_);
    Script& script = server_.script_;
    script.pulls.push_back(*request);
    if (Status refusal = server_.NextRefusal(); !refusal.ok()) return refusal;
    if (request->generation() != kGeneration) {
      return Status(StatusCode::FAILED_PRECONDITION, "another generation");
    }
    const auto tokens = static_cast<uint64_t>(script.prefills.back().token_ids_size());
    const uint64_t bytes =
        tokens * server_.model_.kv_bytes_per_token() / server_.model_.layers() / 2;
    const uint32_t end = request->has_layer_count()
                             ? request->first_layer() + request->layer_count()
                             : server_.model_.layers();
    uint32_t tensor = request->resume_tensor_index();
    uint64_t offset = request->resume_byte_offset();
    for (uint32_t layer = request->first_layer(); layer < end; ++layer, tensor = 0) {
      for (; tensor < 2; ++tensor, offset = 0) {
        std::string data(bytes, '\0');
        for (uint64_t i = 0; i < bytes; ++i) data[i] = KvByte(layer, tensor, i);
        const bool sent = SendTensor(
            data, tensor, layer, offset, script.chunk_bytes, [&](v1::TensorChunk& chunk) {
              return (!script.before_chunk || script.before_chunk(chunk)) && stream->Write(chunk);
            });
        if (!sent) return Status(StatusCode::UNAVAILABLE, "stream broken by the script");
      }
    }
    return Status::OK;
  }

  Status RenewLease(ServerContext*, const v1::RenewLeaseRequest* request,
                    v1::Lease* lease) override {
    lease->set_name(request->lease());
    lease->set_generation(request->generation());
    *lease->mutable_ttl() = request->ttl();
    return Status::OK;
  }

  Status ReleaseLease(ServerContext*, const v1::ReleaseLeaseRequest* request,
                      v1::ReleaseLeaseResponse* response) override {
    std::lock_guard lock(server_.mutex_);
    server_.script_.releases.push_back(*request);
    response->set_running_transfers(3);
    return Status::OK;
  }

 private:
  FakeServer& server_;
};

class FakeServer::Models : public v1::ModelService::Service {
 public:
  explicit Models(FakeServer& server) : server_(server) {}

  Status GetModel(ServerContext* context, const v1::GetModelRequest* request,
                  v1::Model* model) override {
    std::lock_guard lock(server_.mutex_);
    const auto& said = context->client_metadata();
    const auto found = said.find("authorization");
    server_.script_.authorization.push_back(
        found == said.end() ? "" : std::string(found->second.data(), found->second.size()));
    server_.script_.models_asked.push_back(request->name());
    if (request->name() != server_.model_.name()) return NotFound("model", request->name());
    *model = server_.model_;
    return Status::OK;
  }

  Status ListModels(ServerContext*, const v1::ListModelsRequest*,
                    v1::ListModelsResponse* response) override {
    *response->add_models() = server_.model_;
    return Status::OK;
  }

 private:
  FakeServer& server_;
};

FakeServer::FakeServer(const std::shared_ptr<grpc::ServerCredentials>& credentials)
    : prefills_(std::make_unique<Prefills>(*this)),
      handoffs_(std::make_unique<Handoffs>(*this)),
      models_(std::make_unique<Models>(*this)) {
  model_.set_name("tiny");
  model_.set_model_type("llama");
  model_.set_layers(3);
  model_.set_q_heads(4);
  model_.set_kv_heads(2);
  model_.set_head_dim(64);
  model_.set_vocab_size(100);
  model_.set_max_prompt_tokens(4096);
  model_.set_data_type(v1::DATA_TYPE_F32);
  model_.set_kv_bytes_per_token(3 * 2 * 2 * 64 * 4);
  model_.set_fingerprint("0123456789abcdef");

  grpc::EnableDefaultHealthCheckService(true);
  grpc::ServerBuilder builder;
  int port = 0;
  builder.AddListeningPort("127.0.0.1:0", credentials, &port);
  builder.RegisterService(prefills_.get());
  builder.RegisterService(handoffs_.get());
  builder.RegisterService(models_.get());
  server_ = builder.BuildAndStart();
  EXPECT_NE(server_, nullptr);
  target_ = absl::StrCat("127.0.0.1:", port);
  SetReady(true);
}

FakeServer::~FakeServer() { server_->Shutdown(std::chrono::system_clock::now()); }

void FakeServer::SetReady(bool ready) {
  server_->GetHealthCheckService()->SetServingStatus("prefilld.v1.PrefillService", ready);
}

Status FakeServer::NextRefusal() {
  if (script_.refusals.empty()) return Status::OK;
  Status refusal = script_.refusals.front();
  script_.refusals.erase(script_.refusals.begin());
  return refusal;
}

}  // namespace prefilld

// The whole server in this process, asked over loopback: what only shows with real calls.
#include "server/server.h"

#include <grpcpp/create_channel.h>
#include <grpcpp/impl/codegen/client_unary_call.h>
#include <grpcpp/support/byte_buffer.h>
#include <gtest/gtest.h>

#include <fstream>
#include <iterator>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

#include "google/rpc/error_details.pb.h"
#include "prefilld/v1/kv_handoff_service.grpc.pb.h"
#include "prefilld/v1/model_service.grpc.pb.h"
#include "prefilld/v1/prefill_service.grpc.pb.h"
#include "proto/wire/chunk.h"
#include "tests/server/importer.h"
#include "tests/server/waits.h"

namespace prefilld {
namespace {

const std::string kFixtures = PREFILLD_FIXTURES;

Config TestConfig() {
  Config config;
  config.listen = config.http = {"127.0.0.1", 0};
  config.backend = "cpu";
  config.threads = 1;
  config.models = {{"base", kFixtures + "/models/base"}};
  config.kv_memory = 16 << 20;
  config.attend_memory = 16 << 20;
  config.upload_timeout = absl::Milliseconds(300);
  config.drain_timeout = absl::Seconds(10);
  return config;
}

std::string ReadFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  EXPECT_TRUE(file) << path;
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

class Caller {
 public:
  explicit Caller(const Server& server, std::shared_ptr<grpc::ChannelCredentials> credentials =
                                            grpc::InsecureChannelCredentials())
      : channel_(grpc::CreateChannel(server.grpc_endpoint().ToString(), credentials)),
        prefill(v1::PrefillService::NewStub(channel_)),
        handoff(v1::KvHandoffService::NewStub(channel_)),
        models(v1::ModelService::NewStub(channel_)) {}

  // grpc.health.v1, of the server as a whole.
  grpc::Status Health() const {
    const grpc::internal::RpcMethod check("/grpc.health.v1.Health/Check",
                                          grpc::internal::RpcMethod::NORMAL_RPC);
    grpc::ClientContext context;
    const grpc::Slice nothing;
    const grpc::ByteBuffer request(&nothing, 1);
    grpc::ByteBuffer response;
    return grpc::internal::BlockingUnaryCall(channel_.get(), check, &context, request, &response);
  }

 private:
  std::shared_ptr<grpc::Channel> channel_;

 public:
  std::unique_ptr<v1::PrefillService::Stub> prefill;
  std::unique_ptr<v1::KvHandoffService::Stub> handoff;
  std::unique_ptr<v1::ModelService::Stub> models;
};

class ServerTest : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    auto server = Server::Start(TestConfig());
    ASSERT_TRUE(server.ok()) << server.status();
    server_ = std::move(*server).release();
  }
  static void TearDownTestSuite() {
    delete server_;
    server_ = nullptr;
  }

  // 130 tokens: two blocks, the second one nearly empty.
  static v1::PrefillRequest Prompt(const std::string& id) {
    v1::PrefillRequest request;
    request.set_request_id(id);
    request.set_model("base");
    for (uint32_t t = 0; t < 130; ++t) request.add_token_ids(t % 96);
    return request;
  }
  std::vector<v1::PrefillEvent> Prefill(const v1::PrefillRequest& request, grpc::Status* status) {
    grpc::ClientContext context;
    auto reader = caller_.prefill->Prefill(&context, request);
    std::vector<v1::PrefillEvent> events;
    for (v1::PrefillEvent event; reader->Read(&event);) events.push_back(event);
    *status = reader->Finish();
    return events;
  }
  // The bytes of every chunk in order, after checking each.
  std::string Pull(const v1::PullKvRequest& request, grpc::Status* status) {
    grpc::ClientContext context;
    auto reader = caller_.handoff->PullKv(&context, request);
    std::string bytes;
    for (v1::TensorChunk chunk; reader->Read(&chunk);) {
      EXPECT_EQ(chunk.crc32c(), Crc32c(0, chunk.data().data(), chunk.data().size()));
      bytes += chunk.data();
    }
    *status = reader->Finish();
    return bytes;
  }
  void Release(const v1::Lease& lease) {
    v1::ReleaseLeaseRequest request;
    request.set_lease(lease.name());
    request.set_generation(lease.generation());
    request.set_reason(v1::RELEASE_REASON_CONSUMED);
    v1::ReleaseLeaseResponse response;
    grpc::ClientContext context;
    EXPECT_TRUE(caller_.handoff->ReleaseLease(&context, request, &response).ok());
  }

  static Server* server_;
  Caller caller_{*server_};
};
Server* ServerTest::server_ = nullptr;

v1::AttendRequest Header(int tokens) {
  v1::AttendRequest request;
  v1::AttendHeader& header = *request.mutable_header();
  for (const char* name : {"q", "k", "v"}) {
    v1::TensorSpec& spec = *header.add_tensors();
    spec.set_name(name);
    spec.set_data_type(v1::DATA_TYPE_F32);
    for (int dim : {tokens, 1, 64}) spec.add_shape(dim);
  }
  return request;
}

v1::AttendRequest Chunk(uint32_t tensor, const std::string& data) {
  v1::AttendRequest request;
  v1::TensorChunk& chunk = *request.mutable_chunk();
  chunk.set_tensor_index(tensor);
  chunk.set_data(data);
  chunk.set_crc32c(Crc32c(0, data.data(), data.size()));
  chunk.set_last(true);
  return request;
}

TEST_F(ServerTest, AttendAnswersWithAdmissionOutputsAndSummary) {
  grpc::ClientContext context;
  auto stream = caller_.prefill->Attend(&context);
  ASSERT_TRUE(stream->Write(Header(1)));
  v1::AttendResponse response;
  ASSERT_TRUE(stream->Read(&response));
  ASSERT_TRUE(response.has_admission());
  EXPECT_EQ(response.admission().upload_credit_bytes(), 3u * 256);
  EXPECT_FALSE(response.admission().request_id().empty());
  std::string v(256, '\0');
  for (int i = 0; i < 64; ++i) {
    const float value = static_cast<float>(i);
    v.replace(i * 4, 4, reinterpret_cast<const char*>(&value), 4);
  }
  for (uint32_t tensor : {0u, 1u}) stream->Write(Chunk(tensor, std::string(256, '\0')));
  stream->Write(Chunk(2, v));
  ASSERT_TRUE(stream->Read(&response));
  ASSERT_TRUE(response.has_outputs());
  ASSERT_EQ(response.outputs().tensors_size(), 1);
  ASSERT_TRUE(stream->Read(&response));
  ASSERT_TRUE(response.has_chunk());
  EXPECT_EQ(response.chunk().data(), v) << "one token attends to itself";
  EXPECT_TRUE(response.chunk().last());
  ASSERT_TRUE(stream->Read(&response));
  ASSERT_TRUE(response.has_summary());
  EXPECT_EQ(response.summary().bytes_in(), 768u);
  EXPECT_EQ(response.summary().bytes_out(), 256u);
  EXPECT_FALSE(stream->Read(&response));
  EXPECT_TRUE(stream->Finish().ok()) << "without the caller's half-close";
}

TEST_F(ServerTest, AnUploadThatStallsIsGivenUp) {
  grpc::ClientContext context;
  auto stream = caller_.prefill->Attend(&context);
  ASSERT_TRUE(stream->Write(Header(1)));
  v1::AttendResponse response;
  ASSERT_TRUE(stream->Read(&response));
  EXPECT_FALSE(stream->Read(&response));
  const grpc::Status status = stream->Finish();
  EXPECT_EQ(status.error_code(), grpc::StatusCode::DEADLINE_EXCEEDED) << status.error_message();
}

TEST_F(ServerTest, OneRequestIdOfAttendRunsOnce) {
  v1::AttendRequest header = Header(1);
  header.mutable_header()->set_request_id("twice");
  grpc::ClientContext first_context, second_context;
  auto first = caller_.prefill->Attend(&first_context);
  first->Write(header);
  v1::AttendResponse response;
  ASSERT_TRUE(first->Read(&response));
  auto second = caller_.prefill->Attend(&second_context);
  second->Write(header);
  ASSERT_TRUE(second->Read(&response)) << "it takes the place of the first";
  EXPECT_EQ(first->Finish().error_code(), grpc::StatusCode::ABORTED);
  second_context.TryCancel();
  EXPECT_EQ(second->Finish().error_code(), grpc::StatusCode::CANCELLED);
}

TEST_F(ServerTest, OneRequestIdOfPrefillAttachesToTheSameWork) {
  grpc::Status status;
  const auto first = Prefill(Prompt("same"), &status);
  ASSERT_TRUE(status.ok()) << status.error_message();
  ASSERT_EQ(first.size(), 5u) << "admission, two layers, kv_ready, summary";
  const auto again = Prefill(Prompt("same"), &status);
  ASSERT_TRUE(status.ok()) << status.error_message();
  ASSERT_EQ(again.size(), first.size());
  for (size_t i = 0; i < first.size(); ++i) {
    EXPECT_EQ(again[i].SerializeAsString(), first[i].SerializeAsString()) << i;
  }

  v1::PrefillRequest other = Prompt("same");
  other.add_token_ids(1);
  EXPECT_TRUE(Prefill(other, &status).empty());
  EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);

  Release(first[3].kv_ready());
  const auto anew = Prefill(other, &status);  // the id is free again
  ASSERT_TRUE(status.ok()) << status.error_message();
  EXPECT_GT(anew[0].admission().lease().generation(), first[3].kv_ready().generation());
  Release(anew[3].kv_ready());
}

TEST_F(ServerTest, ValidateOnlyRunsNothing) {
  v1::PrefillRequest request = Prompt("checked");
  request.set_validate_only(true);
  grpc::Status status;
  EXPECT_TRUE(Prefill(request, &status).empty());
  EXPECT_TRUE(status.ok());
  request.set_token_ids(3, 96);
  EXPECT_TRUE(Prefill(request, &status).empty());
  EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
}

TEST_F(ServerTest, APullResumesAtAnyByteInAnyDtype) {
  grpc::Status status;
  const auto events = Prefill(Prompt("pulled"), &status);
  ASSERT_TRUE(status.ok()) << status.error_message();
  const v1::Lease lease = events[3].kv_ready();
  v1::PullKvRequest request;
  request.set_lease(lease.name());
  request.set_generation(lease.generation());
  for (auto [type, size] : {std::pair(v1::DATA_TYPE_F32, 4), std::pair(v1::DATA_TYPE_BF16, 2)}) {
    request = v1::PullKvRequest();
    request.set_lease(lease.name());
    request.set_generation(lease.generation());
    request.mutable_layout()->set_data_type(type);
    request.set_chunk_bytes(4096);
    const std::string whole = Pull(request, &status);
    ASSERT_TRUE(status.ok()) << status.error_message();
    const size_t tensor = 2 * 130 * 64 * static_cast<size_t>(size);
    ASSERT_EQ(whole.size(), 4 * tensor) << "two layers of K and V";
    request.set_first_layer(1);
    for (uint32_t index : {0u, 1u}) {
      for (size_t offset : {size_t{0}, size_t{1}, size_t{40'001}, tensor - 1, tensor}) {
        offset = std::min(offset, tensor);
        request.set_resume_tensor_index(index);
        request.set_resume_byte_offset(offset);
        EXPECT_EQ(Pull(request, &status), whole.substr((2 + index) * tensor + offset)) << offset;
        EXPECT_TRUE(status.ok()) << status.error_message();
      }
    }
  }
  Release(lease);
  EXPECT_TRUE(Pull(request, &status).empty());
  EXPECT_EQ(status.error_code(), grpc::StatusCode::NOT_FOUND);
}

TEST_F(ServerTest, NegotiatesLayoutTransportAndFingerprint) {
  const auto negotiate = [&](const v1::NegotiateRequest& request, v1::NegotiateResponse* response) {
    grpc::ClientContext context;
    return caller_.handoff->Negotiate(&context, request, response).error_code();
  };
  v1::NegotiateRequest request;
  v1::NegotiateResponse response;
  request.set_model("base");
  request.add_transports(v1::TRANSPORT_CUDA_IPC);
  request.add_transports(v1::TRANSPORT_GRPC);
  ASSERT_EQ(negotiate(request, &response), grpc::StatusCode::OK);
  EXPECT_EQ(response.transport(), v1::TRANSPORT_GRPC);
  EXPECT_EQ(response.layout().physical_order_size(), 5);
  EXPECT_EQ(response.fingerprint().size(), 64u);
  EXPECT_EQ(response.limits().max_prompt_tokens(), 1024u);
  request.set_fingerprint(response.fingerprint());
  EXPECT_EQ(negotiate(request, &response), grpc::StatusCode::OK);
  request.set_fingerprint("other");
  EXPECT_EQ(negotiate(request, &response), grpc::StatusCode::FAILED_PRECONDITION);
  request.clear_fingerprint();
  request.mutable_transports()->RemoveLast();  // a pinned transport never falls back
  EXPECT_EQ(negotiate(request, &response), grpc::StatusCode::FAILED_PRECONDITION);
}

TEST_F(ServerTest, SharesMemoryWithWhoSeesTheSame) {
  grpc::Status status;
  const auto negotiate = [&](const v1::NegotiateRequest& request) {
    grpc::ClientContext context;
    v1::NegotiateResponse response;
    status = caller_.handoff->Negotiate(&context, request, &response);
    return response;
  };
  v1::NegotiateRequest request;
  const std::string domain = negotiate(request).shm_domain();
  ASSERT_FALSE(domain.empty());
  EXPECT_EQ(negotiate(request).transport(), v1::TRANSPORT_GRPC) << "the caller's is not known";
  request.add_transports(v1::TRANSPORT_POSIX_SHM);
  request.set_shm_domain("elsewhere:1");
  negotiate(request);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::FAILED_PRECONDITION);
  for (const std::string& shown : {std::string("elsewhere:1"), domain}) {
    EXPECT_NE(status.error_message().find(shown), std::string::npos) << status.error_message();
  }
  request.add_transports(v1::TRANSPORT_GRPC);
  EXPECT_EQ(negotiate(request).transport(), v1::TRANSPORT_GRPC);
  request.set_shm_domain(domain);
  EXPECT_EQ(negotiate(request).transport(), v1::TRANSPORT_POSIX_SHM);
  request.clear_transports();
  EXPECT_EQ(negotiate(request).transport(), v1::TRANSPORT_POSIX_SHM);
}

TEST_F(ServerTest, APullOverSharedMemoryNamesWholeTensors) {
  grpc::Status status;
  const auto events = Prefill(Prompt("mapped"), &status);
  ASSERT_TRUE(status.ok()) << status.error_message();
  EXPECT_EQ(events[0].admission().transport(), v1::TRANSPORT_POSIX_SHM);
  const v1::Lease lease = events[3].kv_ready();
  v1::PullKvRequest request;
  request.set_lease(lease.name());
  request.set_generation(lease.generation());
  const std::string sent = Pull(request, &status);
  ASSERT_TRUE(status.ok()) << status.error_message();
  request.set_transport(v1::TRANSPORT_POSIX_SHM);
  v1::NegotiateResponse negotiated;
  {
    grpc::ClientContext context;
    ASSERT_TRUE(caller_.handoff->Negotiate(&context, {}, &negotiated).ok());
  }
  grpc::ClientContext context;
  auto reader = caller_.handoff->PullKv(&context, request);
  std::string mapped;
  for (v1::TensorChunk chunk; reader->Read(&chunk);) {
    EXPECT_TRUE(chunk.last());
    EXPECT_TRUE(chunk.data().empty());
    Importer importer(negotiated.memory_socket());
    const std::byte* const memory = importer.Map(chunk.buffer().name(), PROT_READ);
    ASSERT_NE(memory, nullptr);
    mapped.append(reinterpret_cast<const char*>(memory) + chunk.buffer().byte_offset(),
                  chunk.buffer().byte_length());
  }
  EXPECT_TRUE(reader->Finish().ok());
  EXPECT_EQ(mapped, sent);
  Release(lease);
}

class ServerWithHeldThreads : public testing::Test {
 protected:
  ServerWithHeldThreads() {
    Config config = TestConfig();
    config.upload_timeout = absl::Seconds(30);
    config.memory_threads = config.transfer_threads = 2;
    config.kv_memory = kBlocks * 128 * 1024;
    server_ = *Server::Start(config);
    caller_ = std::make_unique<Caller>(*server_);
    HoldTwoBlocks();
  }
  // By a lease that nobody releases.
  void HoldTwoBlocks() {
    v1::PrefillRequest request = Prompt(1);
    request.set_request_id("holder");
    request.mutable_destination()->set_transport(v1::TRANSPORT_GRPC);
    grpc::ClientContext context;
    auto reader = caller_->prefill->Prefill(&context, request);
    for (v1::PrefillEvent event; reader->Read(&event);) {
    }
    EXPECT_TRUE(reader->Finish().ok());
  }
  static v1::PrefillRequest Prompt(int tokens) {
    v1::PrefillRequest request;
    request.set_request_id("held");
    request.set_model("base");
    for (int t = 0; t < tokens; ++t) request.add_token_ids(t % 96);
    return request;
  }
  // The events of a prompt; none when it is refused.
  std::vector<v1::PrefillEvent> Prefill(int tokens, grpc::Status* status) {
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(30));
    auto reader = caller_->prefill->Prefill(&context, Prompt(tokens));
    std::vector<v1::PrefillEvent> events;
    for (v1::PrefillEvent event; reader->Read(&event);) events.push_back(event);
    *status = reader->Finish();
    return events;
  }
  // Whether the server knows a prompt. Who asks comes with another of the same id, one that there
  // is no room for now: it leaves nothing behind, also when it is the first.
  bool Lives() {
    grpc::Status status;
    EXPECT_TRUE(Prefill(640, &status).empty());
    if (status.error_code() == grpc::StatusCode::INVALID_ARGUMENT) return true;
    EXPECT_EQ(status.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED) << status.error_message();
    return false;
  }
  using AttendStream = grpc::ClientReaderWriter<v1::AttendRequest, v1::AttendResponse>;
  // One token over gRPC, from beginning to end.
  void AttendOnce() {
    grpc::ClientContext context;
    auto stream = caller_->prefill->Attend(&context);
    stream->Write(Header(1));
    for (uint32_t tensor : {0u, 1u, 2u}) stream->Write(Chunk(tensor, std::string(256, '\0')));
    v1::AttendResponse response;
    while (stream->Read(&response)) {
    }
    EXPECT_TRUE(stream->Finish().ok());
    EXPECT_TRUE(response.has_summary());
  }

  static constexpr int kBlocks = 10;  // for 640 tokens in two layers, 512 of them free
  std::unique_ptr<Server> server_;
  std::unique_ptr<Caller> caller_;
};

TEST_F(ServerWithHeldThreads, WhoWaitsForMemoryKeepsNobodyElse) {
  v1::AttendRequest header = Header(1000);
  header.mutable_header()->set_transport(v1::TRANSPORT_POSIX_SHM);
  struct Call {
    grpc::ClientContext context;
    std::unique_ptr<AttendStream> stream;
  };
  std::vector<std::unique_ptr<Call>> calls;
  std::vector<v1::PrefillEvent> events[2];
  std::vector<std::thread> readers;
  grpc::ClientContext contexts[2];
  {
    Held held(server_->memory(), 2);
    for (int i = 0; i < 3; ++i) {
      calls.push_back(std::make_unique<Call>());
      calls.back()->stream = caller_->prefill->Attend(&calls.back()->context);
      ASSERT_TRUE(calls.back()->stream->Write(header));
    }
    for (int i = 0; i < 2; ++i) {
      readers.emplace_back([&, i] {
        auto reader = caller_->prefill->Prefill(&contexts[i], Prompt(130));
        for (v1::PrefillEvent event; reader->Read(&event);) events[i].push_back(event);
        EXPECT_TRUE(reader->Finish().ok());
      });
    }
    for (int i = 0; i < 10; ++i) EXPECT_TRUE(caller_->Health().ok());
    AttendOnce();
    // Who goes meanwhile need not wait.
    calls[0]->context.TryCancel();
    EXPECT_EQ(calls[0]->stream->Finish().error_code(), grpc::StatusCode::CANCELLED);
    EXPECT_TRUE(Becomes([&] { return Lives(); }));
  }
  for (std::thread& reader : readers) reader.join();
  for (int i : {1, 2}) {
    v1::AttendResponse response;
    ASSERT_TRUE(calls[i]->stream->Read(&response));
    EXPECT_EQ(response.admission().buffers_size(), 3);
    calls[i]->context.TryCancel();
    EXPECT_EQ(calls[i]->stream->Finish().error_code(), grpc::StatusCode::CANCELLED);
  }
  ASSERT_EQ(events[0].size(), 5u) << "admission, two layers, kv_ready, summary";
  ASSERT_EQ(events[1].size(), 5u);
  EXPECT_EQ(events[0][0].admission().transport(), v1::TRANSPORT_POSIX_SHM);
  for (size_t i = 0; i < 5; ++i) {
    EXPECT_EQ(events[0][i].SerializeAsString(), events[1][i].SerializeAsString());
  }
}

TEST_F(ServerWithHeldThreads, NobodyTakesMemoryForAPromptThatWasGivenUp) {
  {
    Held held(server_->memory(), 2);
    grpc::ClientContext context;
    auto reader = caller_->prefill->Prefill(&context, Prompt(130));
    ASSERT_TRUE(Becomes([&] { return Lives(); }));
    context.TryCancel();
    EXPECT_EQ(reader->Finish().error_code(), grpc::StatusCode::CANCELLED);
    ASSERT_TRUE(Becomes([&] { return !Lives(); })) << "the server has not heard of it";
  }
  Held{server_->memory(), 2};  // its turn has come and gone
  // All blocks are free.
  grpc::Status status;
  std::vector<v1::PrefillEvent> events;
  ASSERT_TRUE(Becomes([&] {
    events = Prefill(512, &status);
    return status.error_code() != grpc::StatusCode::RESOURCE_EXHAUSTED;
  }));
  ASSERT_EQ(events.size(), 5u) << status.error_message();
}

TEST_F(ServerWithHeldThreads, AComputationWaitsForNoPull) {
  v1::PrefillRequest request = Prompt(130);
  request.mutable_destination()->set_transport(v1::TRANSPORT_GRPC);
  grpc::ClientContext context, pull_context;
  std::unique_ptr<grpc::ClientReader<v1::TensorChunk>> pull;
  {
    Held held(server_->transfers(), 2);
    auto reader = caller_->prefill->Prefill(&context, request);
    v1::PrefillEvent event;
    ASSERT_TRUE(reader->Read(&event));
    v1::PullKvRequest pulled;
    pulled.set_lease(event.admission().lease().name());
    pulled.set_generation(event.admission().lease().generation());
    pull = caller_->handoff->PullKv(&pull_context, pulled);
    int count = 1;
    while (reader->Read(&event)) ++count;
    EXPECT_TRUE(reader->Finish().ok());
    EXPECT_EQ(count, 5);
    EXPECT_TRUE(caller_->Health().ok());
  }
  int chunks = 0;
  for (v1::TensorChunk chunk; pull->Read(&chunk);) ++chunks;
  EXPECT_TRUE(pull->Finish().ok());
  EXPECT_EQ(chunks, 4);
}

TEST(ServerStart, AnErrorIsOneLineThatNamesTheFlag) {
  Config config = TestConfig();
  config.models[0].directory = "/does/not/exist";
  auto server = Server::Start(config);
  ASSERT_FALSE(server.ok());
  EXPECT_NE(server.status().message().find("--model=base"), absl::string_view::npos);

  config = TestConfig();
  config.models.clear();
  auto first = Server::Start(config);
  ASSERT_TRUE(first.ok()) << first.status();
  config.listen = (*first)->grpc_endpoint();
  auto second = Server::Start(config);
  ASSERT_FALSE(second.ok());
  EXPECT_NE(second.status().message().find("--listen"), absl::string_view::npos);
  config.listen = {"127.0.0.1", 0};
  config.http = (*first)->http_endpoint();
  second = Server::Start(config);
  ASSERT_FALSE(second.ok());
  EXPECT_NE(second.status().message().find("--http"), absl::string_view::npos);
}

TEST(ServerStart, MutualTlsLetsOnlyTheRightClientsIn) {
  Config config = TestConfig();
  config.models.clear();
  config.tls_cert = kFixtures + "/tls/server.pem";
  config.tls_key = kFixtures + "/tls/server.key";
  config.tls_client_ca = kFixtures + "/tls/ca.pem";
  auto server = Server::Start(config);
  ASSERT_TRUE(server.ok()) << server.status();
  const auto list = [&](std::shared_ptr<grpc::ChannelCredentials> credentials) {
    Caller caller(**server, credentials);
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(10));
    v1::ListModelsResponse response;
    return caller.models->ListModels(&context, {}, &response).error_code();
  };
  const auto tls = [&](const char* who) {
    grpc::SslCredentialsOptions options;
    options.pem_root_certs = ReadFile(config.tls_client_ca);
    if (who != nullptr) {
      options.pem_cert_chain = ReadFile(kFixtures + "/tls/" + who + ".pem");
      options.pem_private_key = ReadFile(kFixtures + "/tls/" + who + ".key");
    }
    return grpc::SslCredentials(options);
  };
  EXPECT_EQ(list(tls("client")), grpc::StatusCode::OK);
  EXPECT_EQ(list(tls("stranger")), grpc::StatusCode::UNAVAILABLE);
  EXPECT_EQ(list(tls(nullptr)), grpc::StatusCode::UNAVAILABLE) << "no certificate";
  EXPECT_EQ(list(grpc::InsecureChannelCredentials()), grpc::StatusCode::UNAVAILABLE);
}

TEST(ServerStart, ABrokenKeyEndsTheStart) {
  Config config = TestConfig();
  config.models.clear();
  config.tls_cert = kFixtures + "/tls/server.pem";
  config.tls_key = "/does/not/exist";
  EXPECT_NE(Server::Start(config).status().message().find("--tls_key"), absl::string_view::npos);
  config.tls_key = kFixtures + "/tls/server.pem";  // no key in it
  EXPECT_FALSE(Server::Start(config).ok());
}

// Loading may take minutes: what is wrong with the address or with TLS is told before.
TEST(ServerStart, TlsFilesAndTheAddressComeBeforeTheModels) {
  const auto refusal = [](const Config& config) {
    return std::string(Server::Start(config).status().message());
  };
  Config config = TestConfig();
  config.models[0].directory = "/does/not/exist";
  EXPECT_EQ(refusal(config).find("--model=base"), 0u);
  Config in_use = config;
  Config other = TestConfig();
  other.models.clear();
  auto listener = Server::Start(other);
  ASSERT_TRUE(listener.ok()) << listener.status();
  in_use.listen = (*listener)->grpc_endpoint();
  EXPECT_EQ(refusal(in_use),
            "--listen: cannot listen on " + in_use.listen.ToString() + ": Address already in use");
  in_use.listen = {"192.0.2.1", 0};  // nobody's
  EXPECT_EQ(refusal(in_use).find("--listen: cannot listen on 192.0.2.1:0: "), 0u);

  const std::string tls = kFixtures + "/tls/", wrong = kFixtures + "/models/base/config.json";
  const std::tuple<std::string, std::string, std::string, std::string> cases[] = {
      {wrong, tls + "server.key", "", "--tls_cert: '" + wrong + "' holds no PEM certificate"},
      {tls, tls + "server.key", "", "--tls_cert: cannot read '" + tls + "': it is a directory"},
      {tls + "server.pem", tls, "", "--tls_key: cannot read '" + tls + "': it is a directory"},
      {tls + "server.pem", wrong, "", "--tls_key: '" + wrong + "' holds no PEM private key"},
      {tls + "server.pem", tls + "client.key", "",
       "--tls_key: '" + tls + "client.key' is not the key of '" + tls + "server.pem'"},
      {tls + "server.pem", tls + "server.key", wrong,
       "--tls_client_ca: '" + wrong + "' holds no PEM certificate"},
      {tls + "server.pem", tls + "server.key", "/does/not/exist", "--tls_client_ca: cannot read"},
      {tls + "server.pem", tls + "server.key", tls + "ca.pem", "--model=base"}};
  for (const auto& [cert, key, ca, told] : cases) {
    config.tls_cert = cert;
    config.tls_key = key;
    config.tls_client_ca = ca;
    EXPECT_EQ(refusal(config).find(told), 0u) << refusal(config);
  }
}

TEST(ServerStart, AFaultThatThereIsNotEndsTheStart) {
  Config config = TestConfig();
  config.inject_fault = 1;
  const absl::Status status = Server::Start(config).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kUnimplemented);
  EXPECT_EQ(status.message(), "--inject_fault: this backend has none");
}

TEST(ServerDrain, RefusesNewWorkAndWaitsForLeases) {
  auto server = Server::Start(TestConfig());
  ASSERT_TRUE(server.ok()) << server.status();
  Caller caller(**server);
  v1::PrefillRequest request;
  request.set_model("base");
  request.add_token_ids(1);
  grpc::ClientContext context;
  auto reader = caller.prefill->Prefill(&context, request);
  v1::Lease lease;
  for (v1::PrefillEvent event; reader->Read(&event);) {
    if (event.has_kv_ready()) lease = event.kv_ready();
  }
  ASSERT_TRUE(reader->Finish().ok());

  std::thread drain([&] { (*server)->Drain(); });
  grpc::Status status;
  do {  // until the drain has begun
    grpc::ClientContext late_context;
    auto late = caller.prefill->Prefill(&late_context, request);
    for (v1::PrefillEvent event; late->Read(&event);) {
      if (!event.has_kv_ready()) continue;
      grpc::ClientContext release_context;
      v1::ReleaseLeaseRequest release;
      release.set_lease(event.kv_ready().name());
      release.set_generation(event.kv_ready().generation());
      release.set_reason(v1::RELEASE_REASON_CONSUMED);
      v1::ReleaseLeaseResponse released;
      caller.handoff->ReleaseLease(&release_context, release, &released);
    }
    status = late->Finish();
  } while (status.ok());
  EXPECT_EQ(status.error_code(), grpc::StatusCode::UNAVAILABLE);
  google::rpc::Status details;
  ASSERT_TRUE(details.ParseFromString(status.error_details()));
  ASSERT_EQ(details.details_size(), 2);
  EXPECT_TRUE(details.details(0).Is<google::rpc::RetryInfo>());
  EXPECT_TRUE(details.details(1).Is<google::rpc::ErrorInfo>());

  // The lease still serves; its release lets the drain end.
  v1::PullKvRequest pull;
  pull.set_lease(lease.name());
  pull.set_generation(lease.generation());
  grpc::ClientContext pull_context;
  auto chunks = caller.handoff->PullKv(&pull_context, pull);
  int count = 0;
  for (v1::TensorChunk chunk; chunks->Read(&chunk);) ++count;
  EXPECT_EQ(count, 4);
  EXPECT_TRUE(chunks->Finish().ok());
  grpc::ClientContext release_context;
  v1::ReleaseLeaseRequest release;
  release.set_lease(lease.name());
  release.set_generation(lease.generation());
  release.set_reason(v1::RELEASE_REASON_CONSUMED);
  v1::ReleaseLeaseResponse released;
  EXPECT_TRUE(caller.handoff->ReleaseLease(&release_context, release, &released).ok());
  const absl::Time begin = SteadyNow();
  drain.join();
  EXPECT_LT(SteadyNow() - begin, absl::Seconds(5)) << "it waited for its timeout";
}

}  // namespace
}  // namespace prefilld

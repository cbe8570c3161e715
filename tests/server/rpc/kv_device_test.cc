// Prefill and PullKv over cuda_ipc, from end to end: real calls, a peer that maps what it is told
// of, on a device that is a fake. Its caches are compared with those that are sent.
#include <grpcpp/create_channel.h>
#include <grpcpp/server.h>
#include <grpcpp/server_builder.h>
#include <gtest/gtest.h>

#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "server/rpc/services.h"
#include "server/transport/ipc_memory.h"
#include "tests/server/fake_device.h"
#include "tests/server/importer.h"
#include "tests/server/memory_socket.h"
#include "tests/server/model/model_directory.h"
#include "tests/server/waits.h"

namespace prefilld {
namespace {

constexpr uint64_t kMiB = uint64_t{1} << 20;
constexpr auto kIpc = v1::TRANSPORT_CUDA_IPC, kGrpc = v1::TRANSPORT_GRPC;

class KvOnDeviceTest : public testing::Test {
 protected:
  KvOnDeviceTest() {
    models_.emplace("base", *Transformer::Load("base", FixtureModel("base"), backend_));
    media_[Transport::kCudaIpc] = *CudaIpc::Open(device_, socket_.names);
    pools_[Transport::kCudaIpc] =
        SegmentPool::Create(*media_[Transport::kCudaIpc], device_, 32 * kMiB, [] { return false; });
    rpc_.limits.offered = {Transport::kCudaIpc};
    rpc_.memory_socket = socket_.address();
    rpc_.limits.kv_regions[Transport::kCudaIpc] = 32 * kMiB;
    pools_[Transport::kCudaIpc]->Fill();
    EXPECT_TRUE(Ready(16 * kMiB));
    grpc::ServerBuilder builder;
    int port = 0;
    builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port);
    builder.RegisterService(&prefill_service_);
    builder.RegisterService(&handoff_service_);
    server_ = builder.BuildAndStart();
    const auto channel = grpc::CreateChannel("127.0.0.1:" + std::to_string(port),
                                             grpc::InsecureChannelCredentials());
    prefill_ = v1::PrefillService::NewStub(channel);
    handoff_ = v1::KvHandoffService::NewStub(channel);
  }
  ~KvOnDeviceTest() override {
    server_->Shutdown();
    leases_.ReleaseAll(LeaseEnd::kConsumed);
    memory_->Stop();
    transfers_.Stop();
    for (const auto& [transport, pool] : pools_) {
      pool->Stop();
      EXPECT_TRUE(pool->WaitAllBack(SteadyNow() + absl::Seconds(20)));
    }
    EXPECT_FALSE(device_.freed_under_a_copy());
  }

  static v1::PrefillRequest Prompt(const std::string& id, v1::Transport transport) {
    v1::PrefillRequest request;
    request.set_request_id(id);
    request.set_model("base");
    for (uint32_t t = 0; t < 300; ++t) request.add_token_ids(t % 96);
    request.mutable_destination()->set_transport(transport);
    return request;
  }
  // Computes it; its lease.
  v1::Lease Prefill(const v1::PrefillRequest& request, v1::Transport expected) {
    grpc::ClientContext context;
    auto reader = prefill_->Prefill(&context, request);
    v1::Lease lease;
    for (v1::PrefillEvent event; reader->Read(&event);) {
      if (event.has_admission()) {
        EXPECT_EQ(event.admission().transport(), expected);
        EXPECT_EQ(event.admission().buffers_size(), expected == kIpc ? 1 : 0);
        if (expected == kIpc) admitted_ = event.admission().buffers(0);
      }
      if (event.has_kv_ready()) lease = event.kv_ready();
    }
    const grpc::Status status = reader->Finish();
    EXPECT_TRUE(status.ok()) << status.error_message();
    return lease;
  }
  std::vector<v1::TensorChunk> Pull(const v1::Lease& lease, v1::Transport transport,
                                    grpc::Status* status) {
    v1::PullKvRequest request;
    request.set_lease(lease.name());
    request.set_generation(lease.generation());
    request.set_transport(transport);
    grpc::ClientContext context;
    auto reader = handoff_->PullKv(&context, request);
    std::vector<v1::TensorChunk> chunks;
    for (v1::TensorChunk chunk; reader->Read(&chunk);) chunks.push_back(chunk);
    *status = reader->Finish();
    return chunks;
  }
  std::string Sent(const std::string& id) {
    grpc::Status status;
    std::string bytes;
    const v1::Lease lease = Prefill(Prompt(id, kGrpc), kGrpc);
    for (const v1::TensorChunk& chunk : Pull(lease, kGrpc, &status)) bytes += chunk.data();
    EXPECT_TRUE(status.ok()) << status.error_message();
    Release(lease);
    return bytes;
  }
  void Release(const v1::Lease& lease) {
    v1::ReleaseLeaseRequest request;
    request.set_lease(lease.name());
    request.set_generation(lease.generation());
    request.set_reason(v1::RELEASE_REASON_CONSUMED);
    v1::ReleaseLeaseResponse response;
    grpc::ClientContext context;
    EXPECT_TRUE(handoff_->ReleaseLease(&context, request, &response).ok());
  }
  uint64_t Count(SegmentState state) const {
    return pools_.at(Transport::kCudaIpc)->CountByState()[static_cast<size_t>(state)];
  }
  bool Ready(uint64_t bytes) {
    return Becomes([&] { return Count(SegmentState::kReady) == bytes; });
  }

  FakeBackend backend_;
  v1::BufferRef admitted_;  // of the last one that lies on the device
  FakeDevice& device_ = backend_.device();
  std::unique_ptr<BlockPool> pool_ = *BlockPool::Create(device_, 16 << 20, 128 << 10);
  Metrics metrics_;
  Access access_{metrics_};
  ReportTable reports_;
  LiveIds attends_;
  LiveCalls calls_;
  Sweeper sweeper_{absl::Milliseconds(20)};
  PrefillRegistry prefills_;
  Models models_;
  MemorySocket socket_;
  Media media_;
  SegmentPools pools_;
  std::shared_ptr<WorkPool> memory_ = std::make_shared<WorkPool>(1);
  WorkPool transfers_{1};
  LeaseTable leases_{{.ended = [this](const LeaseInfo& lease, LeaseEnd) {
    prefills_.Remove(lease.owner, lease.request_id, lease.generation);
  }}};
  Engine engine_{backend_, metrics_};
  Scheduler scheduler_{engine_, metrics_, {}};
  RpcContext rpc_{backend_,   models_,   media_,   pool_.get(), pools_,   leases_,
                  scheduler_, prefills_, attends_, calls_,      sweeper_, reports_,
                  metrics_,   access_,   memory_,  transfers_,  {}};
  PrefillServiceImpl prefill_service_{rpc_};
  KvHandoffServiceImpl handoff_service_{rpc_};
  std::unique_ptr<grpc::Server> server_;
  std::unique_ptr<v1::PrefillService::Stub> prefill_;
  std::unique_ptr<v1::KvHandoffService::Stub> handoff_;
};

TEST_F(KvOnDeviceTest, APeerMapsTheSameBytesThatAreSentToOthers) {
  const std::string sent = Sent("sent");
  const int64_t blocks = pool_->total();
  ASSERT_TRUE(Becomes([&] { return pool_->CountByState()[0] == blocks; })) << "they are back";
  for (int round = 0; round < 2; ++round) {  // the second time in the same memory
    const v1::Lease lease = Prefill(Prompt("mapped", kIpc), kIpc);
    EXPECT_EQ(pool_->CountByState()[0], blocks) << "it takes no blocks";
    grpc::Status status;
    const auto chunks = Pull(lease, kIpc, &status);
    ASSERT_TRUE(status.ok()) << status.error_message();
    ASSERT_EQ(chunks.size(), 4u) << "two layers of K and V";
    EXPECT_EQ(admitted_.name(), chunks[0].buffer().name()) << "told before the first layer";
    EXPECT_EQ(admitted_.byte_offset(), 0u);
    EXPECT_GE(admitted_.byte_length(),
              chunks[3].buffer().byte_offset() + chunks[3].buffer().byte_length());
    Importer importer(socket_.address());
    ASSERT_NE(importer.Map(chunks[0].buffer().name()), nullptr);
    std::string mapped;
    for (const v1::TensorChunk& chunk : chunks) {
      EXPECT_TRUE(chunk.last());
      EXPECT_TRUE(chunk.data().empty());
      EXPECT_EQ(chunk.buffer().name(), chunks[0].buffer().name());
      EXPECT_EQ(chunk.buffer().device_uuid(), "GPU-fake");
      ASSERT_LE(chunk.buffer().byte_offset() + chunk.buffer().byte_length(), importer.bytes());
      mapped.append(reinterpret_cast<char*>(importer.mapped()) + chunk.buffer().byte_offset(),
                    chunk.buffer().byte_length());
    }
    EXPECT_TRUE(mapped == sent);
    Release(lease);
    EXPECT_FALSE(Pull(lease, kIpc, &status).size());
    EXPECT_TRUE(Becomes([&] {
      return Importer(socket_.address()).Ask(chunks[0].buffer().name()).bytes == 0;
    })) << "its name has ended";
    EXPECT_GT(Count(SegmentState::kLent), 0u) << "a peer has it";
    importer.HangUp();
    EXPECT_TRUE(Ready(16 * kMiB));
  }
  EXPECT_EQ(device_.registrations(), 0);
  EXPECT_EQ(device_.zeroed(), 2);
}

TEST_F(KvOnDeviceTest, IsNotSentNorMappedElsewhere) {
  const v1::Lease on_device = Prefill(Prompt("device", kIpc), kIpc);
  const v1::Lease in_blocks = Prefill(Prompt("blocks", v1::TRANSPORT_UNSPECIFIED), kGrpc);
  grpc::Status status;
  EXPECT_TRUE(Pull(on_device, kGrpc, &status).empty());
  EXPECT_EQ(status.error_code(), grpc::StatusCode::FAILED_PRECONDITION);
  EXPECT_TRUE(Pull(in_blocks, kIpc, &status).empty());
  EXPECT_EQ(status.error_code(), grpc::StatusCode::FAILED_PRECONDITION);
}

TEST_F(KvOnDeviceTest, APoolThatPeersHoldRefusesTheNextUntilTheyHangUp) {
  pools_.clear();
  pools_[Transport::kCudaIpc] =
      SegmentPool::Create(*media_[Transport::kCudaIpc], device_, kMiB, [] { return false; });
  const v1::Lease lease = Prefill(Prompt("first", kIpc), kIpc);
  grpc::Status status;
  const auto chunks = Pull(lease, kIpc, &status);
  ASSERT_FALSE(chunks.empty()) << status.error_message();
  Importer importer(socket_.address());
  ASSERT_NE(importer.Map(chunks[0].buffer().name()), nullptr);
  Release(lease);
  const auto next = [&] {
    grpc::ClientContext context;
    auto reader = prefill_->Prefill(&context, Prompt("next", kIpc));
    for (v1::PrefillEvent event; reader->Read(&event);) {
    }
    return reader->Finish().error_code();
  };
  EXPECT_EQ(next(), grpc::StatusCode::RESOURCE_EXHAUSTED);
  importer.HangUp();
  EXPECT_TRUE(Becomes([&] { return next() == grpc::StatusCode::OK; }));
}

TEST_F(KvOnDeviceTest, IsAgreedOnForAModelWhereThereIsRoomForCaches) {
  PeerFacts ours;
  media_[Transport::kCudaIpc]->Introduce(&ours);
  v1::NegotiateRequest request;
  request.set_model("base");
  request.set_cuda_ipc_domain(ours.cuda_ipc_domain);
  request.add_device_uuids("GPU-fake");
  const auto agreed = [&] {
    grpc::ClientContext context;
    v1::NegotiateResponse response;
    EXPECT_TRUE(handoff_->Negotiate(&context, request, &response).ok());
    EXPECT_EQ(response.memory_socket(), socket_.address());
    return response.transport();
  };
  EXPECT_EQ(agreed(), kIpc);
  rpc_.limits.kv_regions.clear();
  EXPECT_EQ(agreed(), kGrpc);
  request.clear_model();
  EXPECT_EQ(agreed(), kIpc) << "for an Attend";
}

}  // namespace
}  // namespace prefilld

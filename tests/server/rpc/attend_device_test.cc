// Attend on a device with memory of its own, over every transport: what is copied when, what is
// held how long, and what a refusal leaves. The device is a fake, the stages are the CPU's.
#include <fcntl.h>
#include <grpcpp/create_channel.h>
#include <grpcpp/server.h>
#include <grpcpp/server_builder.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "proto/wire/chunk.h"
#include "server/rpc/services.h"
#include "server/transport/ipc_memory.h"
#include "server/transport/shm_memory.h"
#include "server/transport/staging.h"
#include "tests/server/fake_device.h"
#include "tests/server/importer.h"
#include "tests/server/memory_socket.h"
#include "tests/server/waits.h"

namespace prefilld {
namespace {

using Kind = FakeDevice::Kind;
using Tensors = std::map<std::string, std::string>;  // bytes by name

constexpr int kQHeads = 2, kDim = 64;

class AttendOnDeviceTest : public testing::Test {
 protected:
  AttendOnDeviceTest() {
    rpc_.limits.offered = {Transport::kPosixShm, Transport::kCudaIpc};
    rpc_.memory_socket = socket_.address();
    grpc::ServerBuilder builder;
    builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port_);
    builder.SetMaxReceiveMessageSize(kMaxMessageBytes);
    builder.RegisterService(&prefill_service_);
    builder.RegisterService(&handoff_service_);
    server_ = builder.BuildAndStart();
    auto channel = Connect({});
    prefill_ = v1::PrefillService::NewStub(channel);
    handoff_ = v1::KvHandoffService::NewStub(channel);
    Warm(700);
  }

  ~AttendOnDeviceTest() override {
    server_->Shutdown();
    // What the pools still have to run uses members that go before them.
    memory_->Stop();
    transfers_.Stop();
    WaitUntilFree();
    EXPECT_FALSE(device_.freed_under_a_copy());
  }

  std::shared_ptr<grpc::Channel> Connect(const grpc::ChannelArguments& arguments) const {
    return grpc::CreateCustomChannel("127.0.0.1:" + std::to_string(port_),
                                     grpc::InsecureChannelCredentials(), arguments);
  }

  // The engine's own memory, some of it for every other step, is there from now on, and no other.
  void Warm(int tokens) {
    for (int step = 0; step < 2; ++step) {
      Attend(v1::TRANSPORT_GRPC, tokens);
      WaitUntilGivenBack();
    }
    at_rest_ = device_.live_bytes(Kind::kDevice);
    host_at_rest_ = device_.live_bytes(Kind::kHost);
    device_.ForgetCopied();
  }

  // Jobs are gone, which have a share of the pool that their memory is given back on, and so is
  // what they left there.
  void WaitUntilGivenBack() {
    EXPECT_TRUE(Becomes([this] { return memory_.use_count() == 2; }));
    Held{*memory_, 2};
  }

  // No call holds memory: the last slices may go after the call has ended.
  void WaitUntilFree() const {
    (void)Becomes([this] {
      return device_.live_bytes(Kind::kDevice) == at_rest_ &&
             device_.live_bytes(Kind::kHost) == host_at_rest_;
    });
    EXPECT_EQ(device_.live_bytes(Kind::kDevice), at_rest_);
    EXPECT_EQ(device_.live_bytes(Kind::kHost), host_at_rest_);
  }

  static v1::AttendRequest Header(int tokens, v1::Transport transport) {
    v1::AttendRequest request;
    v1::AttendHeader& header = *request.mutable_header();
    for (const char* name : {"q", "k", "v"}) {
      v1::TensorSpec& spec = *header.add_tensors();
      spec.set_name(name);
      spec.set_data_type(v1::DATA_TYPE_F32);
      for (int dim : {tokens, *name == 'q' ? kQHeads : 1, kDim}) spec.add_shape(dim);
    }
    header.set_transport(transport);
    header.set_return_lse(true);
    header.set_return_block_index(true);
    header.mutable_sparsity()->set_method(v1::METHOD_JOINT);
    return request;
  }

  // The tensors of a call, always the same, in the header's order.
  static std::vector<std::string> Inputs(const v1::AttendRequest& header) {
    std::mt19937 random(7);
    std::normal_distribution<float> normal;
    std::vector<std::string> inputs;
    for (const v1::TensorSpec& spec : header.header().tensors()) {
      std::vector<float> values(spec.shape(0) * spec.shape(1) * spec.shape(2));
      for (float& value : values) value = normal(random);
      inputs.emplace_back(reinterpret_cast<const char*>(values.data()), 4 * values.size());
    }
    return inputs;
  }

  using Stream = grpc::ClientReaderWriter<v1::AttendRequest, v1::AttendResponse>;
  // Sends the header, expects the admission.
  static v1::Admission Admit(Stream& stream, const v1::AttendRequest& header) {
    v1::AttendResponse response;
    EXPECT_TRUE(stream.Write(header));
    EXPECT_TRUE(stream.Read(&response));
    EXPECT_TRUE(response.has_admission()) << response.ShortDebugString();
    return response.admission();
  }

  static void Send(Stream& stream, const std::vector<std::string>& inputs, size_t chunk_bytes,
                   size_t chunks = SIZE_MAX) {
    for (uint32_t i = 0; i < inputs.size(); ++i) {
      for (size_t at = 0; at < inputs[i].size() && chunks > 0; at += chunk_bytes, --chunks) {
        const std::string data = inputs[i].substr(at, chunk_bytes);
        v1::AttendRequest request;
        v1::TensorChunk& chunk = *request.mutable_chunk();
        chunk.set_tensor_index(i);
        chunk.set_byte_offset(at);
        chunk.set_data(data);
        chunk.set_crc32c(Crc32c(0, data.data(), data.size()));
        chunk.set_last(at + data.size() == inputs[i].size());
        EXPECT_TRUE(stream.Write(request));
      }
    }
  }

  PeerFacts Ours() const {
    PeerFacts ours;
    for (const auto& [transport, medium] : media_) medium->Introduce(&ours);
    return ours;
  }

  // How often cuda_ipc was, for this.
  double Refused(const std::string& reason) {
    metrics_.AddTransport("cuda_ipc", true);
    for (const auto& family : metrics_.Collect()) {
      if (family.name != "prefilld_transport_refused_total") continue;
      for (const auto& metric : family.metric) {
        std::map<std::string, std::string> labels;
        for (const auto& label : metric.label) labels[label.name] = label.value;
        if (labels["transport"] == "cuda_ipc" && labels["reason"] == reason) {
          return metric.counter.value;
        }
      }
    }
    return -1;
  }

  // Where the caller finds memory that it was given.
  struct Opened {
    explicit Opened(const AttendOnDeviceTest& test) : importer(test.socket_.address()) {}
    Importer importer;
    std::byte* at(const v1::BufferRef& buffer) {
      if (importer.mapped() == nullptr) importer.Map(buffer.name());
      EXPECT_NE(importer.mapped(), nullptr);
      return importer.mapped() + buffer.byte_offset();
    }
  };

  static v1::AttendRequest Written() {
    v1::AttendRequest request;
    request.mutable_written();
    return request;
  }

  // A whole call; its outputs.
  Tensors Attend(v1::Transport transport, int tokens, v1::Summary* summary = nullptr) {
    grpc::ClientContext context;
    auto stream = prefill_->Attend(&context);
    const v1::AttendRequest header = Header(tokens, transport);
    const v1::Admission admission = Admit(*stream, header);
    const std::vector<std::string> inputs = Inputs(header);
    Opened opened(*this);
    if (transport == v1::TRANSPORT_GRPC) {
      Send(*stream, inputs, 100'000);
    } else {
      EXPECT_EQ(admission.transport(), transport);
      EXPECT_EQ(admission.buffers_size(), 3);
      for (int i = 0; i < 3; ++i) {
        EXPECT_EQ(admission.buffers(i).byte_length(), inputs[i].size());
        std::memcpy(opened.at(admission.buffers(i)), inputs[i].data(), inputs[i].size());
      }
      EXPECT_TRUE(stream->Write(Written()));
    }
    stream->WritesDone();
    Tensors outputs;
    std::vector<std::string> names;
    for (v1::AttendResponse response; stream->Read(&response);) {
      if (response.has_chunk()) {
        outputs[names[response.chunk().tensor_index()]] += response.chunk().data();
      }
      for (int i = 0; i < response.outputs().tensors_size(); ++i) {
        names.push_back(response.outputs().tensors(i).name());
        if (transport == v1::TRANSPORT_GRPC) continue;
        const v1::BufferRef& buffer = response.outputs().buffers(i);
        outputs[names.back()].assign(reinterpret_cast<const char*>(opened.at(buffer)),
                                     buffer.byte_length());
      }
      if (response.has_summary() && summary != nullptr) *summary = response.summary();
    }
    const grpc::Status status = stream->Finish();
    EXPECT_TRUE(status.ok()) << status.error_message();
    return outputs;
  }

  // A call over shared memory of which a test sees to the rest.
  struct Call {
    Call(AttendOnDeviceTest& test, const v1::AttendRequest& header) {
      // One that waits for what the test holds fails instead.
      context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(20));
      stream = test.prefill_->Attend(&context);
      Admit(*stream, header);
    }
    bool ReadToSummary() {
      v1::AttendResponse response;
      while (stream->Read(&response)) {
        if (response.has_summary()) return true;
      }
      return false;
    }
    void ExpectToEndWell() {
      stream->WritesDone();
      v1::AttendResponse response;
      EXPECT_FALSE(stream->Read(&response));
      const grpc::Status status = stream->Finish();
      EXPECT_TRUE(status.ok()) << status.error_message();
    }
    grpc::ClientContext context;
    std::unique_ptr<Stream> stream;
  };

  // Whether there is room for it; it goes away then.
  bool Admits(const v1::AttendRequest& header) {
    v1::AttendResponse response;
    {
      grpc::ClientContext context;
      auto stream = prefill_->Attend(&context);
      stream->Write(header);
      stream->Read(&response);
      context.TryCancel();
      stream->Finish();
    }
    WaitUntilGivenBack();
    return response.has_admission();
  }

  // A call that is refused.
  grpc::Status Refused(const v1::AttendRequest& header) {
    grpc::ClientContext context;
    auto stream = prefill_->Attend(&context);
    stream->Write(header);
    v1::AttendResponse response;
    EXPECT_FALSE(stream->Read(&response));
    return stream->Finish();
  }

  size_t Uploads() const {
    size_t count = 0;
    for (const FakeDevice::Copied& copy : device_.copied()) count += copy.upload;
    return count;
  }

  uint64_t HeadsInMetrics() {
    uint64_t heads = 0;
    for (const auto& family : metrics_.Collect()) {
      if (family.name != "prefilld_head_density_ratio") continue;
      for (const auto& metric : family.metric) heads += metric.histogram.sample_count;
    }
    return heads;
  }

  FakeBackend backend_;
  FakeDevice& device_ = backend_.device();
  Metrics metrics_;
  Access access_{metrics_};
  ReportTable reports_;
  LiveIds attends_;
  LiveCalls calls_;
  Sweeper sweeper_{absl::Milliseconds(20)};
  PrefillRegistry prefills_;
  Models models_;
  static Media OpenMedia(Device& device, const MemorySocket& socket) {
    Media media;
    media[Transport::kPosixShm] = *PosixShm::Open(socket.names);
    media[Transport::kCudaIpc] = *CudaIpc::Open(device, socket.names);
    return media;
  }
  MemorySocket socket_;
  Media media_ = OpenMedia(device_, socket_);
  SegmentPools segments_;
  std::shared_ptr<WorkPool> memory_ = std::make_shared<WorkPool>(2);
  WorkPool transfers_{2};
  LeaseTable leases_{{}};
  Engine engine_{backend_, metrics_};
  Scheduler scheduler_{engine_, metrics_, {.attend_bytes_max = 32 << 20}};
  RpcContext rpc_{backend_,   models_,   media_,   nullptr,    segments_, leases_,
                  scheduler_, prefills_, attends_, calls_,     sweeper_,  reports_,
                  metrics_,   access_,   memory_,  transfers_, {}};
  PrefillServiceImpl prefill_service_{rpc_};
  KvHandoffServiceImpl handoff_service_{rpc_};
  int port_ = 0;
  std::unique_ptr<grpc::Server> server_;
  std::unique_ptr<v1::PrefillService::Stub> prefill_;
  std::unique_ptr<v1::KvHandoffService::Stub> handoff_;
  size_t at_rest_ = 0, host_at_rest_ = 0;
};

TEST_F(AttendOnDeviceTest, EveryTransportGivesTheSameBytes) {
  const Tensors sent = Attend(v1::TRANSPORT_GRPC, 700);
  ASSERT_EQ(sent.size(), 6u);
  EXPECT_EQ(sent.at("o").size(), 700u * kQHeads * kDim * 4);
  EXPECT_EQ(sent.at("lse").size(), 700u * kQHeads * 4);
  EXPECT_EQ(sent.at("o").find("\xCD\xCD\xCD\xCD"), std::string::npos) << "memory nobody wrote";
  const auto* count = reinterpret_cast<const int32_t*>(sent.at("block_count").data());
  const auto* blocks = reinterpret_cast<const int32_t*>(sent.at("block_index").data());
  constexpr int kRows = kQHeads * 6;
  const int width = *std::max_element(count, count + kRows);
  ASSERT_EQ(sent.at("block_index").size(), sizeof(int32_t) * kRows * width);
  for (int row = 0; row < kRows; ++row, blocks += width) {
    ASSERT_GE(count[row], 1);
    EXPECT_EQ(blocks[count[row] - 1], row % 6) << "its diagonal is the last";
    EXPECT_TRUE(std::is_sorted(blocks, blocks + count[row]));
    EXPECT_EQ(std::count(blocks, blocks + width, -1), width - count[row]);
  }
  EXPECT_EQ(Attend(v1::TRANSPORT_POSIX_SHM, 700), sent);
  EXPECT_EQ(Attend(v1::TRANSPORT_CUDA_IPC, 700), sent);
}

TEST_F(AttendOnDeviceTest, ChunksAreOnTheirWayBeforeTheLastHasArrived) {
  // q alone is more than a group.
  const v1::AttendRequest header = Header(12'000, v1::TRANSPORT_GRPC);
  grpc::ClientContext context;
  auto stream = prefill_->Attend(&context);
  Admit(*stream, header);
  Send(*stream, Inputs(header), 1 << 20, 5);
  EXPECT_TRUE(Becomes([this] { return Uploads() > 0; }));
  EXPECT_EQ(Uploads(), 1u);
  EXPECT_EQ(device_.copied()[0].bytes, Staging::kGroupBytes);
  // Its copy is still pending when the caller goes.
  EXPECT_EQ(device_.pending(), 1u);
  context.TryCancel();
  EXPECT_EQ(stream->Finish().error_code(), grpc::StatusCode::CANCELLED);
}

TEST_F(AttendOnDeviceTest, OverCudaIpcTensorsStayWhereTheyAre) {
  Attend(v1::TRANSPORT_CUDA_IPC, 700);
  for (const FakeDevice::Copied& copy : device_.copied()) {
    EXPECT_LT(copy.bytes, 10'000u) << "more than a block index";
  }
}

TEST_F(AttendOnDeviceTest, NoDeviceMemoryIsToldAtAdmissionAndTheNextRequestWorks) {
  for (v1::Transport transport :
       {v1::TRANSPORT_GRPC, v1::TRANSPORT_POSIX_SHM, v1::TRANSPORT_CUDA_IPC}) {
    for (Kind kind : {Kind::kDevice, Kind::kHost}) {
      if (kind == Kind::kHost && transport == v1::TRANSPORT_CUDA_IPC) continue;
      device_.Limit(kind, device_.live_bytes(kind) + 400'000);
      const grpc::Status status = Refused(Header(700, transport));
      EXPECT_EQ(status.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED)
          << status.error_message();
      WaitUntilFree();
      device_.Limit(kind, SIZE_MAX);
      EXPECT_EQ(Attend(transport, 700).size(), 6u);
      WaitUntilFree();
    }
  }
}

// The call ends when it has been answered, whatever the caller does with its side of the stream.
TEST_F(AttendOnDeviceTest, DeviceMemoryIsTakenUntilItsPeersHaveHungUp) {
  const v1::AttendRequest header = Header(12'000, v1::TRANSPORT_CUDA_IPC);  // two are too many
  Warm(12'000);
  for (const bool answered : {true, false}) {
    Opened opened(*this);
    {
      grpc::ClientContext context;
      auto stream = prefill_->Attend(&context);
      const v1::Admission admission = Admit(*stream, header);
      opened.at(admission.buffers(0))[0] = std::byte{1};
      v1::AttendResponse response;
      if (answered) {
        ASSERT_TRUE(stream->Write(Written()));
        while (!response.has_summary()) ASSERT_TRUE(stream->Read(&response));
        EXPECT_FALSE(stream->Read(&response));
      } else {
        context.TryCancel();
      }
      EXPECT_EQ(stream->Finish().error_code(),
                answered ? grpc::StatusCode::OK : grpc::StatusCode::CANCELLED);
      EXPECT_TRUE(Becomes([&] {
        return Importer(socket_.address()).Ask(admission.buffers(0).name()).bytes == 0;
      })) << "its name has ended";
    }
    WaitUntilGivenBack();
    EXPECT_GT(device_.live_bytes(Kind::kDevice), at_rest_);
    for (v1::Transport transport : {v1::TRANSPORT_CUDA_IPC, v1::TRANSPORT_GRPC}) {
      const grpc::Status status = Refused(Header(12'000, transport));
      EXPECT_EQ(status.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED)
          << status.error_message();
    }
    opened.importer.HangUp();
    WaitUntilFree();
    EXPECT_TRUE(Becomes([&] { return Admits(header); })) << "its bytes are free after its memory";
  }
}

TEST_F(AttendOnDeviceTest, ACallerThatGoesTakesItsMemoryWithIt) {
  for (v1::Transport transport :
       {v1::TRANSPORT_GRPC, v1::TRANSPORT_POSIX_SHM, v1::TRANSPORT_CUDA_IPC}) {
    for (const bool written : {false, true}) {
      grpc::ClientContext context;
      auto stream = prefill_->Attend(&context);
      Admit(*stream, Header(700, transport));
      if (written && transport != v1::TRANSPORT_GRPC) stream->Write(Written());
      context.TryCancel();
      EXPECT_EQ(stream->Finish().error_code(), grpc::StatusCode::CANCELLED);
      WaitUntilFree();
    }
  }
}

TEST_F(AttendOnDeviceTest, NoMemoryIsTakenForWhoGoesBeforeItsTurn) {
  const int before = device_.taken();
  {
    Held held(*memory_, 2);
    grpc::ClientContext context;
    auto stream = prefill_->Attend(&context);
    stream->Write(Header(700, v1::TRANSPORT_POSIX_SHM));
    ASSERT_TRUE(Becomes([this] { return metrics_.uploads.Value() == 1; })) << "it has not come";
    context.TryCancel();
    EXPECT_EQ(stream->Finish().error_code(), grpc::StatusCode::CANCELLED);
    ASSERT_TRUE(scheduler_.WaitIdle(SteadyNow() + absl::Seconds(30)))
        << "the server has not heard of it";
  }
  Held{*memory_, 2};  // its turn has come and gone
  EXPECT_EQ(device_.taken(), before);
}

// Outputs are placed, inputs are let go of, metrics are told: none of it by whoever computes.
TEST_F(AttendOnDeviceTest, TheNextJobIsComputedWhileOutputsWait) {
  const uint64_t heads = HeadsInMetrics();
  const v1::AttendRequest header = Header(700, v1::TRANSPORT_CUDA_IPC);
  Call first(*this, header), second(*this, header);
  {
    Held held(transfers_, 2);
    for (Call* call : {&first, &second}) ASSERT_TRUE(call->stream->Write(Written()));
    EXPECT_TRUE(scheduler_.WaitIdle(SteadyNow() + absl::Seconds(30))) << "both were computed";
    EXPECT_EQ(HeadsInMetrics(), heads);
  }
  for (Call* call : {&first, &second}) {
    EXPECT_TRUE(call->ReadToSummary());
    call->ExpectToEndWell();
  }
  EXPECT_EQ(HeadsInMetrics(), heads + 2 * kQHeads);
}

TEST_F(AttendOnDeviceTest, AnAnswerWaitsForNoOtherStep) {
  for (const bool with_index : {false, true}) {
    v1::AttendRequest header = Header(700, v1::TRANSPORT_CUDA_IPC);
    header.mutable_header()->set_return_block_index(with_index);
    Call computed(*this, header);
    std::unique_ptr<Call> computing;
    {
      Held held(transfers_, 2);
      ASSERT_TRUE(computed.stream->Write(Written()));
      ASSERT_TRUE(scheduler_.WaitIdle(SteadyNow() + absl::Seconds(30)));
      device_.HoldSteps();
      computing = std::make_unique<Call>(*this, header);
      ASSERT_TRUE(computing->stream->Write(Written()));
      device_.AwaitHeldStep();
    }
    EXPECT_TRUE(computed.ReadToSummary());
    device_.ReleaseSteps();
    EXPECT_TRUE(computing->ReadToSummary());
    for (Call* call : {&computed, computing.get()}) call->ExpectToEndWell();
  }
}

TEST_F(AttendOnDeviceTest, TheStepIsAllThatIsWaitedFor) {
  for (v1::Transport transport :
       {v1::TRANSPORT_GRPC, v1::TRANSPORT_POSIX_SHM, v1::TRANSPORT_CUDA_IPC}) {
    const int waits = device_.waits();
    Attend(transport, 700);
    EXPECT_EQ(device_.waits() - waits, 1) << v1::Transport_Name(transport);
  }
}

// Memory that somebody waits for may take seconds.
TEST_F(AttendOnDeviceTest, ASegmentIsCopiedWhileOthersWaitForMemory) {
  Call call(*this, Header(700, v1::TRANSPORT_POSIX_SHM));
  {
    Held held(*memory_, 2);
    ASSERT_TRUE(call.stream->Write(Written()));
    EXPECT_TRUE(call.ReadToSummary());
  }
  call.ExpectToEndWell();
}

TEST_F(AttendOnDeviceTest, ItsBytesAreTakenUntilItsMemoryIsGivenBack) {
  const v1::AttendRequest header = Header(12'000, v1::TRANSPORT_GRPC);  // two are too many
  {
    Call call(*this, header);
    Held held(*memory_, 2);
    call.context.TryCancel();
    EXPECT_EQ(call.stream->Finish().error_code(), grpc::StatusCode::CANCELLED);
    ASSERT_TRUE(scheduler_.WaitIdle(SteadyNow() + absl::Seconds(30)));
    for (int i = 0; i < 100; ++i) {
      grpc::ClientContext context;
      context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(5));
      auto stream = prefill_->Attend(&context);
      stream->Write(header);
      v1::AttendResponse response;
      ASSERT_FALSE(stream->Read(&response));
      ASSERT_EQ(stream->Finish().error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
    }
  }
  WaitUntilGivenBack();
  Call next(*this, header);
  next.context.TryCancel();
  EXPECT_EQ(next.stream->Finish().error_code(), grpc::StatusCode::CANCELLED);
}

// Who had nothing to do while it was computed is looked at again afterwards.
TEST_F(AttendOnDeviceTest, AFailureThatTheCallerDoesNotTakeEndsToo) {
  rpc_.upload_timeout = absl::Milliseconds(300);
  grpc::ChannelArguments arguments;  // less is let through unread than an admission has
  arguments.SetInt(GRPC_ARG_HTTP2_STREAM_LOOKAHEAD_BYTES, 5);
  arguments.SetInt(GRPC_ARG_HTTP2_BDP_PROBE, 0);
  auto prefill = v1::PrefillService::NewStub(Connect(arguments));
  const v1::AttendRequest header = Header(700, v1::TRANSPORT_GRPC);
  grpc::ClientContext context;
  auto stream = prefill->Attend(&context);
  device_.HoldSteps();
  ASSERT_TRUE(stream->Write(header));
  Send(*stream, Inputs(header), 100'000);
  device_.AwaitHeldStep();
  absl::SleepFor(3 * rpc_.upload_timeout);
  device_.Lose();
  device_.ReleaseSteps();
  WaitUntilFree();
  context.TryCancel();
  stream->Finish();
}

TEST_F(AttendOnDeviceTest, OnlyWrittenFollowsTheHeader) {
  const v1::AttendRequest header = Header(1, v1::TRANSPORT_CUDA_IPC);
  grpc::ClientContext context;
  auto stream = prefill_->Attend(&context);
  Admit(*stream, header);
  Send(*stream, Inputs(header), 1000, 1);
  v1::AttendResponse response;
  EXPECT_FALSE(stream->Read(&response));
  const grpc::Status status = stream->Finish();
  EXPECT_EQ(status.error_code(), grpc::StatusCode::DATA_LOSS);
  EXPECT_NE(status.error_message().find("TRANSPORT_CUDA_IPC"), std::string::npos);
}

TEST_F(AttendOnDeviceTest, NotOfferedIsNotServed) {
  rpc_.limits.offered.erase(Transport::kCudaIpc);
  EXPECT_EQ(Refused(Header(1, v1::TRANSPORT_CUDA_IPC)).error_code(),
            grpc::StatusCode::FAILED_PRECONDITION);
}

TEST_F(AttendOnDeviceTest, NegotiatedByHostAndDevice) {
  struct Case {
    std::vector<v1::Transport> transports;
    std::string domain, uuid;
    grpc::StatusCode code;
    v1::Transport agreed;
    std::vector<v1::Transport> refused = {};
  };
  const std::string here = Ours().cuda_ipc_domain;
  const auto ok = grpc::StatusCode::OK, no = grpc::StatusCode::FAILED_PRECONDITION;
  const auto ipc = v1::TRANSPORT_CUDA_IPC, shm = v1::TRANSPORT_POSIX_SHM, rpc = v1::TRANSPORT_GRPC;
  for (const Case& each :
       std::vector<Case>{{{}, here, "GPU-fake", ok, ipc},
                         {{}, "", "GPU-fake", ok, shm},
                         {{}, here, "GPU-other", ok, shm},
                         {{}, here, "", ok, shm},
                         {{ipc}, here, "GPU-fake", ok, ipc},
                         {{ipc}, here, "GPU-other", no, rpc},
                         {{ipc}, "there", "GPU-fake", no, rpc},
                         {{ipc, rpc}, "there", "GPU-fake", ok, rpc},
                         {{rpc, ipc}, here, "GPU-fake", ok, rpc},
                         {{ipc, v1::TRANSPORT_UNSPECIFIED}, "", "", ok, shm},
                         {{}, here, "GPU-fake", ok, shm, {ipc}},
                         {{}, here, "GPU-fake", ok, rpc, {ipc, shm, ipc}},
                         {{}, here, "GPU-fake", no, rpc, {ipc, shm, rpc}},
                         {{v1::TRANSPORT_UNSPECIFIED}, here, "GPU-fake", no, rpc, {ipc, shm, rpc}},
                         {{}, here, "GPU-fake", ok, ipc, {rpc}},
                         {{ipc, rpc}, here, "GPU-fake", ok, rpc, {ipc}},
                         {{ipc}, here, "GPU-fake", no, rpc, {ipc}}}) {
    v1::NegotiateRequest request;
    for (v1::Transport transport : each.transports) request.add_transports(transport);
    request.set_shm_domain(Ours().shm_domain);
    request.set_cuda_ipc_domain(each.domain);
    for (v1::Transport refused : each.refused) request.add_refused()->set_transport(refused);
    if (!each.uuid.empty()) request.add_device_uuids(each.uuid);
    v1::NegotiateResponse response;
    grpc::ClientContext context;
    const grpc::Status status = handoff_->Negotiate(&context, request, &response);
    EXPECT_EQ(status.error_code(), each.code) << request.ShortDebugString();
    if (!status.ok()) continue;
    EXPECT_EQ(response.transport(), each.agreed) << request.ShortDebugString();
    EXPECT_EQ(response.cuda_ipc_domain(), here);
    EXPECT_EQ(response.memory_socket(), socket_.address());
    ASSERT_EQ(response.device_uuids_size(), 1);
    EXPECT_EQ(response.device_uuids(0), "GPU-fake");
  }
  const auto invalid = [&](const v1::NegotiateRequest& request) {
    v1::NegotiateResponse response;
    grpc::ClientContext context;
    return handoff_->Negotiate(&context, request, &response).error_code() ==
           grpc::StatusCode::INVALID_ARGUMENT;
  };
  v1::NegotiateRequest uuids, refusals, unknown;
  for (int i = 0; i < 65; ++i) uuids.add_device_uuids("x");
  EXPECT_TRUE(invalid(uuids));
  for (int i = 0; i < 8; ++i) refusals.add_refused()->set_transport(shm);
  EXPECT_FALSE(invalid(refusals));
  refusals.add_refused()->set_transport(shm);
  EXPECT_TRUE(invalid(refusals));
  unknown.add_refused();
  EXPECT_TRUE(invalid(unknown)) << "of no transport";
}

TEST_F(AttendOnDeviceTest, RefusalsAreCountedByTheirReason) {
  v1::NegotiateRequest request;
  for (const int reason : {1, 2, 3, 4, 4, 0, -7, 99}) {
    v1::TransportRefusal& refusal = *request.add_refused();
    refusal.set_transport(v1::TRANSPORT_CUDA_IPC);
    refusal.set_reason(static_cast<v1::TransportRefusal::Reason>(reason));
  }
  v1::NegotiateResponse response;
  grpc::ClientContext context;
  EXPECT_TRUE(handoff_->Negotiate(&context, request, &response).ok());
  for (const char* reason : {"socket", "peer", "descriptor"})
    EXPECT_EQ(Refused(reason), 1) << reason;
  EXPECT_EQ(Refused("driver"), 2);
  EXPECT_EQ(Refused("unspecified"), 3) << "what is not known is none";
}

TEST_F(AttendOnDeviceTest, AGpuThatDoesNotReachOursIsCounted) {
  const auto negotiate = [&](const std::string& uuid, const std::string& domain,
                             const std::vector<v1::Transport>& transports = {}) {
    v1::NegotiateRequest request;
    for (const v1::Transport transport : transports) request.add_transports(transport);
    request.set_cuda_ipc_domain(domain);
    if (!uuid.empty()) request.add_device_uuids(uuid);
    v1::NegotiateResponse response;
    grpc::ClientContext context;
    EXPECT_TRUE(handoff_->Negotiate(&context, request, &response).ok());
  };
  const std::string here = Ours().cuda_ipc_domain;
  negotiate("GPU-fake", here);
  negotiate("", here);
  negotiate("GPU-other", "another host");
  negotiate("GPU-other", here, {v1::TRANSPORT_GRPC});
  EXPECT_EQ(Refused("reach"), 0);
  negotiate("GPU-other", here);
  negotiate("GPU-other", here, {v1::TRANSPORT_CUDA_IPC, v1::TRANSPORT_GRPC});
  EXPECT_EQ(Refused("reach"), 2);
}

}  // namespace
}  // namespace prefilld

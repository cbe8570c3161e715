// What callers of one prompt see who come and go, and what a refusal takes. No calls: the streams
// themselves, on a device whose work ends when the test says so.
#include "server/rpc/prefill_stream.h"

#include <grpcpp/create_channel.h>
#include <grpcpp/server.h>
#include <grpcpp/server_builder.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <functional>
#include <memory>
#include <string>

#include "absl/strings/str_cat.h"
#include "server/record/errors.h"
#include "server/rpc/context.h"
#include "server/rpc/negotiate.h"
#include "server/rpc/services.h"
#include "server/rpc/validate.h"
#include "server/transport/shm_memory.h"
#include "tests/server/fake_device.h"
#include "tests/server/importer.h"
#include "tests/server/memory_socket.h"
#include "tests/server/model/model_directory.h"

namespace prefilld {
namespace {

class Caller : public PrefillStream::Reader {
 public:
  explicit Caller(absl::Time deadline = absl::InfiniteFuture(), bool broke = false)
      : deadline_(deadline), broke_(broke) {}
  void OnEvents() override {}
  absl::Time deadline() const override { return deadline_; }
  bool broke() const override { return broke_; }

 private:
  const absl::Time deadline_;
  const bool broke_;
};

// Has no memory, and counts who asks.
class NoMedium : public Medium {
 public:
  absl::StatusOr<std::shared_ptr<Region>> Create(uint64_t, PeerAccess) override {
    ++asked;
    return absl::ResourceExhaustedError("no room");
  }
  void Introduce(PeerFacts*) const override {}
  absl::Status Reaches(const PeerFacts&) const override { return absl::OkStatus(); }
  void Close() override {}

  int asked = 0;
};

class PrefillStreamTest : public testing::Test {
 protected:
  explicit PrefillStreamTest(SchedulerOptions options = {})
      : scheduler_(engine_, metrics_, options) {
    models_.emplace("base", *Transformer::Load("base", FixtureModel("base"), backend_));
  }
  ~PrefillStreamTest() override { leases_.ReleaseAll(LeaseEnd::kConsumed); }

  ValidPrefill Valid() const {
    ValidPrefill valid{.job = std::make_shared<Job>(), .lease_ttl = absl::Hours(1)};
    valid.job->request_id = "id";
    valid.job->prefill = std::make_unique<PrefillWork>();
    valid.job->prefill->model = models_.at("base").get();
    valid.job->prefill->token_ids = {1, 2, 3};
    return valid;
  }
  absl::StatusOr<std::shared_ptr<PrefillStream>> Come(const std::shared_ptr<Caller>& caller) {
    return prefills_.FindOrStart({}, "id", "content", caller, [&] {
      return PrefillStream::Start(rpc_, {}, Valid(), "content", caller);
    });
  }

  FakeBackend backend_;
  std::unique_ptr<BlockPool> pool_ = *BlockPool::Create(backend_.device(), 16 << 20, 128 << 10);
  Metrics metrics_;
  Access access_{metrics_};
  ReportTable reports_;
  LiveIds attends_;
  LiveCalls calls_;
  Sweeper sweeper_{absl::Milliseconds(20)};
  PrefillRegistry prefills_;
  Models models_;
  Media media_;
  SegmentPools pools_;
  std::shared_ptr<WorkPool> memory_ = std::make_shared<WorkPool>(1);
  WorkPool transfers_{1};
  std::function<void()> on_ended_;
  LeaseTable leases_{{.ended = [this](const LeaseInfo& lease, LeaseEnd) {
    if (on_ended_) on_ended_();
    prefills_.Remove(lease.owner, lease.request_id, lease.generation);
  }}};
  Engine engine_{backend_, metrics_};
  Scheduler scheduler_;
  RpcContext rpc_{backend_,   models_,   media_,   pool_.get(), pools_,   leases_,
                  scheduler_, prefills_, attends_, calls_,      sweeper_, reports_,
                  metrics_,   access_,   memory_,  transfers_,  {}};
};

TEST_F(PrefillStreamTest, WhoComesAsTheLastCallerGoesIsToldToComeAgain) {
  const auto first = std::make_shared<Caller>(), second = std::make_shared<Caller>();
  backend_.device().HoldMarks();
  const auto stream = *Come(first);
  absl::Status meanwhile = absl::UnknownError("the lease has not ended");
  on_ended_ = [&] { meanwhile = Come(second).status(); };
  stream->Detach(first.get());
  on_ended_ = nullptr;
  EXPECT_EQ(meanwhile.code(), absl::StatusCode::kUnavailable) << meanwhile;
  EXPECT_TRUE(FactsOf(meanwhile).retry_after.has_value());

  const auto again = Come(second);  // the id is free
  ASSERT_TRUE(again.ok()) << again.status();
  EXPECT_NE(*again, stream);
  backend_.device().ReleaseMarks();
  ASSERT_TRUE(scheduler_.WaitIdle(SteadyNow() + absl::Seconds(20)));
  absl::Status end = absl::UnknownError("it has not ended");
  bool ended = false;
  for (size_t index = 0; (*again)->Get(index, &end, &ended) != nullptr;) ++index;
  EXPECT_TRUE(ended);
  EXPECT_TRUE(end.ok()) << end;
}

TEST_F(PrefillStreamTest, WhoAttachesMayWaitForLonger) {
  const absl::Time soon = SteadyNow() + absl::Seconds(10), late = soon + absl::Seconds(10);
  ValidPrefill valid = Valid();
  const std::shared_ptr<Job> job = valid.job;
  job->deadline = soon;
  backend_.device().HoldMarks();
  const auto start = [&] {
    return PrefillStream::Start(rpc_, {}, valid, "content", std::make_shared<Caller>(soon));
  };
  const auto attach = [&](absl::Time deadline) {
    return prefills_.FindOrStart({}, "id", "content", std::make_shared<Caller>(deadline), start);
  };
  ASSERT_TRUE(attach(soon).ok());
  EXPECT_EQ(job->deadline.at(), soon);
  ASSERT_TRUE(attach(late).ok());
  EXPECT_EQ(job->deadline.at(), late);
  ASSERT_TRUE(attach(soon).ok());
  EXPECT_EQ(job->deadline.at(), late) << "the first of them may still wait";
  ASSERT_TRUE(attach(absl::InfiniteFuture()).ok());
  EXPECT_EQ(job->deadline.at(), absl::InfiniteFuture());
  backend_.device().ReleaseMarks();
  ASSERT_TRUE(scheduler_.WaitIdle(SteadyNow() + absl::Seconds(20)));
}

class FullQueueTest : public PrefillStreamTest {
 protected:
  FullQueueTest() : PrefillStreamTest({.waiting_jobs_max = 0}) {}
};

TEST_F(FullQueueTest, NoRegionIsMadeForWhomTheQueueHasNoPlace) {
  auto medium = std::make_unique<NoMedium>();
  const NoMedium& asked = *medium;
  media_[Transport::kPosixShm] = std::move(medium);
  ValidPrefill valid = Valid();
  valid.transport = Transport::kPosixShm;
  const auto stream = PrefillStream::Start(rpc_, {}, valid, "content", std::make_shared<Caller>());
  memory_->Stop();  // what was posted has run
  EXPECT_EQ(FactsOf(stream.status()).reason, "queue_full") << stream.status();
  EXPECT_EQ(asked.asked, 0);
  EXPECT_EQ(pool_->CountByState()[0], pool_->total());
}

// Nor for a prompt that what is reserved can never hold.
TEST_F(PrefillStreamTest, NothingIsTakenForWhatNeverFits) {
  auto medium = std::make_unique<NoMedium>();
  const NoMedium& asked = *medium;
  media_[Transport::kPosixShm] = std::move(medium);
  MemoryPlan none;
  none.batches = 1;
  ASSERT_TRUE(engine_.Reserve(none).ok());
  ValidPrefill valid = Valid();
  valid.transport = Transport::kPosixShm;
  const auto stream = PrefillStream::Start(rpc_, {}, valid, "content", std::make_shared<Caller>());
  memory_->Stop();
  EXPECT_EQ(stream.status().code(), absl::StatusCode::kInvalidArgument) << stream.status();
  EXPECT_EQ(FactsOf(stream.status()).field, "token_ids");
  EXPECT_EQ(asked.asked, 0);
  EXPECT_EQ(pool_->CountByState()[0], pool_->total());
}

// Over the wire, as nothing of it becomes a stream.
TEST_F(PrefillStreamTest, ValidateOnlyTellsWhatNeverFits) {
  PrefillServiceImpl service(rpc_);
  grpc::ServerBuilder builder;
  int port = 0;
  builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port);
  builder.RegisterService(&service);
  const auto server = builder.BuildAndStart();
  const auto stub = v1::PrefillService::NewStub(
      grpc::CreateChannel("127.0.0.1:" + std::to_string(port), grpc::InsecureChannelCredentials()));
  v1::PrefillRequest request;
  request.set_model("base");
  request.mutable_token_ids()->Resize(3, 1);
  request.set_validate_only(true);
  const auto validate = [&] {
    grpc::ClientContext context;
    v1::PrefillEvent event;
    const auto reader = stub->Prefill(&context, request);
    EXPECT_FALSE(reader->Read(&event));
    return reader->Finish().error_code();
  };
  EXPECT_EQ(validate(), grpc::StatusCode::OK);
  MemoryPlan none;
  none.batches = 1;
  ASSERT_TRUE(engine_.Reserve(none).ok());
  EXPECT_EQ(validate(), grpc::StatusCode::INVALID_ARGUMENT);
  server->Shutdown();
}

TEST_F(PrefillStreamTest, WhatHasNoRoomForCachesIsNotAgreedOnForAModel) {
  media_[Transport::kPosixShm] = std::make_unique<NoMedium>();
  v1::NegotiateRequest request;
  v1::NegotiateResponse response;
  const auto agreed = [&] {
    EXPECT_TRUE(Negotiate(rpc_, {}, request, &response).ok());
    return response.transport();
  };
  EXPECT_EQ(agreed(), v1::TRANSPORT_POSIX_SHM) << "for an Attend";
  request.set_model("base");
  EXPECT_EQ(agreed(), v1::TRANSPORT_GRPC);
  request.add_transports(v1::TRANSPORT_POSIX_SHM);
  EXPECT_EQ(Negotiate(rpc_, {}, request, &response).code(), absl::StatusCode::kFailedPrecondition);
  rpc_.limits.kv_regions[Transport::kPosixShm] = 1 << 20;
  EXPECT_EQ(agreed(), v1::TRANSPORT_POSIX_SHM);
}

// Caches over posix_shm in a pool of segments.
class SegmentsTest : public PrefillStreamTest {
 protected:
  explicit SegmentsTest(uint64_t bytes = 64 << 20)
      : segments_(SegmentPool::Create(*shm_, backend_.device(), bytes, [] { return false; })) {
    media_[Transport::kPosixShm] = std::move(shm_);
    pools_[Transport::kPosixShm] = segments_;
  }
  ~SegmentsTest() override {
    leases_.ReleaseAll(LeaseEnd::kConsumed);
    memory_->Stop();
    segments_->Stop();
    EXPECT_TRUE(segments_->WaitAllBack(SteadyNow() + absl::Seconds(20)));
  }
  void FillAndWait() {
    segments_->Fill();
    AwaitReady();
  }
  void AwaitReady() const {
    while (segments_->CountByState()[static_cast<int>(SegmentState::kReady)] < 48 << 20) {
      absl::SleepFor(absl::Milliseconds(1));
    }
  }
  std::shared_ptr<PrefillStream> Begin(bool pinned) {
    ValidPrefill valid = Valid();
    valid.transport = Transport::kPosixShm;
    valid.pinned = pinned;
    return *PrefillStream::Start(rpc_, {}, valid, "content", caller_);
  }
  // Of a prompt, which a peer may have open; the segments registered so far, once all are ready
  // again.
  int Release(bool mapped) {
    const auto stream = Begin(/*pinned=*/true);
    EXPECT_TRUE(scheduler_.WaitIdle(SteadyNow() + absl::Seconds(20)));
    const v1::Lease lease = AdmissionOf(*stream)->lease();
    Importer importer(socket_.address());
    if (mapped) {
      EXPECT_NE(importer.Map(AdmissionOf(*stream)->buffers(0).name(), PROT_READ), nullptr);
    }
    EXPECT_TRUE(leases_.Release(lease.name(), lease.generation(), LeaseEnd::kConsumed).ok());
    if (mapped) {
      absl::SleepFor(absl::Milliseconds(20));
      EXPECT_LT(segments_->CountByState()[static_cast<int>(SegmentState::kReady)], 48u << 20);
      importer.HangUp();
    }
    AwaitReady();
    return backend_.device().registrations();
  }
  // Waits for it, which is the first event or how the stream ended.
  absl::StatusOr<v1::Admission> AdmissionOf(const PrefillStream& stream) {
    for (;;) {
      absl::Status end;
      bool ended = false;
      if (const auto* event = stream.Get(0, &end, &ended)) return event->admission();
      if (ended) return end;
      absl::SleepFor(absl::Milliseconds(1));
    }
  }

  MemorySocket socket_;
  std::unique_ptr<PosixShm> shm_ = *PosixShm::Open(socket_.names);
  std::shared_ptr<SegmentPool> segments_;
  std::shared_ptr<Caller> caller_ = std::make_shared<Caller>();
};

TEST_F(SegmentsTest, NothingIsMadeOrRegisteredBeforeAPromptForWhichOneIsReady) {
  FillAndWait();
  const int before = backend_.device().registrations();
  const auto stream = Begin(/*pinned=*/true);
  absl::Status end;
  bool ended = false;
  const v1::PrefillEvent* first = stream->Get(0, &end, &ended);
  ASSERT_NE(first, nullptr) << "admitted by the caller's thread";
  EXPECT_EQ(first->admission().transport(), v1::TRANSPORT_POSIX_SHM);
  EXPECT_EQ(backend_.device().registrations(), before);
  EXPECT_EQ(pool_->CountByState()[0], pool_->total()) << "it takes no blocks";
  ASSERT_TRUE(scheduler_.WaitIdle(SteadyNow() + absl::Seconds(20)));
}

TEST_F(SegmentsTest, APromptAfterOneThatNobodyHasOpenRegistersNothing) {
  FillAndWait();
  const int before = backend_.device().registrations();
  for (const bool mapped : {false, true, true}) EXPECT_EQ(Release(mapped), before);
}

TEST_F(SegmentsTest, OneIsMadeForAPromptForWhichNoneIsReady) {
  const auto stream = Begin(/*pinned=*/true);
  const auto admission = AdmissionOf(*stream);
  ASSERT_TRUE(admission.ok()) << admission.status();
  EXPECT_EQ(admission->transport(), v1::TRANSPORT_POSIX_SHM);
  EXPECT_EQ(backend_.device().registrations(), 1);
  ASSERT_TRUE(scheduler_.WaitIdle(SteadyNow() + absl::Seconds(20)));
}

TEST_F(SegmentsTest, WhoGoesBeforeItIsMadeLeavesNothing) {
  Gate gate;
  gate.Hold();
  memory_->Post([&] { gate.Pass(); });
  const auto stream = Begin(/*pinned=*/true);
  stream->Detach(caller_.get());
  gate.Release();
  memory_->Stop();
  EXPECT_EQ(backend_.device().registrations(), 0);
  EXPECT_EQ(pool_->CountByState()[0], pool_->total());
}

class NoSegmentsTest : public SegmentsTest {
 protected:
  NoSegmentsTest() : SegmentsTest(0) {}
};

TEST_F(NoSegmentsTest, ACallerThatCanDoWithoutHasBlocks) {
  const auto stream = Begin(/*pinned=*/false);
  const auto admission = AdmissionOf(*stream);
  ASSERT_TRUE(admission.ok()) << admission.status();
  EXPECT_EQ(admission->transport(), v1::TRANSPORT_GRPC);
  EXPECT_LT(pool_->CountByState()[0], pool_->total());
  ASSERT_TRUE(scheduler_.WaitIdle(SteadyNow() + absl::Seconds(20)));
}

TEST_F(NoSegmentsTest, ACallerThatCannotIsRefused) {
  const absl::Status status = AdmissionOf(*Begin(/*pinned=*/true)).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted) << status;
  EXPECT_EQ(pool_->CountByState()[0], pool_->total());
}

}  // namespace
}  // namespace prefilld

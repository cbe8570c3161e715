#include "server/server.h"

#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <set>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/time/clock.h"
#include "kernels/faulty_backend.h"
#include "proto/wire/chunk.h"
#include "server/record/log.h"
#include "server/rpc/credentials.h"
#include "server/startup_log.h"
#include "server/version.h"

namespace prefilld {
namespace {

constexpr absl::Duration kWatchInterval = absl::Seconds(1);
constexpr absl::Duration kLostDeviceTimeout = absl::Seconds(5);
// Batches of long prompts that may be in progress; shorter ones, as many more as have that room.
constexpr int kBatchesPlanned = 4;
// What waiting prompts may need of KV memory, of what there is: it comes back as they end.
constexpr int64_t kQueuedPools = 4;
constexpr absl::Duration kGoodbye = absl::Milliseconds(100);  // for what others than we answer

absl::Status Explain(const char* what, const absl::Status& status) {
  return absl::Status(status.code(), absl::StrCat(what, ": ", status.message()));
}

void TellNoRoom(Transport transport) {
  Log(Level::kWarning, absl::StrCat(Name(transport), "_not_offered").c_str(),
      {{"message", "for KV caches: there is no room for a segment"}});
}

// Left open, models run on the CPU where the GPU lacks what they need.
absl::StatusOr<std::unique_ptr<Backend>> ChooseBackend(const Config& config) {
  auto backend = CreateBackend(config.backend, config.threads,
                               {.kernels = config.cuda_kernels,
                                .cache_dir = config.cache_dir,
                                .memory_bytes = config.gpu_memory});
  if (!backend.ok() || config.backend != "auto" || config.models.empty()) return backend;
  const absl::Status serves = (*backend)->ops().status();
  if (serves.ok()) return backend;
  Log(Level::kWarning, "models_on_cpu",
      {{"backend", std::string((*backend)->name())}, {"message", std::string(serves.message())}});
  return CreateBackend("cpu", config.threads);
}

}  // namespace

absl::StatusOr<std::unique_ptr<Server>> Server::Start(const Config& config) {
  std::unique_ptr<Server> server(new Server(config));
  if (absl::Status status = server->PrepareGrpc(); !status.ok()) return status;
  auto backend = ChooseBackend(config);
  if (!backend.ok()) return Explain("--backend", backend.status());
  server->backend_ = *std::move(backend);
  FaultyBackend* faulty = nullptr;
  if (const int attends = std::max(config.inject_fault, config.inject_hang); attends > 0) {
    auto fault = config.inject_fault > 0 ? FaultOf(server->backend_->device())
                                         : HangOf(server->backend_->device());
    if (fault == nullptr) {
      return Explain("--inject_fault", absl::UnimplementedError("this backend has none"));
    }
    auto wrapped = std::make_unique<FaultyBackend>(std::move(server->backend_), std::move(fault));
    faulty = wrapped.get();
    server->backend_ = std::move(wrapped);
  }
  if (absl::Status status = server->StartHttp(); !status.ok()) return status;
  if (absl::Status status = server->LoadModels(); !status.ok()) return status;
  if (absl::Status status = server->OpenMedia(); !status.ok()) return status;
  if (absl::Status status = server->TakeKvMemory(); !status.ok()) return status;

  server->leases_ = std::make_unique<LeaseTable>(
      LeaseTable::Events{.ended = [s = server.get()](const LeaseInfo& lease, LeaseEnd why) {
        const char* reason = Metrics::kLeaseEnds[static_cast<int>(why)];
        s->metrics_.LeaseEnded(reason);
        Log(Level::kInfo, "lease_ended",
            {{"request_id", lease.request_id},
             {"generation", lease.generation},
             {"reason", reason}});
        s->prefills_.Remove(lease.owner, lease.request_id, lease.generation);
      }});
  server->engine_ = std::make_unique<Engine>(*server->backend_, server->metrics_);
  if (absl::Status status = server->engine_->Calibrate(!server->models_.empty()); !status.ok()) {
    return Explain("calibration", status);
  }
  if (faulty != nullptr) faulty->Arm(std::max(config.inject_fault, config.inject_hang));
  SchedulerOptions options;
  options.waiting_jobs_max = config.waiting_jobs_max;
  options.attend_bytes_max = config.attend_memory;
  options.measures_again = faulty == nullptr;  // it would be what breaks, or hangs
  if (absl::Status status = server->PlanMemory(options); !status.ok()) return status;
  server->scheduler_ = std::make_unique<Scheduler>(*server->engine_, server->metrics_, options);

  server->built_.Notify();
  if (absl::Status status = server->StartGrpc(); !status.ok()) return status;
  server->watch_ = std::thread([s = server.get()] { s->Watch(); });
  PeerFacts ours;
  for (const auto& [transport, medium] : server->media_) medium->Introduce(&ours);
  Log(Level::kInfo, "serving",
      {{"version", kVersion},
       {"listen", server->grpc_endpoint().ToString()},
       {"http", server->http_->endpoint().ToString()},
       {"backend", std::string(server->backend_->name())},
       {"device", std::string(server->backend_->device().name())},
       {"models", server->models_.size()},
       {"kv_blocks", server->pool_ ? server->pool_->total() : 0},
       {"shm_domain", ours.shm_domain},
       {"cuda_ipc_domain", ours.cuda_ipc_domain},
       {"memory_socket", server->rpc_->memory_socket}});
  for (const auto& [transport, segments] : server->segments_) segments->Fill();
  return server;
}

Server::Server(Config config) : config_(std::move(config)) {}

// Before the models: who waits for the server sees how far it is.
absl::Status Server::StartHttp() {
  metrics_.on_scrape = [this](Metrics& metrics) {
    metrics.log_lines_dropped.Increment(static_cast<double>(LogLinesDropped()) -
                                        metrics.log_lines_dropped.Value());
    for (const Device::Memory& memory : backend_->device().memory()) {
      metrics.SetGpuMemory(memory.kind, memory.bytes);
    }
    metrics.connections.SetDescriptors("connections",
                                       static_cast<int64_t>(metrics.connections.open.Value()),
                                       descriptors_.connections);
    metrics.connections.SetDescriptors("segments", descriptors_.segments.used(),
                                       descriptors_.segments.limit());
    metrics.connections.SetDescriptors("memory", descriptors_.memory.used(),
                                       descriptors_.memory.limit());
    metrics.ready.Set(health_.ready().ok() ? 1 : 0);
    if (!built_.HasBeenNotified()) return;
    metrics.leases_active.Set(static_cast<double>(leases_->active()));
    if (!pool_) return;
    const auto counts = pool_->CountByState();
    for (size_t i = 0; i < counts.size(); ++i) {
      metrics.SetKvBlocks(static_cast<BlockState>(i), counts[i]);
    }
    for (const auto& [transport, segments] : segments_) {
      const auto bytes = segments->CountByState();
      for (size_t i = 0; i < bytes.size(); ++i) {
        metrics.SetSegments(Name(transport), kSegmentStateNames[i], bytes[i]);
      }
    }
  };
  auto http = HttpServer::Start(config_.http, {metrics_, reports_, health_, *access_}, tls_.get());
  if (!http.ok()) return Explain("--http", http.status());
  http_ = *std::move(http);
  return absl::OkStatus();
}

absl::Status Server::LoadModels() {
  for (const ModelSource& source : config_.models) {
    LoadingModel loading(source.name, backend_->device().host_memory(), metrics_);
    auto model = Transformer::Load(source.name, source.directory, *backend_,
                                   [&](uint64_t bytes, uint64_t of) { loading.Tell(bytes, of); });
    if (!model.ok()) {
      return Explain(absl::StrCat("--model=", source.name).c_str(), model.status());
    }
    loading.Done();
    const ModelInfo& info = (*model)->info();
    const AttentionShape shape{info.activations, info.q_heads, info.kv_heads,
                               info.head_dim,    {0, 1},       {0, 1}};
    if (absl::Status status = backend_->Supports(shape, {.method = Method::kDense}); !status.ok()) {
      return Explain(absl::StrCat("--model=", source.name).c_str(), status);
    }
    metrics_.AddModel(source.name);
    models_.emplace(source.name, *std::move(model));
  }
  return absl::OkStatus();
}

// What prompts will need is known now, and taken: a prompt that is admitted does not fail for want
// of it. The CPU's pages are taken from the system at first touch.
absl::Status Server::PlanMemory(SchedulerOptions& options) {
  const ModelInfos infos = Infos();
  int64_t positions = 0;
  for (const ModelInfo* info : infos) positions = std::max(positions, info->max_positions);
  PlanInputs inputs{
      .backend = *backend_,
      .prompt_tokens = config_.prompt_tokens_max.value_or(std::min(kPromptTokens, positions)),
      .batch_tokens = options.batch_tokens_max,
      .batch_jobs = options.waiting_jobs_max,
      .batches = kBatchesPlanned,
      .attend_bytes = config_.attend_memory,
      .free = backend_->device().free_bytes()};
  if (pool_) {
    inputs.kv_block_bytes = limits_.kv.blocks * limits_.kv.block_bytes;
    inputs.kv_segment_bytes = limits_.kv.segment_bytes.value_or(0);
  }
  for (const auto& [name, model] : models_) inputs.models.push_back(model.get());
  const TransportRow* on_device = PooledRow(/*on_device=*/true);
  if (on_device) inputs.kv_device_bytes = config_.kv_device_memory.value_or(0);
  const MemoryPlan asked = prefilld::PlanMemory(inputs);
  if (!models_.empty() && (config_.prompt_tokens_max || asked.fits == 0)) {
    absl::Status status = CheckPromptTokens({.asked = asked.prompt_tokens,
                                             .models = infos,
                                             .kv = limits_.kv,
                                             .retain = false,
                                             .plan = asked});
    if (!status.ok()) {
      TellPlan(asked, metrics_);
      return Explain("--max_prompt_tokens", status);
    }
  }
  inputs.prompt_tokens = asked.fits;
  MemoryPlan plan = prefilld::PlanMemory(inputs);
  if (on_device && !config_.kv_device_memory) {
    inputs.kv_device_bytes = KvDeviceBytes(plan);
    plan = prefilld::PlanMemory(inputs);
  }
  TellPlan(plan, metrics_);
  if (models_.empty() && plan.free && plan.needs() > *plan.free) {
    return absl::ResourceExhaustedError(
        absl::StrCat("--attend_memory: ", FlagSize(plan.needs()), " of gpu memory are needed, ",
                     *plan.free >> 20, "MiB are free; what helps: a smaller --attend_memory"));
  }
  limits_.prompt_tokens_max = plan.prompt_tokens;
  if (!models_.empty()) options.batch_bytes_max = plan.batches;
  if (pool_) options.waiting_blocks_max = kQueuedPools * pool_->total();
  if (on_device && config_.kv_device_memory != 0) {
    MakePool(on_device->transport, inputs.kv_device_bytes);
  }
  TellLowered(infos, limits_, asked);
  TellSmallRegions(infos, limits_);
  return backend_->device().host_memory() ? absl::OkStatus() : engine_->Reserve(plan);
}

// Callers are served without what is not possible here, unless it was asked for by name.
absl::Status Server::OpenMedia() {
  const MediumSite site{backend_->device(), std::make_shared<RegionNames>(), descriptors_.segments};
  for (const TransportRow& row : kTransports) {
    const bool named = config_.transports && config_.transports->count(row.transport) > 0;
    if (row.open != nullptr && (named || !config_.transports)) {
      if (auto medium = row.open(site); medium.ok()) {
        media_[row.transport] = *std::move(medium);
      } else if (named && row.required) {
        return Explain(absl::StrCat("--transports=", row.name).c_str(), medium.status());
      } else if (named || !absl::IsUnimplemented(medium.status())) {
        Log(Level::kWarning, absl::StrCat(row.name, "_not_offered").c_str(),
            {{"message", std::string(medium.status().message())}});
      }
    }
    const bool offered = row.open == nullptr || media_.count(row.transport) > 0;
    metrics_.AddTransport(row.name, offered);
  }
  return media_.empty() ? absl::OkStatus() : OpenMemorySocket(site.names);
}

absl::Status Server::OpenMemorySocket(std::shared_ptr<RegionNames> names) {
  auto socket = DescriptorSocket::Listen(
      {.address = config_.memory_socket.empty() ? "@prefilld-" + boot_id_ : config_.memory_socket,
       .find = [names = std::move(names)](const std::string& name) { return names->HandOut(name); },
       .told =
           [this](DescriptorSocket::Outcome outcome) {
             metrics_.DescriptorAsked(Metrics::kDescriptorOutcomes[static_cast<int>(outcome)]);
           },
       .connections = descriptors_.memory});
  if (!socket.ok()) return Explain("--memory_socket", socket.status());
  memory_socket_ = *std::move(socket);
  return absl::OkStatus();
}

const TransportRow* Server::PooledRow(bool on_device) const {
  if (models_.empty() || backend_->device().host_memory()) return nullptr;
  for (const TransportRow& row : kTransports) {
    const bool fits = row.pooled && row.kv_cache && row.on_device == on_device;
    if (fits && FindMedium(media_, row.transport) != nullptr) return &row;
  }
  return nullptr;
}

void Server::MakePool(Transport transport, uint64_t bytes) {
  auto pool = SegmentPool::Create(*FindMedium(media_, transport), backend_->device(), bytes,
                                  [this] { return !scheduler_->WaitIdle(absl::InfinitePast()); });
  if (pool->bytes() == 0) return TellNoRoom(transport);
  limits_.kv_regions[transport] = pool->bytes();
  segments_[transport] = std::move(pool);
}

// Where host memory is pinned for the device, blocks and segments are memory of their own each:
// half of it is one's. Elsewhere segments have the pages of the blocks that they take.
absl::Status Server::TakeKvMemory() {
  if (models_.empty()) return absl::OkStatus();
  const TransportRow* pooled = PooledRow(/*on_device=*/false);
  const ModelInfos infos = Infos();
  const KvShares kv = limits_.kv = ShareKv(infos, config_.kv_memory, pooled != nullptr);
  for (const ModelInfo* info : infos) {
    if (GeometryOf(*info, 0).TokensInBlocks(kv.blocks, /*retain=*/true) > 0) continue;
    return absl::InvalidArgumentError(absl::StrCat(
        "--kv_memory: ", config_.kv_memory, " bytes hold no prompt of model '", info->name,
        "', not even of one token: --kv_memory=", FlagSize(KvMemoryFor(infos, 1, kv)), " would"));
  }
  for (const auto& [transport, medium] : media_) {
    const TransportRow& row = RowOf(transport);
    if (!row.kv_cache || row.on_device || &row == pooled) continue;  // pools have what they have
    limits_.kv_regions[transport] = config_.kv_memory;
  }
  if (pooled != nullptr) MakePool(pooled->transport, *kv.segment_bytes);
  auto pool = BlockPool::Create(backend_->device(), kv.blocks * kv.block_bytes, kv.block_bytes);
  if (!pool.ok()) return Explain("--kv_memory", pool.status());
  pool_ = *std::move(pool);
  return absl::OkStatus();
}

ModelInfos Server::Infos() const {
  ModelInfos infos;
  for (const auto& [name, model] : models_) infos.push_back(&model->info());
  return infos;
}

// What can be wrong with them is told before models are loaded. Until then nobody listens.
absl::Status Server::PrepareGrpc() {
  if (!config_.tls_cert.empty()) {
    auto tls = TlsFiles::Open({config_.tls_cert, config_.tls_key, config_.tls_client_ca});
    if (!tls.ok()) return tls.status();
    tls_ = *std::move(tls);
  }
  auto access = Access::Open(metrics_, config_.access_policy, !config_.tls_client_ca.empty());
  if (!access.ok()) return Explain("--access_policy", access.status());
  access_ = *std::move(access);
  credentials_ = ServerCredentialsOf(tls_.get(), /*need_certificate=*/!access_->has_policy());
  auto shares = ShareDescriptors(DescriptorLimit(), config_.connections_max);
  if (!shares.ok()) return Explain("--max_connections", shares.status());
  descriptors_ = *std::move(shares);
  auto port = HeldPort::Take(config_.listen);
  if (!port.ok()) return Explain("--listen", port.status());
  held_port_ = *std::move(port);
  return absl::OkStatus();
}

absl::Status Server::StartGrpc() {
  for (const auto& [transport, medium] : media_) limits_.offered.insert(transport);
  limits_.attend_bytes_max = config_.attend_memory;
  limits_.lease_ttl = config_.lease_ttl;
  limits_.lease_ttl_max = config_.lease_ttl_max;
  limits_.device_memory = !backend_->device().host_memory();
  rpc_.reset(new RpcContext{.backend = *backend_,
                            .models = models_,
                            .media = media_,
                            .pool = pool_.get(),
                            .segments = segments_,
                            .leases = *leases_,
                            .scheduler = *scheduler_,
                            .prefills = prefills_,
                            .attends = attends_,
                            .calls = calls_,
                            .sweeper = sweeper_,
                            .reports = reports_,
                            .metrics = metrics_,
                            .access = *access_,
                            .memory = memory_,
                            .transfers = transfers_,
                            .limits = limits_,
                            .waiting_jobs_max = config_.waiting_jobs_max,
                            .upload_timeout = config_.upload_timeout,
                            .transfer_rate_min = config_.transfer_rate_min,
                            .boot_id = boot_id_,
                            .memory_socket = memory_socket_ ? memory_socket_->address() : ""});
  if (absl::Status status = held_port_->Listen(); !status.ok()) return Explain("--listen", status);
  const int connections = descriptors_.connections;
  const ConnectionLimits limits{
      .connections = connections,
      .per_address = config_.connections_per_address.value_or(std::max(1, connections / 2)),
      .new_per_second = static_cast<double>(config_.connection_rate)};
  auto grpc = GrpcServer::Start(*rpc_, health_,
                                {.credentials = credentials_,
                                 .listeners = held_port_->sockets(),
                                 .connections = limits,
                                 .memory_bytes = config_.rpc_memory,
                                 .connection_age = config_.connection_age,
                                 .message_bytes_max = MessageBytesMax(Infos(), limits_),
                                 .reflection = config_.reflection,
                                 .tls = !config_.tls_cert.empty()});
  if (!grpc.ok()) return grpc.status();
  grpc_ = *std::move(grpc);
  health_.Set(Health::kStarting, "");
  return absl::OkStatus();
}

// A lost device is the end of the process, nothing in it can make a new one; and so is a step that
// does not end, nothing can take a kernel from the device.
void Server::Watch() {
  while (!stopping_.Await(SteadyNow() + kWatchInterval)) {
    const std::string_view fault = backend_->device().fault();
    if (!fault.empty()) {
      Log(Level::kError, "device_lost", {{"kind", std::string(fault)}});
      health_.Set(Health::kDeviceLost, "device lost: " + std::string(fault));
      kill(getpid(), SIGTERM);  // main drains
      return;
    }
    const auto stalled = scheduler_->Stalled(config_.stall_timeout, kWatchInterval);
    if (stalled) EndStalled(*stalled);
    CheckModels();
    RefreshCredentials();
  }
}

// Whoever rotates certificates and tokens does not restart us.
void Server::RefreshCredentials() {
  access_->Refresh();
  if (tls_) metrics_.access.stale_tls.Set(tls_->Refresh() ? 0 : 1);
}

// A model whose files have changed is none any more. The others go on, but whoever looks at the
// health is to start another server: a file that is still being written may not be loaded yet.
void Server::CheckModels() {
  for (const auto& [name, model] : models_) {
    const absl::Status files = model->CheckFiles();
    if (!files.ok()) return health_.Set(Health::kModelChanged, std::string(files.message()));
  }
}

// Whoever waits hears UNAVAILABLE when the connections go. A drain would wait for the step.
void Server::EndStalled(const StalledStep& step) {
  // What was enqueued first is waited for; the rest is behind it.
  nlohmann::json parts = nlohmann::json::array();
  for (const StalledStep::Part& part : step.parts) {
    parts.push_back({{"request_ids", part.request_ids},
                     {"model", part.model},
                     {"layer", part.layer ? nlohmann::json(*part.layer) : nlohmann::json()}});
  }
  const nlohmann::json first = parts.empty() ? nlohmann::json::object() : parts[0];
  if (!parts.empty()) parts.erase(0);
  Log(Level::kError, "step_stalled",
      {{"request_ids", first.value("request_ids", nlohmann::json::array())},
       {"model", first.value("model", "")},
       {"layer", first.value("layer", nlohmann::json())},
       {"behind", parts},
       {"seconds", absl::ToDoubleSeconds(step.waited)},
       {"predicted_seconds", absl::ToDoubleSeconds(step.predicted)},
       {"limit", absl::FormatDuration(config_.stall_timeout)},
       {"jobs", "end with the process, as UNAVAILABLE"}});
  health_.Set(Health::kStalled, "a step does not end");
  absl::SleepFor(kWatchInterval);  // for those who watch it
  CloseMedia();
  FlushLog();
  _exit(1);
}

void Server::Drain() {
  // Without a device every job fails at once: only their answers are waited for.
  const SteadyTime deadline =
      SteadyNow() +
      (device_lost() ? std::min(config_.drain_timeout, kLostDeviceTimeout) : config_.drain_timeout);
  Log(Level::kInfo, "draining", {{"leases", leases_->active()}});
  health_.Set(Health::kDraining, "draining");
  scheduler_->Drain();
  calls_.Drain();
  for (const auto& [transport, segments] : segments_) segments->Close();
  const bool idle = scheduler_->WaitIdle(deadline);
  const bool leases_ended = leases_->WaitEmpty(deadline);
  const bool calls_ended = calls_.WaitNone(deadline);  // what still sends its last bytes
  // What is left has no end, such as who watches the health: the word of it is on its way.
  grpc_->Shutdown(std::min(deadline - SteadyNow(), kGoodbye));
  CloseMedia();
  Log(idle && leases_ended && calls_ended ? Level::kInfo : Level::kWarning, "drained",
      {{"idle", idle}, {"leases_ended", leases_ended}, {"calls_ended", calls_ended}});
}

void Server::CloseMedia() {
  for (const auto& [transport, segments] : segments_) segments->Close();
  for (const auto& [transport, medium] : media_) medium->Close();
  if (memory_socket_) memory_socket_->Close();
}

Server::~Server() {
  stopping_.Ring();
  if (watch_.joinable()) watch_.join();
  grpc_.reset();
  // Nobody waits for what they have not begun; what comes later runs where it comes from.
  memory_->Stop();
  transfers_.Stop();
  http_.reset();
  if (leases_) {
    leases_->Stop();  // a lease's end reaches into the scheduler
    leases_->ReleaseAll(LeaseEnd::kAbandoned);
  }
  for (const auto& [transport, segments] : segments_) segments->Stop();  // they ask the scheduler
  scheduler_.reset();  // its sinks reach into what is above it
  CloseMedia();
  memory_socket_.reset();  // peers' shares are not waited for
  media_.clear();
  // gRPC lets go of the last slices in its own time. A pool they point into is rather leaked.
  const SteadyTime deadline = SteadyNow() + absl::Seconds(2);
  bool back = true;
  for (const auto& [transport, segments] : segments_) back &= segments->WaitAllBack(deadline);
  if (pool_ && (!pool_->WaitAllFree(deadline) || !back)) (void)pool_.release();
}

}  // namespace prefilld

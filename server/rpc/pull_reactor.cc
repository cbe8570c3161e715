#include "server/rpc/pull_reactor.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "prefilld/v1/kv_handoff_service.pb.h"
#include "server/record/errors.h"
#include "server/record/log.h"
#include "server/rpc/messages.h"

namespace prefilld {

PullReactor* PullReactor::Start(RpcContext& rpc, grpc::CallbackServerContext* context,
                                const grpc::ByteBuffer& request) {
  std::shared_ptr<PullReactor> reactor(new PullReactor(rpc, context));
  const absl::Status status = reactor->Open(request);
  int ask = -1;
  {
    absl::MutexLock lock(&reactor->mutex_);
    reactor->self_ = reactor;
    if (status.ok()) {
      ask = reactor->Advance();
    } else {
      reactor->End(status, "refused");
    }
  }
  if (ask >= 0) reactor->AskForLayer(ask);
  return reactor.get();
}

PullReactor::PullReactor(RpcContext& rpc, grpc::CallbackServerContext* context)
    : rpc_(rpc),
      context_(context),
      deadline_(DeadlineOf(*context)),
      record_(rpc.metrics, "PullKv") {}

absl::Status PullReactor::Open(grpc::ByteBuffer buffer) {
  v1::PullKvRequest request;
  if (!ParseMessage(&buffer, &request)) {
    return InvalidField("request", "the message is no PullKvRequest");
  }
  absl::MutexLock lock(&mutex_);
  lease_ = request.lease().substr(0, kRequestIdBytesMax);
  if (const TransportRow* row = FindTransportOfWire(request.transport()); row != nullptr) {
    transport_ = row->transport;
  }
  if (!request.boot_id().empty() && request.boot_id() != rpc_.boot_id) {
    return absl::FailedPreconditionError(
        absl::StrCat("the lease is of boot_id ", request.boot_id().substr(0, 64),
                     ", this server's is ", rpc_.boot_id, ": leases do not survive a restart"));
  }
  auto cache = rpc_.leases.Find(request.lease(), request.generation());
  if (!cache.ok()) return cache.status();
  auto range = ValidatePull(request, **cache, rpc_.limits);
  if (!range.ok()) return range.status();
  auto transfer = (*cache)->Open([weak = weak_from_this()] {
    const auto self = weak.lock();
    if (!self) return;
    // The peer takes nothing: only a reset ends the call. OnCancel does the rest.
    absl::MutexLock abort_lock(&self->mutex_);
    if (!self->self_) return;
    self->aborted_ = true;
    self->context_->TryCancel();
  });
  if (!transfer.ok()) return transfer.status();
  cache_ = *std::move(cache);
  transfer_ = *std::move(transfer);
  range_ = *range;
  layer_ = range_.first_layer;
  tensor_ = range_.tensor;
  offset_ = range_.byte_offset;
  tensor_bytes_ = range_.form.tensor_bytes(cache_->geometry());
  if (offset_ == tensor_bytes_) {  // resumed at a tensor's end: that is the next one's start
    offset_ = 0;
    if (++tensor_ == 2) {
      tensor_ = 0;
      ++layer_;
    }
  }
  // Who starts here has all before it: a write that broke after the last byte had arrived must not
  // keep a layer of a streamed cache for ever.
  for (int layer = std::max(0, layer_ - 2); layer < layer_; ++layer) cache_->Delivered(layer);
  return absl::OkStatus();
}

void PullReactor::AskForLayer(int layer) {
  std::shared_ptr<KvCache> cache;
  {
    absl::MutexLock lock(&mutex_);
    cache = cache_;
  }
  if (!cache) return;  // done meanwhile
  cache->WhenReady(layer, [self = shared_from_this()](auto pin) { self->OnLayer(std::move(pin)); });
}

void PullReactor::OnLayer(absl::StatusOr<std::shared_ptr<const KvCache::Pin>> pin) {
  int ask = -1;
  {
    absl::MutexLock lock(&mutex_);
    if (ended_) return;
    if (!pin.ok()) {
      const bool refused = absl::IsFailedPrecondition(pin.status());
      return End(pin.status(), refused ? "refused" : "computation");
    }
    pin_ = *std::move(pin);
    ask = Advance();
  }
  if (ask >= 0) AskForLayer(ask);
}

int PullReactor::Advance() {
  int ask = -1;
  while (!ended_) {
    if (!next_ && layer_ < range_.end_layer) {
      if (pin_) {
        next_ = Encode();
      } else if (!asked_) {
        asked_ = true;
        ask = layer_;
      }
    }
    if (writing_) break;
    if (next_) {
      write_ = *std::exchange(next_, std::nullopt);
      writing_ = true;
      StartWrite(&write_.message);
      continue;  // make the next one ready
    }
    if (layer_ >= range_.end_layer) End(absl::OkStatus(), nullptr);
    break;
  }
  return ask;
}

PullReactor::Chunk PullReactor::Encode() {
  const uint64_t bytes = std::min(range_.chunk_bytes, tensor_bytes_ - offset_);
  ChunkHeader header;
  header.tensor_index = static_cast<uint32_t>(tensor_);
  header.layer = static_cast<uint32_t>(layer_);
  header.byte_offset = offset_;
  header.last = offset_ + bytes == tensor_bytes_;
  Chunk chunk;
  chunk.message = RowOf(transport_).open != nullptr ? Place(header) : Bytes(header, bytes);
  chunk.payload_bytes = bytes;
  offset_ += bytes;
  if (!header.last) return chunk;
  offset_ = 0;
  if (++tensor_ < 2) return chunk;
  chunk.ends_layer = layer_++;
  tensor_ = 0;
  pin_.reset();  // the slices hold it now
  asked_ = false;
  return chunk;
}

grpc::ByteBuffer PullReactor::Bytes(ChunkHeader header, size_t bytes) {
  const KvRange range{tensor_ == 1, offset_, bytes};
  const auto& [layout, dtype] = range_.form;
  std::vector<grpc::Slice> payload;
  if (dtype == cache_->geometry().dtype && layout->spans != nullptr) {
    for (const ByteSpan& span : layout->spans(*pin_, range)) {
      header.crc32c = Crc32c(header.crc32c, span.data, span.bytes);
      payload.push_back(SliceOf(span.data, span.bytes, pin_));
    }
  } else {
    const std::shared_ptr<std::byte[]> converted(new std::byte[bytes]);
    layout->convert(*pin_, dtype, range, converted.get());
    header.crc32c = Crc32c(0, converted.get(), bytes);
    payload.push_back(SliceOf(converted.get(), bytes, converted));
  }
  return EncodeChunk(header, payload, kBareChunk);
}

// The whole tensor, which is readable from now until the cache is freed.
grpc::ByteBuffer PullReactor::Place(const ChunkHeader& header) {
  v1::TensorChunk chunk;
  chunk.set_tensor_index(header.tensor_index);
  chunk.set_layer(header.layer);
  chunk.set_last(header.last);
  *chunk.mutable_buffer() = BufferIn(
      *pin_->region(), cache_->geometry().region_offset(layer_, tensor_ == 1), tensor_bytes_);
  return EncodeMessage(chunk);
}

void PullReactor::OnWriteDone(bool ok) {
  std::shared_ptr<KvCache> cache;
  int delivered = -1, ask = -1;
  {
    absl::MutexLock lock(&mutex_);
    writing_ = false;
    if (ended_) return;
    if (!ok) return End(WhyCancelled(deadline_), "cancelled");
    bytes_ += write_.payload_bytes;
    rpc_.metrics.HandoffBytes(Name(transport_), write_.payload_bytes);
    transfer_->Progress();
    delivered = write_.ends_layer;
    cache = cache_;
    write_ = Chunk();
    ask = Advance();
  }
  if (delivered >= 0) cache->Delivered(delivered);
  if (ask >= 0) AskForLayer(ask);
}

void PullReactor::OnCancel() {
  absl::MutexLock lock(&mutex_);
  if (aborted_) {
    return End(absl::AbortedError("the lease has ended and the pull made no progress"), "stalled");
  }
  const absl::Status why = WhyCancelled(deadline_);
  End(why, absl::IsDeadlineExceeded(why) ? "deadline" : "cancelled");
}

void PullReactor::End(const absl::Status& status, const char* failure) {
  if (ended_) return;
  ended_ = true;
  const absl::Duration seconds = record_.age();
  if (status.ok()) {
    rpc_.metrics.HandoffFinished(Name(transport_), absl::ToDoubleSeconds(seconds));
  } else {
    rpc_.metrics.HandoffFailed(Name(transport_), failure);
  }
  const grpc::Status wire = record_.End(status);
  Log(status.ok() ? Level::kInfo : Level::kWarning, "pull_finished",
      {{"request_id", lease_},
       {"transport", Name(transport_)},
       {"code", CodeName(wire.error_code())},
       {"message", wire.error_message()},
       {"bytes", bytes_},
       {"seconds", absl::ToDoubleSeconds(seconds)}});
  Finish(wire);
}

// Lets go of the cache outside the lock: its callbacks may come back to us.
void PullReactor::OnDone() {
  std::shared_ptr<PullReactor> self;
  std::shared_ptr<KvCache> cache;
  std::unique_ptr<KvCache::Transfer> transfer;
  std::shared_ptr<const KvCache::Pin> pin;
  std::optional<Chunk> next;
  Chunk write;
  absl::MutexLock lock(&mutex_);
  self.swap(self_);
  cache.swap(cache_);
  transfer.swap(transfer_);
  pin.swap(pin_);
  next.swap(next_);
  std::swap(write, write_);
}

}  // namespace prefilld

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
  absl::MutexLock lock(&reactor->mutex_);
  reactor->self_ = reactor;
  if (status.ok()) {
    reactor->Schedule();
  } else {
    reactor->End(status, "refused");
  }
  return reactor.get();
}

PullReactor::PullReactor(RpcContext& rpc, grpc::CallbackServerContext* context)
    : rpc_(rpc),
      context_(context),
      deadline_(DeadlineOf(*context)),
      record_(rpc, *context, Rpc::kPullKv) {}

absl::Status PullReactor::Open(const grpc::ByteBuffer& bytes) {
  v1::PullKvRequest request;
  if (!record_.caller().ok()) return record_.caller().status();
  if (absl::Status status = Parse(bytes, &request); !status.ok()) return status;
  absl::MutexLock lock(&mutex_);
  if (const TransportRow* row = FindTransportOfWire(request.transport()); row != nullptr) {
    transport_ = row->transport;
  }
  if (!request.boot_id().empty() && request.boot_id() != rpc_.boot_id) {
    return absl::FailedPreconditionError(
        absl::StrCat("the lease is of boot_id ", request.boot_id().substr(0, 64),
                     ", this server's is ", rpc_.boot_id, ": leases do not survive a restart"));
  }
  auto found =
      FindLease(rpc_, Rpc::kPullKv, *record_.caller(), request.lease(), request.generation());
  if (!found.ok()) return found.status();
  request_id_ = std::move(found->request_id);
  auto range = ValidatePull(request, *found->cache, rpc_.limits);
  if (!range.ok()) return range.status();
  const auto abort = [weak = weak_from_this()] {
    const auto self = weak.lock();
    if (!self) return;
    // The peer takes nothing: only a reset ends the call. OnCancel does the rest.
    absl::MutexLock abort_lock(&self->mutex_);
    if (!self->self_) return;
    self->aborted_ = true;
    self->context_->TryCancel();
  };
  auto transfer = found->cache->Open(abort);
  if (!transfer.ok()) return transfer.status();
  cache_ = std::move(found->cache);
  transfer_ = *std::move(transfer);
  range_ = *range;
  position_ = {range_.first_layer, range_.tensor, range_.byte_offset};
  tensor_bytes_ = range_.form.tensor_bytes(cache_->geometry());
  if (position_.offset ==
      tensor_bytes_) {  // resumed at a tensor's end: that is the next one's start
    position_.offset = 0;
    if (++position_.tensor == 2) {
      position_.tensor = 0;
      ++position_.layer;
    }
  }
  // Who starts here has all before it: a write that broke after the last byte had arrived must not
  // keep a layer of a streamed cache for ever.
  for (int layer = std::max(0, position_.layer - 2); layer < position_.layer; ++layer) {
    cache_->Delivered(layer);
  }
  return absl::OkStatus();
}

void PullReactor::Schedule() {
  if (running_ || ended_) return;  // it looks again before it rests
  running_ = true;
  rpc_.transfers.Post([self = shared_from_this()] { self->Run(); });
}

// Whoever commits the layer only posts.
void PullReactor::AskForLayer(int layer, std::shared_ptr<KvCache::Transfer> transfer) {
  transfer->WhenReady(layer, [weak = weak_from_this(), &pool = rpc_.transfers](auto pin) {
    pool.Post([weak, pin = std::move(pin)] {
      if (const auto self = weak.lock()) self->OnLayer(pin);
    });
  });
}

void PullReactor::OnLayer(const absl::StatusOr<std::shared_ptr<const KvCache::Pin>>& pin) {
  absl::MutexLock lock(&mutex_);
  if (ended_) return;
  if (!pin.ok()) {
    const bool refused = absl::IsFailedPrecondition(pin.status());
    return End(pin.status(), refused ? "refused" : "computation");
  }
  pin_ = *pin;
  Schedule();
}

// Makes the next chunk and starts the next write, as far as both are possible. Chunks are made
// outside the lock, by nobody else meanwhile.
void PullReactor::Run() {
  mutex_.Lock();
  while (!ended_) {
    if (next_ && !writing_) {
      write_ = *std::exchange(next_, std::nullopt);
      writing_ = true;
      StartWrite(&write_.message);
    } else if (!next_ && pin_ && position_.layer < range_.end_layer) {
      const Position from = position_;
      const std::shared_ptr<const KvCache::Pin> pin = pin_;
      mutex_.Unlock();
      Chunk chunk = Encode(from, pin);
      mutex_.Lock();
      if (chunk.ends_layer >= 0) {
        pin_.reset();  // the slices hold it now
        asked_ = false;
      }
      position_ = chunk.end;
      next_ = std::move(chunk);
    } else if (!next_ && !asked_ && position_.layer < range_.end_layer) {
      asked_ = true;
      const int layer = position_.layer;
      std::shared_ptr<KvCache::Transfer> transfer = transfer_;
      mutex_.Unlock();
      AskForLayer(layer, std::move(transfer));
      mutex_.Lock();
    } else {
      if (!next_ && !writing_ && position_.layer >= range_.end_layer) {
        End(absl::OkStatus(), nullptr);
      }
      break;
    }
  }
  running_ = false;
  mutex_.Unlock();
}

PullReactor::Chunk PullReactor::Encode(const Position& from,
                                       const std::shared_ptr<const KvCache::Pin>& pin) const {
  const uint64_t bytes = std::min(range_.chunk_bytes, tensor_bytes_ - from.offset);
  ChunkHeader header;
  header.tensor_index = static_cast<uint32_t>(from.tensor);
  header.layer = static_cast<uint32_t>(from.layer);
  header.byte_offset = from.offset;
  header.last = from.offset + bytes == tensor_bytes_;
  Chunk chunk;
  chunk.message =
      RowOf(range_.transport).open != nullptr ? Place(header, *pin) : Bytes(header, bytes, pin);
  chunk.payload_bytes = bytes;
  chunk.end = from;
  chunk.end.offset += bytes;
  if (!header.last) return chunk;
  chunk.end.offset = 0;
  if (++chunk.end.tensor < 2) return chunk;
  chunk.end.tensor = 0;
  chunk.ends_layer = chunk.end.layer++;
  return chunk;
}

grpc::ByteBuffer PullReactor::Bytes(ChunkHeader header, size_t bytes,
                                    const std::shared_ptr<const KvCache::Pin>& pin) const {
  const KvRange range{header.tensor_index == 1, header.byte_offset, bytes};
  const auto& [layout, dtype] = range_.form;
  std::vector<grpc::Slice> payload;
  if (dtype == pin->geometry().dtype && layout->spans != nullptr) {
    for (const ByteSpan& span : layout->spans(*pin, range)) {
      header.crc32c = Crc32c(header.crc32c, span.data, span.bytes);
      payload.push_back(SliceOf(span.data, span.bytes, pin));
    }
  } else {
    const std::shared_ptr<std::byte[]> converted(new std::byte[bytes]);
    layout->convert(*pin, dtype, range, converted.get());
    header.crc32c = Crc32c(0, converted.get(), bytes);
    payload.push_back(SliceOf(converted.get(), bytes, converted));
  }
  return EncodeChunk(header, payload, kBareChunk);
}

// The whole tensor, which is readable from now until the cache is freed.
grpc::ByteBuffer PullReactor::Place(const ChunkHeader& header, const KvCache::Pin& pin) const {
  v1::TensorChunk chunk;
  chunk.set_tensor_index(header.tensor_index);
  chunk.set_layer(header.layer);
  chunk.set_last(header.last);
  const uint64_t offset = pin.geometry().region_offset(pin.layer(), header.tensor_index == 1);
  *chunk.mutable_buffer() = BufferAt(pin.region()->address(), offset, tensor_bytes_);
  return EncodeMessage(chunk);
}

void PullReactor::OnWriteDone(bool ok) {
  std::shared_ptr<KvCache> cache;
  int delivered = -1;
  {
    absl::MutexLock lock(&mutex_);
    writing_ = false;
    if (ended_) return;
    if (!ok) return EndCancelled();
    bytes_ += write_.payload_bytes;
    rpc_.metrics.HandoffBytes(Name(transport_), write_.payload_bytes);
    transfer_->Progress();
    delivered = write_.ends_layer;
    cache = cache_;
    write_ = Chunk();
    Schedule();
  }
  if (delivered >= 0) cache->Delivered(delivered);
}

void PullReactor::OnCancel() {
  absl::MutexLock lock(&mutex_);
  EndCancelled();
}

// A write that fails may come before the word of the cancellation that it fails for.
void PullReactor::EndCancelled() {
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
  if (!record_.caller().ok()) return Finish(wire);  // access has its line
  Log(status.ok() ? Level::kInfo : Level::kWarning, "pull_finished",
      {{"request_id", request_id_},
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
  std::shared_ptr<KvCache::Transfer> transfer;
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

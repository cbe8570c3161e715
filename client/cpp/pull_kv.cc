// PrefillClient::PullKv: a raw stream of chunks, and the position to resume at when it breaks.
#include <grpcpp/support/sync_stream.h>

#include <optional>

#include "absl/strings/str_cat.h"
#include "client/cpp/client.h"
#include "client/cpp/errors.h"
#include "client/cpp/stubs.h"

namespace prefilld::client {
namespace {

using RawReader = grpc::ClientReader<grpc::ByteBuffer>;

// What has arrived, over all tries.
class Pull {
 public:
  explicit Pull(const PullCall& call)
      : call_(call),
        layer_(call.first_layer),
        end_layer_(call.layer_count == 0 ? call.lease.layers()
                                         : call.first_layer + call.layer_count) {}

  bool complete() const { return layer_ >= end_layer_; }

  v1::PullKvRequest NextRequest() const {
    v1::PullKvRequest request;
    request.set_lease(call_.lease.name());
    request.set_generation(call_.lease.generation());
    request.set_boot_id(call_.lease.boot_id());
    if (call_.data_type != v1::DATA_TYPE_UNSPECIFIED) {
      request.mutable_layout()->set_data_type(call_.data_type);
    }
    request.set_first_layer(layer_);
    request.set_layer_count(end_layer_ - layer_);
    request.set_resume_tensor_index(tensor_);
    request.set_resume_byte_offset(receiver_.has_value() ? receiver_->received() : 0);
    return request;
  }

  absl::Status Add(const grpc::ByteBuffer& buffer) {
    const auto chunk = ParseChunk(buffer, kBareChunk);
    if (!chunk.ok()) return absl::DataLossError(chunk.status().message());
    if (complete() || chunk->header.layer != layer_ || chunk->header.tensor_index != tensor_) {
      return absl::DataLossError(absl::StrCat(
          "chunk of layer ", chunk->header.layer, " tensor ", chunk->header.tensor_index,
          ", expected layer ", layer_, " tensor ", tensor_, " of ", end_layer_, " layers"));
    }
    if (!receiver_.has_value()) {
      const auto place = call_.destination(layer_, static_cast<int>(tensor_));
      if (!place.ok()) return place.status();
      receiver_.emplace(*place, call_.tensor_bytes);
    }
    const absl::Status status = receiver_->Add(*chunk);
    if (status.ok() && receiver_->complete()) NextTensor();
    return status;
  }

 private:
  void NextTensor() {
    receiver_.reset();
    tensor_ = 1 - tensor_;
    if (tensor_ == 1) return;
    if (call_.on_layer) call_.on_layer(layer_);
    ++layer_;
  }

  const PullCall& call_;
  uint32_t layer_;
  uint32_t end_layer_;
  uint32_t tensor_ = 0;                     // 0 K, 1 V
  std::optional<TensorReceiver> receiver_;  // of that tensor, once its first chunk is there
};

}  // namespace

absl::Status PrefillClient::PullKv(const PullCall& call, const CallOptions& options) {
  if (call.first_layer >= call.lease.layers() ||
      call.layer_count > call.lease.layers() - call.first_layer) {
    return absl::InvalidArgumentError(absl::StrCat("layers ", call.first_layer, " + ",
                                                   call.layer_count, " of a lease with ",
                                                   call.lease.layers()));
  }
  const grpc::internal::RpcMethod method("/prefilld.v1.KvHandoffService/PullKv",
                                         grpc::internal::RpcMethod::SERVER_STREAMING);
  Pull pull(call);
  return Run(options, [&](Try& current, Stubs& stubs) -> absl::Status {
    if (pull.complete()) return absl::OkStatus();  // only the stream's end was lost
    const std::unique_ptr<RawReader> stream(
        grpc::internal::ClientReaderFactory<grpc::ByteBuffer>::Create(
            stubs.channel.get(), method, &current.context, pull.NextRequest()));
    grpc::ByteBuffer buffer;
    absl::Status ours;
    while (ours.ok() && stream->Read(&buffer)) {
      ours = pull.Add(buffer);
      current.progressed |= ours.ok();
    }
    if (!ours.ok()) current.context.TryCancel();
    const absl::Status theirs = FromGrpc(stream->Finish());
    if (!ours.ok()) return ours;
    if (theirs.ok() && !pull.complete()) {
      return absl::DataLossError("the server ended the pull before the last layer was complete");
    }
    return theirs;
  });
}

}  // namespace prefilld::client

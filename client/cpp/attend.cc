// PrefillClient::Attend: header, admission, chunks up; specs, chunks, summary down. The stream is
// raw (ByteBuffer): tensor bytes go from the caller's memory to the transport and from the
// transport to the caller's memory, with no protobuf message in between.
#include <grpcpp/support/sync_stream.h>

#include <algorithm>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "client/cpp/client.h"
#include "client/cpp/errors.h"
#include "client/cpp/stubs.h"

namespace prefilld::client {
namespace {

using RawStream = grpc::ClientReaderWriter<grpc::ByteBuffer, grpc::ByteBuffer>;

// Larger chunks cost less per byte (headers, system calls), so the largest the contract allows.
constexpr uint64_t kChunkBytes = kMaxChunkBytes;

absl::Status UnexpectedPart(const v1::AttendResponse& part) {
  return absl::DataLossError(
      absl::StrCat("the server sent part ", part.part_case(), " of AttendResponse out of turn"));
}

// One try. Its methods return an error of ours (then the call must be cancelled); when the stream
// ends early they return OK and the stream's own status says why.
class AttendTry {
 public:
  AttendTry(const AttendCall& call, const std::vector<uint64_t>& input_bytes, RawStream& stream)
      : call_(call), input_bytes_(input_bytes), stream_(stream) {
    for (uint64_t bytes : input_bytes) upload_bytes_ += bytes;
  }

  absl::Status Run(const v1::AttendRequest& header) {
    if (!stream_.Write(EncodeMessage(header))) return absl::OkStatus();
    // Not one tensor byte leaves before the server has made room for all of them.
    grpc::ByteBuffer buffer;
    if (!stream_.Read(&buffer)) return absl::OkStatus();
    v1::AttendResponse first;
    if (!ParseMessage(&buffer, &first) || !first.has_admission()) return UnexpectedPart(first);
    return Upload() ? Download() : absl::OkStatus();
  }

  bool complete() const {
    return std::all_of(outputs_.begin(), outputs_.end(),
                       [](const TensorReceiver& output) { return output.complete(); });
  }
  std::optional<v1::Summary>& summary() { return summary_; }

 private:
  // False when the stream broke.
  bool Upload() {
    uint64_t sent = 0;
    for (size_t i = 0; i < call_.inputs.size(); ++i) {
      const InputTensor& input = call_.inputs[i];
      const auto* data = static_cast<const uint8_t*>(input.data);
      for (uint64_t offset = 0; offset < input_bytes_[i]; offset += kChunkBytes) {
        const uint64_t size = std::min(kChunkBytes, input_bytes_[i] - offset);
        const ChunkHeader header = {.tensor_index = static_cast<uint32_t>(i),
                                    .byte_offset = offset,
                                    .crc32c = Crc32c(0, data + offset, size),
                                    .last = offset + size == input_bytes_[i]};
        const grpc::Slice payload = SliceOf(data + offset, size, input.owner);
        if (!stream_.Write(EncodeChunk(header, {payload}, kAttendChunk))) return false;
        sent += size;
        if (call_.on_upload) call_.on_upload(sent, upload_bytes_);
      }
    }
    return stream_.WritesDone();
  }

  absl::Status Download() {
    grpc::ByteBuffer buffer;
    while (stream_.Read(&buffer)) {
      const absl::Status status =
          FirstField(buffer) == kAttendChunk ? AddChunk(buffer) : AddMessage(&buffer);
      if (!status.ok()) return status;
    }
    return absl::OkStatus();
  }

  absl::Status AddChunk(const grpc::ByteBuffer& buffer) {
    const auto chunk = ParseChunk(buffer, kAttendChunk);
    if (!chunk.ok()) return absl::DataLossError(chunk.status().message());
    if (chunk->header.tensor_index >= outputs_.size()) {
      return absl::DataLossError(
          absl::StrCat("chunk of tensor ", chunk->header.tensor_index, " of ", outputs_.size()));
    }
    const absl::Status status = outputs_[chunk->header.tensor_index].Add(*chunk);
    download_ += chunk->payload_bytes;
    if (status.ok() && call_.on_download) call_.on_download(download_, download_bytes_);
    return status;
  }

  absl::Status AddMessage(grpc::ByteBuffer* buffer) {
    v1::AttendResponse part;
    if (!ParseMessage(buffer, &part)) return absl::DataLossError("malformed AttendResponse");
    if (part.has_outputs() && outputs_.empty()) return Allocate(part.outputs());
    if (part.has_summary() && !summary_.has_value()) {
      summary_ = std::move(*part.mutable_summary());
      return absl::OkStatus();
    }
    return UnexpectedPart(part);
  }

  absl::Status Allocate(const v1::OutputSpecs& outputs) {
    const std::vector<v1::TensorSpec> specs(outputs.tensors().begin(), outputs.tensors().end());
    std::vector<uint64_t> sizes;
    for (const v1::TensorSpec& spec : specs) {
      const auto bytes = TensorBytes(spec);
      if (!bytes.ok()) return absl::DataLossError(bytes.status().message());
      sizes.push_back(*bytes);
      download_bytes_ += *bytes;
    }
    const auto places = call_.allocate(specs);
    if (!places.ok()) return places.status();
    for (size_t i = 0; i < specs.size(); ++i) outputs_.emplace_back((*places)[i], sizes[i]);
    return absl::OkStatus();
  }

  const AttendCall& call_;
  const std::vector<uint64_t>& input_bytes_;
  RawStream& stream_;
  uint64_t upload_bytes_ = 0, download_bytes_ = 0, download_ = 0;
  std::vector<TensorReceiver> outputs_;
  std::optional<v1::Summary> summary_;
};

}  // namespace

absl::StatusOr<v1::Summary> PrefillClient::Attend(const AttendCall& call,
                                                  const CallOptions& options) {
  v1::AttendRequest request;
  v1::AttendHeader& header = *request.mutable_header();
  header = call.header;
  if (header.request_id().empty()) header.set_request_id(NewRequestId());
  std::vector<uint64_t> input_bytes;
  for (const InputTensor& input : call.inputs) {
    const auto bytes = TensorBytes(input.spec);
    if (!bytes.ok()) return bytes.status();
    input_bytes.push_back(*bytes);
    *header.add_tensors() = input.spec;
  }

  const grpc::internal::RpcMethod method("/prefilld.v1.PrefillService/Attend",
                                         grpc::internal::RpcMethod::BIDI_STREAMING);
  std::optional<v1::Summary> summary;
  const absl::Status status = Run(options, [&](Try& current, Stubs& stubs) -> absl::Status {
    const std::unique_ptr<RawStream> stream(
        grpc::internal::ClientReaderWriterFactory<grpc::ByteBuffer, grpc::ByteBuffer>::Create(
            stubs.channel.get(), method, &current.context));
    AttendTry attend(call, input_bytes, *stream);
    const absl::Status ours = attend.Run(request);
    if (!ours.ok()) current.context.TryCancel();
    const absl::Status theirs = FromGrpc(stream->Finish());
    if (!ours.ok()) return ours;
    if (!theirs.ok()) return theirs;
    if (!attend.summary().has_value() || !attend.complete()) {
      return absl::DataLossError("the server ended the call before the outputs were complete");
    }
    summary = std::move(attend.summary());
    return absl::OkStatus();
  });
  if (!status.ok()) return status;
  return *std::move(summary);
}

}  // namespace prefilld::client

// The tensors of an Attend, sent in chunks that are right or wrong in one way: beside a plain
// account of what has arrived.
#include <fuzzer/FuzzedDataProvider.h>

#include <cstring>
#include <string>
#include <vector>

#include "server/rpc/upload.h"
#include "tests/fuzz/property.h"

namespace prefilld {
namespace {

constexpr size_t kTensorBytesMax = 512;

struct Sender {
  std::vector<std::string> tensors;
  size_t tensor = 0, offset = 0;  // what comes next

  bool complete() const { return tensor == tensors.size(); }
  void Advance(size_t bytes) {
    offset += bytes;
    if (offset == tensors[tensor].size()) ++tensor, offset = 0;
  }
};

// The chunk of `bytes` that comes next.
ChunkHeader Next(const Sender& sender, const std::string& payload) {
  return {.tensor_index = static_cast<uint32_t>(sender.tensor),
          .byte_offset = sender.offset,
          .crc32c = Crc32c(0, payload.data(), payload.size()),
          .last = sender.offset + payload.size() == sender.tensors[sender.tensor].size()};
}

// Makes it another one; false when this left it as it was.
bool Spoil(FuzzedDataProvider& input, ChunkHeader* header, std::string* payload) {
  switch (input.ConsumeIntegralInRange(0, 4)) {
    case 0: {
      const auto index = input.ConsumeIntegral<uint32_t>();
      return std::exchange(header->tensor_index, index) != index;
    }
    case 1: {
      const auto offset = input.ConsumeIntegral<uint64_t>();
      return std::exchange(header->byte_offset, offset) != offset;
    }
    case 2: {
      const auto crc = input.ConsumeIntegral<uint32_t>();
      return std::exchange(header->crc32c, crc) != crc;
    }
    case 3:
      header->last = !header->last;
      return true;
    default:
      payload->clear();
      return true;
  }
}

ParsedChunk ByWire(const ChunkHeader& header, const std::string& payload) {
  std::vector<grpc::Slice> slices;
  for (size_t begin = 0; begin < payload.size(); begin += 100) {
    slices.emplace_back(payload.data() + begin, std::min<size_t>(100, payload.size() - begin));
  }
  auto parsed = ParseChunk(EncodeChunk(header, slices, kAttendChunk), kAttendChunk);
  Promise(parsed.ok(), "what is encoded can be read", parsed.status().ToString());
  return *std::move(parsed);
}

}  // namespace
}  // namespace prefilld

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace prefilld;  // NOLINT
  FuzzedDataProvider input(data, size);
  Sender sender;
  std::vector<std::vector<char>> places;  // of exactly their size, so that a byte too far is seen
  std::vector<Upload::Tensor> tensors;
  uint64_t total = 0;
  sender.tensors.resize(input.ConsumeIntegralInRange<size_t>(1, 4));
  for (std::string& tensor : sender.tensors) {
    tensor.resize(input.ConsumeIntegralInRange<size_t>(1, kTensorBytesMax));
    for (size_t i = 0; i < tensor.size(); ++i) tensor[i] = static_cast<char>(i * 7 + total);
    total += tensor.size();
    tensors.push_back({places.emplace_back(tensor.size()).data(), tensor.size()});
  }
  Upload upload(tensors);
  Promise(upload.total_bytes() == total && !upload.complete(), "an upload begins with nothing");

  uint64_t received = 0;
  while (input.remaining_bytes() > 0) {
    if (sender.complete()) {
      Promise(
          absl::IsDataLoss(upload.Take(ByWire({}, "more"))) && absl::IsDataLoss(upload.Written()),
          "nothing comes behind the last chunk");
      break;
    }
    const std::string& tensor = sender.tensors[sender.tensor];
    const size_t bytes = input.ConsumeIntegralInRange<size_t>(1, tensor.size() - sender.offset);
    std::string payload = tensor.substr(sender.offset, bytes);
    ChunkHeader header = Next(sender, payload);
    if (input.ConsumeProbability<float>() > 0.9f && Spoil(input, &header, &payload)) {
      const absl::Status status = upload.Take(ByWire(header, payload));
      Promise(absl::IsDataLoss(status), "a wrong chunk is DATA_LOSS", status.ToString());
      Promise(upload.received_bytes() == received, "a wrong chunk does not count");
      return 0;
    }
    const absl::Status status = upload.Take(ByWire(header, payload));
    Promise(status.ok(), "a right chunk is taken", status.ToString());
    sender.Advance(bytes);
    received += bytes;
    Promise(upload.received_bytes() == received && upload.complete() == sender.complete(),
            "bytes are counted once");
  }
  for (size_t i = 0; i < sender.tensor; ++i) {
    Promise(std::memcmp(places[i].data(), sender.tensors[i].data(), places[i].size()) == 0,
            "what is complete is what was sent");
  }
  return 0;
}

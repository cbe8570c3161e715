// The table of transports: how tensors reach their reader, sent or in memory that the reader opens.
// Whatever asks about a transport (flags, admission, negotiation, metrics, logs) searches this
// table, and what has no row is refused. A new one is a row, a Medium, a value in the proto.
#pragma once

#include <array>
#include <map>
#include <memory>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "kernels/backend.h"
#include "server/descriptors.h"
#include "server/transport/region.h"
#include "server/transport/region_names.h"

namespace prefilld {

// What a medium is opened on.
struct MediumSite {
  Device& device;  // that the server computes on; outlives the medium
  std::shared_ptr<RegionNames> names;
  DescriptorShare segments = DescriptorShare();
};

struct TransportRow {
  Transport transport;
  const char* name;  // in flags, metrics and logs
  int wire;          // its value of v1::Transport
  // What it may carry.
  bool tensors;   // of an Attend
  bool kv_cache;  // in the Hugging Face layout
  // Its regions lie in the device's memory, and are computed in. A region in the host's is copied
  // to and from a device that has memory of its own (Staging).
  bool on_device;
  // Its regions take long to make, more so where the device has them pinned: where it has memory of
  // its own, a pool of them is kept ready for caches, which lie nowhere else.
  bool pooled;
  // Asked for by name and not possible is no start. What is not is served without, with a warning.
  bool required;
  // At start. UNIMPLEMENTED: not on this device, which nobody need be told; UNAVAILABLE and others
  // say why not. Null: bytes are sent, there are no regions, and it is always there.
  absl::StatusOr<std::unique_ptr<Medium>> (*open)(const MediumSite& site);
};

absl::StatusOr<std::unique_ptr<Medium>> OpenPosixShm(const MediumSite& site);
absl::StatusOr<std::unique_ptr<Medium>> OpenCudaIpc(const MediumSite& site);

// The further down, the better for a caller that can have either.
inline constexpr std::array<TransportRow, 3> kTransports = {{
    {.transport = Transport::kGrpc,
     .name = "grpc",
     .wire = 1,
     .tensors = true,
     .kv_cache = true,
     .on_device = false,
     .pooled = false,
     .required = true,
     .open = nullptr},
    {.transport = Transport::kPosixShm,
     .name = "posix_shm",
     .wire = 2,
     .tensors = true,
     .kv_cache = true,
     .on_device = false,
     .pooled = true,
     .required = false,
     .open = OpenPosixShm},
    {.transport = Transport::kCudaIpc,
     .name = "cuda_ipc",
     .wire = 3,
     .tensors = true,
     .kv_cache = true,
     .on_device = true,
     .pooled = true,
     .required = true,
     .open = OpenCudaIpc},
}};

const TransportRow& RowOf(Transport transport);
inline const char* Name(Transport transport) { return RowOf(transport).name; }
// Null when no row has it.
const TransportRow* FindTransport(absl::string_view name);
const TransportRow* FindTransportOfWire(int wire);

// The media that this process has opened, by transport.
using Media = std::map<Transport, std::unique_ptr<Medium>>;
inline Medium* FindMedium(const Media& media, Transport transport) {  // null: not offered
  const auto found = media.find(transport);
  return found == media.end() ? nullptr : found->second.get();
}

}  // namespace prefilld

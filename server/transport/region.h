// Memory that a caller opens instead of being sent bytes, and the media that such memory comes
// from. A region is made by the server and belongs to one KV cache or one Attend. Peers open it by
// a descriptor that a socket of ours hands out (descriptor_socket) to those who know its name
// (region_names). The connection that a peer got it by says that the peer has it open: until all
// have hung up, or died, the region is in use, counted, and nobody else's.
//
// A peer that may write may do so at any time: nothing read from such a region may be used as an
// index or a size. Threads: any.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace prefilld {

// How tensors reach their reader: sent, or in a region that it opens. transports.h has the table.
enum class Transport { kGrpc, kPosixShm, kCudaIpc };

// Tensors in a region start at multiples of this.
inline constexpr uint64_t kRegionAlignment = 64;
constexpr uint64_t RegionAligned(uint64_t bytes) {
  return (bytes + kRegionAlignment - 1) / kRegionAlignment * kRegionAlignment;
}

// What opens a region elsewhere; what its transport does not need is empty.
struct RegionAddress {
  std::string name;         // to be said to the socket that hands out its descriptor
  std::string device_uuid;  // of the GPU whose memory it is
};

class RegionNames;

// One region, zeroed, readable and writable. Its memory goes with it; that may take as long as
// making it did.
class Region {
 public:
  Region(const Region&) = delete;
  Region& operator=(const Region&) = delete;
  virtual ~Region() = default;

  Transport transport() const { return transport_; }
  std::byte* data() const { return data_; }  // not the host's where the transport's row says so
  uint64_t bytes() const { return bytes_; }
  const RegionAddress& address() const { return address_; }
  // A new one, of the memory, for a peer; the caller closes it.
  virtual absl::StatusOr<int> Descriptor() const = 0;

  // By who hands `region` to its owner, each time: the owner's share of it. Its address, under a
  // new name, opens it from now on, until Unlink or the end of that share. Whoever has opened it by
  // then has a share of `region` too, until it hangs up: once the last is gone nobody has it open.
  static std::shared_ptr<Region> Link(std::shared_ptr<Region> region);
  // Nobody can open it from now on; who has, and we, keep it.
  void Unlink();
  // Goes after its memory: what that is counted by.
  void Keep(std::shared_ptr<void> budget) { budget_ = std::move(budget); }

 protected:
  Region(Transport transport, std::shared_ptr<RegionNames> names)
      : transport_(transport), names_(std::move(names)) {}

  std::byte* data_ = nullptr;
  uint64_t bytes_ = 0;
  RegionAddress address_;

 private:
  const Transport transport_;
  const std::shared_ptr<RegionNames> names_;
  std::shared_ptr<void> budget_;
};

// What peers may do with a region that they open. Where a medium cannot tell, they may write.
enum class PeerAccess { kRead, kReadAndWrite };

// What the two sides tell each other of where they are; empty: not told.
struct PeerFacts {
  std::string shm_domain;
  std::string cuda_ipc_domain;
  std::vector<std::string> device_uuids;  // GPUs that it works from
};

// Where regions of one transport come from. Owned by the server; regions may outlive it.
class Medium {
 public:
  virtual ~Medium() = default;
  // RESOURCE_EXHAUSTED when there is no room. Takes the memory from the system at once, so it
  // blocks for as long as that takes.
  virtual absl::StatusOr<std::shared_ptr<Region>> Create(uint64_t bytes, PeerAccess access) = 0;
  // A region of so many bytes, or a multiple, has no more than was asked for.
  virtual uint64_t Unit() const { return 1; }
  // Writes what a peer has to compare into *ours.
  virtual void Introduce(PeerFacts* ours) const = 0;
  // FAILED_PRECONDITION says why such a peer cannot open what is made here, OUT_OF_RANGE that no
  // GPU of its own has access to ours.
  virtual absl::Status Reaches(const PeerFacts& peer) const = 0;
  virtual void Close() = 0;  // makes no more
};

}  // namespace prefilld

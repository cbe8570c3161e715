// Memory that a caller opens instead of being sent bytes, and the media that such memory comes
// from. A region is made by the server and belongs to one KV cache or one Attend. It is not used
// again, unless nobody has it open: who has keeps what it saw. What a peer needs to open it is told
// by its address; how that is put on the wire is rpc's.
//
// A peer may change what it has opened at any time: nothing read from a region may be used as an
// index or a size. Threads: any.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <limits>
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
  std::string name;         // posix_shm: what shm_open(3) takes; cuda_ipc: to be said to the socket
  std::string device_uuid;  // of the GPU whose memory it is
};

// One region, zeroed, readable and writable. Memory and name go with it; that may take as long as
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

  // By who hands it to its owner, each time: the owner's share of `lent`, which is this region. Its
  // address opens it from now on, until Unlink or the end of that share. Whoever has opened it by
  // then has a share of `lent` too, as far as we can know how long they have it.
  virtual std::shared_ptr<Region> Link(std::shared_ptr<Region> lent) { return lent; }
  // Nobody can open it from now on; who has, and we, keep it.
  virtual void Unlink() {}
  // Whether nobody but us has it open, once its last share is gone: as the only peer says that was
  // told of it, or for certain, where peers have shares.
  virtual bool unmapped() const { return unmapped_; }
  void SetUnmapped(bool unmapped) { unmapped_ = unmapped; }
  // Goes after its memory: what that is counted by.
  void Keep(std::shared_ptr<void> budget) { budget_ = std::move(budget); }

 protected:
  explicit Region(Transport transport) : transport_(transport) {}

  std::byte* data_ = nullptr;
  uint64_t bytes_ = 0;
  RegionAddress address_;

 private:
  const Transport transport_;
  std::atomic<bool> unmapped_{false};
  std::shared_ptr<void> budget_;
};

// What the two sides tell each other of where they are; empty: not told.
struct PeerFacts {
  std::string shm_domain;
  std::string cuda_ipc_domain;
  std::vector<std::string> device_uuids;  // GPUs that it works from
  std::string cuda_ipc_socket;            // ours alone
};

// Where regions of one transport come from. Owned by the server; regions may outlive it.
class Medium {
 public:
  virtual ~Medium() = default;
  // RESOURCE_EXHAUSTED when there is no room. Takes the memory from the system at once, so it
  // blocks for as long as that takes.
  virtual absl::StatusOr<std::shared_ptr<Region>> Create(uint64_t bytes) = 0;
  // A region of so many bytes, or a multiple, has no more than was asked for.
  virtual uint64_t Unit() const { return 1; }
  // Bytes that there is room for now, where that is known.
  virtual uint64_t Room() const { return std::numeric_limits<uint64_t>::max(); }
  // Bytes of the largest region that there can ever be, where that is known.
  virtual uint64_t Largest() const { return std::numeric_limits<uint64_t>::max(); }
  // Writes what a peer has to compare into *ours.
  virtual void Introduce(PeerFacts* ours) const = 0;
  // FAILED_PRECONDITION says why such a peer cannot open what is made here, OUT_OF_RANGE that no
  // GPU of its own has access to ours.
  virtual absl::Status Reaches(const PeerFacts& peer) const = 0;
  // For the end of the process: removes the names of all regions, and makes no more.
  virtual void Close() {}
};

}  // namespace prefilld

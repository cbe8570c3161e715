#include "server/transport/shm_memory.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <fstream>
#include <limits>

#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "server/machine_memory.h"
#include "server/record/errors.h"
#include "server/transport/transports.h"

// Since Linux 6.3 and 5.1; this system's headers may be older.
#ifndef MFD_NOEXEC_SEAL
#define MFD_NOEXEC_SEAL 0x0008U
#endif
#ifndef F_SEAL_FUTURE_WRITE
#define F_SEAL_FUTURE_WRITE 0x0010
#endif

namespace prefilld {
namespace {

constexpr char kHostId[] = "/proc/sys/kernel/random/boot_id";
constexpr char kProbe[] = "probe_shm";
constexpr char kFileName[] = "prefilld";  // for who looks into /proc

absl::Status Refuse(uint64_t bytes, absl::string_view why) {
  return RetryLater(absl::StatusCode::kResourceExhausted, "shm_memory",
                    absl::StrCat("no shared memory of ", bytes, " bytes: ", why), absl::Seconds(1));
}

// Some systems allow nothing that could be executed; older ones do not know the word.
int NewFile() {
  constexpr unsigned int kFlags = MFD_CLOEXEC | MFD_ALLOW_SEALING;
  const int fd = memfd_create(kFileName, kFlags | MFD_NOEXEC_SEAL);
  return fd < 0 && errno == EINVAL ? memfd_create(kFileName, kFlags) : fd;
}

int Reserve(int fd, uint64_t bytes) {
  int error;
  do {
    error = posix_fallocate(fd, 0, static_cast<off_t>(bytes));
  } while (error == EINTR);
  return error;
}

// Nothing takes a seal away again. We have it mapped by now, and go on writing.
bool Seal(int fd, PeerAccess access) {
  if (access == PeerAccess::kRead && fcntl(fd, F_ADD_SEALS, F_SEAL_FUTURE_WRITE) != 0 &&
      errno != EINVAL) {
    return false;
  }
  return fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) == 0;
}

class ShmMemory final : public Region {
 public:
  ShmMemory(std::shared_ptr<RegionNames> names, std::shared_ptr<void> taken)
      : Region(Transport::kPosixShm, std::move(names)), taken_(std::move(taken)) {}
  ~ShmMemory() override {
    if (data_ != nullptr) munmap(data_, bytes_);
    if (fd_ >= 0) close(fd_);
  }

  // 0, or errno. Once.
  int Make(uint64_t bytes, PeerAccess access) {
    if ((fd_ = NewFile()) < 0) return errno;
    if (const int error = Reserve(fd_, bytes); error != 0) return error;
    void* data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd_, 0);
    if (data == MAP_FAILED) return errno;
    data_ = static_cast<std::byte*>(data);
    bytes_ = bytes;
    return Seal(fd_, access) ? 0 : errno;
  }
  absl::StatusOr<int> Descriptor() const override {
    const int fd = fcntl(fd_, F_DUPFD_CLOEXEC, 0);
    if (fd >= 0) return fd;
    return absl::ResourceExhaustedError(absl::StrCat("no descriptor: ", std::strerror(errno)));
  }

 private:
  const std::shared_ptr<void> taken_;  // of the descriptors
  int fd_ = -1;
};

}  // namespace

absl::StatusOr<std::unique_ptr<PosixShm>> PosixShm::Open(std::shared_ptr<RegionNames> names,
                                                         DescriptorShare segments) {
  std::string host;
  if (!std::getline(std::ifstream(kHostId), host) || host.empty()) {
    return absl::UnavailableError(absl::StrCat("cannot read ", kHostId));
  }
  std::unique_ptr<PosixShm> medium(
      new PosixShm("memfd:" + host, std::move(names), std::move(segments)));
  auto probe = medium->Create(static_cast<uint64_t>(sysconf(_SC_PAGESIZE)), PeerAccess::kRead);
  if (!probe.ok()) return absl::UnavailableError(probe.status().message());
  medium->probe_ = *std::move(probe);
  medium->names_->Add(kProbe, medium->probe_);
  return medium;
}

absl::StatusOr<std::shared_ptr<Region>> PosixShm::Create(uint64_t bytes, PeerAccess access) {
  if (bytes == 0 || bytes > static_cast<uint64_t>(std::numeric_limits<off_t>::max())) {
    return Refuse(bytes, "not a size of memory");
  }
  if (closed_) return Refuse(bytes, "the server is shutting down");
  // Asked first: to take all that there is would end us.
  if (const uint64_t most = MachineMemory(); bytes > most) {
    return Refuse(bytes, absl::StrCat("there are ", most));
  }
  auto taken = segments_.Take();
  if (taken == nullptr) {
    return Refuse(bytes, absl::StrCat(segments_.used(), " segments are there, and descriptors for ",
                                      segments_.limit()));
  }
  auto memory = std::make_shared<ShmMemory>(names_, std::move(taken));
  if (const int error = memory->Make(bytes, access); error != 0) {
    return Refuse(bytes, std::strerror(error));
  }
  return memory;
}

absl::Status PosixShm::Reaches(const PeerFacts& peer) const {
  if (peer.shm_domain == domain_) return absl::OkStatus();
  return absl::FailedPreconditionError(absl::StrCat("shm_domain '", peer.shm_domain.substr(0, 128),
                                                    "' is not the server's '", domain_, "'"));
}

absl::StatusOr<std::unique_ptr<Medium>> OpenPosixShm(const MediumSite& site) {
  return PosixShm::Open(site.names, site.segments);
}

}  // namespace prefilld

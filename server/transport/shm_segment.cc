#include "server/transport/shm_segment.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <fstream>
#include <limits>
#include <optional>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "server/mapping_guard.h"
#include "server/record/errors.h"
#include "server/record/log.h"
#include "server/transport/transports.h"

namespace prefilld {
namespace {

constexpr char kDirectory[] = "/dev/shm";
constexpr char kPrefix[] = "prefilld-";
constexpr char kHostId[] = "/proc/sys/kernel/random/boot_id";

std::vector<std::string> FilesWith(absl::string_view prefix) {
  std::vector<std::string> names;
  DIR* directory = opendir(kDirectory);
  if (directory == nullptr) return names;
  while (const dirent* entry = readdir(directory)) {
    if (absl::StartsWith(entry->d_name, prefix)) names.push_back(entry->d_name);
  }
  closedir(directory);
  return names;
}

// Removes the segments that no process holds a lock on: their owners are dead. Ours are named after
// an owner that is new, so a name that is found cannot be anybody's next one.
void Sweep() {
  int64_t segments = 0, bytes = 0;
  for (const std::string& file : FilesWith(kPrefix)) {
    const std::string path = absl::StrCat(kDirectory, "/", file);
    const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
    if (fd < 0) continue;  // gone meanwhile, or of another user
    struct stat info;
    if (fstat(fd, &info) == 0 && S_ISREG(info.st_mode) && flock(fd, LOCK_EX | LOCK_NB) == 0 &&
        unlink(path.c_str()) == 0) {
      ++segments;
      bytes += int64_t{info.st_blocks} * 512;
    }
    close(fd);
  }
  if (segments > 0) Log(Level::kInfo, "shm_swept", {{"segments", segments}, {"bytes", bytes}});
}

absl::Status Refuse(uint64_t bytes, const std::string& why) {
  return RetryLater(absl::StatusCode::kResourceExhausted, "shm_memory",
                    absl::StrCat("no segment of ", bytes, " bytes in ", kDirectory, ": ", why),
                    absl::Seconds(1));
}

// Another server's sweep may come between the file and its lock, and take it away.
bool LockIsOurs(int fd) {
  struct stat info;
  return flock(fd, LOCK_SH | LOCK_NB) == 0 && fstat(fd, &info) == 0 && info.st_nlink > 0;
}

int Reserve(int fd, uint64_t bytes) {
  int error;
  do {
    error = posix_fallocate(fd, 0, static_cast<off_t>(bytes));
  } while (error == EINTR);
  return error;
}

// A file in /dev/shm, mapped.
class ShmSegment final : public Region {
 public:
  ShmSegment(std::string name, int fd, std::shared_ptr<void> taken)
      : Region(Transport::kPosixShm), taken_(std::move(taken)), fd_(fd) {
    address_.name = std::move(name);
  }
  ~ShmSegment() override {
    Unlink();
    guard_.reset();
    if (data_ != nullptr) munmap(data_, bytes_);
    close(fd_);
  }

  void Unlink() override {
    if (linked_.exchange(false)) shm_unlink(address_.name.c_str());
  }
  // 0, or errno. Takes the memory first: what there is not shows here, not at first touch.
  int Map(uint64_t bytes) {
    if (const int error = Reserve(fd_, bytes); error != 0) return error;
    void* data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd_, 0);
    if (data == MAP_FAILED) return errno;
    data_ = static_cast<std::byte*>(data);
    bytes_ = bytes;
    guard_.emplace(data, bytes, PROT_READ | PROT_WRITE);
    return 0;
  }
  // Nor for somebody else, if a peer has truncated it.
  bool unmapped() const override {
    struct stat now;
    return Region::unmapped() && !guard_->lost() && fstat(fd_, &now) == 0 &&
           static_cast<uint64_t>(now.st_size) == bytes_;
  }

 private:
  const std::shared_ptr<void> taken_;  // of the descriptors
  const int fd_;                       // holds the lock
  std::atomic<bool> linked_{true};
  std::optional<MappingGuard> guard_;  // of what peers may truncate under us
};

}  // namespace

absl::StatusOr<std::unique_ptr<ShmDomain>> ShmDomain::Open(absl::string_view owner,
                                                           DescriptorShare descriptors) {
  std::string host;
  struct stat info;
  if (!std::getline(std::ifstream(kHostId), host) || host.empty()) {
    return absl::UnavailableError(absl::StrCat("cannot read ", kHostId));
  }
  if (stat(kDirectory, &info) != 0) {
    return absl::UnavailableError(absl::StrCat(kDirectory, ": ", std::strerror(errno)));
  }
  Sweep();
  std::unique_ptr<ShmDomain> domain(new ShmDomain(absl::StrCat(host, ":", info.st_dev),
                                                  absl::StrCat(kPrefix, owner.substr(0, 12), "-"),
                                                  std::move(descriptors)));
  if (auto probe = domain->Create(1); !probe.ok()) {
    return absl::UnavailableError(probe.status().message());
  }
  return domain;
}

absl::StatusOr<std::shared_ptr<Region>> ShmDomain::Create(uint64_t bytes) {
  if (bytes == 0 || bytes > static_cast<uint64_t>(std::numeric_limits<off_t>::max())) {
    return Refuse(bytes, "not a size of memory");
  }
  // Asked first: filling the file system to its end would hurt whoever else uses it.
  if (const uint64_t room = Room(); bytes >= room) {
    return Refuse(bytes, absl::StrCat(room, " bytes are free"));
  }
  const auto taken = descriptors_.Take();
  if (taken == nullptr) {
    return Refuse(bytes,
                  absl::StrCat(descriptors_.used(), " segments are there, and descriptors for ",
                               descriptors_.limit()));
  }
  std::shared_ptr<ShmSegment> segment;
  constexpr int kTries = 16;
  for (int i = 0; i < kTries && segment == nullptr; ++i) {
    std::string name = absl::StrCat("/", prefix_, next_++);
    const int fd = shm_open(name.c_str(), O_CREAT | O_EXCL | O_RDWR | O_CLOEXEC, 0600);
    if (fd < 0 && errno == EEXIST) continue;
    if (fd < 0) return Refuse(bytes, std::strerror(errno));
    segment = std::make_shared<ShmSegment>(std::move(name), fd, taken);
    if (!LockIsOurs(fd)) segment.reset();
  }
  if (segment == nullptr) return Refuse(bytes, "somebody else takes them away");
  if (closed_) return Refuse(bytes, "the server is shutting down");
  if (const int error = segment->Map(bytes); error != 0) return Refuse(bytes, std::strerror(error));
  return segment;
}

uint64_t ShmDomain::Room() const {
  struct statvfs room;
  // A file system without a size has no blocks.
  if (statvfs(kDirectory, &room) != 0 || room.f_blocks == 0) return Medium::Room();
  return uint64_t{room.f_bavail} * room.f_frsize;
}

uint64_t ShmDomain::Largest() const {
  struct statvfs size;
  if (statvfs(kDirectory, &size) != 0 || size.f_blocks == 0) return Medium::Largest();
  return uint64_t{size.f_blocks} * size.f_frsize - 1;  // Create's, where nobody else has anything
}

absl::Status ShmDomain::Reaches(const PeerFacts& peer) const {
  if (peer.shm_domain == name_) return absl::OkStatus();
  return absl::FailedPreconditionError(absl::StrCat("shm_domain '", peer.shm_domain.substr(0, 128),
                                                    "' is not the server's '", name_, "'"));
}

void ShmDomain::Close() {
  closed_ = true;
  for (const std::string& file : FilesWith(prefix_)) shm_unlink(absl::StrCat("/", file).c_str());
}

absl::StatusOr<std::unique_ptr<Medium>> OpenPosixShm(const MediumSite& site) {
  return ShmDomain::Open(site.owner, site.segments);
}

}  // namespace prefilld

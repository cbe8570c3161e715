#include "server/rpc/watched_file.h"

#include <sys/stat.h>

#include <cerrno>
#include <cstring>
#include <fstream>
#include <string_view>

#include "absl/strings/str_cat.h"

namespace prefilld {

WatchedFile::Facts WatchedFile::Look() const {
  struct stat is {};
  if (stat(path_.c_str(), &is) != 0) return {};
  const auto nanos = [](const timespec& time) {
    return time.tv_sec * 1'000'000'000 + time.tv_nsec;
  };
  return {static_cast<int64_t>(is.st_dev), static_cast<int64_t>(is.st_ino), is.st_size,
          nanos(is.st_ctim), nanos(is.st_mtim)};
}

absl::StatusOr<std::string> WatchedFile::Read(size_t bytes_max) {
  const auto refuse = [&](std::string_view why) {
    return absl::NotFoundError(
        absl::StrCat("cannot read '", path_, "': ", absl::string_view(why.data(), why.size())));
  };
  seen_ = Look();
  struct stat is {};
  if (stat(path_.c_str(), &is) == 0 && !S_ISREG(is.st_mode)) {  // to open a pipe may take for ever
    return refuse(S_ISDIR(is.st_mode) ? "it is a directory" : "it is no regular file");
  }
  errno = 0;
  std::ifstream file(path_, std::ios::binary);
  if (!file) return refuse(std::strerror(errno));
  std::string text(bytes_max + 1, '\0');
  file.read(text.data(), static_cast<std::streamsize>(text.size()));
  text.resize(static_cast<size_t>(file.gcount()));
  if (text.empty()) return refuse("it is empty");
  if (text.size() > bytes_max) {
    return absl::ResourceExhaustedError(
        absl::StrCat("'", path_, "' has more than ", bytes_max, " bytes"));
  }
  return text;
}

}  // namespace prefilld

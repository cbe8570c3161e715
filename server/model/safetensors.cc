#include "server/model/safetensors.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <limits>
#include <nlohmann/json.hpp>
#include <set>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "server/mapping_guard.h"

namespace prefilld {
namespace {

using nlohmann::json;
using TensorMap = std::map<std::string, SafeTensor, std::less<>>;

constexpr uint64_t kMaxHeaderBytes = 100'000'000;  // the format's own limit
constexpr uint64_t kLengthBytes = 8;               // the header's length, little-endian
constexpr size_t kMaxRank = 16;
constexpr size_t kMaxShownBytes = 200;  // of a name from a file in an error message

constexpr char kSingleFile[] = "model.safetensors";
constexpr char kIndexFile[] = "model.safetensors.index.json";

size_t ElementBytes(std::string_view dtype) {
  static const std::map<std::string_view, size_t> kBytes = {
      {"BOOL", 1}, {"U8", 1},  {"I8", 1},  {"F8_E4M3", 1}, {"F8_E5M2", 1},
      {"I16", 2},  {"U16", 2}, {"F16", 2}, {"BF16", 2},    {"I32", 4},
      {"U32", 4},  {"F32", 4}, {"I64", 8}, {"U64", 8},     {"F64", 8}};
  const auto it = kBytes.find(dtype);
  return it == kBytes.end() ? 0 : it->second;
}

absl::Status Invalid(const std::string& file, const std::string& problem) {
  return absl::InvalidArgumentError(file + ": " + problem);
}

// What a file says may be long and hold anything; an error is one line.
std::string Quote(const std::string& text) {
  return "'" + absl::CHexEscape(text.substr(0, kMaxShownBytes)) + "'";
}

std::string TensorName(const std::string& name) { return "tensor " + Quote(name); }

}  // namespace

// Mapped, and what it was like then.
class MappedFile {
 public:
  static absl::StatusOr<std::shared_ptr<const MappedFile>> Map(const std::string& path) {
    const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
    if (fd < 0) return absl::NotFoundError(path + ": " + std::strerror(errno));
    struct stat found = {};
    const bool regular = fstat(fd, &found) == 0 && S_ISREG(found.st_mode);
    if (!regular || found.st_size <= 0) {
      close(fd);
      return Invalid(path, regular ? "is empty" : "is not a regular file");
    }
    const auto bytes = static_cast<size_t>(found.st_size);
    void* data = mmap(nullptr, bytes, PROT_READ, MAP_PRIVATE, fd, 0);
    const int error = errno;
    if (data == MAP_FAILED) {
      close(fd);
      return absl::InternalError(path + ": mmap: " + std::strerror(error));
    }
    return std::shared_ptr<const MappedFile>(new MappedFile(path, fd, found, data));
  }
  ~MappedFile() {
    guard_.reset();
    munmap(data_, bytes());
    close(fd_);
  }

  const std::byte* data() const { return static_cast<const std::byte*>(data_); }
  uint64_t bytes() const { return static_cast<uint64_t>(found_.st_size); }

  // Not the time of change of its node, which the name that another file takes changes too.
  absl::Status Check() const {
    struct stat now = {};
    if (!changed_ && !guard_->lost() && fstat(fd_, &now) == 0 && now.st_size == found_.st_size &&
        now.st_mtim.tv_sec == found_.st_mtim.tv_sec &&
        now.st_mtim.tv_nsec == found_.st_mtim.tv_nsec) {
      return absl::OkStatus();
    }
    changed_ = true;
    return absl::UnavailableError(path_ +
                                  ": has changed since it was opened; start the server anew, and "
                                  "replace model files by renaming others over them");
  }

 private:
  MappedFile(std::string path, int fd, const struct stat& found, void* data)
      : path_(std::move(path)),
        fd_(fd),
        found_(found),
        data_(data),
        guard_(std::make_unique<MappingGuard>(data, bytes(), PROT_READ)) {}

  const std::string path_;
  const int fd_;
  const struct stat found_;
  void* const data_;
  std::unique_ptr<MappingGuard> guard_;
  mutable std::atomic<bool> changed_{false};
};

namespace {

// A size >= 0 that fits in 63 bits.
bool IsSize(const json& value) {
  return value.is_number_unsigned() &&
         value.get<uint64_t>() <= uint64_t{std::numeric_limits<int64_t>::max()};
}

// A tensor and where its bytes lie in the data section.
struct Entry {
  const std::string* name;
  uint64_t begin, end;
};

absl::StatusOr<SafeTensor> ParseTensor(const json& fields, const std::string& what,
                                       uint64_t data_bytes, uint64_t* begin, uint64_t* end) {
  const auto problem = [&](const std::string& text) {
    return absl::InvalidArgumentError(what + " " + text);
  };
  if (!fields.is_object() || !fields.contains("dtype") || !fields["dtype"].is_string() ||
      !fields.contains("shape") || !fields["shape"].is_array() ||
      !fields.contains("data_offsets") || !fields["data_offsets"].is_array() ||
      fields["data_offsets"].size() != 2) {
    return problem("lacks a dtype, shape or data_offsets of the right kind");
  }
  SafeTensor tensor;
  tensor.dtype = fields["dtype"].get<std::string>();
  const uint64_t element = ElementBytes(tensor.dtype);
  if (element == 0) {
    return problem("has the unknown dtype " + Quote(tensor.dtype));
  }
  if (fields["shape"].size() > kMaxRank) {
    return problem(absl::StrCat("has ", fields["shape"].size(), " dimensions; at most ", kMaxRank,
                                " are supported"));
  }
  uint64_t bytes = element;
  for (const json& side : fields["shape"]) {
    if (!IsSize(side)) return problem("has a side that is not a size");
    const uint64_t length = side.get<uint64_t>();
    if (length != 0 && bytes > std::numeric_limits<int64_t>::max() / length) {
      return problem("has a shape that overflows");
    }
    bytes *= length;
    tensor.shape.push_back(static_cast<int64_t>(length));
  }
  const json& offsets = fields["data_offsets"];
  if (!IsSize(offsets[0]) || !IsSize(offsets[1])) return problem("has offsets that are not sizes");
  *begin = offsets[0].get<uint64_t>();
  *end = offsets[1].get<uint64_t>();
  if (*begin > *end || *end > data_bytes) {
    return problem(absl::StrCat("spans bytes [", *begin, ", ", *end, ") of ", data_bytes,
                                "; the file may be truncated"));
  }
  if (*end - *begin != bytes) {
    return problem(
        absl::StrCat("spans ", *end - *begin, " bytes, its shape and dtype need ", bytes));
  }
  tensor.bytes = bytes;
  return tensor;
}

// The tensors of one file. The format wants the data section covered without overlap or gap.
absl::StatusOr<TensorMap> ParseFile(const std::string& path, const MappedFile& file) {
  uint64_t header_bytes = 0;
  if (file.bytes() < kLengthBytes) {
    return Invalid(path, absl::StrCat("has ", file.bytes(), " bytes, less than a header"));
  }
  std::memcpy(&header_bytes, file.data(), kLengthBytes);
  if (header_bytes > kMaxHeaderBytes || header_bytes > file.bytes() - kLengthBytes) {
    return Invalid(path, absl::StrCat("has a header of ", header_bytes, " bytes in a file of ",
                                      file.bytes(), "; at most ", kMaxHeaderBytes, " are read"));
  }
  const char* text = reinterpret_cast<const char*>(file.data()) + kLengthBytes;
  const json header = json::parse(text, text + header_bytes, nullptr, /*allow_exceptions=*/false);
  if (!header.is_object()) return Invalid(path, "the header is not a JSON object");

  const std::byte* data = file.data() + kLengthBytes + header_bytes;
  const uint64_t data_bytes = file.bytes() - kLengthBytes - header_bytes;
  TensorMap tensors;
  std::vector<Entry> entries;
  for (const auto& [name, fields] : header.items()) {
    if (name == "__metadata__") continue;
    Entry entry = {};
    absl::StatusOr<SafeTensor> tensor =
        ParseTensor(fields, path + ": " + TensorName(name), data_bytes, &entry.begin, &entry.end);
    if (!tensor.ok()) return tensor.status();
    tensor->data = data + entry.begin;
    if (reinterpret_cast<uintptr_t>(tensor->data) % ElementBytes(tensor->dtype) != 0) {
      return Invalid(path, TensorName(name) + " is not aligned to its elements");
    }
    entry.name = &tensors.emplace(name, *std::move(tensor)).first->first;
    entries.push_back(entry);
  }
  std::sort(entries.begin(), entries.end(), [](const Entry& a, const Entry& b) {
    return std::pair(a.begin, a.end) < std::pair(b.begin, b.end);
  });
  uint64_t covered = 0;
  for (const Entry& entry : entries) {
    if (entry.begin != covered) {
      return Invalid(
          path, absl::StrCat(TensorName(*entry.name), " starts at byte ", entry.begin,
                             entry.begin < covered ? ", inside the one before it" : ", after a gap",
                             " that ends at ", covered));
    }
    covered = entry.end;
  }
  if (covered != data_bytes) {
    return Invalid(path,
                   absl::StrCat("has ", data_bytes, " bytes of data, its tensors cover ", covered));
  }
  return tensors;
}

// tensor name -> file name, of model.safetensors.index.json.
absl::StatusOr<std::map<std::string, std::string>> ParseIndex(const std::string& path) {
  const auto mapped = MappedFile::Map(path);
  if (!mapped.ok()) return mapped.status();
  const MappedFile& file = **mapped;
  if (file.bytes() > kMaxHeaderBytes) {
    return Invalid(
        path, absl::StrCat("has ", file.bytes(), " bytes; at most ", kMaxHeaderBytes, " are read"));
  }
  const char* text = reinterpret_cast<const char*>(file.data());
  const json index = json::parse(text, text + file.bytes(), nullptr, /*allow_exceptions=*/false);
  if (!index.is_object() || !index.contains("weight_map") || !index["weight_map"].is_object()) {
    return Invalid(path, "has no weight_map object");
  }
  std::map<std::string, std::string> shard_of;
  for (const auto& [name, value] : index["weight_map"].items()) {
    const std::string shard = value.is_string() ? value.get<std::string>() : "";
    // Only files of this directory: a path could lead anywhere.
    if (shard.empty() || shard.front() == '.' || shard.find('/') != std::string::npos ||
        shard.find('\0') != std::string::npos) {
      return Invalid(
          path, TensorName(name) + " is in " + Quote(shard) + ", which is not a plain file name");
    }
    shard_of.emplace(name, shard);
  }
  return shard_of;
}

}  // namespace

absl::Status SafeTensors::CheckFiles() const {
  absl::Status status;
  for (const auto& file : files_) status.Update(file->Check());
  return status;
}

absl::StatusOr<SafeTensors> SafeTensors::Open(const std::string& directory) {
  const std::filesystem::path root(directory);
  const std::string index_path = root / kIndexFile;
  const std::string single_path = root / kSingleFile;
  std::error_code ignored;
  SafeTensors out;
  const auto add = [&out](const std::string& path) -> absl::StatusOr<TensorMap> {
    auto file = MappedFile::Map(path);
    if (!file.ok()) return file.status();
    out.files_.push_back(*file);
    return ParseFile(path, **file);
  };

  if (std::filesystem::exists(single_path, ignored) ||
      !std::filesystem::exists(index_path, ignored)) {
    absl::StatusOr<TensorMap> tensors = add(single_path);
    if (!tensors.ok()) return tensors.status();
    out.tensors_ = *std::move(tensors);
    return out;
  }

  const auto shard_of = ParseIndex(index_path);
  if (!shard_of.ok()) return shard_of.status();
  std::set<std::string> shards;
  for (const auto& [name, shard] : *shard_of) shards.insert(shard);
  for (const std::string& shard : shards) {
    absl::StatusOr<TensorMap> tensors = add(root / shard);
    if (!tensors.ok()) return tensors.status();
    for (auto& [name, tensor] : *tensors) {
      const auto listed = shard_of->find(name);
      if (listed == shard_of->end() || listed->second != shard) {
        return Invalid(root / shard,
                       TensorName(name) + " is not listed for this file in " + kIndexFile);
      }
      out.tensors_.emplace(name, std::move(tensor));
    }
  }
  for (const auto& [name, shard] : *shard_of) {
    if (out.tensors_.find(name) == out.tensors_.end()) {
      return Invalid(root / shard, TensorName(name) + " is missing, " + kIndexFile + " lists it");
    }
  }
  return out;
}

}  // namespace prefilld

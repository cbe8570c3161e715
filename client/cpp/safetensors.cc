#include "client/cpp/safetensors.h"

#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <nlohmann/json.hpp>
#include <set>
#include <utility>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/str_cat.h"

namespace prefilld::client {
namespace {

using nlohmann::json;

constexpr uint64_t kHeaderBytesMax = 16 << 20;

struct DtypeName {
  v1::DataType type;
  const char* name;
};
constexpr DtypeName kDtypeNames[] = {{v1::DATA_TYPE_F32, "F32"},
                                     {v1::DATA_TYPE_BF16, "BF16"},
                                     {v1::DATA_TYPE_F16, "F16"},
                                     {v1::DATA_TYPE_I32, "I32"},
                                     {v1::DATA_TYPE_U8, "U8"}};

v1::DataType DtypeOf(const std::string& name) {
  for (const DtypeName& dtype : kDtypeNames) {
    if (name == dtype.name) return dtype.type;
  }
  return v1::DATA_TYPE_UNSPECIFIED;
}

const char* NameOf(v1::DataType type) {
  for (const DtypeName& dtype : kDtypeNames) {
    if (type == dtype.type) return dtype.name;
  }
  return "";
}

absl::Status Bad(const std::string& path, absl::string_view what) {
  return absl::InvalidArgumentError(absl::StrCat(path, ": ", what));
}

absl::Status SystemError(const std::string& path, absl::string_view what) {
  return absl::ErrnoToStatus(errno, absl::StrCat(path, ": cannot ", what));
}

bool IsUint(const json& value) { return value.is_number_unsigned(); }

// One entry of the header. Data [data_bytes] follows the header; the range is appended to `ranges`.
absl::StatusOr<InputTensor> ReadEntry(const std::string& path, const std::string& name,
                                      const json& entry, const std::shared_ptr<const void>& map,
                                      uint64_t data_start, uint64_t data_bytes,
                                      std::vector<std::pair<uint64_t, uint64_t>>& ranges) {
  const auto bad = [&](absl::string_view what) {
    return Bad(path, absl::StrCat("tensor ", name, ": ", what));
  };
  // Not copied before it is known to be flat: a copy goes as deep as lists lie in each other.
  const json absent;
  const auto field = [&](const char* key) -> const json& {
    const auto found = entry.find(key);  // of what is no object: none
    return found == entry.end() ? absent : *found;
  };
  const json& shape = field("shape");
  const json& offsets = field("data_offsets");
  const json& dtype = field("dtype");
  if (!dtype.is_string() || !shape.is_array() || !offsets.is_array() || offsets.size() != 2 ||
      !std::all_of(shape.begin(), shape.end(), IsUint) ||
      !std::all_of(offsets.begin(), offsets.end(), IsUint)) {
    return bad("needs dtype, shape and data_offsets");
  }
  const uint64_t begin = offsets[0].get<uint64_t>();
  const uint64_t end = offsets[1].get<uint64_t>();
  if (begin > end || end > data_bytes) {
    return bad(absl::StrCat("bytes ", begin, " to ", end, " of ", data_bytes));
  }
  ranges.emplace_back(begin, end);

  InputTensor tensor;
  tensor.spec.set_name(name);
  tensor.spec.set_data_type(DtypeOf(dtype.get<std::string>()));
  for (const json& dimension : shape) {
    if (dimension.get<uint64_t>() > uint64_t{1} << 62) return bad("dimension out of range");
    tensor.spec.add_shape(dimension.get<int64_t>());
  }
  tensor.data = static_cast<const uint8_t*>(map.get()) + data_start + begin;
  tensor.owner = map;
  const auto bytes = TensorBytes(tensor.spec);
  // A tensor that the service cannot carry is harmless as long as nobody asks for it.
  if (bytes.ok() && *bytes != end - begin) {
    return bad(absl::StrCat("has ", end - begin, " bytes, its shape ", *bytes));
  }
  return tensor;
}

}  // namespace

absl::StatusOr<SafetensorsFile> SafetensorsFile::Open(const std::string& path) {
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) return SystemError(path, "open");
  const absl::Cleanup closer = [fd] { close(fd); };
  struct stat info;
  if (fstat(fd, &info) != 0) return SystemError(path, "stat");
  if (!S_ISREG(info.st_mode)) return Bad(path, "not a regular file");
  const auto file_bytes = static_cast<uint64_t>(info.st_size);
  uint64_t header_bytes = 0;
  if (file_bytes < sizeof(header_bytes)) return Bad(path, "not a safetensors file: too short");

  void* address = mmap(nullptr, file_bytes, PROT_READ, MAP_PRIVATE, fd, 0);
  if (address == MAP_FAILED) return SystemError(path, "map");
  const std::shared_ptr<const void> map(
      address, [file_bytes](const void* mapped) { munmap(const_cast<void*>(mapped), file_bytes); });
  std::memcpy(&header_bytes, address, sizeof(header_bytes));
  if (header_bytes > kHeaderBytesMax || header_bytes > file_bytes - sizeof(header_bytes)) {
    return Bad(path,
               absl::StrCat("not a safetensors file, or damaged: it would begin with a header of ",
                            header_bytes, " bytes, has ", file_bytes, " in all, and ",
                            kHeaderBytesMax, " are the most that are read"));
  }

  const char* text = static_cast<const char*>(address) + sizeof(header_bytes);
  // The parser keeps the last of two equal keys; here two tensors of one name are an error.
  bool repeated = false;
  std::set<std::string> names;
  const json header = json::parse(
      text, text + header_bytes,
      [&](int depth, json::parse_event_t event, json& parsed) {
        if (depth == 1 && event == json::parse_event_t::key) {
          repeated |= !names.insert(parsed.get<std::string>()).second;
        }
        return true;
      },
      /*allow_exceptions=*/false);
  if (!header.is_object()) return Bad(path, "the header is not a JSON object");
  if (repeated) return Bad(path, "the header names a tensor twice");

  SafetensorsFile file;
  file.path_ = path;
  std::vector<std::pair<uint64_t, uint64_t>> ranges;
  const uint64_t data_start = sizeof(header_bytes) + header_bytes;
  for (const auto& [name, entry] : header.items()) {
    if (name == "__metadata__") continue;
    auto tensor = ReadEntry(path, name, entry, map, data_start, file_bytes - data_start, ranges);
    if (!tensor.ok()) return tensor.status();
    if (TensorBytes(tensor->spec).ok()) {
      file.tensors_.push_back(*std::move(tensor));
    } else {
      file.unlisted_[name] =
          absl::StrCat(entry["dtype"].get<std::string>(), " ", entry["shape"].dump());
    }
  }
  std::sort(ranges.begin(), ranges.end());
  for (size_t i = 1; i < ranges.size(); ++i) {
    if (ranges[i].first < ranges[i - 1].second) return Bad(path, "tensors overlap");
  }
  return file;
}

const InputTensor* SafetensorsFile::Find(const std::string& name) const {
  const auto found = std::find_if(tensors_.begin(), tensors_.end(), [&](const InputTensor& tensor) {
    return tensor.spec.name() == name;
  });
  return found == tensors_.end() ? nullptr : &*found;
}

absl::StatusOr<InputTensor> SafetensorsFile::Get(const std::string& name) const {
  if (const InputTensor* tensor = Find(name); tensor != nullptr) return *tensor;
  const auto unlisted = unlisted_.find(name);
  if (unlisted == unlisted_.end()) return Bad(path_, absl::StrCat("no tensor ", name));
  return Bad(path_, absl::StrCat("tensor ", name, " is ", unlisted->second,
                                 "; F32, BF16 and F16 are served"));
}

absl::StatusOr<std::unique_ptr<SafetensorsWriter>> SafetensorsWriter::Create(
    const std::string& path) {
  struct stat info;
  if (stat(path.c_str(), &info) == 0 && !S_ISREG(info.st_mode)) {
    return Bad(path, "exists and is not a regular file");
  }
  std::string temporary_path = path + ".XXXXXX";
  const int fd = mkostemp(temporary_path.data(), O_CLOEXEC);
  if (fd < 0) return SystemError(path, "create");
  fchmod(fd, 0644);  // mkostemp's files are private
  return std::unique_ptr<SafetensorsWriter>(new SafetensorsWriter(path, temporary_path, fd));
}

SafetensorsWriter::SafetensorsWriter(std::string path, std::string temporary_path, int fd)
    : path_(std::move(path)), temporary_path_(std::move(temporary_path)), fd_(fd) {}

SafetensorsWriter::~SafetensorsWriter() {
  Unmap();
  close(fd_);
  if (!temporary_path_.empty()) unlink(temporary_path_.c_str());
}

void SafetensorsWriter::Unmap() {
  if (map_ != nullptr) munmap(map_, map_bytes_);
  map_ = nullptr;
}

absl::StatusOr<std::vector<void*>> SafetensorsWriter::Allocate(
    const std::vector<v1::TensorSpec>& specs) {
  Unmap();
  json header = json::object();
  std::vector<uint64_t> offsets;
  uint64_t end = 0;
  for (const v1::TensorSpec& spec : specs) {
    const auto bytes = TensorBytes(spec);
    if (!bytes.ok()) return bytes.status();
    if (header.contains(spec.name())) return Bad(path_, absl::StrCat("two tensors ", spec.name()));
    if (*bytes > (uint64_t{1} << 62) - end) return Bad(path_, "over 2^62 bytes");
    header[spec.name()] = {
        {"dtype", NameOf(spec.data_type())},
        {"shape", std::vector<int64_t>(spec.shape().begin(), spec.shape().end())},
        {"data_offsets", {end, end + *bytes}}};
    offsets.push_back(end);
    end += *bytes;
  }
  // A name that is no UTF-8 would make a file nobody can read: it is spelt with replacements.
  std::string text = header.dump(-1, ' ', false, json::error_handler_t::replace);
  text.append(7 - (text.size() + 7) % 8, ' ');  // the data starts at a multiple of 8
  const uint64_t header_bytes = text.size();
  text.insert(0, reinterpret_cast<const char*>(&header_bytes), sizeof(header_bytes));

  map_bytes_ = text.size() + end;
  if (ftruncate(fd_, 0) != 0) return SystemError(path_, "truncate");
  // Space that is not there must fail here, not as a signal when the map is written.
  errno = posix_fallocate(fd_, 0, static_cast<off_t>(map_bytes_));
  if (errno != 0) return SystemError(path_, "reserve disk space");
  void* address = mmap(nullptr, map_bytes_, PROT_READ | PROT_WRITE, MAP_SHARED, fd_, 0);
  if (address == MAP_FAILED) return SystemError(path_, "map");
  map_ = address;
  std::memcpy(map_, text.data(), text.size());
  std::vector<void*> places;
  for (uint64_t offset : offsets) {
    places.push_back(static_cast<uint8_t*>(map_) + text.size() + offset);
  }
  return places;
}

absl::Status SafetensorsWriter::Commit() {
  Unmap();
  if (rename(temporary_path_.c_str(), path_.c_str()) != 0) return SystemError(path_, "rename to");
  temporary_path_.clear();
  return absl::OkStatus();
}

}  // namespace prefilld::client

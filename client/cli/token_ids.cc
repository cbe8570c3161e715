#include "client/cli/token_ids.h"

#include <filesystem>
#include <fstream>
#include <limits>
#include <nlohmann/json.hpp>
#include <system_error>

#include "absl/strings/str_cat.h"

namespace prefilld::cli {

absl::StatusOr<std::vector<uint32_t>> ReadTokenIds(const std::string& path) {
  std::error_code error;
  if (std::filesystem::is_directory(path, error)) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": is a directory, not a file"));
  }
  std::ifstream stream(path, std::ios::binary);
  if (!stream) return absl::NotFoundError(absl::StrCat(path, ": cannot open"));
  const auto list = nlohmann::json::parse(stream, nullptr, /*allow_exceptions=*/false);
  if (!list.is_array()) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": not a JSON array of token IDs"));
  }
  std::vector<uint32_t> ids;
  ids.reserve(list.size());
  for (const auto& id : list) {
    if (!id.is_number_unsigned() || id.get<uint64_t>() > std::numeric_limits<uint32_t>::max()) {
      return absl::InvalidArgumentError(absl::StrCat(path, ": token_ids[", ids.size(), "] is ",
                                                     id.is_number() ? id.dump() : id.type_name(),
                                                     ", not an integer from 0 to 4294967295"));
    }
    ids.push_back(id.get<uint32_t>());
  }
  return ids;
}

}  // namespace prefilld::cli

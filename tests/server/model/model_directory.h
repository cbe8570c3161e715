// A copy of a fixture model that a test may damage; removed with its owner.
#pragma once

#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <string_view>

namespace prefilld {

inline std::string FixtureModel(std::string_view name) {
  return std::string(PREFILLD_FIXTURES "/models/") + std::string(name);
}

class ModelDirectory {
 public:
  ModelDirectory() {
    std::string pattern = std::filesystem::temp_directory_path() / "prefilld_model_XXXXXX";
    if (mkdtemp(pattern.data()) == nullptr) throw std::runtime_error("mkdtemp " + pattern);
    path_ = pattern;
  }
  explicit ModelDirectory(std::string_view fixture) : ModelDirectory() {
    std::filesystem::copy(FixtureModel(fixture), path_, std::filesystem::copy_options::recursive);
  }
  ModelDirectory(const ModelDirectory&) = delete;
  ModelDirectory& operator=(const ModelDirectory&) = delete;
  ~ModelDirectory() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }

  std::string path() const { return path_; }
  std::filesystem::path operator/(std::string_view file) const { return path_ / file; }

  std::string Read(std::string_view file) const {
    std::ifstream in(path_ / file, std::ios::binary);
    return {std::istreambuf_iterator<char>(in), {}};
  }
  void Write(std::string_view file, std::string_view bytes) const {
    std::ofstream(path_ / file, std::ios::binary) << bytes;
  }
  // Replaces the only place where `from` stands.
  void Replace(std::string_view file, std::string_view from, std::string_view to) const {
    std::string bytes = Read(file);
    const size_t at = bytes.find(from);
    if (at == std::string::npos || bytes.find(from, at + 1) != std::string::npos) {
      throw std::runtime_error(std::string(from) + " does not stand once in " + std::string(file));
    }
    Write(file, bytes.replace(at, from.size(), to));
  }

 private:
  std::filesystem::path path_;
};

}  // namespace prefilld

#include "kernels/cuda/model/algorithms.h"

#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <optional>
#include <sstream>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"

namespace prefilld::cuda {
namespace {

constexpr int64_t kStepMin = 16;
constexpr mode_t kFileMode = 0644;

// A line of the file: the shape, then the algorithm as the library lays it out, in hex. It says
// itself that its bytes may be kept for the same version.
std::optional<DType> DTypeOf(std::string_view name) {
  for (const DType dtype : {DType::kF32, DType::kBF16, DType::kF16}) {
    if (name == Name(dtype)) return dtype;
  }
  return std::nullopt;
}

bool Parse(const std::string& line, ProductShape* shape, cublasLtMatmulAlgo_t* algorithm) {
  std::istringstream words(line);
  std::string dtype, y_dtype, hex;
  words >> dtype >> y_dtype >> shape->out >> shape->in >> shape->tokens >> shape->accumulate >>
      shape->bias >> hex;
  const auto x = DTypeOf(dtype), y = DTypeOf(y_dtype);
  if (words.fail() || !x || !y || hex.size() != 2 * sizeof *algorithm) return false;
  const bool digits =
      std::all_of(hex.begin(), hex.end(), [](unsigned char c) { return std::isxdigit(c) != 0; });
  if (!digits) return false;
  shape->dtype = *x;
  shape->y_dtype = *y;
  std::memcpy(algorithm, absl::HexStringToBytes(hex).data(), sizeof *algorithm);
  return true;
}

std::string LineOf(const ProductShape& shape, const cublasLtMatmulAlgo_t& algorithm) {
  const std::string bytes(reinterpret_cast<const char*>(&algorithm), sizeof algorithm);
  return absl::StrCat(Name(shape.dtype), " ", Name(shape.y_dtype), " ", shape.out, " ", shape.in,
                      " ", shape.tokens, " ", shape.accumulate, " ", shape.bias, " ",
                      absl::BytesToHexString(bytes), "\n");
}

}  // namespace

int64_t TokensStep(int64_t tokens) {
  int64_t step = kStepMin;
  while (step < tokens) {
    if (step + step / 2 >= tokens) return step + step / 2;
    step *= 2;
  }
  return step;
}

Algorithms::Algorithms(const std::string& directory, std::string_view device,
                       size_t library_version) {
  if (directory.empty()) return;
  std::string name(device);
  std::replace_if(
      name.begin(), name.end(), [](unsigned char c) { return std::isalnum(c) == 0; }, '_');
  path_ = absl::StrCat(directory, "/cublaslt-", library_version, "-", name, ".txt");
  Read();
}

const cublasLtMatmulAlgo_t* Algorithms::Find(const ProductShape& shape) const {
  const auto found = chosen_.find(shape);
  return found == chosen_.end() ? nullptr : &found->second;
}

void Algorithms::Keep(const ProductShape& shape, const cublasLtMatmulAlgo_t& algorithm) {
  chosen_[shape] = algorithm;
  if (!path_.empty()) Write();
}

void Algorithms::Read() {
  std::ifstream file(path_);
  std::string line;
  while (std::getline(file, line)) {
    ProductShape shape;
    cublasLtMatmulAlgo_t algorithm;
    if (Parse(line, &shape, &algorithm)) chosen_[shape] = algorithm;
  }
}

void Algorithms::Write() const {
  std::string beside = path_ + ".XXXXXX";
  const int made = mkstemp(beside.data());
  if (made < 0) return;
  fchmod(made, kFileMode);
  close(made);
  std::ofstream file(beside, std::ios::trunc);
  for (const auto& [shape, algorithm] : chosen_) file << LineOf(shape, algorithm);
  file.close();
  if (file.fail() || std::rename(beside.c_str(), path_.c_str()) != 0) std::remove(beside.c_str());
}

}  // namespace prefilld::cuda

// Which of cuBLASLt's algorithms a product runs: its heuristic's first is often 5% slower than the
// best that it knows. They are measured when a shape is first seen, which is at start for what a
// model runs, and kept in a file, if there is a directory for it, so that a server gives the same
// bits after it was started again. The engine thread alone.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <tuple>

#include "kernels/cuda/model/cublas_lt.h"
#include "kernels/tensor.h"

namespace prefilld::cuda {

// What an algorithm is chosen by.
struct ProductShape {
  DType dtype = DType::kBF16, y_dtype = DType::kBF16;
  int64_t out = 0, in = 0, tokens = 0;
  bool accumulate = false, bias = false;
  auto operator<=>(const ProductShape&) const = default;
};

// Token counts are rounded up to one of few, each about 4/3 of the one before it.
int64_t TokensStep(int64_t tokens);

class Algorithms {
 public:
  // Reads what was kept for this device and version of the library: a file of its own each. A file
  // that is missing or broken is none. directory: empty, nothing is kept.
  Algorithms(const std::string& directory, std::string_view device, size_t library_version);

  const cublasLtMatmulAlgo_t* Find(const ProductShape& shape) const;  // null: not measured
  // The file is written anew beside the old one, under a name of its own, for others may share the
  // directory, and takes its place; that it cannot is no failure.
  void Keep(const ProductShape& shape, const cublasLtMatmulAlgo_t& algorithm);

 private:
  void Read();
  void Write() const;

  std::string path_;  // empty: no file
  std::map<ProductShape, cublasLtMatmulAlgo_t> chosen_;
};

}  // namespace prefilld::cuda

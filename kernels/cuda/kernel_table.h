// What a kernel is instantiated for: closed tables of element types and head dims beside each
// kernel, searched by admission (Has) and by dispatch (Launch) alike, so that what is admitted is
// what can run and what is not listed runs nothing.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <array>

#include "kernels/tensor.h"

namespace prefilld::cuda {

// BF16 and F16 times the head dims listed.
template <int... kHeadDims>
struct KernelTable {
  // What tiles are cut for: outputs leave in pieces of 32 channels, at most a warp copies a row.
  static_assert(((kHeadDims % 32 == 0 && kHeadDims >= 64 && kHeadDims <= 256) && ...));
  static constexpr std::array<DType, 2> kDTypes = {DType::kBF16, DType::kF16};
  static constexpr std::array kHeadDimList = {kHeadDims...};  // for messages

  static constexpr bool Has(DType dtype, int head_dim) {
    return (dtype == kDTypes[0] || dtype == kDTypes[1]) && ((head_dim == kHeadDims) || ...);
  }

  // launch.template operator()<T, kHeadDim>() of the row that is listed, which returns a
  // cudaError_t; cudaErrorInvalidValue where none is.
  template <typename Function>
  static cudaError_t Launch(DType dtype, int head_dim, Function&& launch) {
    if (!Has(dtype, head_dim)) return cudaErrorInvalidValue;
    return dtype == DType::kBF16 ? Find<__nv_bfloat16>(head_dim, launch)
                                 : Find<__half>(head_dim, launch);
  }

 private:
  template <typename T, typename Function>
  static cudaError_t Find(int head_dim, Function&& launch) {
    cudaError_t error = cudaErrorInvalidValue;
    static_cast<void>(
        ((head_dim == kHeadDims && (error = launch.template operator()<T, kHeadDims>(), true)) ||
         ...));
    return error;
  }
};

// F32, for parity with the CPU and not for speed: kernels without tensor cores, instantiated by the
// number of groups of 64 channels that they hold. They take every multiple of 8 channels.
struct PlainTable {
  static constexpr int kUnit = 8, kMax = 256;
  static constexpr std::array kHeadDimList = [] {  // for messages
    std::array<int, kMax / kUnit> list = {};
    for (int i = 0; i < kMax / kUnit; ++i) list[i] = (i + 1) * kUnit;
    return list;
  }();

  static constexpr bool Has(DType dtype, int head_dim) {
    return dtype == DType::kF32 && head_dim > 0 && head_dim <= kMax && head_dim % kUnit == 0;
  }

  // launch.template operator()<kGroups>(), or cudaErrorInvalidValue.
  template <typename Function>
  static cudaError_t Launch(DType dtype, int head_dim, Function&& launch) {
    if (!Has(dtype, head_dim)) return cudaErrorInvalidValue;
    switch ((head_dim + 63) / 64) {
      case 1:
        return launch.template operator()<1>();
      case 2:
        return launch.template operator()<2>();
      case 3:
        return launch.template operator()<3>();
      default:
        return launch.template operator()<4>();
    }
  }
};

}  // namespace prefilld::cuda

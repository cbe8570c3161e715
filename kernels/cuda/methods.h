// The closed table of what each method launches on CUDA, in stages 1 and 2. Admission and the
// backend search it.
#pragma once

#include <cstddef>
#include <span>

#include "kernels/cuda/select/selection.h"

namespace prefilld::cuda {

using SelectionLauncher = cudaError_t (*)(const Selection& selection, int multiprocessors,
                                          cudaStream_t stream);

struct MethodLaunchers {
  Method method;
  bool (*has)(DType dtype, int head_dim);       // whether its kernels exist for these
  size_t (*workspace)(const Problem& problem);  // bytes that both stages share; null: none
  SelectionLauncher estimate;                   // stage 1; null: there is none
  SelectionLauncher select;                     // stage 2
};

std::span<const Method> ServedMethods();
const MethodLaunchers& LaunchersOf(Method method);  // of a served one

}  // namespace prefilld::cuda

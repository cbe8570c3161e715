// A transformer's other operations on CUDA: there are none yet. Every call says so.
#pragma once

#include <memory>

#include "kernels/ops.h"

namespace prefilld::cuda {

std::unique_ptr<Ops> CreateOps();

}  // namespace prefilld::cuda

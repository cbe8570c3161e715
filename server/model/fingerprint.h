// What tells decode engines that a KV cache is of the model they run.
#pragma once

#include <string>

#include "kernels/tensor.h"
#include "server/model/config.h"
#include "server/model/safetensors.h"

namespace prefilld {

// SHA-256 in hex over the model's id and revision, the shape of its KV, its norms' epsilon, its
// rope, and name, dtype, shape and CRC32C of every tensor. Neither where the files lie nor how they
// are split changes it. Reads every weight once.
std::string Fingerprint(const ModelConfig& config, DType dtype, const SafeTensors& tensors);

}  // namespace prefilld

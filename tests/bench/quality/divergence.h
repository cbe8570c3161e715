// How far the next-token distributions of sparse prefills lie from the dense one.
#pragma once

#include <vector>

#include "absl/status/statusor.h"
#include "server/model/transformer.h"

namespace prefilld {

// KL(dense || sparse) in nats at every position: [sparse batches, tokens]. All batches hold the
// same text, after the model's last layer. Logits are made tile by tile, so that memory does not
// grow with the text; uses every thread of the machine's OpenMP team.
absl::StatusOr<std::vector<std::vector<double>>> Divergence(
    Transformer& model, const PrefillBatch& dense, const std::vector<const PrefillBatch*>& sparse);

}  // namespace prefilld

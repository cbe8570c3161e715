// Where paged keys lie.
#pragma once

#include <cstdint>

#include "kernels/cuda/launch.h"

namespace prefilld::cuda {

// The row of the arena, in rows of head_dim, that holds key `token` of the sequence whose pages
// begin at `page_begin`; its value lies page_tokens rows behind. The keys of a block follow it row
// by row.
__device__ __forceinline__ int64_t PagedRow(const Problem& p, int32_t page_begin, int32_t token,
                                            int kv_head) {
  const int64_t page = p.pages[page_begin + (token >> p.page_shift)];
  return (page * p.kv_heads + kv_head) * 2 * p.page_tokens + (token & (p.page_tokens - 1));
}

}  // namespace prefilld::cuda

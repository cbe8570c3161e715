// Where a cache has one tile [128][d] of a layer that is computed.
#pragma once

#include <cstddef>
#include <cstdint>

#include "server/kv/kv_cache.h"

namespace prefilld {

inline std::byte* ComputeTile(const KvCache& cache, int layer, int64_t b, int kv_head, bool value) {
  const KvTarget target = cache.Target(layer);
  const int64_t first = b * kKvBlockTokens, page = first / target.page_tokens;
  const int64_t at = kv_head * target.head_stride + (value ? target.value_stride : 0) +
                     first % target.page_tokens * cache.geometry().head_dim;
  return static_cast<std::byte*>(target.pages[page]) +
         at * static_cast<int64_t>(SizeOf(target.dtype));
}

}  // namespace prefilld

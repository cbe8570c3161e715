// Where keys and values lie, in rows or in pages.
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

template <typename T>
__device__ __forceinline__ const T* KeyRow(const Problem& p, const Sequence& s, int kv_head,
                                           int token) {
  if (p.pages != nullptr) {
    return static_cast<const T*>(p.arena) + PagedRow(p, s.page_begin, token, kv_head) * p.head_dim;
  }
  return static_cast<const T*>(p.k.data) + (s.k_begin + token) * p.k.token_stride +
         kv_head * p.k.head_stride;
}
template <typename T>
__device__ __forceinline__ const T* ValueRow(const Problem& p, const Sequence& s, int kv_head,
                                             int token) {
  if (p.pages != nullptr) {
    return static_cast<const T*>(p.arena) +
           (PagedRow(p, s.page_begin, token, kv_head) + p.page_tokens) * p.head_dim;
  }
  return static_cast<const T*>(p.v.data) + (s.k_begin + token) * p.v.token_stride +
         kv_head * p.v.head_stride;
}
template <typename T>
__device__ __forceinline__ const T* QueryRow(const Problem& p, const Sequence& s, int head,
                                             int token) {
  return static_cast<const T*>(p.q.data) + (s.q_begin + token) * p.q.token_stride +
         head * p.q.head_stride;
}

}  // namespace prefilld::cuda

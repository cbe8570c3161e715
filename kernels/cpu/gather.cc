#include "kernels/cpu/gather.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/cpu/cpu_device.h"
#include "kernels/validate.h"

namespace prefilld::cpu {

absl::Status GatherPages(AttentionArgs* args, Buffer* memory) {
  const KvPages from = args->kv_pages;
  absl::Status status = ValidatePages(from);
  if (!status.ok() || from.arena == nullptr) return status;
  const AttentionShape& shape = args->shape;
  const int64_t row = shape.head_dim * static_cast<int64_t>(SizeOf(shape.dtype));  // bytes
  const int64_t matrix = from.page_tokens * row;
  const int64_t token = shape.kv_heads * row;
  const int64_t all = shape.total_k() * token;
  if (memory->bytes() < static_cast<size_t>(2 * all)) {
    *memory = Buffer();  // the old one goes first: both together may be too much
    absl::StatusOr<Buffer> larger = AllocatePages(static_cast<size_t>(2 * all));
    if (!larger.ok()) return larger.status();
    *memory = *std::move(larger);
  }
  char* const k = memory->as<char>();
  const int32_t* next = from.pages;
  for (int s = 0; s < shape.sequences(); ++s) {
    const int64_t end = shape.cu_seqlens_k[s + 1];
    for (int64_t t = shape.cu_seqlens_k[s]; t < end; t += from.page_tokens, ++next) {
      if (*next < 0 || *next >= from.arena_pages) {
        return absl::InvalidArgumentError(
            absl::StrCat("page ", *next, " of sequence ", s, " is not one of ", from.arena_pages));
      }
      const int64_t tokens = std::min<int64_t>(from.page_tokens, end - t);
      const char* page = static_cast<const char*>(from.arena) + *next * 2 * shape.kv_heads * matrix;
      for (int g = 0; g < shape.kv_heads; ++g, page += 2 * matrix) {
        for (int64_t i = 0; i < tokens; ++i) {
          char* to = k + (t + i) * token + g * row;
          std::memcpy(to, page + i * row, row);
          std::memcpy(to + all, page + matrix + i * row, row);
        }
      }
    }
  }
  args->k = {k, shape.kv_heads * int64_t{shape.head_dim}, shape.head_dim};
  args->v = {k + all, args->k.token_stride, args->k.head_stride};
  args->kv_pages = {};
  return absl::OkStatus();
}

}  // namespace prefilld::cpu

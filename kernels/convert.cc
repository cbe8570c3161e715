#include "kernels/convert.h"

#include <algorithm>
#include <cstddef>

#include "kernels/cpu/elementwise.h"
#include "kernels/cpu/tile.h"

namespace prefilld {

// By way of F32, which holds every value of the others.
void Convert(const ConvertArgs& args) {
  constexpr int64_t kPiece = 1024;  // small enough to stay in the first cache
  alignas(64) float wide[kPiece];
  const std::byte* src = static_cast<const std::byte*>(args.src);
  std::byte* dst = static_cast<std::byte*>(args.dst);
  for (int64_t done = 0; done < args.count; done += kPiece) {
    const int64_t count = std::min(kPiece, args.count - done);
    cpu::WidenRows(src + done * SizeOf(args.from), args.from, 0, 1, static_cast<int>(count), 1.0f,
                   wide, 0);
    cpu::Narrow(wide, count, args.to, dst + done * SizeOf(args.to));
  }
}

}  // namespace prefilld

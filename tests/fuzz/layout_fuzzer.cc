// Any bytes as a KvLayout, and any range of a layer in any dtype: what is sent of a range is that
// part of the whole, and the whole is what lies in the cache.
#include <fuzzer/FuzzedDataProvider.h>

#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "kernels/convert.h"
#include "server/kv/layout.h"
#include "server/rpc/messages.h"
#include "server/rpc/validate.h"
#include "tests/fuzz/refusal.h"
#include "tests/server/kv/compute_tile.h"

namespace prefilld {
namespace {

constexpr DType kDtypes[] = {DType::kF32, DType::kBF16, DType::kF16};

// A committed layer of random bits, and the same in the Hugging Face form.
struct Layer {
  KvGeometry geometry;
  std::unique_ptr<Backend> backend;
  std::unique_ptr<BlockPool> pool;
  std::shared_ptr<KvCache> cache;
  std::shared_ptr<const KvCache::Pin> pin;
  std::string plain[2];  // K, V: [kv_head, token, d]

  Layer(DType dtype, int heads, int tokens, int dim)
      : geometry{
            .layers = 1, .kv_heads = heads, .head_dim = dim, .dtype = dtype, .tokens = tokens} {
    backend = *CreateBackend("cpu", 1);
    const size_t blocks = static_cast<size_t>(geometry.blocks_per_layer());
    pool = *BlockPool::Create(backend->device(), blocks * geometry.block_bytes(),
                              geometry.block_bytes());
    cache = *KvCache::Create(*pool, geometry, /*retain=*/true);
    uint32_t bits = 1;
    const size_t row_bytes = dim * SizeOf(dtype);
    for (const bool value : {false, true}) {
      for (int head = 0; head < heads; ++head) {
        for (int token = 0; token < tokens; ++token) {
          std::byte* row = ComputeTile(*cache, 0, token / kKvBlockTokens, head, value) +
                           token % kKvBlockTokens * row_bytes;
          for (size_t i = 0; i < row_bytes; ++i) {
            row[i] = static_cast<std::byte>((bits = bits * 1664525 + 1013904223) >> 24);
          }
          plain[value].append(reinterpret_cast<const char*>(row), row_bytes);
        }
      }
    }
    cache->Commit(0);
    (*cache->Open([] {}))->WhenReady(0, [&](auto ready) { pin = *std::move(ready); });
  }

  // The whole tensor in another dtype, in one piece.
  const std::string& Whole(DType dtype, bool value) {
    std::string& whole = whole_[static_cast<int>(dtype)][value];
    if (!whole.empty()) return whole;
    const auto count = static_cast<int64_t>(plain[value].size() / SizeOf(geometry.dtype));
    whole.resize(count * SizeOf(dtype));
    Convert({.src = plain[value].data(),
             .from = geometry.dtype,
             .dst = whole.data(),
             .to = dtype,
             .count = count});
    return whole;
  }

 private:
  std::string whole_[3][2];
};

// Made once: as short as a token, as long as some blocks and a bit, of odd heads and channels.
std::vector<std::unique_ptr<Layer>>& Layers() {
  static auto* layers = [] {
    auto* made = new std::vector<std::unique_ptr<Layer>>;
    for (const DType dtype : kDtypes) {
      for (const auto& [heads, tokens, dim] : {std::tuple(1, 1, 2), {3, 300, 6}, {2, 256, 64}}) {
        made->push_back(std::make_unique<Layer>(dtype, heads, tokens, dim));
      }
    }
    return made;
  }();
  return *layers;
}

void CheckRange(Layer& layer, const KvForm& form, bool value, uint64_t offset, size_t bytes) {
  const std::string seen = std::to_string(offset) + " + " + std::to_string(bytes);
  const std::string& whole = layer.Whole(form.dtype, value);
  Promise(form.tensor_bytes(layer.geometry) == whole.size(), "a tensor has its bytes", seen);
  const std::string expected = whole.substr(offset, bytes);
  std::string part(bytes, '\0');
  form.layout->convert(*layer.pin, form.dtype, {value, offset, bytes},
                       reinterpret_cast<std::byte*>(part.data()));
  Promise(part == expected, "a converted range is that of the whole", seen);
  if (form.dtype != layer.geometry.dtype || form.layout->spans == nullptr) return;
  std::string joined;
  for (const ByteSpan& span : form.layout->spans(*layer.pin, {value, offset, bytes})) {
    joined.append(reinterpret_cast<const char*>(span.data), span.bytes);
  }
  Promise(joined == layer.plain[value].substr(offset, bytes), "spans are the range", seen);
}

}  // namespace
}  // namespace prefilld

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace prefilld;              // NOLINT
  FuzzedDataProvider input(data, size);  // numbers are taken from the end: the message comes first
  Layer& layer = *Layers()[input.ConsumeIntegralInRange<size_t>(0, Layers().size() - 1)];
  const bool value = input.ConsumeBool();
  const auto at = input.ConsumeIntegral<uint32_t>();
  const auto most = input.ConsumeIntegralInRange<size_t>(1, 8192);
  const std::string message = input.ConsumeRemainingBytesAsString();
  v1::KvLayout asked;
  if (!asked.ParseFromString(message)) return 0;
  const auto form = ValidateLayout(asked, "layout", layer.geometry);
  if (!form.ok()) {
    CheckRefusal(form.status());
    return 0;
  }
  const v1::KvLayout told = LayoutOf({.kv_heads = layer.geometry.kv_heads,
                                      .head_dim = layer.geometry.head_dim,
                                      .dtype = layer.geometry.dtype},
                                     *form);
  const auto again = ValidateLayout(told, "layout", layer.geometry);
  Promise(again.ok() && again->layout == form->layout && again->dtype == form->dtype,
          "the layout that is told can be asked for", told.ShortDebugString());
  const uint64_t total = form->tensor_bytes(layer.geometry);
  const uint64_t offset = at % total;
  CheckRange(layer, *form, value, offset, std::min<uint64_t>(most, total - offset));
  return 0;
}

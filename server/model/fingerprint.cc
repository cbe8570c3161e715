#include "server/model/fingerprint.h"

#include <isa-l/crc.h>
#include <openssl/evp.h>

#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

#include "absl/strings/escaping.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"

namespace prefilld {
namespace {

uint32_t Crc32c(const std::byte* data, size_t bytes) {
  constexpr size_t kPiece = size_t{1} << 30;  // crc32_iscsi takes its length as an int
  uint32_t crc = ~uint32_t{0};
  for (size_t done = 0; done < bytes; done += kPiece) {
    auto* piece = reinterpret_cast<unsigned char*>(const_cast<std::byte*>(data + done));
    crc = crc32_iscsi(piece, static_cast<int>(std::min(kPiece, bytes - done)), crc);
  }
  return ~crc;
}

// Of every tensor, in the order of their names. As many threads as memory keeps busy: one takes as
// long for a large model as its weights take to a GPU.
std::vector<uint32_t> Crc32cOfAll(const SafeTensors& tensors) {
  constexpr unsigned kThreadsMax = 8;
  std::vector<const SafeTensor*> all;
  for (const auto& [name, tensor] : tensors.tensors()) all.push_back(&tensor);
  std::vector<uint32_t> crcs(all.size());
  std::atomic<size_t> next{0};
  const auto run = [&] {
    for (size_t i = next++; i < all.size(); i = next++) {
      crcs[i] = Crc32c(all[i]->data, all[i]->bytes);
    }
  };
  std::vector<std::thread> helpers;
  for (unsigned i = 1; i < std::min(kThreadsMax, std::thread::hardware_concurrency()); ++i) {
    helpers.emplace_back(run);
  }
  run();
  for (std::thread& helper : helpers) helper.join();
  return crcs;
}

std::string Sha256Hex(const std::string& text) {
  unsigned char digest[EVP_MAX_MD_SIZE];
  unsigned int bytes = 0;
  EVP_Digest(text.data(), text.size(), digest, &bytes, EVP_sha256(), nullptr);
  return absl::BytesToHexString(absl::string_view(reinterpret_cast<char*>(digest), bytes));
}

}  // namespace

std::string Fingerprint(const ModelConfig& config, DType dtype, const SafeTensors& tensors) {
  const RopeConfig& rope = config.rope;
  std::string text = absl::StrFormat(
      "id %s\nrevision %s\nlayers %d kv_heads %d head_dim %d dtype %s eps %.9g\n"
      "rope %.17g %s %.17g %.17g %.17g %d\n",
      absl::CEscape(config.model_id), absl::CEscape(config.revision), config.layers,
      config.kv_heads, config.head_dim, Name(dtype), config.rms_norm_eps, rope.theta,
      Name(rope.scaling), rope.factor, rope.low_freq_factor, rope.high_freq_factor,
      rope.original_max_positions);
  // Said only where it differs from what all had when the first fingerprints were given out.
  const int rotary_dim = RotaryDim(rope, config.head_dim);
  const bool halves = rope.pairing == RotaryPairing::kHalf;
  if (rotary_dim != config.head_dim || !halves) {
    absl::StrAppendFormat(&text, "rotary_dim %d %s\n", rotary_dim, halves ? "half" : "interleaved");
  }
  if (rope.scaling == RopeScaling::kYarn) {
    absl::StrAppendFormat(&text, "yarn %.17g %.17g %d %.9g\n", rope.beta_fast, rope.beta_slow,
                          rope.truncate, rope.attention_factor);
  }
  const std::vector<uint32_t> crcs = Crc32cOfAll(tensors);
  auto crc = crcs.begin();
  for (const auto& [name, tensor] : tensors.tensors()) {
    absl::StrAppendFormat(&text, "%s %s [%s] %08x\n", absl::CEscape(name), tensor.dtype,
                          absl::StrJoin(tensor.shape, ","), *crc++);
  }
  return Sha256Hex(text);
}

}  // namespace prefilld

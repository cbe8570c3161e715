#include "kernels/cpu/reference.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>

#include "kernels/cpu/reference_head.h"

namespace prefilld::cpu {
namespace reference {
namespace {

double Widen(const void* data, DType dtype, int64_t at) {
  if (dtype == DType::kF32) return static_cast<const float*>(data)[at];
  const uint16_t bits = static_cast<const uint16_t*>(data)[at];
  if (dtype == DType::kBF16) {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float x;
    std::memcpy(&x, &wide, sizeof(x));
    return x;
  }
  const int exponent = (bits >> 10) & 31, mantissa = bits & 1023;
  const double sign = bits >> 15 ? -1 : 1;
  if (exponent == 31) return mantissa ? NAN : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(mantissa, -24);
  return sign * std::ldexp(1024 + mantissa, exponent - 25);
}

Mask ReadMask(const AttentionArgs& args, const SequenceBlocks& blocks, int h) {
  Mask keep(blocks.k_blocks, std::vector<bool>(blocks.k_blocks));
  for (int64_t i = 0; i < blocks.q_blocks; ++i) {
    const int64_t row = blocks.row_begin + i;
    for (int32_t x = 0; x < args.index.count_at(h, row); ++x) {
      keep[blocks.first_q_block + i][args.index.row_at(h, row)[x]] = true;
    }
  }
  return keep;
}

// Returns the number of blocks kept.
int64_t WriteMask(const AttentionArgs& args, const SequenceBlocks& blocks, int h,
                  const Mask& keep) {
  int64_t kept = 0;
  for (int64_t i = 0; i < blocks.q_blocks; ++i) {
    const int64_t row = blocks.row_begin + i;
    int32_t count = 0;
    for (int64_t j = 0; j <= blocks.first_q_block + i; ++j) {
      if (keep[blocks.first_q_block + i][j]) {
        args.index.row_at(h, row)[count++] = static_cast<uint16_t>(j);
      }
    }
    args.index.count_at(h, row) = count;
    kept += count;
  }
  return kept;
}

Mask CausalMask(const SequenceBlocks& blocks) {
  Mask keep(blocks.k_blocks, std::vector<bool>(blocks.k_blocks));
  for (int64_t i = 0; i < blocks.k_blocks; ++i) {
    for (int64_t j = 0; j <= i; ++j) keep[i][j] = true;
  }
  return keep;
}

// docs/sparse-attention.md, section 4: one row in each of 64 strata, others than joint's.
std::vector<int64_t> MeasuredRows(int64_t sq) {
  std::vector<int64_t> rows;
  if (sq <= 64) {
    for (int64_t t = 0; t < sq; ++t) rows.push_back(t);
    return rows;
  }
  for (int64_t r = 0; r < 64; ++r) {
    const double t = std::floor((r + 1 - RadicalInverse(r)) * sq / 64);
    rows.push_back(std::min(static_cast<int64_t>(t), sq - 1));
  }
  return rows;
}

// Softmax over the keys that query t sees, and the share of it in kept blocks.
double CapturedShare(const Head& head, const Mask& keep, int64_t t) {
  const int64_t position = head.blocks.prefix + t;
  std::vector<double> p(position + 1);
  for (int64_t j = 0; j <= position; ++j) {
    p[j] = Dot(head.q[t], head.k[j], head.head_dim) * head.softmax_scale;
  }
  Softmax(&p);
  double share = 0;
  for (int64_t j = 0; j <= position; ++j) {
    if (keep[position / head.block_size][j / head.block_size]) share += p[j];
  }
  return share;
}

}  // namespace

Matrix LoadRows(const ConstHeadsView& view, DType dtype, int64_t begin, int64_t rows, int h,
                int d) {
  Matrix m(rows, d);
  for (int64_t t = 0; t < rows; ++t) {
    for (int c = 0; c < d; ++c) {
      m[t][c] = Widen(view.data, dtype, (begin + t) * view.token_stride + h * view.head_stride + c);
    }
  }
  return m;
}

Head LoadHead(const AttentionArgs& args, const SequenceBlocks& blocks, int h) {
  const AttentionShape& shape = args.shape;
  const int d = shape.head_dim;
  const int kv = h / (shape.q_heads / shape.kv_heads);
  return {.blocks = blocks,
          .block_size = args.policy.block_size,
          .head_dim = d,
          .softmax_scale = args.softmax_scale,
          .q = LoadRows(args.q, shape.dtype, blocks.q_begin, blocks.sq, h, d),
          .k = LoadRows(args.k, shape.dtype, blocks.k_begin, blocks.sk, kv, d)};
}

double Dot(const double* a, const double* b, int d) {
  double sum = 0;
  for (int c = 0; c < d; ++c) sum += a[c] * b[c];
  return sum;
}

double RoundToBFloat16(double x) {
  const float narrow = static_cast<float>(x);
  if (std::isnan(narrow)) return narrow;
  uint32_t bits;
  std::memcpy(&bits, &narrow, sizeof(bits));
  bits = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000;
  float rounded;
  std::memcpy(&rounded, &bits, sizeof(rounded));
  return rounded;
}

void Softmax(std::vector<double>* row) {
  double largest = -INFINITY;
  for (double x : *row) largest = std::max(largest, x);
  double sum = 0;
  for (double& x : *row) sum += x = std::exp(x - largest);
  for (double& x : *row) x = std::isfinite(sum) ? x / sum : 0;
}

std::vector<int64_t> DescendingOrder(const std::vector<double>& x) {
  std::vector<int64_t> order(x.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return x[a] > x[b]; });
  return order;
}

double RadicalInverse(int64_t r) {
  double inverse = 0;
  for (double bit = 0.5; r > 0; r >>= 1, bit /= 2) inverse += (r & 1) * bit;
  return inverse;
}

}  // namespace reference

void ReferenceSelectBlocks(const AttentionArgs& args) {
  using namespace reference;
  int64_t s = 0;
  for (const SequenceBlocks& blocks : SplitIntoBlocks(args.shape, args.policy.block_size)) {
    for (int h = 0; h < args.shape.q_heads; ++h) {
      HeadReport& report = args.report[s * args.shape.q_heads + h];
      Mask keep(blocks.k_blocks, std::vector<bool>(blocks.k_blocks));
      const SparsityPolicy& policy = PolicyOf(args, h);
      report = FunctionOf(policy.method)(LoadHead(args, blocks, h), policy, &keep);
      if (report.pattern == Pattern::kDense) keep = CausalMask(blocks);
      const int64_t kept = WriteMask(args, blocks, h, keep);
      report.density = static_cast<float>(static_cast<double>(kept) / blocks.causal_blocks());
    }
    ++s;
  }
}

void ReferenceMeasureCapturedMass(const AttentionArgs& args) {
  using namespace reference;
  int64_t s = 0;
  for (const SequenceBlocks& blocks : SplitIntoBlocks(args.shape, args.policy.block_size)) {
    const std::vector<int64_t> rows = MeasuredRows(blocks.sq);
    for (int h = 0; h < args.shape.q_heads; ++h) {
      HeadReport& report = args.report[s * args.shape.q_heads + h];
      const Head head = LoadHead(args, blocks, h);
      const Mask keep = ReadMask(args, blocks, h);
      double sum = 0, least = 1;
      for (int64_t t : rows) {
        const double share = CapturedShare(head, keep, t);
        sum += share;
        least = std::min(least, share);
      }
      report.captured_mass = static_cast<float>(sum / rows.size());
      report.captured_mass_min = static_cast<float>(least);
      if (sum / rows.size() < PolicyOf(args, h).min_captured_mass) {
        WriteMask(args, blocks, h, CausalMask(blocks));
        report = {.pattern = Pattern::kDense, .dense_reason = DenseReason::kMinCapturedMass};
      }
    }
    ++s;
  }
}

ReferenceOutput ReferenceAttend(const AttentionArgs& args) {
  using namespace reference;
  const AttentionShape& shape = args.shape;
  const int d = shape.head_dim;
  ReferenceOutput out;
  out.o.resize(shape.total_q() * shape.q_heads * d);
  out.lse.resize(shape.q_heads * shape.total_q());
  for (const SequenceBlocks& blocks : SplitIntoBlocks(shape, args.policy.block_size)) {
    for (int h = 0; h < shape.q_heads; ++h) {
      const Head head = LoadHead(args, blocks, h);
      const int kv = h / (shape.q_heads / shape.kv_heads);
      const Matrix v = LoadRows(args.v, shape.dtype, blocks.k_begin, blocks.sk, kv, d);
      const Mask keep = ReadMask(args, blocks, h);
      for (int64_t t = 0; t < blocks.sq; ++t) {
        const int64_t position = blocks.prefix + t;
        std::vector<double> logits(position + 1, -INFINITY);
        double largest = -INFINITY;
        for (int64_t j = 0; j <= position; ++j) {
          if (!keep[position / head.block_size][j / head.block_size]) continue;
          logits[j] = Dot(head.q[t], head.k[j], d) * args.softmax_scale;
          largest = std::max(largest, logits[j]);
        }
        double sum = 0;
        for (int64_t j = 0; j <= position; ++j) sum += std::exp(logits[j] - largest);
        double* o = &out.o[((blocks.q_begin + t) * shape.q_heads + h) * d];
        for (int64_t j = 0; j <= position; ++j) {
          const double p = std::exp(logits[j] - largest) / sum;
          if (p == 0) continue;
          for (int c = 0; c < d; ++c) o[c] += p * v[j][c];
        }
        out.lse[h * shape.total_q() + blocks.q_begin + t] = largest + std::log(sum);
      }
    }
  }
  return out;
}

}  // namespace prefilld::cpu

// What the files of the oracle share: one head of one sequence, widened to double.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/attention.h"

namespace prefilld::cpu::reference {

struct Matrix {
  Matrix() = default;
  Matrix(int64_t rows_in, int64_t columns_in, double fill = 0)
      : rows(rows_in), columns(columns_in), x(rows_in * columns_in, fill) {}
  double* operator[](int64_t r) { return x.data() + r * columns; }
  const double* operator[](int64_t r) const { return x.data() + r * columns; }

  int64_t rows = 0, columns = 0;
  std::vector<double> x;
};

struct Head {
  SequenceBlocks blocks;
  int64_t block_size;
  int head_dim;
  double softmax_scale;
  Matrix q, k;  // [sq, d], [sk, d]
};
Head LoadHead(const AttentionArgs& args, const SequenceBlocks& blocks, int h);
// Rows [begin, begin + rows) of head h of a view.
Matrix LoadRows(const ConstHeadsView& view, DType dtype, int64_t begin, int64_t rows, int h, int d);

// keep[I][J], I and J absolute block numbers; rows before blocks.first_q_block are unused.
using Mask = std::vector<std::vector<bool>>;

double Dot(const double* a, const double* b, int d);
double RoundToBFloat16(double x);
// In place. A row that holds a NaN or has no finite sum becomes zeros.
void Softmax(std::vector<double>* row);
// Indices of x from the largest to the smallest; ties: the lower index first.
std::vector<int64_t> DescendingOrder(const std::vector<double>& x);
// The base-2 radical inverse: the bits of r mirrored behind the point.
double RadicalInverse(int64_t r);

// A method for one head: marks the blocks to keep, all false before. Of what it returns pattern and
// dense_reason count; a head of kDense keeps every causal block, whatever is marked.
using MethodFunction = HeadReport (*)(const Head& head, const SparsityPolicy& policy, Mask* keep);
MethodFunction FunctionOf(Method method);  // from the table in methods.cc
// docs/sparse-attention.md, sections 2 and 3.
HeadReport FlexPrefill(const Head& head, const SparsityPolicy& policy, Mask* keep);
HeadReport Joint(const Head& head, const SparsityPolicy& policy, Mask* keep);

}  // namespace prefilld::cpu::reference

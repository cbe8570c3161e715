// What the kernels of joint hand to each other: the workspace and the lines of a head.
#pragma once

#include <cstdint>

#include "kernels/cuda/select/joint/joint.h"
#include "kernels/cuda/select/probe.cuh"

namespace prefilld::cuda {

// Thread blocks of the repair, each with a scratch of its own: two an SM where memory allows.
constexpr int kRepairBlocksMax = 320;
// Pooled queries that a thread block of the repair takes: 32 or 64 blocks of queries.
constexpr int kRepairRows = 128;

// The lines of one head of one sequence: bitmaps of LineWords() words each.
// vertical: bit J. diagonal: bit x stands for offset n - 1 - x, so that the bits of a row of blocks
// lie in the order of its key blocks: block J of row I is bit n - 1 - I + J.
struct HeadLines {
  uint32_t* vertical;
  uint32_t* diagonal;
  uint32_t* flags;
};
constexpr uint32_t kKeepsAll = 1, kNeedsRepair = 2;

struct JointWork {
  int64_t slots;         // BlockSlots()
  int32_t line_words;    // of a bitmap: one beyond the last, so that a row can be read unaligned
  BlockPart* parts;      // Probe()
  uint32_t* mass;        // like parts: the mass of a block in 2^-32
  unsigned char* pools;  // Probe()
  uint32_t* lines;       // [sequences, q_heads, 2, line_words]
  uint32_t* flags;       // [sequences, q_heads]
  // Where the lines are chosen for sequences too long for shared memory, else null.
  unsigned char* gains;  // [q_heads, slots] of kGainBytes
  // Tasks of the repair taken from the front (low half) and from the back; zeroed by the choice of
  // lines.
  unsigned long long* taken;
  unsigned char* scratch;  // [scratch_blocks, scratch_stride]
  int32_t scratch_blocks;
  int64_t scratch_stride;

#ifdef __CUDACC__
  __device__ HeadLines Lines(const Problem& p, int s, int h) const {
    const int64_t head = static_cast<int64_t>(s) * p.q_heads + h;
    uint32_t* at = lines + head * 2 * line_words;
    return {at, at + line_words, flags + head};
  }
#endif
};

// Up to here the gains of the lines lie in shared memory.
constexpr int kGainsInShared = 4096;
constexpr int kGainBytes = 24;  // of a line: two sums, an entry of a list, its cost

// Bytes of scratch that one thread block of the repair needs.
size_t RepairScratchBytes(const Problem& problem);

struct JointPlan {
  JointWork work;
  size_t bytes;
};
JointPlan PlanJoint(const Problem& problem, void* workspace);

cudaError_t ChooseLines(const Selection& selection, const JointWork& work, cudaStream_t stream);
bool HasRepair(DType dtype, int head_dim);
cudaError_t RepairRows(const Selection& selection, const JointWork& work, int multiprocessors,
                       cudaStream_t stream);
// What they ask and launch for F32.
size_t RepairF32ScratchBytes(const Problem& problem);
cudaError_t RepairRowsF32(const Selection& selection, const JointWork& work, cudaStream_t stream);

}  // namespace prefilld::cuda

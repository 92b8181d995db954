// What an ISA must provide. kernels.cpp is compiled once per ISA with that ISA's -m flags, in a namespace of its own;
// dispatch.cpp chooses a table by cpuid (or FPTQ_ISA) at run time.
#pragma once

#include <cstddef>
#include <cstdint>

#include "views.h"

namespace fptq {

constexpr int kTileRows = 6;       // at most, of an activation panel
constexpr int kPanelCols = 64;     // columns of a weight panel
constexpr int kSumGroup = 32;      // activations carry one sum per 32 k; a weight group is a multiple of it
constexpr int kSumRows = 8;        // stride of an activation panel's sums

// M rows lie in ceil(M / kTileRows) panels of nearly equal heights, the first at row 0 and each where the last ends.
static inline int count_panels(int rows) { return (rows + kTileRows - 1) / kTileRows; }
static inline int panel_begin(int panel, int rows) {
  return static_cast<int>(static_cast<int64_t>(panel) * rows / count_panels(rows));
}
static inline int panel_of(int row, int rows) {
  return static_cast<int>(((row + int64_t{1}) * count_panels(rows) - 1) / rows);
}

// int8 activations of M rows, written panel by panel as the GEMM reads them: a panel of R rows from row m on lies at
// m · Kp, [Kp/4][R][4], zero beyond K; Kp = K rounded up to 32.
struct Activations {
  static size_t sums_size(size_t rows, size_t padded_k) {
    return (count_panels(static_cast<int>(rows)) * (padded_k / kSumGroup) + 1) * kSumRows;
  }

  int8_t* codes;
  float* scales;   // [M], the row's scale (the same static one everywhere, or dynamic)
  int32_t* sums;   // [ceil(M/6)][Kp/32][8], sums of the codes; 8 more are read, not used, beyond the last
  int rows;
  int k;
};

// Integer weights in "x32" panels. 4 bits: [N/64][Kp/4][2 lines of 64 bytes]; line l, byte 4j+b holds
// W[64p + 32l + j][4s+b] + 8 in the low nibble and W[64p + 32l + 16 + j][4s+b] + 8 in the high one.
// 8 bits: [N/64][Kp/4][4 lines of 64 bytes]; line l, byte 4j+b holds W[64p + 16l + j][4s+b] + 128.
// scales [N/64][groups][64], bf16 where every one is exactly representable, else float; those of high-nibble columns
// divided by 16; N rounded up to 64 with zero scales.
struct PackedWeight {
  uint8_t* data;
  void* scales;
  bool bf16_scales;
  int n, k, group_size, bits;   // group_size == k rounded up to 32 where quantized per channel
};

// Float weights for layers that stay in float: panels [N/64][K][64], N rounded up with zeros.
struct FloatWeight {
  void* data;
  FloatType type;
  int n, k;
};

// out[m][n] = scales[m] · Σ_g scale[n][g] · acc[m][n][g] + bias[n] + residual[m][n], for rows m0..m1 and
// 64-column panels p0..p1. Groups are added in ascending order with one fma each, so the bits do not
// depend on M, tiles or threads. Element (m, n) of out and residual lies at (m - row) · stride + n - column.
struct Epilogue {
  const float* bias;       // [N] or null
  const float* residual;   // null, or like out, which it may be
  float* out;
  ptrdiff_t stride;
  int row = 0, column = 0;
};

using GemmFn = void (*)(const Activations&, const PackedWeight&, const Epilogue&, int m0, int m1, int p0, int p1);
using FloatGemmFn = void (*)(const float* x, const FloatWeight&, const Epilogue&, int m0, int m1, int p0, int p1);
// Float rows by integer weights: the bits that a FloatGemmFn gives for float32 weights of code · scale.
using WeightOnlyGemmFn = void (*)(const float* x, const PackedWeight&, const Epilogue&, int m0, int m1, int p0, int p1);
// Multiplies what the registers hold with the GEMMs' integer instruction; returns the multiply-adds done.
using MultiplyFn = int64_t (*)(int64_t rounds);
// Quantizes row m of x (K floats) into `out`. static_scale > 0: that scale; 0: dynamic, max|x| / 127.5.
using QuantizeRowFn = void (*)(const float* x, int m, float static_scale, Activations& out);
// Quantizes columns k0..k0+n of rows m0..m1, x [m1 - m0][ldx], where the rows' maxima are known: scales[m - m0] is what
// activation_scale makes of one. k0 is a multiple of kSumGroup, and n as well or what is left of K.
using QuantizePartFn = void (*)(const float* x, ptrdiff_t ldx, int m0, int m1, const float* scales, int k0, int n,
                                Activations& out);

// compressed-tensors' symmetric int8: max|x| / 127.5, float32 epsilon where that is 0. max_bits are the bits of max|x|:
// integers order as floats do, with NaN above infinity.
static inline float activation_scale(int32_t max_bits) {
  float scale;
  __builtin_memcpy(&scale, &max_bits, 4);
  scale /= 127.5f;
  return scale == 0 ? 0x1p-23f : scale;
}

}  // namespace fptq

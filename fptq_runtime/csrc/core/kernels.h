// What an ISA must provide, and what its functions read. An ISA's files are compiled with its own -m flags, in a
// namespace of its own; dispatch.cpp chooses a table by cpuid (or FPTQ_ISA) at run time.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/views.h"

namespace fptq {

struct Layout;

// M rows lie in ceil(M / tile_rows) panels of nearly equal heights, the first at row 0 and each where the last ends.
static inline int count_panels(int rows, int tile_rows) { return (rows + tile_rows - 1) / tile_rows; }
static inline int panel_begin(int panel, int rows, int tile_rows) {
  return static_cast<int>(static_cast<int64_t>(panel) * rows / count_panels(rows, tile_rows));
}
static inline int panel_of(int row, int rows, int tile_rows) {
  return static_cast<int>(((row + int64_t{1}) * count_panels(rows, tile_rows) - 1) / rows);
}

// int8 activations of M rows, as a Layout has them.
struct Activations {
  int8_t* codes;
  float* scales;  // [M], the row's scale (the same static one everywhere, or dynamic)
  int32_t* sums;  // of the codes
  int rows;
  int k;
};

// Integer weights, as a Layout has them: codes, and scales [panels][groups][panel_cols], bf16 where every one is
// exactly representable, else float; N rounded up with zero scales.
struct PackedWeight {
  const Layout* layout;
  uint8_t* data;
  void* scales;
  bool bf16_scales;
  int n, k, group_size, bits;  // group_size == k rounded up to k_unit where quantized per channel
};

// Float weights for layers that stay in float.
struct FloatWeight {
  const Layout* layout;
  void* data;
  FloatType type;
  int n, k;
};

// Rows of integer codes as they come, to be packed. load(rows, row, k0, width, words) gives codes k0..k0+width of a
// row, kCodeBlock at most and k0 a multiple of that, each plus 2^(bits-1), four to a word, and zeros beyond them.
constexpr int kCodeBlock = 128;  // a cache line of each row where codes have 4 bits
struct CodeRows {
  void (*load)(const CodeRows& rows, size_t row, size_t k0, size_t width, uint32_t (&words)[kCodeBlock / 4]);
  const char* data;
  size_t row_bytes;
  int bits;
};

// The geometry that an ISA's GEMMs are made for. ISAs that agree share one, and then packed weights.
struct Layout {
  int tile_rows;   // at most, of an activation panel
  int panel_cols;  // columns of a weight panel
  int k_unit;      // K is rounded up to it, and a weight group is a multiple of it
  // int8 activations: bytes of codes, and numbers of sums.
  size_t (*codes_size)(size_t rows, int k);
  size_t (*sums_size)(size_t rows, int k);
  // Row m of one to row `to` of another of the same K, with its scale.
  void (*copy_row)(const Activations& from, int m, Activations& out, int to);
  // Row m's codes [K rounded up] and their sums of k_unit each, for tests to see.
  void (*read_row)(const Activations& rows, int m, int8_t* codes, int32_t* sums);
  size_t (*weight_size)(int n, int k, int bits);  // bytes of codes
  float (*stored_scale)(size_t row, int bits, float scale);
  // Panel p of the rows, with scale [N][groups].
  void (*pack_weight)(const CodeRows& rows, const float* scale, size_t p, PackedWeight& packed);
  size_t (*float_size)(int n, int k);  // numbers
  void (*pack_float)(const void* rows, size_t p, FloatWeight& packed);
};

// out[m][n] = scales[m] · Σ_g scale[n][g] · acc[m][n][g] + bias[n] + residual[m][n], for rows m0..m1 and weight panels
// p0..p1. Groups are added in ascending order with one fma each, so the bits do not depend on M, tiles or threads.
// Element (m, n) of out and residual lies at (m - row) · stride + n - column.
struct Epilogue {
  const float* bias;      // [N] or null
  const float* residual;  // null, or like out, which it may be
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
// activation_scale makes of one. k0 is a multiple of k_unit, and n as well or what is left of K.
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

// The GEMMs and the row quantizer of one ISA: included by arch/kernels.cpp, which CMake compiles once per ISA with
// FPTQ_NS naming the namespace. Nothing here may call a function template of the standard library: an out-of-line
// copy of it could be the one that another ISA's code is linked to.
//
// Every output is one fixed sequence of float operations, whatever M, tile, ISA or thread computes it: groups in
// ascending k, one fma each from an exact int32; then fma(sum, row scale, bias); then + residual.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "arch/generic/panels.h"
#include "arch/generic/simd.h"

namespace fptq::FPTQ_NS {
namespace {

// A few groups of one tile, R rows by one 64-column panel.
struct Tile {
  const int8_t* a;  // row r of step s at a + s · a_stride + r · 4
  ptrdiff_t a_stride;
  const uint8_t* w;      // the panel from the first group on
  const int32_t* sums;   // row r's sum of 32-block b at sums[b · kSumRows + r]
  const float* scales;   // [groups][64]
  float* f;              // [R][64], the float sums so far
  const uint8_t* ahead;  // weights to prefetch at the first step, then ahead_step bytes further at each
  ptrdiff_t ahead_step;
};

struct FloatTile {
  const float* x;  // [R][ldx]
  ptrdiff_t ldx;
  const void* w;  // [k][64]
  float* f;       // [R][64]
};

// Bytes of weights that every tile of a chunk reads before the next ones: of a few tiles the next block arrives in L1
// meanwhile, of many a larger one takes fewer turns. As measured.
#if defined(__AVX512VNNI__)
constexpr int kBlockBytes = 32768;
#else
constexpr int kBlockBytes = 8192;
#endif
constexpr int kFewTiles = 2, kFewTilesBlockBytes = 8192;
constexpr int kMaxGroups = kBlockBytes * 2 / kPanelCols / kSumGroup;  // in a block
constexpr int kAhead = 4096;  // bytes between a weight's prefetch and its use, where a block is walked over once

inline int smaller(int a, int b) { return a < b ? a : b; }

// What the unsigned weight codes (code + zero) add to a group's dot product: zero · Σ a, to be subtracted. Wraps as
// the accumulators do: only the difference must fit in 32 bits.
inline int32_t zero_point(const int32_t* sums, int count, uint32_t zero) {
  uint32_t total = 0;
  for (int i = 0; i < count; ++i) total += static_cast<uint32_t>(sums[i * kSumRows]);
  return static_cast<int32_t>(0u - zero * total);
}

}  // namespace
}  // namespace fptq::FPTQ_NS

// Each defines add_groups<Bits, R>(tile, groups, steps), which adds `groups` groups of `steps` · 4 codes to f and walks
// over the weights passes(Bits, R) times, add_products<Type, R>(tile, k), widen_weights<Bits>(w, scales, out), which
// makes kSumGroup k of a panel floats [k][64] of code · scale, add_weights<Bits, R>(tile, scales), which adds such
// products without memory between, and quantize_block(x, scale, codes), which quantizes 32 floats (NaN as 127) and
// returns the sum of the codes.
#if defined(__AVX512VNNI__) && !defined(FPTQ_EVEX256)
#include "arch/x86/gemm_avx512.h"
#elif defined(__AVX2__)
#include "arch/x86/gemm_avx2.h"
#else
#include "arch/generic/gemm_generic.h"
#endif

namespace fptq::FPTQ_NS {
namespace {

constexpr int kChunkRows = 8 * kTileRows;  // rows whose float sums are kept at once
template <int Bits>
void add_groups(int rows, const Tile& tile, int groups, int steps) {
  switch (rows) {
    case 1:
      return add_groups<Bits, 1>(tile, groups, steps);
    case 2:
      return add_groups<Bits, 2>(tile, groups, steps);
    case 3:
      return add_groups<Bits, 3>(tile, groups, steps);
    case 4:
      return add_groups<Bits, 4>(tile, groups, steps);
    case 5:
      return add_groups<Bits, 5>(tile, groups, steps);
    default:
      return add_groups<Bits, 6>(tile, groups, steps);
  }
}

template <FloatType Type>
void add_products(int rows, const FloatTile& tile, int k) {
  switch (rows) {
    case 1:
      return add_products<Type, 1>(tile, k);
    case 2:
      return add_products<Type, 2>(tile, k);
    case 3:
      return add_products<Type, 3>(tile, k);
    case 4:
      return add_products<Type, 4>(tile, k);
    case 5:
      return add_products<Type, 5>(tile, k);
    default:
      return add_products<Type, 6>(tile, k);
  }
}

constexpr int kFewRows = 3;  // that weights are widened for in registers; for more it is done once for all, in L1

template <int Bits>
void add_weights(int rows, const FloatTile& tile, const float* scales) {
  switch (rows) {
    case 1:
      return add_weights<Bits, 1>(tile, scales);
    case 2:
      return add_weights<Bits, 2>(tile, scales);
    default:
      return add_weights<Bits, 3>(tile, scales);
  }
}

// Row m's 64 float sums to out. scale is 1 for float weights, which leaves f + bias.
void store_row(const float* f, float scale, const Epilogue& e, int m, int n0, int n) {
  static constexpr float kZeros[kPanelCols] = {};
  const ptrdiff_t row = (m - e.row) * e.stride + n0 - e.column;
  const float* bias = e.bias ? e.bias + n0 : kZeros;
  float* out = e.out + row;
  const auto store = [=](int width) {
    if (e.residual) {
      const float* residual = e.residual + row;
#pragma GCC ivdep
      for (int j = 0; j < width; ++j) out[j] = __builtin_fmaf(f[j], scale, bias[j]) + residual[j];
    } else {
#pragma GCC ivdep
      for (int j = 0; j < width; ++j) out[j] = __builtin_fmaf(f[j], scale, bias[j]);
    }
  };
  n - n0 >= kPanelCols ? store(kPanelCols) : store(n - n0);
}

// The scales of `count` groups as floats.
const float* widen_scales(const PackedWeight& w, ptrdiff_t first, int count, float* wide) {
  if (!w.bf16_scales) return static_cast<const float*>(w.scales) + first * kPanelCols;
  const uint16_t* half = static_cast<const uint16_t*>(w.scales) + first * kPanelCols;
  for (int j = 0; j < count * kPanelCols; ++j) {
    const uint32_t bits = static_cast<uint32_t>(half[j]) << 16;
    std::memcpy(wide + j, &bits, 4);
  }
  return wide;
}

template <int Bits>
void gemm_int(const Activations& x, const PackedWeight& w, const Epilogue& e, int m0, int m1, int p0, int p1) {
  constexpr ptrdiff_t kStepBytes = kPanelCols * 4 * Bits / 8;
  const int steps = (w.k + kSumGroup - 1) / kSumGroup * (kSumGroup / 4);
  const int group_steps = w.group_size / 4;
  const int groups = (steps + group_steps - 1) / group_steps;
  const int whole_groups = steps / group_steps;  // the last group may be cut short by K
  alignas(64) float f[kChunkRows * kPanelCols], wide[kMaxGroups * kPanelCols];

  for (int p = p0; p < p1; ++p) {
    const uint8_t* panel = w.data + p * steps * kStepBytes;
    for (int c0 = m0, c1; c0 < m1; c0 = c1) {
      c1 = c0 + kChunkRows < m1 ? panel_begin(panel_of(c0 + kChunkRows, x.rows), x.rows) : m1;
      const int tiles = panel_of(c1 - 1, x.rows) - panel_of(c0, x.rows) + 1;
      const int walks = tiles * passes(Bits, smaller(c1 - c0, kTileRows));
      const bool few = walks > 1 && tiles <= kFewTiles;
      const int block_steps = (few ? kFewTilesBlockBytes : kBlockBytes) / kStepBytes;
      int block = group_steps < block_steps ? block_steps / group_steps : 1;
      if (few)
        while (groups % block) --block;
      std::memset(f, 0, static_cast<size_t>(c1 - c0) * kPanelCols * sizeof(float));
      for (int g = 0, count; g < groups; g += count) {
        count = g < whole_groups ? smaller(block, whole_groups - g) : 1;
        const int s = g * group_steps, each = smaller(group_steps, steps - s);
        const float* scales = widen_scales(w, static_cast<ptrdiff_t>(p) * groups + g, count, wide);
        // The walks over a block share out the prefetching of the next one.
        const ptrdiff_t ahead_step = (kStepBytes + walks - 1) / walks;
        const uint8_t* ahead = panel + s * kStepBytes + (walks == 1 ? kAhead : count * each * kStepBytes);
        for (int m = c0, rows; m < c1; m += rows, ahead += walks / tiles * count * each * ahead_step) {
          const int row_panel = panel_of(m, x.rows), begin = panel_begin(row_panel, x.rows);
          const int end = panel_begin(row_panel + 1, x.rows);
          rows = smaller(end, c1) - m;
          const Tile tile{
              x.codes + (begin * static_cast<ptrdiff_t>(steps) + s * (end - begin) + m - begin) * 4,
              (end - begin) * 4,
              panel + s * kStepBytes,
              x.sums + (static_cast<ptrdiff_t>(row_panel) * steps + s) * 4 / kSumGroup * kSumRows + m - begin,
              scales,
              f + (m - c0) * kPanelCols,
              ahead,
              ahead_step};
          add_groups<Bits>(rows, tile, count, each);
        }
      }
      for (int m = c0; m < c1; ++m) store_row(f + (m - c0) * kPanelCols, x.scales[m], e, m, p * kPanelCols, w.n);
    }
  }
}

// add(p, k0, count, c0, c1, f) adds products of rows c0..c1 with panel p over `count` k from k0 on, kBlock at most.
template <int kBlock, class Add>
void gemm_rows(int n, int k, const Epilogue& e, int m0, int m1, int p0, int p1, const Add& add) {
  alignas(64) float f[kChunkRows * kPanelCols];
  for (int p = p0; p < p1; ++p) {
    for (int c0 = m0, c1; c0 < m1; c0 = c1) {
      c1 = smaller(m1, c0 + kChunkRows);
      std::memset(f, 0, static_cast<size_t>(c1 - c0) * kPanelCols * sizeof(float));
      for (int k0 = 0; k0 < k; k0 += kBlock) add(p, k0, smaller(kBlock, k - k0), c0, c1, f);
      for (int m = c0; m < c1; ++m) store_row(f + (m - c0) * kPanelCols, 1.0f, e, m, p * kPanelCols, n);
    }
  }
}

// tile: the first row's; more follow.
template <FloatType Type>
void add_tiles(FloatTile tile, int rows, int count) {
  for (; rows > 0; rows -= kTileRows, tile.x += kTileRows * tile.ldx, tile.f += kTileRows * kPanelCols)
    add_products<Type>(smaller(kTileRows, rows), tile, count);
}

template <FloatType Type>
void gemm_float_as(const float* x, const FloatWeight& w, const Epilogue& e, int m0, int m1, int p0, int p1) {
  constexpr ptrdiff_t kRowBytes = kPanelCols * float_bytes(Type);
  gemm_rows<128>(w.n, w.k, e, m0, m1, p0, p1, [&](int p, int k0, int count, ptrdiff_t c0, int c1, float* f) {
    const char* weights = static_cast<const char*>(w.data) + (static_cast<ptrdiff_t>(p) * w.k + k0) * kRowBytes;
    add_tiles<Type>({x + c0 * w.k + k0, w.k, weights, f}, c1 - c0, count);
  });
}

template <int Bits>
void gemm_weight_only_as(const float* x, const PackedWeight& w, const Epilogue& e, int m0, int m1, int p0, int p1) {
  constexpr int kBlock = 64;  // its floats stay in L1
  const ptrdiff_t blocks = (w.k + kSumGroup - 1) / kSumGroup, groups = (w.k + w.group_size - 1) / w.group_size;
  alignas(64) float wide[kPanelCols], floats[kBlock * kPanelCols];
  gemm_rows<kBlock>(w.n, w.k, e, m0, m1, p0, p1, [&](int p, int k0, int count, ptrdiff_t c0, int c1, float* f) {
    const float* rows = x + c0 * w.k;
    const bool few = c1 - c0 <= kFewRows && count == kBlock;
    for (int k = k0; k < k0 + count; k += kSumGroup) {
      const uint8_t* codes = w.data + (p * blocks + k / kSumGroup) * (kSumGroup * kPanelCols * Bits / 8);
      const float* scales = widen_scales(w, p * groups + k / w.group_size, 1, wide);
      if (few) add_weights<Bits>(static_cast<int>(c1 - c0), {rows + k, w.k, codes, f}, scales);
      else widen_weights<Bits>(codes, scales, floats + (k - k0) * kPanelCols);
    }
    if (!few) add_tiles<FloatType::kFloat32>({rows + k0, w.k, floats, f}, c1 - c0, count);
  });
}

void gemm_int4(const Activations& x, const PackedWeight& w, const Epilogue& e, int m0, int m1, int p0, int p1) {
  gemm_int<4>(x, w, e, m0, m1, p0, p1);
}

void gemm_int8(const Activations& x, const PackedWeight& w, const Epilogue& e, int m0, int m1, int p0, int p1) {
  gemm_int<8>(x, w, e, m0, m1, p0, p1);
}

void gemm_float(const float* x, const FloatWeight& w, const Epilogue& e, int m0, int m1, int p0, int p1) {
  const auto gemm = w.type == FloatType::kFloat32    ? gemm_float_as<FloatType::kFloat32>
                    : w.type == FloatType::kBfloat16 ? gemm_float_as<FloatType::kBfloat16>
                                                     : gemm_float_as<FloatType::kFloat16>;
  gemm(x, w, e, m0, m1, p0, p1);
}

void gemm_weight_only(const float* x, const PackedWeight& w, const Epilogue& e, int m0, int m1, int p0, int p1) {
  (w.bits == 4 ? gemm_weight_only_as<4> : gemm_weight_only_as<8>)(x, w, e, m0, m1, p0, p1);
}

int32_t max_bits(const float* x, int n) {
  int32_t max = 0;
  for (int i = 0; i < n; ++i) {
    int32_t bits;
    std::memcpy(&bits, x + i, 4);
    bits &= 0x7fffffff;
    max = bits > max ? bits : max;
  }
  return max;
}

// Codes half to even. A NaN or infinity in a dynamic row makes its scale, and so its outputs, NaN or infinite: the
// other rows are safe.
void quantize_part(const float* x, ptrdiff_t ldx, int m0, int m1, const float* scales, int k0, int n,
                   Activations& out) {
  const int blocks = (out.k + kSumGroup - 1) / kSumGroup;
  for (int m = m0, end; m < m1; m = end) {
    const int panel = panel_of(m, out.rows), begin = panel_begin(panel, out.rows);
    const int height = panel_begin(panel + 1, out.rows) - begin;
    end = smaller(begin + height, m1);
    int8_t* codes =
        out.codes + begin * static_cast<ptrdiff_t>(blocks) * kSumGroup + static_cast<ptrdiff_t>(k0) * height;
    int32_t* sums = out.sums + (panel * static_cast<ptrdiff_t>(blocks) + k0 / kSumGroup) * kSumRows;
    for (int row = m; row < end; ++row, x += ldx) {
      const float scale = scales[row - m0];
      if (k0 == 0) out.scales[row] = scale;
      for (int i = 0; i < n; i += kSumGroup) {
        const float* block = x + i;
        float padded[kSumGroup];
        if (n - i < kSumGroup) {
          std::memset(padded, 0, sizeof padded);
          std::memcpy(padded, block, (n - i) * sizeof(float));
          block = padded;
        }
        int8_t q[kSumGroup];
        sums[i / kSumGroup * kSumRows + row - begin] = quantize_block(block, scale, q);
        int8_t* to = codes + static_cast<ptrdiff_t>(i) * height + (row - begin) * 4;
        for (int j = 0; j < kSumGroup; j += 4, to += 4 * height) std::memcpy(to, q + j, 4);
      }
    }
  }
}

void quantize_row(const float* x, int m, float static_scale, Activations& out) {
  const float scale = static_scale > 0 ? static_scale : activation_scale(max_bits(x, out.k));
  quantize_part(x, 0, m, m + 1, &scale, 0, out.k, out);
}

}  // namespace
}  // namespace fptq::FPTQ_NS

// What adapters add to single rows. Included by arch/kernels.cpp only.
#pragma once

#include "arch/generic/simd.h"
#include "core/views.h"

namespace fptq {
namespace FPTQ_NS {

static void widen_codes(const int8_t* codes, float scale, int n, float* out) {
  for (int i = 0; i < n; ++i) out[i] = static_cast<float>(codes[i]) * scale;
}

// kLanes of a factor.
template <FactorType Type>
static inline Vec widen_factor(const char* p) {
  if constexpr (Type == FactorType::kInt8) {
#if defined(__AVX512F__)
    const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm512_maskz_cvtepi32_ps(0xffff, _mm512_maskz_cvtepi8_epi32(0xffff, codes));
#elif defined(__AVX2__)
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
    Vec v;
    for (int i = 0; i < kLanes; ++i) v[i] = static_cast<int8_t>(p[i]);
    return v;
#endif
  } else {
    return widen<static_cast<FloatType>(Type)>(static_cast<const void*>(p));
  }
}

// t[i][r] = scales[r] · Σ x[i][k] · down[r][k] for Ranks of them, over sixteen partial sums each.
template <FactorType Type, int Rows, int Ranks>
static inline void low_rank_dots(const LowRankView& v, const float* const* x, int r, float* t) {
  const char* down = static_cast<const char*>(v.down) + static_cast<ptrdiff_t>(r) * v.k * factor_bytes(Type);
  Sums acc[Ranks][Rows] = {};
  for (int k = 0; k < v.k; k += kSumLanes) {
#pragma GCC unroll 4
    for (int j = 0; j < kParts; ++j) {
      Vec rows[Rows];
      for (int i = 0; i < Rows; ++i) rows[i] = load(x[i] + k + j * kLanes);
      for (int q = 0; q < Ranks; ++q) {
        const Vec w =
            widen_factor<Type>(down + (static_cast<ptrdiff_t>(q) * v.k + k + j * kLanes) * factor_bytes(Type));
        for (int i = 0; i < Rows; ++i) acc[q][i].part[j] = fma(w, rows[i], acc[q][i].part[j]);
      }
    }
  }
  for (int q = 0; q < Ranks; ++q)
    for (int i = 0; i < Rows; ++i) t[i * v.rank + r + q] = v.scales[r + q] * sum(acc[q][i]);
}

template <FactorType Type, int Rows>
static void low_rank_down(const LowRankView& v, const float* const* x, float* t) {
  constexpr int kRanks = kLanes < 16 ? (Rows > 2 ? 1 : 4 / Rows) : Rows > 2 ? 4 : 8 / Rows;  // of registers
  int r = 0;
  for (; r + kRanks <= v.rank; r += kRanks) low_rank_dots<Type, Rows, kRanks>(v, x, r, t);
  for (; r < v.rank; ++r) low_rank_dots<Type, Rows, 1>(v, x, r, t);
}

// y[i][n] += Σ t[i][r] · up[r][n], r ascending.
template <FactorType Type, int Rows>
static void low_rank_up(const LowRankView& v, const float* t, float* const* y) {
  constexpr int kVecs = kLowRankColumns / kLanes;
  const char* up = static_cast<const char*>(v.up);
  for (int n = 0; n < v.n; n += kLowRankColumns) {
    Vec acc[Rows][kVecs] = {};
    for (int r = 0; r < v.rank; ++r) {
      for (int j = 0; j < kVecs; ++j, up += kLanes * factor_bytes(Type)) {
        const Vec w = widen_factor<Type>(up);
        for (int i = 0; i < Rows; ++i) acc[i][j] = fma(splat(t[i * v.rank + r]), w, acc[i][j]);
      }
    }
    for (int i = 0; i < Rows; ++i) {
      for (int j = 0; j < kVecs; ++j) {
        float* to = y[i] + n + j * kLanes;
        const int left = v.n - n - j * kLanes;
        if (left >= kLanes) store(to, load(to) + acc[i][j]);
        else if (left > 0) store_part(to, load_part(to, left) + acc[i][j], left);
      }
    }
  }
}

template <int Rows>
static void low_rank(const LowRankView& v, const float* const* x, float* const* y, float* t) {
  static constexpr decltype(&low_rank_down<FactorType::kInt8, Rows>) kDown[] = {
      low_rank_down<FactorType::kFloat32, Rows>, low_rank_down<FactorType::kBfloat16, Rows>,
      low_rank_down<FactorType::kFloat16, Rows>, low_rank_down<FactorType::kInt8, Rows>};
  static constexpr decltype(&low_rank_up<FactorType::kInt8, Rows>) kUp[] = {
      low_rank_up<FactorType::kFloat32, Rows>, low_rank_up<FactorType::kBfloat16, Rows>,
      low_rank_up<FactorType::kFloat16, Rows>, low_rank_up<FactorType::kInt8, Rows>};
  kDown[static_cast<int>(v.down_type)](v, x, t);
  kUp[static_cast<int>(v.up_type)](v, t, y);
}

static void low_rank_rows(const LowRankView& v, const float* const* x, float* const* y, int rows, float* t) {
  static_assert(kLowRankRows == 4 && kLowRankPad % kSumLanes == 0 && kLowRankColumns % kLanes == 0);
  const auto run = rows == 1 ? low_rank<1> : rows == 2 ? low_rank<2> : rows == 3 ? low_rank<3> : low_rank<4>;
  run(v, x, y, t);
}

}  // namespace FPTQ_NS
}  // namespace fptq

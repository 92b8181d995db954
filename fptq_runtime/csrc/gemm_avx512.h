// AVX-512 VNNI tiles: 6 rows by 64 columns are 24 of the 32 registers. See gemm.h.
#pragma once

#include <immintrin.h>

namespace fptq::FPTQ_NS {
namespace {

constexpr const char* kGemmInt4Name = "int4 x int8, AVX-512 VNNI";
constexpr const char* kGemmInt8Name = "int8 x int8, AVX-512 VNNI";
constexpr const char* kGemmFloatName = "float32, AVX-512";

using Int32Alias [[gnu::may_alias]] = int32_t;

// acc += w · a, four unsigned by four signed bytes a lane. Assembly because GCC 12 turns an intrinsics tile with
// embedded broadcasts into spills.
inline __m512i dot(__m512i acc, __m512i w, const int8_t* a) {
  asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(acc) : "v"(w), "m"(*reinterpret_cast<const Int32Alias*>(a)));
  return acc;
}

int64_t multiply(int64_t rounds) {
  __m512i acc[16] = {};
  const __m512i ones = _mm512_set1_epi8(1);
  for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 16
    for (int j = 0; j < 16; ++j) asm volatile("vpdpbusd %1, %1, %0" : "+v"(acc[j]) : "v"(ones));
  }
  return rounds * 16 * 64;
}

template <int Bits, int R>
[[gnu::noinline]] void add_groups(const Tile& t, int groups, int steps) {
  const __m512i nibble = _mm512_set1_epi8(15);
  const int8_t* a = t.a;
  const uint8_t* w = t.w;
  const int32_t* sums = t.sums;
  const float* scales = t.scales;
  for (int g = 0; g < groups; ++g) {
    __m512i acc[R][4];
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      const int32_t* row = sums + r * t.sum_stride;
      if constexpr (Bits == 4) {
        // A byte as it stands is low + 16 · high, of which the low columns' sum is subtracted at the end.
        const int32_t low = zero_point(row, steps / 8, 8);
        acc[r][0] = acc[r][2] = _mm512_set1_epi32(low);
        acc[r][1] = acc[r][3] = _mm512_set1_epi32(static_cast<int32_t>(17u * static_cast<uint32_t>(low)));
      } else {
        acc[r][0] = acc[r][1] = acc[r][2] = acc[r][3] = _mm512_set1_epi32(zero_point(row, steps / 8, 128));
      }
    }
    for (int s = 0; s < steps; ++s, a += t.a_stride) {
      if constexpr (Bits == 4) {
        const __m512i p0 = _mm512_loadu_si512(w), p1 = _mm512_loadu_si512(w + 64);
        const __m512i l0 = _mm512_and_si512(p0, nibble), l1 = _mm512_and_si512(p1, nibble);
        _mm_prefetch(reinterpret_cast<const char*>(w + 2048), _MM_HINT_T0);
        _mm_prefetch(reinterpret_cast<const char*>(w + 2112), _MM_HINT_T0);
        w += 128;
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r) {
          acc[r][0] = dot(acc[r][0], l0, a + 4 * r);
          acc[r][1] = dot(acc[r][1], p0, a + 4 * r);
          acc[r][2] = dot(acc[r][2], l1, a + 4 * r);
          acc[r][3] = dot(acc[r][3], p1, a + 4 * r);
        }
      } else {
        __m512i p[4];
#pragma GCC unroll 4
        for (int l = 0; l < 4; ++l) {
          p[l] = _mm512_loadu_si512(w + 64 * l);
          _mm_prefetch(reinterpret_cast<const char*>(w + 2048 + 64 * l), _MM_HINT_T0);
        }
        w += 256;
#pragma GCC unroll 6
        for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
          for (int l = 0; l < 4; ++l) acc[r][l] = dot(acc[r][l], p[l], a + 4 * r);
        }
      }
    }
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      if constexpr (Bits == 4) {
        acc[r][1] = _mm512_sub_epi32(acc[r][1], acc[r][0]);
        acc[r][3] = _mm512_sub_epi32(acc[r][3], acc[r][2]);
      }
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) {
        float* f = t.f + r * kPanelCols + 16 * c;
        _mm512_storeu_ps(f, _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc[r][c]), _mm512_loadu_ps(scales + 16 * c),
                                            _mm512_loadu_ps(f)));
      }
    }
    sums += steps / 8;
    scales += kPanelCols;
    asm volatile("" ::: "memory");   // else GCC keeps copies of f from group to group in registers it then spills
  }
}

template <bool Bf16, int R>
[[gnu::noinline]] void add_products(const FloatTile& t, int k) {
  __m512 acc[R][4];
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) acc[r][c] = _mm512_loadu_ps(t.f + r * kPanelCols + 16 * c);
  }
  const char* w = static_cast<const char*>(t.w);
  for (int i = 0; i < k; ++i) {
    __m512 v[4];
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
      if constexpr (Bf16) {
        const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + 32 * c));
        v[c] = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
      } else {
        v[c] = _mm512_loadu_ps(w + 64 * c);
      }
    }
    w += Bf16 ? 128 : 256;
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      const __m512 x = _mm512_set1_ps(t.x[r * t.ldx + i]);
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) acc[r][c] = _mm512_fmadd_ps(v[c], x, acc[r][c]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) _mm512_storeu_ps(t.f + r * kPanelCols + 16 * c, acc[r][c]);
  }
}

}  // namespace
}  // namespace fptq::FPTQ_NS

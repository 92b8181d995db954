// AVX-512 VNNI tiles: the integer and float sums of 6 rows by 32 columns, or 3 by 64, take 24 of the 32 registers. See
// gemm.h.
#pragma once

#include <immintrin.h>

namespace fptq::FPTQ_NS {
namespace {

constexpr const char* kGemmInt4Name = "int4 x int8, AVX-512 VNNI";
constexpr const char* kGemmInt8Name = "int8 x int8, AVX-512 VNNI";
constexpr const char* kGemmFloatName = "float32, AVX-512";

using Int32Alias [[gnu::may_alias]] = int32_t;

// acc[c] += w[c] · a, four unsigned by four signed bytes a lane. Assembly because GCC 12 broadcasts all rows first and
// spills the accumulators.
inline void dot(__m512i (&acc)[4], const __m512i (&w)[4], const int8_t* a) {
  __m512i x;
  asm("vpbroadcastd %[a], %[x]\n\t"
      "vpdpbusd %[x], %[w0], %[acc0]\n\t"
      "vpdpbusd %[x], %[w1], %[acc1]\n\t"
      "vpdpbusd %[x], %[w2], %[acc2]\n\t"
      "vpdpbusd %[x], %[w3], %[acc3]"
      : [acc0] "+v"(acc[0]), [acc1] "+v"(acc[1]), [acc2] "+v"(acc[2]), [acc3] "+v"(acc[3]), [x] "=&v"(x)
      :
      [w0] "v"(w[0]), [w1] "v"(w[1]), [w2] "v"(w[2]), [w3] "v"(w[3]), [a] "m"(*reinterpret_cast<const Int32Alias*>(a)));
}

inline void dot(__m512i (&acc)[2], const __m512i (&w)[2], const int8_t* a) {
  __m512i x;
  asm("vpbroadcastd %[a], %[x]\n\t"
      "vpdpbusd %[x], %[w0], %[acc0]\n\t"
      "vpdpbusd %[x], %[w1], %[acc1]"
      : [acc0] "+v"(acc[0]), [acc1] "+v"(acc[1]), [x] "=&v"(x)
      : [w0] "v"(w[0]), [w1] "v"(w[1]), [a] "m"(*reinterpret_cast<const Int32Alias*>(a)));
}

// f += float(acc) · scale
inline void scale_add(__m512& f, __m512i acc, __m512 scale) {
  asm("vcvtdq2ps %[acc], %[acc]\n\tvfmadd231ps %[scale], %[acc], %[f]"
      : [f] "+v"(f), [acc] "+v"(acc)
      : [scale] "v"(scale));
}

inline int32_t quantize_block(const float* x, float scale, int8_t* codes) {
  const __m512 divisor = _mm512_set1_ps(scale), most = _mm512_set1_ps(127.0f), least = _mm512_set1_ps(-128.0f);
  __m128i q[2];
  for (int h = 0; h < 2; ++h) {
    const __m512 v = _mm512_div_ps(_mm512_loadu_ps(x + 16 * h), divisor);
    q[h] = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(_mm512_max_ps(_mm512_min_ps(v, most), least)));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + 16 * h), q[h]);
  }
  const __m256i offset = _mm256_xor_si256(_mm256_set_m128i(q[1], q[0]), _mm256_set1_epi8(-128));
  const __m256i sum = _mm256_sad_epu8(offset, _mm256_setzero_si256());
  const __m128i half = _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
  return _mm_cvtsi128_si32(half) + _mm_extract_epi32(half, 2) - kSumGroup * 128;
}

// Bytes beyond `ahead` that are fetched into L2 before: L1 has too few misses in flight for memory's latency.
constexpr int kFar = 16384;

constexpr int passes(int, int rows) { return rows <= 3 ? 1 : 2; }

int64_t multiply(int64_t rounds) {
  __m512i acc[16] = {};
  const __m512i ones = _mm512_set1_epi8(1);
  for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 16
    for (int j = 0; j < 16; ++j) asm volatile("vpdpbusd %1, %1, %0" : "+v"(acc[j]) : "v"(ones));
  }
  return rounds * 16 * 64;
}

// V vectors of 16 columns at a time, so that their float sums stay in registers from group to group.
template <int Bits, int R>
[[gnu::noinline]] void add_groups(const Tile& t, int groups, int steps) {
  constexpr int V = 4 / passes(Bits, R);
  constexpr int kStepLines = Bits / 2, kLines = kStepLines * V / 4;
  constexpr int kUnroll = R == 1 ? 2 : 1;  // steps with accumulators of their own: four chains do not fill the units
  const __m512i nibble = _mm512_set1_epi8(15);

  alignas(64) int32_t zero[kMaxGroups][2][8];
  const int32_t* sums = t.sums;
  for (int g = 0; g < groups; ++g) {
    __m256i total = _mm256_setzero_si256();
    for (int i = 0; i < steps / 8; ++i, sums += kSumRows)
      total = _mm256_sub_epi32(total, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(sums)));
    // A byte of two nibbles as it stands is low + 16 · high, of which the low columns' sum is subtracted at the end.
    const __m256i low = _mm256_slli_epi32(total, Bits == 4 ? 3 : 7);
    const __m256i high = Bits == 4 ? _mm256_add_epi32(low, _mm256_slli_epi32(low, 4)) : low;
    _mm256_store_si256(reinterpret_cast<__m256i*>(zero[g][0]), low);
    _mm256_store_si256(reinterpret_cast<__m256i*>(zero[g][1]), high);
  }

  const char* ahead = reinterpret_cast<const char*>(t.ahead);
  // One or two rows wait for memory's bandwidth, whatever is in flight. Where a whole tile shares the prefetching with
  // another, fetching twice is slower, as measured.
  const bool far = R > 2 && (V < 4 || t.ahead_step == 64 * kStepLines);
  for (int v = 0; v < 4; v += V) {
    const int8_t* a = t.a;
    const uint8_t* w = t.w + v / V * kLines * 64;
    const float* scales = t.scales + 16 * v;
    __m512 f[R][V];
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int c = 0; c < V; ++c) f[r][c] = _mm512_loadu_ps(t.f + r * kPanelCols + 16 * (v + c));
    }
    for (int g = 0; g < groups; ++g, scales += kPanelCols) {
      __m512i acc[kUnroll][R][V];
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
        for (int c = 0; c < V; ++c) {
          acc[0][r][c] = _mm512_set1_epi32(zero[g][c % 2][r]);
          if constexpr (kUnroll == 2) acc[1][r][c] = _mm512_setzero_si512();
        }
      }
      for (int s = 0; s < steps; s += kUnroll) {
#pragma GCC unroll 2
        for (int u = 0; u < kUnroll; ++u, w += 64 * kStepLines, a += t.a_stride, ahead += t.ahead_step) {
          __m512i p[V];
#pragma GCC unroll 4
          for (int c = 0; c < V; ++c) {
            p[c] = _mm512_loadu_si512(w + 64 * (Bits == 4 ? c / 2 : c));
            if (Bits == 4 && c % 2 == 0) p[c] = _mm512_and_si512(p[c], nibble);
          }
#pragma GCC unroll 4
          for (int l = 0; l < kLines; ++l) {
            _mm_prefetch(ahead + 64 * l, _MM_HINT_T0);
            if (far) _mm_prefetch(ahead + kFar + 64 * l, _MM_HINT_T1);
          }
#pragma GCC unroll 6
          for (int r = 0; r < R; ++r) dot(acc[u][r], p, a + 4 * r);
        }
      }
      __m512 scale[V];
#pragma GCC unroll 4
      for (int c = 0; c < V; ++c) scale[c] = _mm512_loadu_ps(scales + 16 * c);
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
        for (int c = 0; c < V; ++c) {
          __m512i sum = acc[0][r][c];
          if constexpr (kUnroll == 2) sum = _mm512_add_epi32(sum, acc[1][r][c]);
          if constexpr (Bits == 4) {
            if (c % 2) sum = _mm512_sub_epi32(sum, acc[0][r][c - 1]);
            else acc[0][r][c] = sum;
          }
          scale_add(f[r][c], sum, scale[c]);
        }
      }
    }
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int c = 0; c < V; ++c) _mm512_storeu_ps(t.f + r * kPanelCols + 16 * (v + c), f[r][c]);
    }
  }
}

// f(k, c, v) for columns 16c.. of each k: fma(code, scale, -zero · scale) rounds as (code - zero) · scale does.
template <int Bits, class F>
[[gnu::always_inline]] inline void each_weight(const uint8_t* w, const float* scales, const F& f) {
  const __m512i low = _mm512_set1_epi32(Bits == 4 ? 15 : 255), high = _mm512_set1_epi32(Bits == 4 ? 240 : 255);
  __m512 scale[4], offset[4];
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    scale[c] = _mm512_loadu_ps(scales + 16 * c);
    offset[c] = _mm512_mul_ps(scale[c], _mm512_set1_ps(Bits == 4 && c % 2 == 0 ? -8.0f : -128.0f));
  }
  for (int s = 0; s < kSumGroup / 4; ++s, w += kPanelCols * Bits / 2) {
#pragma GCC unroll 4
    for (int b = 0; b < 4; ++b) {
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) {
        const __m512i line = _mm512_loadu_si512(w + 64 * (Bits == 4 ? c / 2 : c));
        const __m512i code = _mm512_and_si512(_mm512_maskz_srli_epi32(0xffff, line, 8 * b), c % 2 ? high : low);
        f(4 * s + b, c, _mm512_fmadd_ps(_mm512_maskz_cvtepi32_ps(0xffff, code), scale[c], offset[c]));
      }
    }
  }
}

template <int Bits>
void widen_weights(const uint8_t* w, const float* scales, float* out) {
  each_weight<Bits>(w, scales, [out](int k, int c, __m512 v) __attribute__((always_inline)) {
    _mm512_storeu_ps(out + k * kPanelCols + 16 * c, v);
  });
}

template <int Bits, int R>
[[gnu::noinline]] void add_weights(const FloatTile& t, const float* scales) {
  __m512 acc[R][4];
#pragma GCC unroll 3
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) acc[r][c] = _mm512_loadu_ps(t.f + r * kPanelCols + 16 * c);
  }
  each_weight<Bits>(static_cast<const uint8_t*>(t.w), scales,
                    [&acc, x = t.x, ldx = t.ldx](int k, int c, __m512 v) __attribute__((always_inline)) {
#pragma GCC unroll 3
                      for (int r = 0; r < R; ++r)
                        acc[r][c] = _mm512_fmadd_ps(v, _mm512_set1_ps(x[r * ldx + k]), acc[r][c]);
                    });
#pragma GCC unroll 3
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) _mm512_storeu_ps(t.f + r * kPanelCols + 16 * c, acc[r][c]);
  }
}

template <FloatType Type, int R>
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
    for (int c = 0; c < 4; ++c) v[c] = widen<Type>(w + 16 * c * float_bytes(Type));
    w += kPanelCols * float_bytes(Type);
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

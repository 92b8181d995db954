// Integer dot products against an int8 KV cache, whose codes lie as bytes + 128 in lines of 64: byte 4j + b is that of
// column j and k = 4 · step + b. Included by attention.h only.
//
// Dots<R, L, Stride>: R rows of codes, `Stride` apart, by L lines. add() sums row · line over steps, which for every
// line lie step_bytes apart; store() writes 16 sums a line. Sums are of the bytes as they lie: 128 · Σ row too large.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fptq {
namespace FPTQ_NS {

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)  // FPTQ_EVEX256 has the first
using Code = int8_t;
constexpr int kPlanes = 2;  // rows of bytes that a row of 15-bit numbers takes: 256 · first + second
using Int32Alias [[gnu::may_alias]] = int32_t;
#else
using Code = int16_t;
constexpr int kPlanes = 1;
#endif

// The inner products are in assembly because GCC 12 otherwise broadcasts all rows first and spills the accumulators.
#if defined(__AVX512VNNI__) && !defined(FPTQ_EVEX256)

constexpr int kDotRows = 6, kDotLines = 4;

template <int R, int L, int Stride>
struct Dots {
  __m512i acc[R][L];

  [[gnu::always_inline]] void clear() {
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int l = 0; l < L; ++l) acc[r][l] = _mm512_setzero_si512();
  }

  [[gnu::always_inline]] void add(const Code* a, const uint8_t* const* lines, size_t step_bytes, int steps) {
    const uint8_t* p[L];
#pragma GCC unroll 4
    for (int l = 0; l < L; ++l) p[l] = lines[l];
    for (int s = 0; s < steps; ++s, a += 4) {
      __m512i x[L];
#pragma GCC unroll 4
      for (int l = 0; l < L; ++l) {
        x[l] = _mm512_loadu_si512(p[l]);
        p[l] += step_bytes;
      }
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int l = 0; l < L; ++l)
          asm("vpdpbusd %2%{1to16%}, %1, %0"
              : "+v"(acc[r][l])
              : "v"(x[l]), "m"(*reinterpret_cast<const Int32Alias*>(a + r * Stride)));
    }
  }

  [[gnu::always_inline]] void store(int32_t* out, int stride) const {
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int l = 0; l < L; ++l) _mm512_storeu_si512(out + r * stride + 16 * l, acc[r][l]);
  }
};

#elif defined(__AVX512VNNI__) || defined(__AVXVNNI__)

#if defined(FPTQ_EVEX256)
#define FPTQ_VEX ""  // the AVX-VNNI tile in AVX-512VL's encoding, to be tested where that is what the CPU has
#else
#define FPTQ_VEX "%{vex%} "
#endif

constexpr int kDotRows = 6, kDotLines = 1;

template <int R, int L, int Stride>
struct Dots {
  static_assert(L == 1);
  __m256i acc[R][2];

  [[gnu::always_inline]] void clear() {
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) acc[r][0] = acc[r][1] = _mm256_setzero_si256();
  }

  [[gnu::always_inline]] void add(const Code* a, const uint8_t* const* lines, size_t step_bytes, int steps) {
    const uint8_t* p = lines[0];
    for (int s = 0; s < steps; ++s, a += 4, p += step_bytes) {
      const __m256i x0 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
      const __m256i x1 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32));
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) {
        __m256i b;
        asm("vpbroadcastd %[a], %[b]\n\t" FPTQ_VEX "vpdpbusd %[b], %[x0], %[acc0]\n\t" FPTQ_VEX
            "vpdpbusd %[b], %[x1], %[acc1]"
            : [acc0] "+x"(acc[r][0]), [acc1] "+x"(acc[r][1]), [b] "=&x"(b)
            : [x0] "x"(x0), [x1] "x"(x1), [a] "m"(*reinterpret_cast<const Int32Alias*>(a + r * Stride)));
      }
    }
  }

  [[gnu::always_inline]] void store(int32_t* out, int stride) const {
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h) _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + r * stride + 8 * h), acc[r][h]);
  }
};

#elif defined(__AVX2__)

constexpr int kDotRows = 2, kDotLines = 1;

// Both sides as int16, because vpmaddubsw saturates. A lane holds half of a column's sum.
template <int R, int L, int Stride>
struct Dots {
  static_assert(L == 1);
  __m256i acc[R][4];

  [[gnu::always_inline]] void clear() {
#pragma GCC unroll 2
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) acc[r][i] = _mm256_setzero_si256();
  }

  [[gnu::always_inline]] void add(const Code* a, const uint8_t* const* lines, size_t step_bytes, int steps) {
    const uint8_t* p = lines[0];
    for (int s = 0; s < steps; ++s, a += 4, p += step_bytes) {
      __m256i b[R];
#pragma GCC unroll 2
      for (int r = 0; r < R; ++r) {
        long long row;
        __builtin_memcpy(&row, a + r * Stride, sizeof row);
        b[r] = _mm256_set1_epi64x(row);
      }
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const __m256i x = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 16 * i)));
#pragma GCC unroll 2
        for (int r = 0; r < R; ++r) acc[r][i] = _mm256_add_epi32(acc[r][i], _mm256_madd_epi16(x, b[r]));
      }
    }
  }

  [[gnu::always_inline]] void store(int32_t* out, int stride) const {
#pragma GCC unroll 2
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + r * stride + 8 * h),
                            _mm256_permute4x64_epi64(_mm256_hadd_epi32(acc[r][2 * h], acc[r][2 * h + 1]), 0xd8));
  }
};

#else

constexpr int kDotRows = 1, kDotLines = 1;

template <int R, int L, int Stride>
struct Dots {
  static_assert(R == 1 && L == 1);
  int32_t acc[16];

  void clear() {
    for (int j = 0; j < 16; ++j) acc[j] = 0;
  }

  void add(const Code* a, const uint8_t* const* lines, size_t step_bytes, int steps) {
    const uint8_t* p = lines[0];
    for (int s = 0; s < steps; ++s, a += 4, p += step_bytes)
      for (int j = 0; j < 16; ++j)
        acc[j] += p[4 * j] * a[0] + p[4 * j + 1] * a[1] + p[4 * j + 2] * a[2] + p[4 * j + 3] * a[3];
  }

  void store(int32_t* out, int) const { __builtin_memcpy(out, acc, sizeof acc); }
};

#endif

}  // namespace FPTQ_NS
}  // namespace fptq

// A vector of floats of the ISA's native width. Included by arch/kernels.cpp only.
#pragma once

#include <cstdint>

#include "core/views.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fptq {
namespace FPTQ_NS {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(kLanes * sizeof(float))));
typedef int32_t IntVec __attribute__((vector_size(kLanes * sizeof(int32_t))));

static inline Vec load(const float* p) {
  Vec v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

static inline IntVec load_int(const int32_t* p) {
  IntVec v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

// The first n floats, zero beyond.
static inline Vec load_part(const float* p, int n) {
  Vec v = {};
  for (int i = 0; i < n; ++i) v[i] = p[i];
  return v;
}

static inline void store(float* p, Vec v) { __builtin_memcpy(p, &v, sizeof v); }

static inline void store_part(float* p, Vec v, int n) {
  for (int i = 0; i < n; ++i) p[i] = v[i];
}

static inline Vec splat(float x) { return x - Vec{}; }

#if defined(__AVX512F__)
static inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
// Where one operand is NaN: the second. (Masked, here and below, because GCC 12 warns about its own intrinsics.)
static inline Vec vmax(Vec a, Vec b) { return _mm512_maskz_max_ps(0xffff, a, b); }
static inline Vec vmin(Vec a, Vec b) { return _mm512_maskz_min_ps(0xffff, a, b); }
#elif defined(__AVX2__)
static inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
static inline Vec vmax(Vec a, Vec b) { return _mm256_max_ps(a, b); }
static inline Vec vmin(Vec a, Vec b) { return _mm256_min_ps(a, b); }
#else
static inline Vec fma(Vec a, Vec b, Vec c) {
  const auto each = [&] {
    Vec y;
    for (int i = 0; i < kLanes; ++i) y[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return y;
  };
#if defined(__x86_64__)
  // Without the instruction: in doubles, where products are exact. A sum rounds twice, which differs from once only
  // where it looks half way between two floats, or where the float is subnormal.
  const __m128d low = _mm_cvtps_pd(a) * _mm_cvtps_pd(b) + _mm_cvtps_pd(c);
  const auto upper = [](Vec v) { return _mm_cvtps_pd(_mm_movehl_ps(v, v)); };
  const __m128d high = upper(a) * upper(b) + upper(c);
  const Vec y = _mm_movelh_ps(_mm_cvtpd_ps(low), _mm_cvtpd_ps(high));
  const IntVec ends = reinterpret_cast<IntVec>(_mm_shuffle_ps(_mm_castpd_ps(low), _mm_castpd_ps(high), 0x88));
  const IntVec size = reinterpret_cast<IntVec>(y) & 0x7fffffff;
  const IntVec doubt = ((ends & 0x1fffffff) == 0x10000000) | ((size > 0) & (size <= 0x00800000));
  return __builtin_expect(_mm_movemask_ps(reinterpret_cast<Vec>(doubt)), 0) ? each() : y;
#else
  return each();
#endif
}
static inline Vec vmax(Vec a, Vec b) { return a > b ? a : b; }
static inline Vec vmin(Vec a, Vec b) { return a < b ? a : b; }
#endif

// Widening loads of what the KV cache holds.
static inline Vec widen(const float* p) { return load(p); }

#if defined(__AVX512F__)
static inline Vec widen(const uint16_t* p) {
  const __m512i x = _mm512_maskz_cvtepu16_epi32(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return _mm512_castsi512_ps(_mm512_maskz_slli_epi32(0xffff, x, 16));
}
#elif defined(__AVX2__)
static inline Vec widen(const uint16_t* p) {
  const __m256i x = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(x, 16));
}
#else
static inline Vec widen(const uint16_t* p) {
  IntVec bits;
  for (int i = 0; i < kLanes; ++i) bits[i] = static_cast<int32_t>(static_cast<uint32_t>(p[i]) << 16);
  return reinterpret_cast<Vec>(bits);
}
#endif

static inline float from_fp16(uint16_t x) {
  const uint32_t sign = static_cast<uint32_t>(x & 0x8000) << 16, exponent = x >> 10 & 31, mantissa = x & 0x3ff;
  if (exponent == 0) {  // subnormal: mantissa · 2^-24
    const float f = static_cast<float>(mantissa) * 5.9604644775390625e-8f;
    return sign ? -f : f;
  }
  const uint32_t bits = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | mantissa << 13;
  float f;
  __builtin_memcpy(&f, &bits, sizeof f);
  return f;
}

// kLanes of that type.
template <FloatType Type>
static inline Vec widen(const void* p) {
  if constexpr (Type == FloatType::kFloat32) {
    return load(static_cast<const float*>(p));
  } else if constexpr (Type == FloatType::kBfloat16) {
    return widen(static_cast<const uint16_t*>(p));
  } else {
#if defined(__AVX512F__)
    return _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(static_cast<const __m256i*>(p)));
#else
    Vec v;
    for (int i = 0; i < kLanes; ++i) v[i] = from_fp16(static_cast<const uint16_t*>(p)[i]);
    return v;
#endif
  }
}

// Lanes folded in halves with f: always the same tree.
template <class V, class F>
static inline auto fold(V v, F f) {
#if defined(__AVX512F__)
  const auto half = f(__builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7),
                      __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15));
#else
  const auto half = v;
#endif
#if defined(__AVX2__)
  const auto four = f(__builtin_shufflevector(half, half, 0, 1, 2, 3), __builtin_shufflevector(half, half, 4, 5, 6, 7));
#else
  const auto four = half;
#endif
  const auto two = f(four, __builtin_shufflevector(four, four, 2, 3, 2, 3));
  return f(two, __builtin_shufflevector(two, two, 1, 1, 1, 1))[0];
}

static inline float sum(Vec v) {
  return fold(v, [](auto a, auto b) { return a + b; });
}

static inline float max(Vec v) {
  return fold(v, [](auto a, auto b) { return a > b ? a : b; });
}

// Sixteen partial sums whatever the native width, so that every ISA adds in one order.
constexpr int kSumLanes = 16, kParts = kSumLanes / kLanes;
struct Sums {
  Vec part[kParts];
};

static inline float sum(Sums s) {
#pragma GCC unroll 2
  for (int half = kParts / 2; half > 0; half /= 2)
#pragma GCC unroll 2
    for (int i = 0; i < half; ++i) s.part[i] = s.part[i] + s.part[i + half];
  return sum(s.part[0]);
}

static inline int32_t sum(IntVec v) {
  return fold(v, [](auto a, auto b) { return a + b; });
}

static inline int32_t max(IntVec v) {
  return fold(v, [](auto a, auto b) { return a > b ? a : b; });
}

static inline IntVec bits(Vec v) { return reinterpret_cast<IntVec>(v); }

// The bits of the larger magnitude, lane by lane: without their sign floats order as integers do, NaN above all.
static inline IntVec max_bits(IntVec top, Vec v) {
  const IntVec magnitude = bits(v) & 0x7fffffff;
  return magnitude > top ? magnitude : top;
}

// The lowest byte of each lane.
static inline void store_bytes(void* p, IntVec v) {
#if defined(__AVX512F__)
  _mm_storeu_si128(static_cast<__m128i*>(p), _mm512_maskz_cvtepi32_epi8(0xffff, reinterpret_cast<__m512i>(v)));
#elif defined(__AVX2__)
  const __m256i low = _mm256_and_si256(reinterpret_cast<__m256i>(v), _mm256_set1_epi32(255));
  const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1));
  _mm_storel_epi64(static_cast<__m128i*>(p), _mm_packus_epi16(words, words));
#else
  for (int i = 0; i < kLanes; ++i) static_cast<uint8_t*>(p)[i] = static_cast<uint8_t>(v[i]);
#endif
}

// The lower half of each lane.
static inline void store_words(void* p, IntVec v) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  const __m256i low = _mm256_and_si256(reinterpret_cast<__m256i>(v), _mm256_set1_epi32(65535));
  _mm_storeu_si128(static_cast<__m128i*>(p),
                   _mm_packus_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1)));
#else
  for (int i = 0; i < kLanes; ++i) static_cast<uint16_t*>(p)[i] = static_cast<uint16_t>(v[i]);
#endif
}

constexpr float kRound = 12582912.0f;  // 1.5 · 2^23: adding it rounds to an integer, half to even

// e^x within 2 ulp: x = n·ln 2 + r, a degree-7 polynomial in r (Cephes' expf), 2^n by its exponent bits.
// Arguments are clamped to [-87.3, 88]; NaN stays NaN.
static inline Vec exp(Vec x) {
  x = vmin(splat(88.0f), vmax(splat(-87.3f), x));
  const Vec n = fma(x, splat(1.44269504f), splat(kRound)) - splat(kRound);
  const Vec r = fma(n, splat(2.12194440e-4f), fma(n, splat(-0.693359375f), x));
  Vec p = splat(1.9875691500e-4f);
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  p = fma(p, r * r, r) + splat(1.0f);
  const IntVec exponent = (__builtin_convertvector(n, IntVec) + 127) << 23;
  return p * reinterpret_cast<Vec>(exponent);
}

// tanh x within 2 ulp: an odd polynomial below 0.625 (Cephes' tanhf), 1 - 2 / (e^2|x| + 1) above. NaN stays NaN.
static inline Vec tanh(Vec x) {
  const Vec magnitude = reinterpret_cast<Vec>(bits(x) & 0x7fffffff);
  const Vec large = splat(1.0f) - splat(2.0f) / (exp(magnitude + magnitude) + splat(1.0f));
  const Vec z = x * x;
  Vec p = splat(-5.70498872745e-3f);
  p = fma(p, z, splat(2.06390887954e-2f));
  p = fma(p, z, splat(-5.37397155531e-2f));
  p = fma(p, z, splat(1.33314422036e-1f));
  p = fma(p, z, splat(-3.33332819422e-1f));
  const Vec small = fma(p * z, x, x);
  return magnitude < splat(0.625f) ? small : reinterpret_cast<Vec>(bits(large) | (bits(x) & INT32_MIN));
}

// 2^x within 3 ulp for x in [-125, 127]: 2^n by adding to the exponent bits, and a minimax polynomial of degree 5 on
// the rest, [-1/2, 1/2] (relative error 9.2e-8). NaN stays NaN.
static inline Vec exp2(Vec x) {
  const Vec shifted = x + splat(kRound);
  const Vec r = x - (shifted - splat(kRound));
  Vec p = splat(1.326472731e-3f);
  p = fma(p, r, splat(9.671512991e-3f));
  p = fma(p, r, splat(5.550733581e-2f));
  p = fma(p, r, splat(2.402224243e-1f));
  p = fma(p, r, splat(6.931470037e-1f));
  p = fma(p, r, splat(1.0f));
  return reinterpret_cast<Vec>(bits(p) + (bits(shifted) << 23));
}

static inline float exp2(float x) { return exp2(splat(x))[0]; }
static inline float exp(float x) { return exp(splat(x))[0]; }

// log(1 + e^x) within 2 ulp: max(x, 0) and log(1 + t), t = e^-|x|, which is 2 artanh(s), s = t / (2 + t) <= 1/3, an odd
// minimax polynomial (relative error 6e-9). NaN stays NaN.
static inline Vec softplus(Vec x) {
  const Vec t = exp(reinterpret_cast<Vec>(bits(x) | INT32_MIN));
  const Vec s = t / (t + splat(2.0f)), z = s * s;
  Vec p = splat(1.400608271e-1f);
  p = fma(p, z, splat(1.400088519e-1f));
  p = fma(p, z, splat(2.001076490e-1f));
  p = fma(p, z, splat(3.333320916e-1f));
  return vmax(splat(0.0f), x) + fma(p * z, s + s, s + s);
}

static inline float from_bf16(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float f;
  __builtin_memcpy(&f, &bits, sizeof f);
  return f;
}

// Round to nearest even; NaN stays NaN.
static inline uint16_t to_bf16(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  if ((bits & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>(bits >> 16 | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

}  // namespace FPTQ_NS
}  // namespace fptq

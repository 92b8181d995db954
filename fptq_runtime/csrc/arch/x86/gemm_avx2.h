// AVX2 tiles, with vpdpbusd where the compiler may use AVX-VNNI. Sixteen registers hold 6 rows of 16 columns, so a
// group is passed over several times, from L1. A "half" is 32 bytes of a packed line. See gemm.h.
#pragma once

#include <immintrin.h>

namespace fptq::FPTQ_NS {
namespace {

#if defined(__AVXVNNI__) || defined(FPTQ_EVEX256)
#define FPTQ_VNNI
#endif
#if defined(FPTQ_EVEX256)
#define FPTQ_VNNI_PREFIX  // a test build: AVX-512VL's encoding of the same instruction
#else
#define FPTQ_VNNI_PREFIX "%{vex%} "
#endif

#if defined(FPTQ_VNNI)
constexpr const char* kGemmInt4Name = "int4 x int8, AVX-VNNI";
constexpr const char* kGemmInt8Name = "int8 x int8, AVX-VNNI";
#else
constexpr const char* kGemmInt4Name = "int4 x int8, AVX2";
constexpr const char* kGemmInt8Name = "int8 x int8, AVX2";
#endif
constexpr const char* kGemmFloatName = "float32, AVX2";

inline __m256i load(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }

using Int32Alias [[gnu::may_alias]] = int32_t;

// f[8] += float(acc) · scales[8]
inline void scale_add(float* f, __m256i acc, const float* scales) {
  _mm256_storeu_ps(f, _mm256_fmadd_ps(_mm256_cvtepi32_ps(acc), _mm256_loadu_ps(scales), _mm256_loadu_ps(f)));
}

inline int32_t quantize_block(const float* x, float scale, int8_t* codes) {
  const __m256 divisor = _mm256_set1_ps(scale), most = _mm256_set1_ps(127.0f), least = _mm256_set1_ps(-128.0f);
  __m256i v[4];
  for (int i = 0; i < 4; ++i) {
    const __m256 quotient = _mm256_div_ps(_mm256_loadu_ps(x + 8 * i), divisor);
    v[i] = _mm256_cvtps_epi32(_mm256_max_ps(_mm256_min_ps(quotient, most), least));
  }
  // Packing works within 128-bit lanes: fours of codes arrive as 0 2 4 6 1 3 5 7.
  const __m256i fours = _mm256_packs_epi16(_mm256_packs_epi32(v[0], v[1]), _mm256_packs_epi32(v[2], v[3]));
  const __m256i q = _mm256_permutevar8x32_epi32(fours, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes), q);
  const __m256i sum = _mm256_sad_epu8(_mm256_xor_si256(q, _mm256_set1_epi8(-128)), _mm256_setzero_si256());
  const __m128i half = _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
  return _mm_cvtsi128_si32(half) + _mm_extract_epi32(half, 2) - kSumGroup * 128;
}

// Vectors of accumulators that a row of a tile takes at once: as many as leave none in memory.
constexpr int at_once(int bits, int rows) {
#if defined(FPTQ_VNNI)
  (void)bits;
  return rows == 1 ? 8 : rows <= 3 ? 4 : 2;
#else
  if (bits == 4) return rows <= 3 ? 2 : 1;
  return rows == 1 ? 8 : rows <= 3 ? 4 : 2;  // each of 4 columns
#endif
}

constexpr int passes(int bits, int rows) {
#if defined(FPTQ_VNNI)
  return 8 / at_once(bits, rows);
#else
  return (bits == 4 ? 8 : 16) / at_once(bits, rows);
#endif
}

// A pass's share of what is prefetched in eight steps.
template <int Bits, int R>
inline void prefetch(const uint8_t* ahead) {
  constexpr int kBytes = 8 * kPanelCols * Bits / 2 / passes(Bits, R);
  for (int i = 0; i < kBytes; i += 64) _mm_prefetch(reinterpret_cast<const char*>(ahead + i), _MM_HINT_T0);
}

// Where the low-nibble columns of half h of a step start; the high ones are 16 further.
constexpr int low_column(int h) { return h / 2 * 32 + h % 2 * 8; }

// The inner products are in assembly because GCC 12 otherwise broadcasts all rows first and spills the accumulators.
#if defined(FPTQ_VNNI)

// acc0 += w0 · a, acc1 += w1 · a, four unsigned by four signed bytes a lane.
inline void dot(__m256i& acc0, __m256i& acc1, __m256i w0, __m256i w1, const int8_t* a) {
  __m256i x;
  asm("vpbroadcastd %[a], %[x]\n\t" FPTQ_VNNI_PREFIX "vpdpbusd %[x], %[w0], %[acc0]\n\t" FPTQ_VNNI_PREFIX
      "vpdpbusd %[x], %[w1], %[acc1]"
      : [acc0] "+x"(acc0), [acc1] "+x"(acc1), [x] "=&x"(x)
      : [w0] "x"(w0), [w1] "x"(w1), [a] "m"(*reinterpret_cast<const Int32Alias*>(a)));
}

int64_t multiply(int64_t rounds) {
  __m256i acc[12] = {};
  const __m256i ones = _mm256_set1_epi8(1);
  for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 12
    for (int j = 0; j < 12; ++j) asm volatile(FPTQ_VNNI_PREFIX "vpdpbusd %1, %1, %0" : "+x"(acc[j]) : "x"(ones));
  }
  return rounds * 12 * 32;
}

// One group: R rows by V vectors of 8 columns from vector v0 on. With 4 bits two of them are one half, low and high.
template <int Bits, int R, int V>
void add_vectors(const Tile& t, int steps, int v0) {
  const __m256i nibble = _mm256_set1_epi8(15);
  __m256i acc[R][V];
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) {
    const int32_t zero = zero_point(t.sums + r, steps / 8, Bits == 4 ? 8 : 128);
    // A byte as it stands is low + 16 · high, of which the low columns' sum is subtracted at the end.
    const int32_t odd = Bits == 4 ? static_cast<int32_t>(17u * static_cast<uint32_t>(zero)) : zero;
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) acc[r][v] = _mm256_set1_epi32(v % 2 ? odd : zero);
  }
  const int8_t* a = t.a;
  const uint8_t* w = t.w + 32 * (Bits == 4 ? v0 / 2 : v0);
  const uint8_t* ahead = t.ahead + v0 / V * steps * t.ahead_step;
  for (int s = 0; s < steps; ++s, a += t.a_stride, w += kPanelCols * Bits / 2) {
    if (s % 8 == 0) prefetch<Bits, R>(ahead + s * t.ahead_step);
#pragma GCC unroll 8
    for (int v = 0; v < V; v += 2) {
      const __m256i w1 = load(w + 32 * (Bits == 4 ? v / 2 : v + 1));
      const __m256i w0 = Bits == 4 ? _mm256_and_si256(w1, nibble) : load(w + 32 * v);
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) dot(acc[r][v], acc[r][v + 1], w0, w1, a + 4 * r);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < V; v += 2) {
      const int column = Bits == 4 ? low_column((v0 + v) / 2) : 8 * (v0 + v);
      const int next = column + (Bits == 4 ? 16 : 8);
      if constexpr (Bits == 4) acc[r][v + 1] = _mm256_sub_epi32(acc[r][v + 1], acc[r][v]);
      scale_add(t.f + r * kPanelCols + column, acc[r][v], t.scales + column);
      scale_add(t.f + r * kPanelCols + next, acc[r][v + 1], t.scales + next);
    }
  }
}

template <int Bits, int R>
void add_group(const Tile& t, int steps) {
  constexpr int kAtOnce = at_once(Bits, R);
  for (int v = 0; v < kPanelCols / 8; v += kAtOnce) add_vectors<Bits, R, kAtOnce>(t, steps, v);
}

#else

int64_t multiply(int64_t rounds) {
  __m256i sum[8] = {};
  const __m256i ones = _mm256_set1_epi8(1);
  for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) {
      __m256i product;
      asm volatile("vpmaddubsw %2, %2, %1\n\tvpaddw %1, %0, %0" : "+x"(sum[j]), "=&x"(product) : "x"(ones));
    }
  }
  return rounds * 8 * 32;
}

// sum += w · a in pairs, unsigned by signed bytes; the first of them starts the sum.
template <bool First>
inline void dot_pairs(__m256i (&sum)[1], const __m256i (&w)[1], const int8_t* a) {
  const auto& word = *reinterpret_cast<const Int32Alias*>(a);
  if constexpr (First) {
    asm("vpbroadcastd %[a], %[sum]\n\tvpmaddubsw %[sum], %[w], %[sum]"
        : [sum] "=&x"(sum[0])
        : [w] "x"(w[0]), [a] "m"(word));
  } else {
    __m256i x;
    asm("vpbroadcastd %[a], %[x]\n\t"
        "vpmaddubsw %[x], %[w], %[x]\n\t"
        "vpaddw %[x], %[sum], %[sum]"
        : [sum] "+x"(sum[0]), [x] "=&x"(x)
        : [w] "x"(w[0]), [a] "m"(word));
  }
}

template <bool First>
inline void dot_pairs(__m256i (&sum)[2], const __m256i (&w)[2], const int8_t* a) {
  const auto& word = *reinterpret_cast<const Int32Alias*>(a);
  if constexpr (First) {
    asm("vpbroadcastd %[a], %[sum1]\n\t"
        "vpmaddubsw %[sum1], %[w0], %[sum0]\n\t"
        "vpmaddubsw %[sum1], %[w1], %[sum1]"
        : [sum0] "=&x"(sum[0]), [sum1] "=&x"(sum[1])
        : [w0] "x"(w[0]), [w1] "x"(w[1]), [a] "m"(word));
  } else {
    __m256i x, product;
    asm("vpbroadcastd %[a], %[x]\n\t"
        "vpmaddubsw %[x], %[w0], %[product]\n\t"
        "vpaddw %[product], %[sum0], %[sum0]\n\t"
        "vpmaddubsw %[x], %[w1], %[x]\n\t"
        "vpaddw %[x], %[sum1], %[sum1]"
        : [sum0] "+x"(sum[0]), [sum1] "+x"(sum[1]), [x] "=&x"(x), [product] "=&x"(product)
        : [w0] "x"(w[0]), [w1] "x"(w[1]), [a] "m"(word));
  }
}

// acc0 += w0 · a, acc1 += w1 · a in pairs, both sides widened to int16.
inline void dot_wide(__m256i& acc0, __m256i& acc1, __m256i w0, __m256i w1, const int8_t* a) {
  __m256i x, product;
  asm("vpbroadcastd %[a], %x[x]\n\t"
      "vpmovsxbw %x[x], %[x]\n\t"
      "vpmaddwd %[x], %[w0], %[product]\n\t"
      "vpaddd %[product], %[acc0], %[acc0]\n\t"
      "vpmaddwd %[x], %[w1], %[x]\n\t"
      "vpaddd %[x], %[acc1], %[acc1]"
      : [acc0] "+x"(acc0), [acc1] "+x"(acc1), [x] "=&x"(x), [product] "=&x"(product)
      : [w0] "x"(w0), [w1] "x"(w1), [a] "m"(*reinterpret_cast<const Int32Alias*>(a)));
}

// One group of 4-bit weights: R rows; of half h, V vectors of 8 columns from the low (0) or high (1) one on. Products
// are summed as int16 over 32 k, which is safe: 2 · 8 · 15 · 128 < 2^15.
template <int R, int V, int First>
void add_nibbles(const Tile& t, int steps, int h) {
  const __m256i nibble = _mm256_set1_epi8(15);
  __m256i acc[R][V];
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) acc[r][v] = _mm256_set1_epi32(zero_point(t.sums + r, steps / 8, 8));
  }
  const int8_t* a = t.a;
  const uint8_t* w = t.w + 32 * h;
  const uint8_t* ahead = t.ahead + (2 / V * h + First) * steps * t.ahead_step;
  for (int s = 0; s < steps; s += 8, ahead += 8 * t.ahead_step) {
    prefetch<4, R>(ahead);
    __m256i sum[R][V];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i, a += t.a_stride, w += 128) {
      const __m256i p = load(w);
      __m256i codes[V];
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) codes[v] = _mm256_and_si256(First + v == 1 ? _mm256_srli_epi16(p, 4) : p, nibble);
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r)
        i == 0 ? dot_pairs<true>(sum[r], codes, a + 4 * r) : dot_pairs<false>(sum[r], codes, a + 4 * r);
    }
    const __m256i ones = _mm256_set1_epi16(1);
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) acc[r][v] = _mm256_add_epi32(acc[r][v], _mm256_madd_epi16(sum[r][v], ones));
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      const int high = First + v, column = low_column(h) + 16 * high;
      // The packed scale of a high column is divided by 16.
      scale_add(t.f + r * kPanelCols + column, _mm256_slli_epi32(acc[r][v], 4 * high), t.scales + column);
    }
  }
}

// One group of 8-bit weights: R rows, 4 · Q columns from c0 on. Widened to int16, because vpmaddubsw would saturate;
// a register then holds two partial sums of each of four columns.
template <int R, int Q>
void add_bytes(const Tile& t, int steps, int c0) {
  __m256i acc[R][Q];
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int q = 0; q < Q; ++q) acc[r][q] = _mm256_setzero_si256();
  const int8_t* a = t.a;
  const uint8_t* w = t.w + 4 * c0;
  const uint8_t* ahead = t.ahead + c0 / 4 / Q * steps * t.ahead_step;
  for (int s = 0; s < steps; ++s, a += t.a_stride, w += 256) {
    if (s % 8 == 0) prefetch<8, R>(ahead + s * t.ahead_step);
#pragma GCC unroll 8
    for (int q = 0; q < Q; q += 2) {
      const __m256i w0 = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w + 16 * q)));
      const __m256i w1 = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w + 16 * q + 16)));
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) dot_wide(acc[r][q], acc[r][q + 1], w0, w1, a + 4 * r);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) {
    const __m256i zero = _mm256_set1_epi32(zero_point(t.sums + r, steps / 8, 128));
#pragma GCC unroll 4
    for (int q = 0; q < Q; q += 2) {
      // hadd works within 128-bit lanes: columns 0 1 4 5 2 3 6 7
      const __m256i pairs = _mm256_permute4x64_epi64(_mm256_hadd_epi32(acc[r][q], acc[r][q + 1]), 0xd8);
      scale_add(t.f + r * kPanelCols + c0 + 4 * q, _mm256_add_epi32(pairs, zero), t.scales + c0 + 4 * q);
    }
  }
}

template <int Bits, int R>
void add_group(const Tile& t, int steps) {
  if constexpr (Bits == 4) {
    for (int h = 0; h < 4; ++h) {
      if constexpr (at_once(4, R) == 2) {
        add_nibbles<R, 2, 0>(t, steps, h);
      } else {
        add_nibbles<R, 1, 0>(t, steps, h);
        add_nibbles<R, 1, 1>(t, steps, h);
      }
    }
  } else {
    constexpr int kAtOnce = at_once(8, R);
    for (int c = 0; c < kPanelCols; c += 4 * kAtOnce) add_bytes<R, kAtOnce>(t, steps, c);
  }
}

#endif

template <int Bits, int R>
void add_groups(const Tile& t, int groups, int steps) {
  Tile group = t;
  for (int g = 0; g < groups; ++g) {
    add_group<Bits, R>(group, steps);
    group.a += steps * t.a_stride;
    group.w += steps * (kPanelCols * Bits / 2);
    group.ahead += passes(Bits, R) * steps * t.ahead_step;
    group.sums += steps / 8 * kSumRows;
    group.scales += kPanelCols;
  }
}

// f(k, c, v) for 8 columns of each k, the c-th of the four vectors in the panel's half `side`, from column
// half_column<Bits>(c) of it on: fma(code, scale, -zero · scale) rounds as (code - zero) · scale does.
template <int Bits>
constexpr int half_column(int c) {
  return Bits == 4 ? c / 2 * 8 + c % 2 * 16 : 8 * c;
}

template <int Bits, class F>
[[gnu::always_inline]] inline void each_weight(const uint8_t* w, const float* scales, int side, const F& f) {
  const __m256i low = _mm256_set1_epi32(Bits == 4 ? 15 : 255), high = _mm256_set1_epi32(Bits == 4 ? 240 : 255);
  __m256 scale[4], offset[4];
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    scale[c] = _mm256_loadu_ps(scales + 32 * side + half_column<Bits>(c));
    offset[c] = _mm256_mul_ps(scale[c], _mm256_set1_ps(Bits == 4 && c % 2 == 0 ? -8.0f : -128.0f));
  }
  w += side * 16 * Bits;
  for (int s = 0; s < kSumGroup / 4; ++s, w += kPanelCols * Bits / 2) {
#pragma GCC unroll 4
    for (int b = 0; b < 4; ++b) {
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) {
        const __m256i line = load(w + 32 * (Bits == 4 ? c / 2 : c));
        const __m256i code = _mm256_and_si256(_mm256_srli_epi32(line, 8 * b), c % 2 ? high : low);
        f(4 * s + b, c, _mm256_fmadd_ps(_mm256_cvtepi32_ps(code), scale[c], offset[c]));
      }
    }
  }
}

template <int Bits>
void widen_weights(const uint8_t* w, const float* scales, float* out) {
  for (int side = 0; side < 2; ++side, out += 32) {
    each_weight<Bits>(w, scales, side, [out](int k, int c, __m256 v) __attribute__((always_inline)) {
      _mm256_storeu_ps(out + k * kPanelCols + half_column<Bits>(c), v);
    });
  }
}

template <int Bits, int R>
[[gnu::noinline]] void add_weights(const FloatTile& t, const float* scales) {
  for (int side = 0; side < 2; ++side) {
    float* f = t.f + 32 * side;
    __m256 acc[R][4];
#pragma GCC unroll 3
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) acc[r][c] = _mm256_loadu_ps(f + r * kPanelCols + half_column<Bits>(c));
    }
    each_weight<Bits>(static_cast<const uint8_t*>(t.w), scales, side,
                      [&acc, x = t.x, ldx = t.ldx](int k, int c, __m256 v) __attribute__((always_inline)) {
#pragma GCC unroll 3
                        for (int r = 0; r < R; ++r)
                          acc[r][c] = _mm256_fmadd_ps(v, _mm256_set1_ps(x[r * ldx + k]), acc[r][c]);
                      });
#pragma GCC unroll 3
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) _mm256_storeu_ps(f + r * kPanelCols + half_column<Bits>(c), acc[r][c]);
    }
  }
}

// Eight floats of that type. (simd.h's vectors are wider where FPTQ_EVEX256 is compiled.)
template <FloatType Type>
inline __m256 widen_eight(const char* w) {
  if constexpr (Type == FloatType::kFloat32) {
    return _mm256_loadu_ps(reinterpret_cast<const float*>(w));
  } else {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(w));
    if constexpr (Type == FloatType::kFloat16) return _mm256_cvtph_ps(half);
    else return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
  }
}

template <FloatType Type, int R>
void add_products(const FloatTile& t, int k) {
  constexpr int kVectors = R == 1 ? 8 : R <= 3 ? 4 : 2;  // of 8 columns
  constexpr int kElement = float_bytes(Type);
  for (int c0 = 0; c0 < kPanelCols; c0 += 8 * kVectors) {
    __m256 acc[R][kVectors];
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int c = 0; c < kVectors; ++c) acc[r][c] = _mm256_loadu_ps(t.f + r * kPanelCols + c0 + 8 * c);
    }
    const char* w = static_cast<const char*>(t.w) + c0 * kElement;
    for (int i = 0; i < k; ++i) {
      __m256 v[kVectors];
#pragma GCC unroll 8
      for (int c = 0; c < kVectors; ++c) v[c] = widen_eight<Type>(w + 8 * c * kElement);
      w += kPanelCols * kElement;
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) {
        const __m256 x = _mm256_set1_ps(t.x[r * t.ldx + i]);
#pragma GCC unroll 8
        for (int c = 0; c < kVectors; ++c) acc[r][c] = _mm256_fmadd_ps(v[c], x, acc[r][c]);
      }
    }
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int c = 0; c < kVectors; ++c) _mm256_storeu_ps(t.f + r * kPanelCols + c0 + 8 * c, acc[r][c]);
    }
  }
}

}  // namespace
}  // namespace fptq::FPTQ_NS

// The sampler's loops over a vocabulary. Included by arch/kernels.cpp only. No fused multiply-add, as numpy
// has none: kernels/sampling.py gives the same bits.
#pragma once

#include "arch/generic/simd.h"
#include "core/dispatch.h"

namespace fptq {
namespace FPTQ_NS {

constexpr int kAbreast = 4;  // vectors computed abreast: one alone would wait for its own results most of the time
constexpr int kStride = 64;  // values that are whole numbers of those on any ISA

// Each t becomes 2^t, t <= 0, within 2e-7; 0 below 2^-126. t = n + f, |f| <= 1/2, and a minimax polynomial in f.
static inline void exp2_negative(Vec (&t)[kAbreast]) {
  constexpr float kCoefficients[] = {9.671512991189957e-3f, 5.550733581185341e-2f, 2.4022242426872253e-1f,
                                     6.931470036506653e-1f, 1.0f};
  const Vec round = splat(12583039.0f);  // 1.5 · 2^23 + 127: the sum's low bits are n and the exponent's bias
  Vec biased[kAbreast], p[kAbreast];
  for (int j = 0; j < kAbreast; ++j) t[j] = vmax(t[j], splat(-127.0f));
  for (int j = 0; j < kAbreast; ++j) biased[j] = t[j] + round;
  for (int j = 0; j < kAbreast; ++j) t[j] -= biased[j] - round;
  for (int j = 0; j < kAbreast; ++j) p[j] = splat(1.3264724984765053e-3f);
  for (float c : kCoefficients)
    for (int j = 0; j < kAbreast; ++j) p[j] = p[j] * t[j] + splat(c);
  for (int j = 0; j < kAbreast; ++j) t[j] = p[j] * reinterpret_cast<Vec>(reinterpret_cast<IntVec>(biased[j]) << 23);
}

// Which of the values seen are NaN.
#if defined(__AVX512F__)
struct NanLanes {
  __mmask16 lanes = 0;
  void add(Vec x) { lanes |= _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q); }
  bool any() const { return lanes; }
};
#else
struct NanLanes {
  IntVec lanes = {};
  void add(Vec x) { lanes |= x != x; }
  bool any() const {
    int32_t all = 0;
    for (int i = 0; i < kLanes; ++i) all |= lanes[i];
    return all;
  }
};
#endif

// n values, n a multiple of kStride.
static inline float largest(const float* x, int n, NanLanes& nan) {
  Vec best[kAbreast];
  for (Vec& b : best) b = splat(-__builtin_inff());
  for (int i = 0; i < n; i += kAbreast * kLanes) {
    for (int j = 0; j < kAbreast; ++j) {
      const Vec v = load(x + i + j * kLanes);
      best[j] = vmax(v, best[j]);
      nan.add(v);
    }
  }
  for (int j = 1; j < kAbreast; ++j) best[0] = vmax(best[0], best[j]);
  return max(best[0]);
}

// Σ 2^((x - top) · log2_scale) over n values, n a multiple of kStride; the terms go to w where it is not null.
template <bool kStore>
static inline float sum_weights(const float* x, int n, float top, float log2_scale, float* w) {
  const Vec tops = splat(top), scales = splat(log2_scale);
  Sums sums = {};
  for (int i = 0; i < n; i += kAbreast * kLanes) {
    Vec t[kAbreast];
    for (int j = 0; j < kAbreast; ++j) t[j] = (load(x + i + j * kLanes) - tops) * scales;
    exp2_negative(t);
    for (int j = 0; j < kAbreast; ++j) {
      if constexpr (kStore) store(w + i + j * kLanes, t[j]);
      sums.part[j % kParts] += t[j];
    }
  }
  return sum(sums);
}

static inline float sum_block(const float* x, int n, float top, float log2_scale) {
  return top == -__builtin_inff() ? 0 : sum_weights<false>(x, n, top, log2_scale, nullptr);
}

// At most a block of values, padded with what weighs nothing to whole strides.
struct Padded {
  float values[kSampleBlock];
  int n;
  Padded(const float* x, int count) : n(round_up(count, kStride)) {
    for (int i = 0; i < n; ++i) values[i] = i < count ? x[i] : -__builtin_inff();
  }
};

static void mask_row(const float* x, const uint32_t* mask, int n, float* out) {
  for (; n >= 32; n -= 32, x += 32, out += 32, ++mask)
    for (int i = 0; i < 32; ++i) out[i] = *mask >> i & 1 ? x[i] : -__builtin_inff();
  for (int i = 0; i < n; ++i) out[i] = *mask >> i & 1 ? x[i] : -__builtin_inff();
}

static bool scan_row(const float* x, int n, float log2_scale, float* maxima, float* sums) {
  NanLanes nan;
  const int whole = n / kSampleBlock;
  for (int b = 0; b <= whole; ++b) {  // sums follow a block behind: they need not wait for a maximum then
    if (b < whole) maxima[b] = largest(x + b * kSampleBlock, kSampleBlock, nan);
    if (sums && b > 0) sums[b - 1] = sum_block(x + (b - 1) * kSampleBlock, kSampleBlock, maxima[b - 1], log2_scale);
  }
  if (n > whole * kSampleBlock) {
    const Padded tail(x + whole * kSampleBlock, n - whole * kSampleBlock);
    maxima[whole] = largest(tail.values, tail.n, nan);
    if (sums) sums[whole] = sum_block(tail.values, tail.n, maxima[whole], log2_scale);
  }
  return !nan.any();
}

static float weigh_block(const float* x, int n, float top, float log2_scale, float* w) {
  if (n % kStride == 0) return sum_weights<true>(x, n, top, log2_scale, w);
  const Padded tail(x, n);
  float weights[kSampleBlock];
  const float sum = sum_weights<true>(tail.values, tail.n, top, log2_scale, weights);
  for (int i = 0; i < n; ++i) w[i] = weights[i];
  return sum;
}

static int select_at_least(const float* x, const int32_t* ids, int first_id, int n, float bound, float* out,
                           int32_t* out_ids) {
  int count = 0, i = 0;
#if defined(__AVX512F__)
  const __m512 bounds = _mm512_set1_ps(bound);
  const __m512i ramp = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (; i + 16 <= n; i += 16) {
    const __m512 v = _mm512_loadu_ps(x + i);
    const __mmask16 keep = _mm512_cmp_ps_mask(v, bounds, _CMP_GE_OQ);
    if (!keep) continue;
    const __m512i id = ids ? _mm512_loadu_si512(ids + i) : _mm512_add_epi32(ramp, _mm512_set1_epi32(first_id + i));
    _mm512_storeu_ps(out + count, _mm512_maskz_compress_ps(keep, v));
    _mm512_storeu_si512(out_ids + count, _mm512_maskz_compress_epi32(keep, id));
    count += __builtin_popcount(keep);
  }
#elif defined(__AVX2__)
  const __m256 bounds = _mm256_set1_ps(bound);
  for (; i + 8 <= n; i += 8) {
    unsigned keep = _mm256_movemask_ps(_mm256_cmp_ps(_mm256_loadu_ps(x + i), bounds, _CMP_GE_OQ));
    for (; keep; keep &= keep - 1) {
      const int at = i + __builtin_ctz(keep);
      out[count] = x[at];
      out_ids[count++] = ids ? ids[at] : first_id + at;
    }
  }
#endif
  for (; i < n; ++i) {
    if (!(x[i] >= bound)) continue;
    out[count] = x[i];
    out_ids[count++] = ids ? ids[i] : first_id + i;
  }
  return count;
}

}  // namespace FPTQ_NS
}  // namespace fptq

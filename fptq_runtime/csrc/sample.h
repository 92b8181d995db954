// The sampler's loops over a vocabulary. Included by kernels.cpp only. No fused multiply-add, and sums over 16 lanes
// whatever the native width: every ISA gives the same bits.
#pragma once

#include "dispatch.h"
#include "simd.h"

namespace fptq {
namespace FPTQ_NS {

constexpr int kSumLanes = 16, kParts = kSumLanes / kLanes;

// 2^t for t <= 0, within 2e-7; 0 below 2^-126. t = n + f, |f| <= 1/2, and a minimax polynomial in f.
static inline Vec exp2_negative(Vec t) {
  t = vmax(t, splat(-127.0f));
  const Vec round = splat(12583039.0f);  // 1.5 · 2^23 + 127: the sum's low bits are n and the exponent's bias
  const Vec biased = t + round;
  const Vec f = t - (biased - round);
  Vec p = splat(1.3264724984765053e-3f);
  p = p * f + splat(9.671512991189957e-3f);
  p = p * f + splat(5.550733581185341e-2f);
  p = p * f + splat(2.4022242426872253e-1f);
  p = p * f + splat(6.931470036506653e-1f);
  p = p * f + splat(1.0f);
  return p * reinterpret_cast<Vec>(reinterpret_cast<IntVec>(biased) << 23);
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

// n values, n a multiple of 16.
static inline float largest(const float* x, int n, NanLanes& nan) {
  Vec best[kParts];
  for (Vec& b : best) b = splat(-__builtin_inff());
  for (int i = 0; i < n; i += kSumLanes) {
    for (int j = 0; j < kParts; ++j) {
      const Vec v = load(x + i + j * kLanes);
      best[j] = vmax(v, best[j]);
      nan.add(v);
    }
  }
  for (int j = 1; j < kParts; ++j) best[0] = vmax(best[0], best[j]);
  return max(best[0]);
}

// Σ 2^((x - top) · log2_scale) over n values, n a multiple of 16; the terms go to w where it is not null.
template <bool kStore>
static inline float sum_weights(const float* x, int n, float top, float log2_scale, float* w) {
  const Vec tops = splat(top), scales = splat(log2_scale);
  Vec sums[kParts] = {};
  for (int i = 0; i < n; i += kSumLanes) {
    for (int j = 0; j < kParts; ++j) {
      const Vec weight = exp2_negative((load(x + i + j * kLanes) - tops) * scales);
      if constexpr (kStore) store(w + i + j * kLanes, weight);
      sums[j] += weight;
    }
  }
  float lanes[kSumLanes];
  for (int j = 0; j < kParts; ++j) store(lanes + j * kLanes, sums[j]);
  for (int half = kSumLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

// At most a block of values, padded with what weighs nothing to whole vectors.
struct Padded {
  float values[kSampleBlock];
  int n;
  Padded(const float* x, int count) : n(round_up(count, kSumLanes)) {
    for (int i = 0; i < n; ++i) values[i] = i < count ? x[i] : -__builtin_inff();
  }
};

static bool scan_row(const float* x, int n, float log2_scale, float* maxima, float* sums) {
  NanLanes nan;
  const auto scan = [&](const float* block, int size, int b) {
    maxima[b] = largest(block, size, nan);
    if (sums) sums[b] = maxima[b] == -__builtin_inff() ? 0 : sum_weights<false>(block, size, maxima[b], log2_scale, nullptr);
  };
  const int whole = n / kSampleBlock;
  for (int b = 0; b < whole; ++b) scan(x + b * kSampleBlock, kSampleBlock, b);
  if (n > whole * kSampleBlock) {
    const Padded tail(x + whole * kSampleBlock, n - whole * kSampleBlock);
    scan(tail.values, tail.n, whole);
  }
  return !nan.any();
}

static float weigh_block(const float* x, int n, float top, float log2_scale, float* w) {
  if (n % kSumLanes == 0) return sum_weights<true>(x, n, top, log2_scale, w);
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

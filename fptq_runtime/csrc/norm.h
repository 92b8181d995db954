// Row kernels: embedding gather, norms, activations. Included by kernels.cpp only.
// Sums run in a fixed pattern of lanes, so a row's bits depend on nothing but the row.
#pragma once

#include "simd.h"
#include "views.h"

namespace fptq {
namespace FPTQ_NS {

static void widen_row(const void* x, FloatType type, int n, float* out) {
  if (type == FloatType::kFloat32) {
    __builtin_memcpy(out, x, n * sizeof(float));
    return;
  }
  const uint16_t* half = static_cast<const uint16_t*>(x);
  if (type == FloatType::kBfloat16)
    for (int i = 0; i < n; ++i) out[i] = from_bf16(half[i]);
  else
    for (int i = 0; i < n; ++i) out[i] = from_fp16(half[i]);
}

// Folds a row with acc = f(vector, acc) into four accumulators and sums them; the tail's padding is left out.
template <class F>
static inline float reduce(const float* x, int n, F f) {
  Vec acc[4] = {};
  int i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes)
    for (int j = 0; j < 4; ++j) acc[j] = f(load(x + i + j * kLanes), acc[j]);
  for (int j = 0; i + kLanes <= n; i += kLanes, ++j) acc[j] = f(load(x + i), acc[j]);
  float rest = 0;
  if (i < n) {
    const Vec tail = f(load_part(x + i, n - i), Vec{});
    for (int j = 0; j < n - i; ++j) rest += tail[j];
  }
  return sum((acc[0] + acc[1]) + (acc[2] + acc[3])) + rest;
}

// Calls f(offset, lanes) for each vector of a row of n.
template <class F>
static inline void each_vector(int n, F f) {
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) f(i, kLanes);
  if (i < n) f(i, n - i);
}

static inline Vec load_lanes(const float* p, int lanes) { return lanes == kLanes ? load(p) : load_part(p, lanes); }
static inline void store_lanes(float* p, Vec v, int lanes) {
  lanes == kLanes ? store(p, v) : store_part(p, v, lanes);
}

// out may be x.
static void norm_row(const NormView& norm, const float* x, float* out) {
  const int n = norm.n;
  float mean = 0;
  if (norm.layer) mean = reduce(x, n, [](Vec v, Vec acc) { return acc + v; }) / n;
  const Vec center = splat(mean);
  const float variance = reduce(x, n, [center](Vec v, Vec acc) {
    const Vec d = v - center;
    return fma(d, d, acc);
  }) / n;
  const Vec scale = splat(1.0f / __builtin_sqrtf(variance + norm.eps));
  each_vector(n, [&](int i, int lanes) {
    Vec y = (load_lanes(x + i, lanes) - center) * scale * load_lanes(norm.weight + i, lanes);
    if (norm.bias) y = y + load_lanes(norm.bias + i, lanes);
    store_lanes(out + i, y, lanes);
  });
}

// silu(gate) · up = gate / (1 + e^-gate) · up. Returns the bits of the largest magnitude.
static int32_t silu_mul_row(const float* gate, const float* up, int n, float* out) {
  IntVec top = {};
  each_vector(n, [&](int i, int lanes) {
    const Vec x = load_lanes(gate + i, lanes), y = x / (splat(1.0f) + exp(-x)) * load_lanes(up + i, lanes);
    top = max_bits(top, y);
    store_lanes(out + i, y, lanes);
  });
  return max(top);
}

// 0.5 x (1 + tanh u) = x / (1 + e^-2u), u = sqrt(2/π) (x + 0.044715 x³).
static void gelu_tanh_row(const float* x, int n, float* out) {
  each_vector(n, [&](int i, int lanes) {
    const Vec v = load_lanes(x + i, lanes);
    const Vec u = splat(0.7978845608f) * v * fma(splat(0.044715f) * v, v, splat(1.0f));
    store_lanes(out + i, v / (splat(1.0f) + exp(splat(-2.0f) * u)), lanes);
  });
}

}  // namespace FPTQ_NS
}  // namespace fptq

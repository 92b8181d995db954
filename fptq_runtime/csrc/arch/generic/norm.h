// Row kernels: embedding gather, norms, activations. Included by arch/kernels.cpp only.
// Sums run in one pattern of lanes on every ISA, so a row's bits depend on nothing but the row.
#pragma once

#include "arch/generic/simd.h"
#include "core/views.h"

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
  Sums acc[4] = {};
  int i = 0;
  const auto add = [&](Sums& to) {
#pragma GCC unroll 4
    for (int p = 0; p < kParts; ++p, i += kLanes) to.part[p] = f(load(x + i), to.part[p]);
  };
  while (i + 4 * kSumLanes <= n)
    for (Sums& to : acc) add(to);
  for (int j = 0; i + kSumLanes <= n; ++j) add(acc[j]);
  float rest = 0;
  for (; i < n; i += kLanes) {
    const int lanes = n - i < kLanes ? n - i : kLanes;
    const Vec tail = f(load_part(x + i, lanes), Vec{});
    for (int j = 0; j < lanes; ++j) rest += tail[j];
  }
  for (int p = 0; p < kParts; ++p)
    acc[0].part[p] = (acc[0].part[p] + acc[1].part[p]) + (acc[2].part[p] + acc[3].part[p]);
  return sum(acc[0]) + rest;
}

// Calls f(offset, lanes) for each vector of a row of n.
template <class F>
static inline void each_vector(int n, F f) {
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) f(i, kLanes);
  if (i < n) f(i, n - i);
}

static inline Vec load_lanes(const float* p, int lanes) { return lanes == kLanes ? load(p) : load_part(p, lanes); }
static inline void store_lanes(float* p, Vec v, int lanes) { lanes == kLanes ? store(p, v) : store_part(p, v, lanes); }

// out may be x.
static void norm_row(const NormView& norm, const float* x, float* out) {
  const int n = norm.n;
  float mean = 0;
  if (norm.layer) mean = reduce(x, n, [](Vec v, Vec acc) { return acc + v; }) / n;
  const Vec center = splat(mean);
  const float variance = reduce(x, n,
                                [center](Vec v, Vec acc) {
                                  const Vec d = v - center;
                                  return fma(d, d, acc);
                                }) /
                         n;
  const Vec scale = splat(1.0f / __builtin_sqrtf(variance + norm.eps));
  each_vector(n, [&](int i, int lanes) {
    Vec y = (load_lanes(x + i, lanes) - center) * scale * load_lanes(norm.weight + i, lanes);
    if (norm.bias) y = y + load_lanes(norm.bias + i, lanes);
    store_lanes(out + i, y, lanes);
  });
}

// x / (1 + e^-z) = x · sigmoid(z).
static inline Vec sigmoid_times(Vec x, Vec z) { return x / (splat(1.0f) + exp(-z)); }

static inline Vec silu(Vec x) { return sigmoid_times(x, x); }

// 0.5 x (1 + tanh u) = x · sigmoid(2u), u = sqrt(2/π) (x + 0.044715 x³).
static inline Vec gelu_tanh(Vec x) {
  return sigmoid_times(x, splat(1.5957691216f) * x * fma(splat(0.044715f) * x, x, splat(1.0f)));
}

// x Φ(x), of the tail Φ(-|x|) = erfc(y) / 2, y = |x| / √2, that keeps its relative precision. After Abramowitz and
// Stegun 7.1.26: e^(y²) erfc(y) = t q(t), t = 1 / (1 + y/2), q a minimax polynomial of degree 8 (relative error 4e-8).
static inline Vec gelu(Vec x) {
  const Vec magnitude = reinterpret_cast<Vec>(bits(x) & 0x7fffffff);
  const Vec t = splat(1.0f) / fma(magnitude, splat(0.35355339f), splat(1.0f));
  Vec q = splat(-5.889071897e-02f);
  q = fma(q, t, splat(2.837016582e-01f));
  q = fma(q, t, splat(-4.853830636e-01f));
  q = fma(q, t, splat(2.759773433e-01f));
  q = fma(q, t, splat(-2.517709695e-02f));
  q = fma(q, t, splat(2.020695657e-01f));
  q = fma(q, t, splat(2.432610840e-01f));
  q = fma(q, t, splat(2.823534608e-01f));
  q = fma(q, t, splat(2.820876837e-01f));
  const Vec part = x * (splat(0.5f) * t * q * exp(splat(-0.5f) * x * x));
  return bits(x) < 0 ? part : x - part;
}

static inline Vec relu(Vec x) { return vmax(splat(0.0f), x); }

// out = f(offset, lanes), vector by vector. Returns the bits of the largest magnitude.
template <class F>
static inline int32_t activate(int n, float* out, F f) {
  IntVec top = {};
  each_vector(n, [&](int i, int lanes) {
    const Vec y = f(i, lanes);
    top = max_bits(top, y);
    store_lanes(out + i, y, lanes);
  });
  return max(top);
}

static int32_t activate_row(const Activation& activation, const float* x, const float* up, int n, float* out) {
  const auto by = [=](auto curve) {
    if (!activation.gated) return activate(n, out, [=](int i, int lanes) { return curve(load_lanes(x + i, lanes)); });
    return activate(n, out,
                    [=](int i, int lanes) { return curve(load_lanes(x + i, lanes)) * load_lanes(up + i, lanes); });
  };
  switch (activation.curve) {  // lambdas, because each type is compiled, and inlined, by itself
    case Curve::kSilu:
      return by([](Vec v) { return silu(v); });
    case Curve::kGeluTanh:
      return by([](Vec v) { return gelu_tanh(v); });
    case Curve::kGelu:
      return by([](Vec v) { return gelu(v); });
    case Curve::kRelu:
      return by([](Vec v) { return relu(v); });
    case Curve::kRelu2:
      return by([](Vec v) { return relu(v) * relu(v); });
    case Curve::kClampedSwiglu:
      break;
  }
  const Vec limit = splat(activation.limit);
  return activate(n, out, [=](int i, int lanes) {
    const Vec gate = vmin(limit, load_lanes(x + i, lanes));
    const Vec other = vmax(-limit, vmin(limit, load_lanes(up + i, lanes)));
    return sigmoid_times(gate, splat(1.702f) * gate) * (other + splat(1.0f));
  });
}

static void add_row(const float* x, const float* y, int n, float* out) {
  each_vector(
      n, [&](int i, int lanes) { store_lanes(out + i, load_lanes(x + i, lanes) + load_lanes(y + i, lanes), lanes); });
}

static void scale_row(const float* x, float factor, int n, float* out) {
  each_vector(n, [&](int i, int lanes) { store_lanes(out + i, load_lanes(x + i, lanes) * splat(factor), lanes); });
}

static void accumulate_row(const float* x, float factor, int n, float* out) {
  each_vector(n, [&](int i, int lanes) {
    store_lanes(out + i, fma(load_lanes(x + i, lanes), splat(factor), load_lanes(out + i, lanes)), lanes);
  });
}

static void gate_row(const float* x, const float* logits, int n, float* out) {
  each_vector(n, [&](int i, int lanes) {
    store_lanes(out + i, sigmoid_times(load_lanes(x + i, lanes), load_lanes(logits + i, lanes)), lanes);
  });
}

static void softcap_row(const float* x, float cap, int n, float* out) {
  each_vector(n, [&](int i, int lanes) {
    store_lanes(out + i, tanh(load_lanes(x + i, lanes) / splat(cap)) * splat(cap), lanes);
  });
}

}  // namespace FPTQ_NS
}  // namespace fptq

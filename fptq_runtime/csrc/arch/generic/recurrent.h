// Recurrent layers: some tokens of one sequence, in their order, which alone decides a result's bits. Included by
// arch/kernels.cpp only.
#pragma once

#include "arch/generic/norm.h"
#include "arch/generic/simd.h"
#include "core/views.h"

namespace fptq {
namespace FPTQ_NS {

static void short_conv(const ShortConvView& conv, const float* x, int rows, int begin, int end, float* state,
                       float* out) {
  const int past = conv.taps - 1;
  const size_t channels = conv.channels, width = conv.width, made = conv.gated ? channels : width;
  const auto given = [&](int t, int c, int lanes) {  // token t's; before the rows the state's, whose last is token -1
    if (t < 0) return load_lanes(state + (past + t) * channels + c, lanes);
    const float* row = x + t * width + c;
    return conv.gated ? load_lanes(row, lanes) * load_lanes(row + channels, lanes) : load_lanes(row, lanes);
  };
  for (int t = 0; t < rows; ++t) {
    each_vector(end - begin, [&](int i, int lanes) {
      const int c = begin + i;
      Vec y = conv.bias ? load_lanes(conv.bias + c, lanes) : Vec{};
      for (int j = 0; j <= past; ++j)
        y = fma(load_lanes(conv.weight + j * channels + c, lanes), given(t + j - past, c, lanes), y);
      if (conv.silu) y = silu(y);
      if (conv.gated) y = y * load_lanes(x + t * width + 2 * channels + c, lanes);
      store_lanes(out + t * made + c, y, lanes);
    });
  }
  for (int j = 0; j < past; ++j)
    each_vector(end - begin, [&](int i, int lanes) {
      store_lanes(state + j * channels + begin + i, given(rows - past + j, begin + i, lanes), lanes);
    });
}

// `Count` vectors of columns of a head's state, of which v and out have n numbers: S' = decay · S + k · change,
// change = (v - k · decay · S) beta, out = q · S'.
template <int Count>
static inline void delta_columns(const float* q, const float* k, int key_dim, const float* v, int n, float decay,
                                 float beta, int stride, float* state, float* out) {
  Vec change[Count], sum[Count] = {};
  for (int i = 0; i < key_dim; ++i)
    for (int u = 0; u < Count; ++u) sum[u] = fma(load(state + i * stride + u * kLanes), splat(k[i]), sum[u]);
  for (int u = 0; u < Count; ++u) {
    const Vec given = n >= (u + 1) * kLanes ? load(v + u * kLanes) : load_part(v + u * kLanes, n - u * kLanes);
    change[u] = (given - sum[u] * splat(decay)) * splat(beta);
    sum[u] = Vec{};
  }
  for (int i = 0; i < key_dim; ++i)
    for (int u = 0; u < Count; ++u) {
      float* at = state + i * stride + u * kLanes;
      const Vec s = fma(splat(k[i]), change[u], load(at) * splat(decay));
      store(at, s);
      sum[u] = fma(s, splat(q[i]), sum[u]);
    }
  for (int u = 0; u < Count; ++u)
    n >= (u + 1) * kLanes ? store(out + u * kLanes, sum[u]) : store_part(out + u * kLanes, sum[u], n - u * kLanes);
}

static void gated_delta(const GatedDeltaView& delta, const float* x, const float* ba, int rows, int head, float* state,
                        float* out) {
  const int dim = delta.key_dim, value_dim = delta.value_dim, padded = delta.padded_dim();
  const size_t keys = static_cast<size_t>(delta.key_heads) * dim,
               values = static_cast<size_t>(delta.value_heads) * value_dim;
  const size_t key = static_cast<size_t>(head / (delta.value_heads / delta.key_heads)) * dim,
               value = static_cast<size_t>(head) * value_dim;
  const float rate = exp(delta.a_log[head]);
  float q[kMaxHeadDim], k[kMaxHeadDim];
  const auto unit = [&](const float* from, float factor, float* to) {
    const float square = reduce(from, dim, [](Vec v, Vec acc) { return fma(v, v, acc); });
    scale_row(from, factor / __builtin_sqrtf(square + 1e-6f), dim, to);
  };
  for (int t = 0; t < rows; ++t, x += 2 * (keys + values), ba += 2 * delta.value_heads, out += values) {
    unit(x + key, 1 / __builtin_sqrtf(dim), q);
    unit(x + keys + key, 1, k);
    const float a = ba[delta.value_heads + head] + delta.dt_bias[head];
    const float decay = exp(-rate * softplus(splat(a))[0]);
    const float beta = 1 / (1 + exp(-ba[head]));
    const float* v = x + 2 * keys + value;
    float* y = out + value;
    int c = 0;
    for (; c + 4 * kLanes <= padded; c += 4 * kLanes)
      delta_columns<4>(q, k, dim, v + c, value_dim - c, decay, beta, padded, state + c, y + c);
    for (; c < padded; c += kLanes)
      delta_columns<1>(q, k, dim, v + c, value_dim - c, decay, beta, padded, state + c, y + c);
    const float* z = x + 2 * keys + values + value;
    norm_row({delta.norm_weight, nullptr, delta.eps, value_dim, false}, y, y);
    activate_row({Curve::kSilu, true, 0}, z, y, value_dim, y);
  }
}

// `Count` vectors of a part's channels, of which x and out have n: S' = decay · S + x · dt · B, out = S' · C + d · x.
// Own: decay = exp(dt · a) of each channel and state.
template <bool Own, int Count>
static inline void state_columns(const StateSpaceView& space, const float* x, const float* dt, const float* b,
                                 const float* c, const float* a, float decay, const float* d, int n, float* state,
                                 float* out) {
  const int stride = space.padded_part();
  Vec given[Count], step[Count], sum[Count] = {};
  const auto lanes = [&](int u) { return n - u * kLanes < kLanes ? n - u * kLanes : kLanes; };
  for (int u = 0; u < Count; ++u) {
    step[u] = load(dt + u * kLanes);
    given[u] = load_lanes(x + u * kLanes, lanes(u));
  }
  for (int i = 0; i < space.state; ++i)
    for (int u = 0; u < Count; ++u) {
      float* at = state + i * stride + u * kLanes;
      const Vec kept = Own ? exp(step[u] * load_lanes(a + static_cast<size_t>(i) * space.heads + u * kLanes, lanes(u)))
                           : splat(decay);
      const Vec s = fma(given[u] * step[u], splat(b[i]), load(at) * kept);
      store(at, s);
      sum[u] = fma(s, splat(c[i]), sum[u]);
    }
  for (int u = 0; u < Count; ++u) {
    const Vec direct = Own ? load_lanes(d + u * kLanes, lanes(u)) : splat(*d);
    store_lanes(out + u * kLanes, fma(direct, given[u], sum[u]), lanes(u));
  }
}

template <bool Own>
static void state_part(const StateSpaceView& space, const float* x, int rows, int part, float* state, float* out) {
  const int begin = part * space.part(), padded = space.padded_part();
  const int size = Own && space.heads - begin < padded ? space.heads - begin : space.part();
  const int group = Own ? 0 : part / (space.heads / space.groups), head = Own ? begin : part;
  const size_t channels = space.channels(), in_group = static_cast<size_t>(space.groups) * space.state;
  float dt[kMaxHeadDim] = {};
  for (int t = 0; t < rows; ++t, x += space.width(), out += channels) {
    const float* b = x + channels + group * space.state;
    const float* z = x + channels + 2 * in_group;
    each_vector(Own ? size : 1, [&](int i, int lanes) {
      const Vec raw = load_lanes(z + channels + head + i, lanes) + load_lanes(space.dt_bias + head + i, lanes);
      store_lanes(dt + i, vmax(splat(space.dt_min), vmin(splat(space.dt_max), softplus(raw))), lanes);
    });
    if (!Own)
      for (int i = 1; i < padded; ++i) dt[i] = dt[0];
    const float decay = Own ? 0 : exp(dt[0] * space.a[head]);
    const float *c = b + in_group, *a = space.a + head, *d = space.d + head;
    int i = 0;
    for (; i + 4 * kLanes <= size; i += 4 * kLanes)
      state_columns<Own, 4>(space, x + begin + i, dt + i, b, c, a + (Own ? i : 0), decay, d + (Own ? i : 0), size - i,
                            state + i, out + begin + i);
    for (; i < size; i += kLanes)
      state_columns<Own, 1>(space, x + begin + i, dt + i, b, c, a + (Own ? i : 0), decay, d + (Own ? i : 0), size - i,
                            state + i, out + begin + i);
    if (!space.gate_last) activate_row({Curve::kSilu, true, 0}, z + begin, out + begin, size, out + begin);
  }
}

static void state_space(const StateSpaceView& space, const float* x, int rows, int part, float* state, float* out) {
  space.own ? state_part<true>(space, x, rows, part, state, out) : state_part<false>(space, x, rows, part, state, out);
}

}  // namespace FPTQ_NS
}  // namespace fptq

// What adapters add to single rows. Included by arch/kernels.cpp only.
#pragma once

#include "arch/generic/simd.h"
#include "core/views.h"

namespace fptq {
namespace FPTQ_NS {

static void widen_codes(const int8_t* codes, float scale, int n, float* out) {
  for (int i = 0; i < n; ++i) out[i] = static_cast<float>(codes[i]) * scale;
}

// t[i][r] = scale · Σ x[i][k] · down[r][k] for Ranks of them, over two vectors in turn.
template <FloatType Type, int Rows, int Ranks>
static inline void low_rank_dots(const LowRankView& v, const float* const* x, int r, float* t) {
  const char* down = static_cast<const char*>(v.down) + static_cast<ptrdiff_t>(r) * v.k * float_bytes(Type);
  Vec acc[Ranks][Rows][2] = {};
  for (int k = 0; k < v.k; k += 2 * kLanes) {
    for (int j = 0; j < 2; ++j) {
      Vec rows[Rows];
      for (int i = 0; i < Rows; ++i) rows[i] = load(x[i] + k + j * kLanes);
      for (int q = 0; q < Ranks; ++q) {
        const Vec w = widen<Type>(down + (static_cast<ptrdiff_t>(q) * v.k + k + j * kLanes) * float_bytes(Type));
        for (int i = 0; i < Rows; ++i) acc[q][i][j] = fma(w, rows[i], acc[q][i][j]);
      }
    }
  }
  for (int q = 0; q < Ranks; ++q)
    for (int i = 0; i < Rows; ++i) t[i * v.rank + r + q] = v.scale * sum(acc[q][i][0] + acc[q][i][1]);
}

template <FloatType Type, int Rows>
static void low_rank_down(const LowRankView& v, const float* const* x, float* t) {
  constexpr int kRanks = Rows > 2 ? 2 : 4;
  int r = 0;
  for (; r + kRanks <= v.rank; r += kRanks) low_rank_dots<Type, Rows, kRanks>(v, x, r, t);
  for (; r < v.rank; ++r) low_rank_dots<Type, Rows, 1>(v, x, r, t);
}

// y[i][n] += Σ t[i][r] · up[r][n], r ascending.
template <FloatType Type, int Rows>
static void low_rank_up(const LowRankView& v, const float* t, float* const* y) {
  constexpr int kVecs = kLowRankColumns / kLanes;
  const char* up = static_cast<const char*>(v.up);
  for (int n = 0; n < v.n; n += kLowRankColumns) {
    Vec acc[Rows][kVecs] = {};
    for (int r = 0; r < v.rank; ++r) {
      for (int j = 0; j < kVecs; ++j, up += kLanes * float_bytes(Type)) {
        const Vec w = widen<Type>(up);
        for (int i = 0; i < Rows; ++i) acc[i][j] = fma(splat(t[i * v.rank + r]), w, acc[i][j]);
      }
    }
    for (int i = 0; i < Rows; ++i) {
      for (int j = 0; j < kVecs; ++j) {
        float* to = y[i] + n + j * kLanes;
        const int left = v.n - n - j * kLanes;
        if (left >= kLanes) store(to, load(to) + acc[i][j]);
        else if (left > 0) store_part(to, load_part(to, left) + acc[i][j], left);
      }
    }
  }
}

template <int Rows>
static void low_rank(const LowRankView& v, const float* const* x, float* const* y, float* t) {
  const auto down = v.down_type == FloatType::kFloat32    ? low_rank_down<FloatType::kFloat32, Rows>
                    : v.down_type == FloatType::kBfloat16 ? low_rank_down<FloatType::kBfloat16, Rows>
                                                          : low_rank_down<FloatType::kFloat16, Rows>;
  const auto up = v.up_type == FloatType::kFloat32    ? low_rank_up<FloatType::kFloat32, Rows>
                  : v.up_type == FloatType::kBfloat16 ? low_rank_up<FloatType::kBfloat16, Rows>
                                                      : low_rank_up<FloatType::kFloat16, Rows>;
  down(v, x, t);
  up(v, t, y);
}

static void low_rank_rows(const LowRankView& v, const float* const* x, float* const* y, int rows, float* t) {
  static_assert(kLowRankRows == 4 && kLowRankPad % (2 * kLanes) == 0 && kLowRankColumns % kLanes == 0);
  const auto run = rows == 1 ? low_rank<1> : rows == 2 ? low_rank<2> : rows == 3 ? low_rank<3> : low_rank<4>;
  run(v, x, y, t);
}

}  // namespace FPTQ_NS
}  // namespace fptq

// Tiles in plain C++, for machines without AVX2. See gemm.h.
#pragma once

namespace fptq::FPTQ_NS {
namespace {

constexpr const char* kGemmInt4Name = "int4 x int8, plain C++";
constexpr const char* kGemmInt8Name = "int8 x int8, plain C++";
constexpr const char* kGemmFloatName = "float32, plain C++";

constexpr int passes(int, int) { return 1; }

inline int32_t quantize_block(const float* x, float scale, int8_t* codes) {
  constexpr float kRound = 0x1.8p23f;  // adding it rounds to an integer, half to even
  int32_t sum = 0;
  for (int i = 0; i < kSumGroup; ++i) {
    float v = x[i] / scale;
    v = v < 127.0f ? v : 127.0f;
    v = v > -128.0f ? v : -128.0f;
    const int32_t code = static_cast<int32_t>((v + kRound) - kRound);
    sum += code;
    codes[i] = static_cast<int8_t>(code);
  }
  return sum;
}

int64_t multiply(int64_t rounds) {
  constexpr int kLanes = 64;
  int32_t acc[kLanes] = {};
  int16_t x[kLanes];
  for (int j = 0; j < kLanes; ++j) x[j] = static_cast<int16_t>(j - 32);
  for (int64_t i = 0; i < rounds; ++i) {
    asm volatile("" : "+m"(x));
    for (int j = 0; j < kLanes; ++j) acc[j] += static_cast<int16_t>(x[j] * 3);
  }
  asm volatile("" : : "m"(acc));
  return rounds * kLanes;
}

template <int Bits, int R>
void add_groups(const Tile& t, int groups, int steps) {
  const uint8_t* w = t.w;
  const int8_t* a = t.a;
  for (int g = 0; g < groups; ++g) {
    int32_t acc[R][kPanelCols] = {};
    for (int s = 0; s < steps; ++s, a += t.a_stride) {
      int16_t codes[4][kPanelCols];  // [k][column]
      for (int b = 0; b < 4; ++b) {
        if constexpr (Bits == 4) {
          for (int j = 0; j < kPanelCols; ++j) {
            const int byte = w[j / 32 * 64 + j % 16 * 4 + b];
            codes[b][j] = static_cast<int16_t>((byte >> (j / 16 % 2 * 4) & 15) - 8);
          }
        } else {
          for (int j = 0; j < kPanelCols; ++j) codes[b][j] = static_cast<int16_t>(w[4 * j + b] - 128);
        }
      }
      w += kPanelCols * 4 * Bits / 8;
      for (int r = 0; r < R; ++r) {
        for (int b = 0; b < 4; ++b) {
          for (int j = 0; j < kPanelCols; ++j) acc[r][j] += static_cast<int16_t>(codes[b][j] * a[4 * r + b]);
        }
      }
    }
    for (int r = 0; r < R; ++r) {
      for (int j = 0; j < kPanelCols; j += kLanes) {
        const int high = Bits == 4 && j / 16 % 2 ? 16 : 1;  // the packed scale of a high column is divided by 16
        float* f = t.f + r * kPanelCols + j;
        const Vec sum = __builtin_convertvector(load_int(acc[r] + j) * high, Vec);
        store(f, fma(sum, load(t.scales + g * kPanelCols + j), load(f)));
      }
    }
  }
}

template <int Bits>
void widen_weights(const uint8_t* w, const float* scales, float* out) {
  for (int k = 0; k < kSumGroup; ++k, out += kPanelCols) {
    const uint8_t* step = w + k / 4 * kPanelCols * Bits / 2 + k % 4;
    for (int j = 0; j < kPanelCols; ++j) {
      if constexpr (Bits == 4) {
        const int byte = step[j / 32 * 64 + j % 16 * 4];
        const int code = j / 16 % 2 ? (byte & 240) - 128 : (byte & 15) - 8;  // a high column's is 16 times as large
        out[j] = static_cast<float>(code) * scales[j];
      } else {
        out[j] = static_cast<float>(step[4 * j] - 128) * scales[j];
      }
    }
  }
}

template <FloatType Type, int R>
void add_products(const FloatTile& t, int k) {
  for (int i = 0; i < k; ++i) {
    float v[kPanelCols];
    const char* w = static_cast<const char*>(t.w) + i * kPanelCols * float_bytes(Type);
    for (int j = 0; j < kPanelCols; j += kLanes) store(v + j, widen<Type>(w + j * float_bytes(Type)));
    for (int r = 0; r < R; ++r) {
      const Vec x = splat(t.x[r * t.ldx + i]);
      float* f = t.f + r * kPanelCols;
      for (int j = 0; j < kPanelCols; j += kLanes) store(f + j, fma(load(v + j), x, load(f + j)));
    }
  }
}

template <int Bits, int R>
void add_weights(const FloatTile& t, const float* scales) {
  float floats[kSumGroup * kPanelCols];
  widen_weights<Bits>(static_cast<const uint8_t*>(t.w), scales, floats);
  add_products<FloatType::kFloat32, R>({t.x, t.ldx, floats, t.f}, kSumGroup);
}

}  // namespace
}  // namespace fptq::FPTQ_NS

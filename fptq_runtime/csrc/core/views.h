// Plain views of parameters, cache and work, as the per-ISA kernels read them.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fptq {

enum class FloatType { kFloat32, kBfloat16, kFloat16 };
enum class FactorType { kFloat32, kBfloat16, kFloat16, kInt8 };  // the first as above
enum class KvType { kFloat32, kBfloat16, kInt8 };

constexpr ptrdiff_t float_bytes(FloatType type) { return type == FloatType::kFloat32 ? 4 : 2; }
constexpr ptrdiff_t factor_bytes(FactorType type) {
  return type == FactorType::kInt8 ? 1 : float_bytes(static_cast<FloatType>(type));
}

constexpr int kKvChunk = 128;  // keys of one softmax partial, at absolute positions
constexpr int kKeyBlock = 16;  // keys that lie side by side in the cache; a cache block is a multiple of it
constexpr int kMaxHeadDim = 256;
constexpr int kMaxHeads = 4096, kMaxLayers = 4096;  // no model comes near, and sizes made of them fit
constexpr int kTileQueries = 48;                    // (token, head) rows of one attention tile

// RMSNorm, or LayerNorm where `layer`.
struct NormView {
  const float* weight;  // [n], null where there is no norm
  const float* bias;    // [n] or null
  float eps;
  int n;
  bool layer;
};

// A norm of q's or of k's heads: each `n` of a row's dimensions by themselves, one head or all of them. `stride`: from
// one head's weights (and bias) to the next one's, 0 where they share them.
struct HeadNormView {
  NormView norm;
  int stride;
};

struct AttentionView {
  int num_heads, num_kv_heads, head_dim;
  float softmax_scale;
  int sliding_window;     // 0: none
  int rope_dim;           // of head_dim, rotated
  const float* rope_cos;  // [positions][rope_dim / 2], null where there is no rope
  const float* rope_sin;
  const float* alibi_slopes;  // [num_heads] or null
  const float* sinks;         // [num_heads] or null
  float softcap;              // 0: none
  HeadNormView q_norm, k_norm;
  bool norm_after_rope;
};

// kernels/base.py's ShortConv; width: of the rows that it reads.
struct ShortConvView {
  int channels, taps;
  bool silu, gated;
  const float* weight;  // [taps][channels]
  const float* bias;    // [channels] or null
  int width;
};

// kernels/base.py's GatedDelta. A head's state is [key_dim][padded_dim].
struct GatedDeltaView {
  int key_heads, value_heads, key_dim, value_dim;
  float eps;
  const float* a_log;        // [value_heads]
  const float* dt_bias;      // [value_heads]
  const float* norm_weight;  // [value_dim]
  int padded_dim() const { return (value_dim + 15) / 16 * 16; }
};

// kernels/base.py's StateSpace, in parts that a task computes: heads, or where each channel is one so many of them. A
// part's state is [state][padded_part].
constexpr int kStateChannels = 64;
struct StateSpaceView {
  int heads, head_dim, groups, state;
  float dt_min, dt_max, eps;
  bool own, gate_last;       // own: a is [state][heads], else [heads]
  const float* a;            // -exp(a_log)
  const float* d;            // [heads]
  const float* dt_bias;      // [heads]
  const float* norm_weight;  // [heads · head_dim] or null
  int channels() const { return heads * head_dim; }
  int part() const { return own ? kStateChannels : head_dim; }
  int padded_part() const { return (part() + 15) / 16 * 16; }
  int width() const { return 2 * channels() + 2 * groups * state + heads; }  // of a row x | B | C | z | dt
};

// kernels/base.py's LowRank, at most kLowRankRows rows at once. `k` is K rounded up to kLowRankPad, with zeros, as is
// N to kLowRankColumns.
constexpr int kLowRankRows = 4, kLowRankPad = 64, kLowRankColumns = 32;
struct LowRankView {
  int rank, k, n;
  FactorType down_type, up_type;
  const float* scales;  // [rank], of both factors and of the adapter together
  const void* down;     // [rank][k]
  const void* up;       // [N / kLowRankColumns][rank][kLowRankColumns]
};

// kernels/base.py's Activation.
enum class Curve { kSilu, kGeluTanh, kGelu, kRelu, kRelu2, kClampedSwiglu };
struct Activation {
  Curve curve;
  bool gated;
  float limit;
};

// One layer's part of the paged cache, [blocks][layers][kv heads][k | v | k scales | v scales]: what a task reads of a
// block is one stream, and a block is large enough for huge pages to hold little else. Keys lie so that q·K runs over
// keys in lanes, values so that P·V runs over dimensions in lanes.
//   floats: k [head_dim][block_size], v [block_size][padded_dim], no scales
//   int8:   k [ceil(head_dim / 4)][block_size][4], v [block_size / 4][padded_dim][4], bytes of code + 128;
//           scales [block_size] float
struct KvCache {
  KvType type;
  int block_size, num_kv_heads, head_dim;
  size_t block_bytes;  // of all layers
  char* data;          // this layer's part of block 0

  int padded_dim() const { return (head_dim + 15) / 16 * 16; }
  size_t element() const { return type == KvType::kFloat32 ? 4 : type == KvType::kBfloat16 ? 2 : 1; }
  size_t k_bytes() const {
    return element() * block_size * (type == KvType::kInt8 ? (head_dim + 3) / 4 * 4 : head_dim);
  }
  size_t v_bytes() const { return element() * block_size * padded_dim(); }
  size_t scale_bytes() const { return type == KvType::kInt8 ? block_size * sizeof(float) : 0; }
  size_t head_bytes() const { return k_bytes() + v_bytes() + 2 * scale_bytes(); }

  char* k(size_t block, int head) const { return data + block * block_bytes + head * head_bytes(); }
  char* v(size_t block, int head) const { return k(block, head) + k_bytes(); }
  float* k_scale(size_t block, int head) const { return reinterpret_cast<float*>(v(block, head) + v_bytes()); }
  float* v_scale(size_t block, int head) const { return k_scale(block, head) + block_size; }
};

// Consecutive tokens of one sequence × query heads of one KV head: at most kTileQueries (token, head) rows.
struct AttentionTile {
  const float* q;  // [tokens][num_heads · head_dim], the first token's row
  float* out;      // like q
  const int32_t* block_table;
  int position, tokens;  // the first token's position
  int kv_head, first_head, heads;
  int first_chunk, chunks;  // the KV chunks to visit
  // Null: merge into `out`. Else softmax partials [chunks of the tile][rows][2 + padded_dim] as (max, sum, values),
  // chunk first_chunk at `partials`; a row that sees no key of a chunk has max = -inf.
  float* partials;
};

constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
constexpr int round_up(int a, int b) { return ceil_div(a, b) * b; }

// Floats of one (chunk, row) partial.
constexpr int partial_size(int padded_dim) { return padded_dim + 2; }

}  // namespace fptq

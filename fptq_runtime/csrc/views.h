// Plain views of parameters, cache and work, as the per-ISA kernels read them.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fptq {

enum class FloatType { kFloat32, kBfloat16, kFloat16 };
enum class KvType { kFloat32, kBfloat16, kInt8 };

constexpr int kKvChunk = 128;      // keys of one softmax partial, at absolute positions
constexpr int kKeyBlock = 16;      // keys that lie side by side in the cache; a cache block is a multiple of it
constexpr int kMaxHeadDim = 256;
constexpr int kTileQueries = 16;   // (token, head) rows of one attention tile

// RMSNorm, or LayerNorm where `layer`.
struct NormView {
  const float* weight;  // [n], null where there is no norm
  const float* bias;    // [n] or null
  float eps;
  int n;
  bool layer;
};

struct AttentionView {
  int num_heads, num_kv_heads, head_dim;
  float softmax_scale;
  int sliding_window;         // 0: none
  const float* rope_cos;      // [positions][head_dim / 2], null where there is no rope
  const float* rope_sin;
  const float* alibi_slopes;  // [num_heads] or null
  NormView q_norm, k_norm;
};

// One layer's paged cache. Keys lie transposed, so that q·K runs over keys in lanes; values lie row by row.
struct KvCache {
  KvType type;
  int block_size, num_kv_heads, head_dim;
  int padded_dim;   // head_dim rounded up to 16
  void* k;          // [blocks][kv heads][head_dim][block_size]
  void* v;          // [blocks][kv heads][block_size][padded_dim]
  float* k_scale;   // [blocks][kv heads][block_size], int8 only
  float* v_scale;
};

// Consecutive tokens of one sequence × query heads of one KV head: at most kTileQueries (token, head) rows.
struct AttentionTile {
  const float* q;             // [M][num_heads · head_dim]
  float* out;                 // like q
  const int32_t* block_table;
  int row, position, tokens;  // the first token's row and position
  int kv_head, first_head, heads;
  int first_chunk, chunks;    // the KV chunks to visit
  // Null: merge into `out`. Else softmax partials [chunks of the tile][rows][2 + padded_dim] as (max, sum, values),
  // chunk first_chunk at `partials`; a row that sees no key of a chunk has max = -inf.
  float* partials;
};

constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
constexpr int round_up(int a, int b) { return ceil_div(a, b) * b; }

// Floats of one (chunk, row) partial.
constexpr int partial_size(int padded_dim) { return padded_dim + 2; }

}  // namespace fptq

// Rope, KV writes and paged attention. Included by kernels.cpp only.
//
// Batch invariance: a key's score is one chain of fma over the head dimension; a row's softmax is taken per chunk of
// kKvChunk keys at absolute positions and the chunks are merged in ascending order. What else shares the tile only adds
// lanes and rows, or exact zeros.
#pragma once

#include "norm.h"
#include "simd.h"
#include "views.h"

namespace fptq {
namespace FPTQ_NS {

constexpr int kRowBlock = 4;                           // query rows of one register tile
constexpr int kVecBlock = kLanes == 16 ? 4 : 2;        // vectors of one register tile
constexpr int kBlockVecs = kKeyBlock / kLanes;         // vectors of 16 keys
constexpr int kChunkVecs = kKvChunk / kLanes;
constexpr float kInfinity = __builtin_inff();

// Halves paired as (i, i + n / 2).
static inline void rotate(const float* cos, const float* sin, int n, float* x) {
  const int half = n / 2;
  for (int i = 0; i < half; ++i) {
    const float first = x[i], second = x[i + half];
    x[i] = first * cos[i] - second * sin[i];
    x[i + half] = second * cos[i] + first * sin[i];
  }
}

// scale = max|x| / 127.5 (float32 epsilon where that is 0), codes half to even: as activations are quantized.
static inline float quantize_head(const float* x, int n, int8_t* codes) {
  float top = 0;
  for (int i = 0; i < n; ++i) {
    const float a = __builtin_fabsf(x[i]);
    top = a > top || a != a ? a : top;
  }
  float scale = top / 127.5f;
  if (scale == 0) scale = 0x1p-23f;
  constexpr float kRound = 0x1.8p23f;
  for (int i = 0; i < n; ++i) {
    float q = x[i] / scale;
    q = q < 127.0f ? q : 127.0f;
    q = q > -128.0f ? q : -128.0f;
    codes[i] = static_cast<int8_t>(static_cast<int32_t>((q + kRound) - kRound));
  }
  return scale;
}

// Writes one head's n values with a stride, and its scale where the cache is int8.
static inline void write_head(const KvCache& cache, void* data, float* scales, size_t head_slot, size_t offset,
                              size_t stride, const float* x) {
  const int n = cache.head_dim;
  if (cache.type == KvType::kFloat32) {
    float* out = static_cast<float*>(data) + offset;
    for (int i = 0; i < n; ++i) out[i * stride] = x[i];
  } else if (cache.type == KvType::kBfloat16) {
    uint16_t* out = static_cast<uint16_t*>(data) + offset;
    for (int i = 0; i < n; ++i) out[i * stride] = to_bf16(x[i]);
  } else {
    int8_t codes[kMaxHeadDim];
    scales[head_slot] = quantize_head(x, n, codes);
    int8_t* out = static_cast<int8_t*>(data) + offset;
    for (int i = 0; i < n; ++i) out[i * stride] = codes[i];
  }
}

// One token: qkv [q | k | v] heads; q to q [num_heads · head_dim], k and v to the cache.
static void rope_and_cache_row(const AttentionView& a, const KvCache& cache, int position, int slot, const float* qkv,
                               float* q) {
  const int dim = a.head_dim;
  const float* cos = a.rope_cos ? a.rope_cos + static_cast<size_t>(position) * (dim / 2) : nullptr;
  const float* sin = a.rope_cos ? a.rope_sin + static_cast<size_t>(position) * (dim / 2) : nullptr;
  const auto finish = [&](const float* x, const NormView& norm, float* out) {
    if (norm.weight) norm_row(norm, x, out);
    else __builtin_memcpy(out, x, dim * sizeof(float));
    if (cos) rotate(cos, sin, dim, out);
  };
  for (int h = 0; h < a.num_heads; ++h) finish(qkv + h * dim, a.q_norm, q + h * dim);

  const float* k = qkv + a.num_heads * dim;
  const float* v = k + a.num_kv_heads * dim;
  const size_t block = slot / cache.block_size, within = slot % cache.block_size;
  for (int h = 0; h < a.num_kv_heads; ++h) {
    float key[kMaxHeadDim];
    finish(k + h * dim, a.k_norm, key);
    const size_t head = block * a.num_kv_heads + h, head_slot = head * cache.block_size + within;
    write_head(cache, cache.k, cache.k_scale, head_slot, head * dim * cache.block_size + within, cache.block_size, key);
    write_head(cache, cache.v, cache.v_scale, head_slot, head_slot * cache.padded_dim, 1, v + h * dim);
  }
}

// The state of one tile on its way through the chunks.
struct TileState {
  int rows;
  const float* q[kTileQueries];
  int position[kTileQueries];
  float slope[kTileQueries];
  alignas(64) float score[kTileQueries][kKvChunk];         // then probability · value scale
  alignas(64) float chunk_out[kTileQueries][kMaxHeadDim];
  float chunk_max[kTileQueries], chunk_sum[kTileQueries];  // max -inf: the row sees no key of the chunk
};

// score[r][v · kLanes ..] = q[r] · K over R rows and V vectors of keys; keys[v] points at [dim][stride].
template <int R, int V, class T>
static inline void score_tile(const float* const* q, const T* const* keys, int dim, int stride, float* const* score) {
  Vec acc[R][V] = {};
  for (int d = 0; d < dim; ++d) {
    Vec k[V];
    for (int v = 0; v < V; ++v) k[v] = widen(keys[v] + static_cast<size_t>(d) * stride);
    for (int r = 0; r < R; ++r) {
      const Vec x = splat(q[r][d]);
      for (int v = 0; v < V; ++v) acc[r][v] = fma(x, k[v], acc[r][v]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) store(score[r] + v * kLanes, acc[r][v]);
}

template <int R, class T>
static inline void score_rows(TileState& s, int r, const T* const* keys, int first, int last, int dim, int stride) {
  for (int v = first; v < last;) {
    float* score[R];
    for (int i = 0; i < R; ++i) score[i] = s.score[r + i] + v * kLanes;
    if (last - v >= kVecBlock) {
      score_tile<R, kVecBlock>(s.q + r, keys + v, dim, stride, score);
      v += kVecBlock;
    } else {
      score_tile<R, 1>(s.q + r, keys + v, dim, stride, score);
      v += 1;
    }
  }
}

// out[r][d ..] = Σ_key p[r][key] · V[key][d], keys first..last of the chunk ascending; values[b] is 16 keys' rows.
template <int R, int V, class T>
static inline void value_tile(TileState& s, int r, const T* const* values, int first, int last, int stride, int d) {
  Vec acc[R][V] = {};
  for (int key = first; key < last;) {
    const int end = key / kKeyBlock * kKeyBlock + kKeyBlock < last ? key / kKeyBlock * kKeyBlock + kKeyBlock : last;
    const T* row = values[key / kKeyBlock] + static_cast<size_t>(key % kKeyBlock) * stride + d;
    for (; key < end; ++key, row += stride) {
      Vec x[V];
      for (int v = 0; v < V; ++v) x[v] = widen(row + v * kLanes);
      for (int i = 0; i < R; ++i) {
        const Vec p = splat(s.score[r + i][key]);
        for (int v = 0; v < V; ++v) acc[i][v] = fma(p, x[v], acc[i][v]);
      }
    }
  }
  for (int i = 0; i < R; ++i)
    for (int v = 0; v < V; ++v) store(s.chunk_out[r + i] + d + v * kLanes, acc[i][v]);
}

template <int R, class T>
static inline void value_rows(TileState& s, int r, const T* const* values, int first, int last, int stride) {
  int d = 0;
  for (; d + kVecBlock * kLanes <= stride; d += kVecBlock * kLanes)
    value_tile<R, kVecBlock>(s, r, values, first, last, stride, d);
  for (; d < stride; d += kLanes) value_tile<R, 1>(s, r, values, first, last, stride, d);
}

// Turns one row's scores over vectors first..last of a chunk into probabilities · value scale; sets its max and sum.
static inline void softmax_row(const AttentionView& a, const KvCache& cache, TileState& s, int r, int base, int first,
                               int last, const float* const* k_scale, const float* const* v_scale) {
  const int position = s.position[r];
  int low = a.sliding_window ? position - a.sliding_window + 1 - base : 0;
  int high = position + 1 - base;
  if (low < first * kLanes) low = first * kLanes;
  if (high > last * kLanes) high = last * kLanes;
  float* score = s.score[r];
  if (low >= high) {
    s.chunk_max[r] = -kInfinity;
    for (int i = first * kLanes; i < last * kLanes; ++i) score[i] = 0;
    return;
  }
  const bool int8 = cache.type == KvType::kInt8;
  const auto scale_at = [](const float* const* scale, int v) {
    return load(scale[v / kBlockVecs] + v % kBlockVecs * kLanes);
  };
  const auto mask = [&](float value) {
    for (int i = first * kLanes; i < low; ++i) score[i] = value;
    for (int i = high; i < last * kLanes; ++i) score[i] = value;
  };

  Vec lane = {};
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  for (int v = first; v < last; ++v) {
    Vec x = load(score + v * kLanes);
    if (int8) x = x * scale_at(k_scale, v);
    x = x * splat(a.softmax_scale);
    if (a.alibi_slopes) x = x + splat(s.slope[r]) * (splat(static_cast<float>(base + v * kLanes)) + lane);
    store(score + v * kLanes, x);
  }
  mask(-kInfinity);
  Vec top = splat(-kInfinity);
  for (int v = first; v < last; ++v) top = vmax(top, load(score + v * kLanes));
  s.chunk_max[r] = max(top);
  for (int v = first; v < last; ++v)
    store(score + v * kLanes, exp(load(score + v * kLanes) - splat(s.chunk_max[r])));
  mask(0);
  Vec total = {};
  for (int v = first; v < last; ++v) total = total + load(score + v * kLanes);
  s.chunk_sum[r] = sum(total);
  if (int8) {
    for (int v = first; v < last; ++v) store(score + v * kLanes, load(score + v * kLanes) * scale_at(v_scale, v));
    mask(0);  // a stale scale may be anything
  }
}

// Fills chunk_max, chunk_sum and chunk_out of every row for one chunk.
template <class T>
static void attend_chunk(const AttentionView& a, const KvCache& cache, const AttentionTile& tile, int chunk,
                         TileState& s) {
  const int base = chunk * kKvChunk, dim = a.head_dim;
  int low = a.sliding_window ? tile.position - a.sliding_window + 1 - base : 0;
  int high = tile.position + tile.tokens - base;
  if (low < 0) low = 0;
  if (high > kKvChunk) high = kKvChunk;
  const int first_block = low / kKeyBlock, last_block = ceil_div(high, kKeyBlock);

  const T* keys[kChunkVecs];
  const T* values[kKvChunk / kKeyBlock];
  const float* k_scale[kKvChunk / kKeyBlock];
  const float* v_scale[kKvChunk / kKeyBlock];
  for (int b = first_block; b < last_block; ++b) {
    const int key = base + b * kKeyBlock;
    const size_t block = tile.block_table[key / cache.block_size], within = key % cache.block_size;
    const size_t head = block * a.num_kv_heads + tile.kv_head;
    const T* k = static_cast<const T*>(cache.k) + head * dim * cache.block_size + within;
    for (int v = 0; v < kBlockVecs; ++v) keys[b * kBlockVecs + v] = k + v * kLanes;
    const size_t slot = head * cache.block_size + within;
    values[b] = static_cast<const T*>(cache.v) + slot * cache.padded_dim;
    if (cache.type == KvType::kInt8) {
      k_scale[b] = cache.k_scale + slot;
      v_scale[b] = cache.v_scale + slot;
    }
  }

  const int first = first_block * kBlockVecs, last = last_block * kBlockVecs;
  for (int r = 0; r < s.rows; r += kRowBlock) {
    switch (s.rows - r) {
      case 1: score_rows<1>(s, r, keys, first, last, dim, cache.block_size); break;
      case 2: score_rows<2>(s, r, keys, first, last, dim, cache.block_size); break;
      case 3: score_rows<3>(s, r, keys, first, last, dim, cache.block_size); break;
      default: score_rows<kRowBlock>(s, r, keys, first, last, dim, cache.block_size);
    }
  }
  for (int r = 0; r < s.rows; ++r) softmax_row(a, cache, s, r, base, first, last, k_scale, v_scale);
  for (int r = 0; r < s.rows; r += kRowBlock) {
    switch (s.rows - r) {
      case 1: value_rows<1>(s, r, values, low, high, cache.padded_dim); break;
      case 2: value_rows<2>(s, r, values, low, high, cache.padded_dim); break;
      case 3: value_rows<3>(s, r, values, low, high, cache.padded_dim); break;
      default: value_rows<kRowBlock>(s, r, values, low, high, cache.padded_dim);
    }
  }
}

// Softmax of two key sets from their (max, sum, values): both scaled to the common max and added.
static inline void merge(float& max, float& sum, float* values, float chunk_max, float chunk_sum, const float* chunk,
                         int padded_dim) {
  if (chunk_max == -kInfinity) return;
  const float top = max > chunk_max ? max : chunk_max;
  const float old_scale = max == -kInfinity ? 0.0f : exp(max - top), new_scale = exp(chunk_max - top);
  max = top;
  sum = sum * old_scale + chunk_sum * new_scale;
  const Vec x = splat(old_scale), y = splat(new_scale);
  for (int d = 0; d < padded_dim; d += kLanes)
    store(values + d, fma(load(chunk + d), y, load(values + d) * x));
}

static inline size_t out_offset(const AttentionView& a, const AttentionTile& tile, int r) {
  const int token = tile.row + r / tile.heads, head = tile.first_head + r % tile.heads;
  return (static_cast<size_t>(token) * a.num_heads + head) * a.head_dim;
}

static inline void write_row(const float* values, float sum, int dim, float* out) {
  for (int d = 0; d < dim; ++d) out[d] = values[d] / sum;
}

static void attention_tile(const AttentionView& a, const KvCache& cache, const AttentionTile& tile) {
  TileState s;
  s.rows = tile.tokens * tile.heads;
  for (int r = 0; r < s.rows; ++r) {
    s.q[r] = tile.q + out_offset(a, tile, r);
    s.position[r] = tile.position + r / tile.heads;
    s.slope[r] = a.alibi_slopes ? a.alibi_slopes[tile.first_head + r % tile.heads] : 0.0f;
  }
  const int padded = cache.padded_dim, size = partial_size(padded);
  float row_max[kTileQueries], row_sum[kTileQueries];
  alignas(64) float values[kTileQueries][kMaxHeadDim];
  for (int r = 0; r < s.rows; ++r) {
    row_max[r] = -kInfinity;
    row_sum[r] = 0;
    __builtin_memset(values[r], 0, padded * sizeof(float));
  }
  for (int c = 0; c < tile.chunks; ++c) {
    const int chunk = tile.first_chunk + c;
    if (cache.type == KvType::kFloat32) attend_chunk<float>(a, cache, tile, chunk, s);
    else if (cache.type == KvType::kBfloat16) attend_chunk<uint16_t>(a, cache, tile, chunk, s);
    else attend_chunk<int8_t>(a, cache, tile, chunk, s);
    for (int r = 0; r < s.rows; ++r) {
      if (tile.partials) {
        float* partial = tile.partials + (static_cast<size_t>(c) * s.rows + r) * size;
        partial[0] = s.chunk_max[r];
        partial[1] = s.chunk_sum[r];
        __builtin_memcpy(partial + 2, s.chunk_out[r], padded * sizeof(float));
      } else {
        merge(row_max[r], row_sum[r], values[r], s.chunk_max[r], s.chunk_sum[r], s.chunk_out[r], padded);
      }
    }
  }
  if (tile.partials) return;
  for (int r = 0; r < s.rows; ++r) write_row(values[r], row_sum[r], a.head_dim, tile.out + out_offset(a, tile, r));
}

// Second pass of a tile whose chunks were attended apart: tile.partials holds all of tile.chunks.
static void merge_partials(const AttentionView& a, const AttentionTile& tile) {
  const int rows = tile.tokens * tile.heads, padded = round_up(a.head_dim, 16), size = partial_size(padded);
  for (int r = 0; r < rows; ++r) {
    float row_max = -kInfinity, row_sum = 0;
    alignas(64) float values[kMaxHeadDim] = {};
    for (int c = 0; c < tile.chunks; ++c) {
      const float* partial = tile.partials + (static_cast<size_t>(c) * rows + r) * size;
      merge(row_max, row_sum, values, partial[0], partial[1], partial + 2, padded);
    }
    write_row(values, row_sum, a.head_dim, tile.out + out_offset(a, tile, r));
  }
}

}  // namespace FPTQ_NS
}  // namespace fptq

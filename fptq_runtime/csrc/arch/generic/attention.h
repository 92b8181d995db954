// Rope, KV writes and paged attention. Included by arch/kernels.cpp only.
//
// Batch invariance: a key's score is one integer or one chain of fma over the head dimension; a row's softmax is taken
// per chunk of kKvChunk keys at absolute positions and the chunks are merged in ascending order. What else shares the
// tile only adds lanes and rows, or exact zeros.
//
// int8: a row of q is quantized like an activation, so q·K is an integer; P · value scale becomes 15-bit integers of a
// scale for each row and chunk, so P·V is one too.
#pragma once

#include "arch/generic/dot.h"
#include "arch/generic/norm.h"
#include "arch/generic/simd.h"
#include "core/views.h"

namespace fptq {
namespace FPTQ_NS {

constexpr int kRowBlock = 8, kIntRowBlock = 6;  // query rows that go through a chunk together
constexpr int kFloatRows = 4;                   // rows and vectors of one register tile of floats
constexpr int kFloatVecs = kLanes == 16 ? 4 : 2;
constexpr int kPieceSteps = kKeyBlock / 4;  // between which lines are prefetched
constexpr int kPrefetchRows = 12;           // a tile of more is one of many that read the same keys
constexpr int kChunkBlocks = kKvChunk / kKeyBlock;
constexpr float kInfinity = __builtin_inff();
constexpr float kLog2e = 1.44269504f;
constexpr float kMaxP = 32512;  // 127 · 256: its upper byte, rounded, is still signed

template <int N>
struct Int {
  static constexpr int value = N;
};

template <int N, class F>
[[gnu::always_inline]] static inline void with_int(int n, int start, const F& f) {
  if (n == N) return f(Int<N>{}, start);
  if constexpr (N > 1) with_int<N - 1>(n, start, f);
}

// f(Int<size>, start) over nearly equal parts of 0..n, none larger than Max.
template <int Max, class F>
[[gnu::always_inline]] static inline void tiles(int n, const F& f) {
  for (int start = 0, parts = ceil_div(n, Max); parts > 0; --parts) {
    const int size = ceil_div(n - start, parts);
    with_int<Max>(size, start, f);
    start += size;
  }
}

// Halves paired as (i, i + n / 2).
static inline void rotate(const float* cos, const float* sin, int n, float* x) {
  const int half = n / 2;
  each_vector(half, [&](int i, int lanes) {
    const Vec first = load_lanes(x + i, lanes), second = load_lanes(x + half + i, lanes);
    const Vec c = load_lanes(cos + i, lanes), s = load_lanes(sin + i, lanes);
    store_lanes(x + i, first * c - second * s, lanes);
    store_lanes(x + half + i, second * c + first * s, lanes);
  });
}

// scale = max|x| / 127.5 (float32 epsilon where that is 0), codes half to even: as activations are quantized. Writes
// zeros up to a multiple of 16; a NaN makes the scale NaN.
static inline float quantize_head(const float* x, int n, int8_t* codes) {
  IntVec tops = {};
  each_vector(n, [&](int i, int lanes) { tops = max_bits(tops, load_lanes(x + i, lanes)); });
  const int32_t top = max(tops);
  float scale;
  __builtin_memcpy(&scale, &top, sizeof scale);
  scale /= 127.5f;
  if (scale == 0) scale = 0x1p-23f;
  __builtin_memset(codes + n / 16 * 16, 0, n % 16 ? 16 : 0);
  each_vector(n, [&](int i, int lanes) {
    const Vec q = vmax(vmin(load_lanes(x + i, lanes) / splat(scale), splat(127.0f)), splat(-128.0f));
    store_bytes(codes + i, bits(q + splat(kRound)));
  });
  return scale;
}

// Keys and values of one token and head into its slot.
static inline void write_slot(const KvCache& cache, size_t block, int within, int head, const float* key,
                              const float* value) {
  const int dim = cache.head_dim, padded = cache.padded_dim(), size = cache.block_size;
  if (cache.type == KvType::kInt8) {
    int8_t codes[kMaxHeadDim + kLanes];
    cache.k_scale(block, head)[within] = quantize_head(key, dim, codes);
    uint8_t* k = reinterpret_cast<uint8_t*>(cache.k(block, head)) + 4 * within;
    for (int d = 0; d < dim; d += 4) {
      uint32_t four;
      __builtin_memcpy(&four, codes + d, sizeof four);
      four ^= 0x80808080;
      __builtin_memcpy(k + static_cast<size_t>(d) * size, &four, sizeof four);
    }
    cache.v_scale(block, head)[within] = quantize_head(value, dim, codes);
    uint8_t* v = reinterpret_cast<uint8_t*>(cache.v(block, head)) + within / 4 * 4 * padded + within % 4;
    for (int d = 0; d < dim; ++d) v[4 * d] = static_cast<uint8_t>(codes[d] + 128);
  } else if (cache.type == KvType::kBfloat16) {
    uint16_t* k = reinterpret_cast<uint16_t*>(cache.k(block, head)) + within;
    uint16_t* v = reinterpret_cast<uint16_t*>(cache.v(block, head)) + within * padded;
    for (int d = 0; d < dim; ++d) k[d * size] = to_bf16(key[d]);
    for (int d = 0; d < dim; ++d) v[d] = to_bf16(value[d]);
  } else {
    float* k = reinterpret_cast<float*>(cache.k(block, head)) + within;
    for (int d = 0; d < dim; ++d) k[d * size] = key[d];
    __builtin_memcpy(reinterpret_cast<float*>(cache.v(block, head)) + within * padded, value, dim * sizeof(float));
  }
}

static inline void norm_heads(const HeadNormView& heads, const float* x, int width, float* out) {
  NormView norm = heads.norm;
  for (int at = 0; at < width; at += norm.n) {
    norm_row(norm, x + at, out + at);
    norm.weight += heads.stride;
    if (norm.bias) norm.bias += heads.stride;
  }
}

// One token: qkv [q | k | v] heads; q to q [num_heads · head_dim], k and v to the cache.
static void rope_and_cache_row(const AttentionView& a, const KvCache& cache, int position, int slot, const float* qkv,
                               float* q, float* keys) {
  const int dim = a.head_dim;
  const size_t row = static_cast<size_t>(position) * (a.rope_dim / 2);
  const auto finish = [&](const float* x, int heads, const HeadNormView& norm, float* out) {
    const int width = heads * dim;
    if (norm.norm.weight && !a.norm_after_rope) norm_heads(norm, x, width, out);
    else __builtin_memcpy(out, x, width * sizeof(float));
    if (a.rope_cos)
      for (int at = 0; at < width; at += dim) rotate(a.rope_cos + row, a.rope_sin + row, a.rope_dim, out + at);
    if (norm.norm.weight && a.norm_after_rope) norm_heads(norm, out, width, out);
  };
  finish(qkv, a.num_heads, a.q_norm, q);

  const float* k = qkv + a.num_heads * dim;
  const float* v = k + a.num_kv_heads * dim;
  finish(k, a.num_kv_heads, a.k_norm, keys);
  for (int h = 0; h < a.num_kv_heads; ++h)
    write_slot(cache, slot / cache.block_size, slot % cache.block_size, h, keys + h * dim, v + h * dim);
}

// One chunk of the cache as a tile sees it, in blocks of kKeyBlock keys.
struct Chunk {
  int base, first, last;  // the chunk's first key; the blocks that a row of the tile sees
  int low, high;          // the keys, from `base` on
  const uint8_t* k[kChunkBlocks];
  const uint8_t* v[kChunkBlocks];
  alignas(64) float k_scale[kKvChunk], v_scale[kKvChunk];
};

// Asks for the next chunk's lines a few at a time, between pieces of arithmetic: all at once they would stall it. The
// pieces of one chunk tell how many the next will have.
class Prefetch {
 public:
  // Points at the chunk from key `base` on of a tile; null: at nothing.
  void start(const KvCache& cache, const AttentionTile* tile, int base) {
    const int pieces = pieces_ ? pieces_ : 32;
    pieces_ = 0;
    lines_ = rate_ = 0;
    if (!tile) return;
    const int last = tile->position + tile->tokens - 1, end = last < base + kKvChunk ? last + 1 : base + kKvChunk;
    head_ = cache.k(0, tile->kv_head);
    block_bytes_ = cache.block_bytes;
    run_ = cache.head_bytes() / 64 * 64;
    block_ = tile->block_table + base / cache.block_size;
    at_ = end_ = nullptr;
    lines_ = ceil_div(end - base, cache.block_size) * static_cast<int>(run_ / 64);
    rate_ = ceil_div(lines_, pieces);
  }

  [[gnu::always_inline]] void some() {
    ++pieces_;
    const int count = rate_ < lines_ ? rate_ : lines_;
    lines_ -= count;
    for (int n = count; n > 0; --n, at_ += 64) {
      if (at_ == end_) at_ = head_ + *block_++ * block_bytes_, end_ = at_ + run_;
      __builtin_prefetch(at_, 0, 2);  // into L2: it has more misses in flight than L1
    }
  }

 private:
  const char *head_ = nullptr, *at_ = nullptr, *end_ = nullptr;  // the head in block 0; the next line, its run's end
  size_t block_bytes_ = 0, run_ = 0;
  const int32_t* block_ = nullptr;
  int lines_ = 0, rate_ = 0, pieces_ = 0;
};

// For a tile whose chunks others have just read.
struct NoPrefetch {
  void some() {}
};

// A tile's rows, and their softmax over the chunks merged so far.
struct TileRows {
  const float* q[kTileQueries];
  int position[kTileQueries];
  float slope[kTileQueries];   // · log2 e
  float scale[kTileQueries];   // of q·K, in units of log 2, or of the cap
  int32_t zero[kTileQueries];  // 128 · Σ codes
  alignas(64) Code codes[kTileQueries][kMaxHeadDim];
  float max[kTileQueries], sum[kTileQueries];            // max -inf: no key yet
  alignas(64) float values[kTileQueries * kMaxHeadDim];  // [rows][padded_dim]
};

// Rows r .. r + n of a tile on their way through one chunk.
struct RowBlock {
  int r, n;
  float max[kRowBlock], sum[kRowBlock];  // max -inf: the row sees no key of the chunk
  float p_scale[kRowBlock];
  int32_t p_zero[kRowBlock];                                      // 128 · Σ p
  alignas(64) int32_t product[kRowBlock * kPlanes][kMaxHeadDim];  // q·K, then p·V
  alignas(64) float score[kRowBlock][kKvChunk];  // in units of log 2, then probabilities (· value scale)
  alignas(64) Code p[kRowBlock * kPlanes][kKvChunk];
  alignas(64) float out[kRowBlock][kMaxHeadDim];
};

template <class P>
static inline void int_scores(const KvCache& cache, const Chunk& chunk, const TileRows& rows, RowBlock& b,
                              P& prefetch) {
  const int steps = ceil_div(cache.head_dim, 4);
  tiles<kDotLines>(chunk.last - chunk.first, [&](auto lines, int line) {
    const int block = chunk.first + line;
    tiles<kDotRows>(b.n, [&](auto n, int i) {
      Dots<n.value, lines.value, kMaxHeadDim> dots;
      dots.clear();
      const size_t step_bytes = 4 * static_cast<size_t>(cache.block_size);
      const uint8_t* k[lines.value];
      for (int l = 0; l < lines.value; ++l) k[l] = chunk.k[block + l];
      for (int step = 0; step < steps; step += kPieceSteps) {
        dots.add(rows.codes[b.r + i] + 4 * step, k, step_bytes,
                 steps - step < kPieceSteps ? steps - step : kPieceSteps);
        for (int l = 0; l < lines.value; ++l) k[l] += kPieceSteps * step_bytes;
        prefetch.some();
      }
      dots.store(b.product[i] + block * kKeyBlock, kMaxHeadDim);
    });
  });
}

template <class P>
static inline void int_values(const KvCache& cache, const Chunk& chunk, RowBlock& b, P& prefetch) {
  const int padded = cache.padded_dim();
  tiles<kDotLines>(padded / 16, [&](auto lines, int line) {
    tiles<kDotRows>(b.n * kPlanes, [&](auto n, int i) {
      Dots<n.value, lines.value, kKvChunk> dots;
      dots.clear();
      for (int block = chunk.first; block < chunk.last; ++block) {
        const uint8_t* v[lines.value];
        for (int l = 0; l < lines.value; ++l) v[l] = chunk.v[block] + 64 * (line + l);
        dots.add(b.p[i] + block * kKeyBlock, v, 4 * static_cast<size_t>(padded), kPieceSteps);
        prefetch.some();
      }
      dots.store(b.product[i] + 16 * line, kMaxHeadDim);
    });
  });
  for (int i = 0; i < b.n; ++i) {
    const IntVec zero = IntVec{} + b.p_zero[i];
    const int32_t* product = b.product[i * kPlanes];
    for (int d = 0; d < padded; d += kLanes) {
      IntVec x = load_int(product + d) - zero;
      if (kPlanes == 2) x = (load_int(product + d) << 8) + load_int(product + kMaxHeadDim + d) - zero;
      store(b.out[i] + d, __builtin_convertvector(x, Vec) * splat(b.p_scale[i]));
    }
  }
}

// score[r][v · kLanes ..] = q[r] · K over R rows and V vectors of keys; keys[v] points at [dim][stride].
template <int R, int V, class T>
static inline void score_tile(const float* const* q, const T* const* keys, int dim, int stride, float* score) {
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
    for (int v = 0; v < V; ++v) store(score + r * kKvChunk + v * kLanes, acc[r][v]);
}

template <class T>
static inline void float_scores(const KvCache& cache, const Chunk& chunk, const TileRows& rows, RowBlock& b) {
  constexpr int kBlockVecs = kKeyBlock / kLanes;
  const T* keys[kKvChunk / kLanes];
  const int vecs = (chunk.last - chunk.first) * kBlockVecs;
  for (int v = 0; v < vecs; ++v)
    keys[v] = reinterpret_cast<const T*>(chunk.k[chunk.first + v / kBlockVecs]) + v % kBlockVecs * kLanes;
  tiles<kFloatVecs>(vecs, [&](auto width, int v) {
    tiles<kFloatRows>(b.n, [&](auto n, int i) {
      score_tile<n.value, width.value>(rows.q + b.r + i, keys + v, cache.head_dim, cache.block_size,
                                       b.score[i] + chunk.first * kKeyBlock + v * kLanes);
    });
  });
}

// out[r][d ..] = Σ_key p[r][key] · V[key][d], keys low..high ascending.
template <int R, int V, class T>
static inline void value_tile(const Chunk& chunk, RowBlock& b, int i, int d, int stride) {
  Vec acc[R][V] = {};
  for (int key = chunk.low; key < chunk.high;) {
    const int end =
        key / kKeyBlock * kKeyBlock + kKeyBlock < chunk.high ? key / kKeyBlock * kKeyBlock + kKeyBlock : chunk.high;
    const T* row =
        reinterpret_cast<const T*>(chunk.v[key / kKeyBlock]) + static_cast<size_t>(key % kKeyBlock) * stride + d;
    for (; key < end; ++key, row += stride) {
      Vec x[V];
      for (int v = 0; v < V; ++v) x[v] = widen(row + v * kLanes);
      for (int r = 0; r < R; ++r) {
        const Vec p = splat(b.score[i + r][key]);
        for (int v = 0; v < V; ++v) acc[r][v] = fma(p, x[v], acc[r][v]);
      }
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) store(b.out[i + r] + d + v * kLanes, acc[r][v]);
}

template <class T>
static inline void float_values(const KvCache& cache, const Chunk& chunk, RowBlock& b) {
  const int padded = cache.padded_dim();
  tiles<kFloatVecs>(padded / kLanes, [&](auto width, int v) {
    tiles<kFloatRows>(b.n,
                      [&](auto n, int i) { value_tile<n.value, width.value, T>(chunk, b, i, v * kLanes, padded); });
  });
}

// Turns scores into probabilities, times the value scale and quantized if Int8; sets max and sum. Each pass goes over
// all rows, so that one row's reduction waits beside another's arithmetic.
template <bool Int8, bool Capped, class P>
static inline void softmax(const AttentionView& a, const Chunk& chunk, const TileRows& rows, RowBlock& b, P& prefetch) {
  IntVec lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  int lows[kRowBlock], highs[kRowBlock];  // the keys that a row sees
  for (int i = 0; i < b.n; ++i) {
    const int position = rows.position[b.r + i];
    const int low = a.sliding_window ? position - a.sliding_window + 1 - chunk.base : 0,
              high = position + 1 - chunk.base;
    lows[i] = low < 0 ? 0 : low;
    highs[i] = high > kKvChunk ? kKvChunk : high;
  }
  // f(key, part, visible) for the vectors of row i in blocks that hold such keys, `part` the vector's place in its
  // block and `visible` null where a block holds no others.
  const auto each_key = [&](int i, const auto& f) {
    const int low = lows[i], high = highs[i];
    if (low >= high) return;
    const auto some = [&](int key) {
#pragma GCC unroll 4
      for (int part = 0; part < kParts; ++part, key += kLanes) {
        const IntVec at = lane + key;
        const IntVec visible = (at >= low) & (at < high);
        f(key, part, &visible);
      }
    };
    int key = low / kKeyBlock * kKeyBlock;
    if (key < low) some(key), key += kKeyBlock;
    while (key + kKeyBlock <= high) {
#pragma GCC unroll 4
      for (int part = 0; part < kParts; ++part, key += kLanes) f(key, part, nullptr);
    }
    if (key < high) some(key);
  };

  const Vec cap = splat(a.softcap * kLog2e);
  Vec top[kRowBlock];
  for (int i = 0; i < b.n; ++i) {
    const Vec scale = splat(rows.scale[b.r + i]), slope = splat(rows.slope[b.r + i]);
    const IntVec zero = IntVec{} + rows.zero[b.r + i];
    Vec max = splat(-kInfinity);
    each_key(i, [&](int key, int, const IntVec* visible) {
      Vec x;
      if (Int8) x = __builtin_convertvector(load_int(b.product[i] + key) - zero, Vec) * load(chunk.k_scale + key);
      else x = load(b.score[i] + key);
      x = x * scale;
      if (Capped) x = tanh(x) * cap;
      if (a.alibi_slopes) x = fma(slope, __builtin_convertvector(lane + (chunk.base + key), Vec), x);
      if (visible) x = *visible ? x : splat(-kInfinity);
      store(b.score[i] + key, x);
      max = vmax(max, x);
    });
    top[i] = max;
    prefetch.some();
  }
  for (int i = 0; i < b.n; ++i) b.max[i] = FPTQ_NS::max(top[i]);

  static_assert(kKeyBlock == kSumLanes);
  Sums total[kRowBlock];
  for (int i = 0; i < b.n; ++i) {
    const Vec max = splat(b.max[i]);
    Sums sum = {};
    Vec p_top = {};
    each_key(i, [&](int key, int part, const IntVec* visible) {
      Vec p = exp2(vmax(splat(-125.0f), load(b.score[i] + key) - max));
      if (visible) p = *visible ? p : Vec{};
      sum.part[part] = sum.part[part] + p;
      if (Int8) {
        p = p * load(chunk.v_scale + key);
        if (visible) p = *visible ? p : Vec{};  // a stale scale may be anything
        p_top = vmax(p_top, p);
      }
      store(b.score[i] + key, p);
    });
    total[i] = sum;
    top[i] = p_top;
    prefetch.some();
  }
  for (int i = 0; i < b.n; ++i) b.sum[i] = FPTQ_NS::sum(total[i]);

  if (!Int8) {
    for (int i = 0; i < b.n; ++i)
      for (int key = chunk.first * kKeyBlock; key < chunk.last * kKeyBlock; key += kLanes)
        if (key + kLanes <= lows[i] || key >= highs[i]) store(b.score[i] + key, Vec{});
    return;
  }
  for (int i = 0; i < b.n; ++i) b.p_scale[i] = FPTQ_NS::max(top[i]) / kMaxP;
  for (int i = 0; i < b.n; ++i) {
    Code* p = b.p[i * kPlanes];
    for (int plane = 0; plane < kPlanes; ++plane)
      __builtin_memset(p + plane * kKvChunk + chunk.first * kKeyBlock, 0,
                       (chunk.last - chunk.first) * kKeyBlock * sizeof(Code));
    const Vec inverse = splat(1.0f / b.p_scale[i]);
    IntVec sum = {};
    each_key(i, [&](int key, int, const IntVec*) {
      const IntVec x = bits(fma(load(b.score[i] + key), inverse, splat(kRound))) - bits(splat(kRound));
      sum = sum + x;
      if (kPlanes == 2) {
        store_bytes(p + key, (x + 128) >> 8);
        store_bytes(p + kKvChunk + key, x);
      } else {
        store_words(p + key, x);
      }
    });
    b.p_zero[i] = FPTQ_NS::sum(sum) * 128;
    prefetch.some();
  }
}

// Softmax of two key sets from their (max, sum, values): both scaled to the common max and added.
static inline void merge(float& max, float& sum, float* values, float chunk_max, float chunk_sum, const float* chunk,
                         int padded_dim) {
  if (chunk_max == -kInfinity) return;
  const float top = max > chunk_max ? max : chunk_max;
  const auto weight = [top](float of) { return exp2(of - top > -125.0f ? of - top : -125.0f); };
  const float old_scale = max == -kInfinity ? 0.0f : weight(max), new_scale = weight(chunk_max);
  max = top;
  sum = sum * old_scale + chunk_sum * new_scale;
  const Vec x = splat(old_scale), y = splat(new_scale);
  for (int d = 0; d < padded_dim; d += kLanes) store(values + d, fma(load(chunk + d), y, load(values + d) * x));
}

static Chunk find_chunk(const AttentionView& a, const KvCache& cache, const AttentionTile& tile, int index) {
  Chunk c;
  c.base = index * kKvChunk;
  c.low = a.sliding_window ? tile.position - a.sliding_window + 1 - c.base : 0;
  c.high = tile.position + tile.tokens - c.base;
  if (c.low < 0) c.low = 0;
  if (c.high > kKvChunk) c.high = kKvChunk;
  c.first = c.low / kKeyBlock;
  c.last = ceil_div(c.high, kKeyBlock);
  const bool int8 = cache.type == KvType::kInt8;
  for (int b = c.first; b < c.last; ++b) {
    const int key = c.base + b * kKeyBlock, within = key % cache.block_size;
    const int block = tile.block_table[key / cache.block_size];
    c.k[b] = reinterpret_cast<const uint8_t*>(cache.k(block, tile.kv_head)) + within * cache.element() * (int8 ? 4 : 1);
    c.v[b] =
        reinterpret_cast<const uint8_t*>(cache.v(block, tile.kv_head)) + within * cache.element() * cache.padded_dim();
    if (int8) {
      const float* k_scale = cache.k_scale(block, tile.kv_head) + within;
      const float* v_scale = cache.v_scale(block, tile.kv_head) + within;
      for (int i = 0; i < kKeyBlock; i += kLanes) {
        store(c.k_scale + b * kKeyBlock + i, load(k_scale + i));
        store(c.v_scale + b * kKeyBlock + i, load(v_scale + i));
      }
    }
  }
  return c;
}

static inline size_t row_offset(const AttentionView& a, const AttentionTile& tile, int r) {
  const int token = r / tile.heads, head = tile.first_head + r % tile.heads;
  return (static_cast<size_t>(token) * a.num_heads + head) * a.head_dim;
}

// What a row's softmax starts from, before any key: nothing, or its head's sink, which has no value.
static inline void start_row(const AttentionView& a, const AttentionTile& tile, int r, float& max, float& sum) {
  max = a.sinks ? a.sinks[tile.first_head + r % tile.heads] * kLog2e : -kInfinity;
  sum = a.sinks ? 1.0f : 0.0f;
}

static inline void write_row(const float* values, float sum, int dim, float* out) {
  each_vector(dim, [&](int d, int lanes) { store_lanes(out + d, load(values + d) / splat(sum), lanes); });
}

// A row block through a chunk.
template <class P>
static inline void attend(const AttentionView& a, const KvCache& cache, const Chunk& chunk, const TileRows& rows,
                          RowBlock& b, P& prefetch) {
  if (cache.type == KvType::kInt8) {
    int_scores(cache, chunk, rows, b, prefetch);
    a.softcap ? softmax<true, true>(a, chunk, rows, b, prefetch) : softmax<true, false>(a, chunk, rows, b, prefetch);
    int_values(cache, chunk, b, prefetch);
  } else {
    const bool bf16 = cache.type == KvType::kBfloat16;
    bf16 ? float_scores<uint16_t>(cache, chunk, rows, b) : float_scores<float>(cache, chunk, rows, b);
    a.softcap ? softmax<false, true>(a, chunk, rows, b, prefetch) : softmax<false, false>(a, chunk, rows, b, prefetch);
    bf16 ? float_values<uint16_t>(cache, chunk, b) : float_values<float>(cache, chunk, b);
  }
}

// `next` is the tile that this thread will probably take next, or null.
static void attention_tile(const AttentionView& a, const KvCache& cache, const AttentionTile& tile,
                           const AttentionTile* next) {
  const int count = tile.tokens * tile.heads, padded = cache.padded_dim(), size = partial_size(padded);
  const bool int8 = cache.type == KvType::kInt8;
  TileRows rows;
  for (int r = 0; r < count; ++r) {
    rows.q[r] = tile.q + row_offset(a, tile, r);
    rows.position[r] = tile.position + r / tile.heads;
    rows.slope[r] = a.alibi_slopes ? a.alibi_slopes[tile.first_head + r % tile.heads] * kLog2e : 0.0f;
    rows.scale[r] = a.softcap ? a.softmax_scale / a.softcap : a.softmax_scale * kLog2e;
    start_row(a, tile, r, rows.max[r], rows.sum[r]);
    if (int8) {
      int8_t codes[kMaxHeadDim + kLanes];
      rows.scale[r] *= quantize_head(rows.q[r], a.head_dim, codes);
      int32_t sum = 0;
      for (int d = 0; d < round_up(a.head_dim, 4); ++d) {
        rows.codes[r][d] = codes[d];
        sum += codes[d];
      }
      rows.zero[r] = 128 * sum;
    }
  }
  __builtin_memset(rows.values, 0, static_cast<size_t>(count) * padded * sizeof(float));

  RowBlock b;
  Prefetch prefetch;
  NoPrefetch none;
  const bool many = count > kPrefetchRows;
  for (int c = 0; c < tile.chunks; ++c) {
    const Chunk chunk = find_chunk(a, cache, tile, tile.first_chunk + c);
    const int blocks = ceil_div(count, int8 ? kIntRowBlock : kRowBlock);
    if (c + 1 < tile.chunks) prefetch.start(cache, &tile, (tile.first_chunk + c + 1) * kKvChunk);
    else prefetch.start(cache, next, next ? next->first_chunk * kKvChunk : 0);
    for (int block = 0; block < blocks; ++block) {
      b.r = count * block / blocks;
      b.n = count * (block + 1) / blocks - b.r;
      many ? attend(a, cache, chunk, rows, b, none) : attend(a, cache, chunk, rows, b, prefetch);
      for (int i = 0; i < b.n; ++i) {
        const int r = b.r + i;
        if (tile.partials) {
          float* partial = tile.partials + (static_cast<size_t>(c) * count + r) * size;
          partial[0] = b.max[i];
          partial[1] = b.sum[i];
          __builtin_memcpy(partial + 2, b.out[i], padded * sizeof(float));
        } else {
          merge(rows.max[r], rows.sum[r], rows.values + r * padded, b.max[i], b.sum[i], b.out[i], padded);
        }
      }
    }
  }
  if (tile.partials) return;
  for (int r = 0; r < count; ++r)
    write_row(rows.values + r * padded, rows.sum[r], a.head_dim, tile.out + row_offset(a, tile, r));
}

// Second pass of a tile whose chunks were attended apart: tile.partials holds all of tile.chunks.
static void merge_partials(const AttentionView& a, const AttentionTile& tile) {
  const int rows = tile.tokens * tile.heads, padded = round_up(a.head_dim, 16), size = partial_size(padded);
  for (int r = 0; r < rows; ++r) {
    float row_max, row_sum;
    start_row(a, tile, r, row_max, row_sum);
    alignas(64) float values[kMaxHeadDim] = {};
    for (int c = 0; c < tile.chunks; ++c) {
      const float* partial = tile.partials + (static_cast<size_t>(c) * rows + r) * size;
      merge(row_max, row_sum, values, partial[0], partial[1], partial + 2, padded);
    }
    write_row(values, row_sum, a.head_dim, tile.out + row_offset(a, tile, r));
  }
}

}  // namespace FPTQ_NS
}  // namespace fptq

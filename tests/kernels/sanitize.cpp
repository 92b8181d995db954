// Drives packing, every ISA's GEMMs, row quantizer, activations and attention, and the thread pool, over odd shapes and
// from exactly sized buffers, for the sanitizers to watch; every path must also give the plain C++ path's bits. CMake
// builds it as the target `sanitize`, with -fsanitize=$FPTQ_SANITIZE; test_sanitizers.py runs it.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "core/dispatch.h"
#include "core/pack.h"
#include "core/thread_pool.h"

#if defined(FPTQ_HAS_EVEX256)
namespace fptq::evex256 {
extern const Kernels kernels;
}  // namespace fptq::evex256
#endif

using namespace fptq;

namespace {

std::vector<const Kernels*> all_kernels() {
  std::vector<const Kernels*> list;
  for (const std::string& isa : available_isas()) list.push_back(&kernels_for(isa));
#if defined(FPTQ_HAS_EVEX256)
  if (available_isas().front() == "avx512vnni") list.push_back(&evex256::kernels);
#endif
  return list;
}

void check(bool same, const char* what, const Kernels& kernels, int m, int n, int k) {
  if (same) return;
  std::fprintf(stderr, "%s: %s differs from plain C++ at M=%d N=%d K=%d\n", kernels.isa, what, m, n, k);
  std::exit(1);
}

template <class T>
bool equal(const std::vector<T>& a, const std::vector<T>& b) {
  return std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

struct Rows {
  std::vector<int8_t> codes;
  std::vector<float> scales;
  std::vector<int32_t> sums;

  Rows(const Kernels& kernels, const std::vector<float>& x, int m, int k)
      : codes(kernels.layout->codes_size(m, k)), scales(m), sums(kernels.layout->sums_size(m, k)) {
    Activations view = activations(k);
    for (int row = 0; row < m; ++row) kernels.quantize_row(x.data() + row * k, row, 0, view);
  }
  Activations activations(int k) {
    return {codes.data(), scales.data(), sums.data(), static_cast<int>(scales.size()), k};
  }
};

void check_gemms(std::mt19937& random, int m, int n, int k, int group_size) {
  std::normal_distribution<float> normal;
  const auto floats = [&](size_t count) {
    std::vector<float> values(count);
    for (float& value : values) value = normal(random);
    return values;
  };
  const std::vector<float> x = floats(m * k), bias = floats(n), residual = floats(m * n);
  const Kernels& plain = kernels_for("generic");
  const Layout& layout = *plain.layout;  // that all of these share
  const int panels = ceil_div(n, layout.panel_cols);
  Rows expected_rows(plain, x, m, k);

  for (int bits : {4, 8}) {
    std::vector<int8_t> codes(static_cast<size_t>(n) * k);
    for (int8_t& code : codes) code = static_cast<int8_t>(static_cast<int>(random() % (1 << bits)) - (1 << (bits - 1)));
    std::vector<float> scale = floats(static_cast<size_t>(n) * ((k + group_size - 1) / group_size));
    if (random() % 2)
      for (float& value : scale) value = 0.25f;  // kept as bf16
    const auto weight = pack_weight(codes.data(), scale.data(), n, k, group_size, bits, layout);
    std::vector<float> expected(m * n), out(m * n);
    const auto gemm = [&](const Kernels& kernels, Rows& rows, std::vector<float>& to) {
      const Epilogue epilogue{bias.data(), residual.data(), to.data(), n};
      (bits == 4 ? kernels.gemm_int4 : kernels.gemm_int8)(rows.activations(k), *weight, epilogue, 0, m, 0, panels);
    };
    gemm(plain, expected_rows, expected);
    for (const Kernels* kernels : all_kernels()) {
      Rows rows(*kernels, x, m, k);
      check(equal(rows.codes, expected_rows.codes) && equal(rows.scales, expected_rows.scales) &&
                equal(rows.sums, expected_rows.sums),
            "quantize_row", *kernels, m, n, k);
      gemm(*kernels, rows, out);
      check(equal(out, expected), bits == 4 ? "int4" : "int8", *kernels, m, n, k);
    }
    const auto weight_only = [&](const Kernels& kernels, std::vector<float>& to) {
      kernels.gemm_weight_only(x.data(), *weight, {bias.data(), residual.data(), to.data(), n}, 0, m, 0, panels);
    };
    weight_only(plain, expected);
    for (const Kernels* kernels : all_kernels()) {
      weight_only(*kernels, out);
      check(equal(out, expected), bits == 4 ? "int4 of floats" : "int8 of floats", *kernels, m, n, k);
    }
  }

  const std::vector<float> values = floats(static_cast<size_t>(n) * k);
  std::vector<uint16_t> halves(values.size());
  for (size_t i = 0; i < values.size(); ++i) {
    uint32_t word;
    std::memcpy(&word, &values[i], sizeof word);
    halves[i] = static_cast<uint16_t>(word >> 16 & 0xbfff);  // a finite float16 too
  }
  for (FloatType type : {FloatType::kFloat32, FloatType::kBfloat16, FloatType::kFloat16}) {
    const void* data = type == FloatType::kFloat32 ? static_cast<const void*>(values.data()) : halves.data();
    const auto weight = pack_float(data, type, n, k, layout, nullptr);
    std::vector<float> expected(m * n), out(m * n);
    plain.gemm_float(x.data(), *weight, {bias.data(), nullptr, expected.data(), n}, 0, m, 0, panels);
    for (const Kernels* kernels : all_kernels()) {
      kernels->gemm_float(x.data(), *weight, {bias.data(), nullptr, out.data(), n}, 0, m, 0, panels);
      check(equal(out, expected), float_bytes(type) == 2 ? "half" : "float32", *kernels, m, n, k);
    }
  }
}

// Every curve, into a buffer of its own size and over its input: the same bits, plain C++'s.
void check_activations(std::mt19937& random, int n) {
  std::normal_distribution<float> normal(0, 3);
  std::vector<float> x(n), up(n);
  for (float& value : x) value = normal(random);
  for (float& value : up) value = normal(random);
  for (Curve curve :
       {Curve::kSilu, Curve::kGeluTanh, Curve::kGelu, Curve::kRelu, Curve::kRelu2, Curve::kClampedSwiglu}) {
    for (bool gated : {false, true}) {
      if (curve == Curve::kClampedSwiglu && !gated) continue;
      const Activation activation{curve, gated, 2.0f};
      std::vector<float> expected(n);
      kernels_for("generic").activate_row(activation, x.data(), up.data(), n, expected.data());
      for (const Kernels* kernels : all_kernels()) {
        std::vector<float> out(n), in_place = x;
        kernels->activate_row(activation, x.data(), up.data(), n, out.data());
        kernels->activate_row(activation, in_place.data(), up.data(), n, in_place.data());
        check(equal(out, in_place), "activation in place", *kernels, 1, n, 0);
        check(equal(out, expected), "activation", *kernels, 1, n, 0);
      }
    }
  }
  for (const Kernels* kernels : all_kernels()) {
    std::vector<float> out = x;
    kernels->add_row(out.data(), up.data(), n, out.data());
    kernels->scale_row(out.data(), 0.5f, n, out.data());
    kernels->softcap_row(out.data(), 2.0f, n, out.data());
    for (int i = 0; i < n; ++i)
      check(std::abs(out[i] - 2 * std::tanh((x[i] + up[i]) / 4)) <= 1e-6f, "softcap", *kernels, 1, n, 0);
  }
}

// One sequence of `tokens`, all at once, then its last token again with the chunks apart: the same bits.
void check_attention(std::mt19937& random, KvType type, int group, int dim, int tokens, int block_size, int window) {
  const int kv_heads = 2, heads = kv_heads * group, width = (heads + 2 * kv_heads) * dim;
  std::normal_distribution<float> normal;
  std::vector<float> qkv(static_cast<size_t>(tokens) * width), expected;
  for (float& value : qkv) value = normal(random);
  const int rope_dim = group % 2 ? dim : dim / 4 * 2;
  const std::vector<float> slopes(heads, 0.01f), table(static_cast<size_t>(tokens) * (rope_dim / 2), 0.7f);
  const std::vector<float> sinks(heads, 0.3f), gains(static_cast<size_t>(kv_heads) * dim, 1.1f);
  const HeadNormView own{{gains.data(), gains.data(), 1e-5f, dim, true}, dim};
  const AttentionView a{heads,
                        kv_heads,
                        dim,
                        0.2f,
                        window,
                        rope_dim,
                        table.data(),
                        table.data(),
                        slopes.data(),
                        window ? sinks.data() : nullptr,
                        group % 2 ? 0 : 5.0f,
                        {},
                        own,
                        tokens % 2 == 0};
  const int blocks = ceil_div(tokens, block_size);
  std::vector<int32_t> block_table(blocks);
  for (int i = 0; i < blocks; ++i) block_table[i] = blocks - 1 - i;
  KvCache cache{type, block_size, kv_heads, dim, 0, nullptr};
  cache.block_bytes = kv_heads * cache.head_bytes();
  const int some = std::min(group, kTileQueries), rows = kTileQueries / some;

  std::vector<const Kernels*> list = all_kernels();
  std::swap(list.front(), *std::find(list.begin(), list.end(), &kernels_for("generic")));
  for (const Kernels* kernels : list) {
    std::vector<char> data(blocks * cache.block_bytes);
    cache.data = data.data();
    std::vector<float> q(static_cast<size_t>(tokens) * heads * dim), out(q.size()), apart(q.size());
    std::vector<float> keys(static_cast<size_t>(kv_heads) * dim);
    for (int t = 0; t < tokens; ++t)
      kernels->rope_and_cache_row(a, cache, t, block_table[t / block_size] * block_size + t % block_size,
                                  qkv.data() + static_cast<size_t>(t) * width,
                                  q.data() + static_cast<size_t>(t) * heads * dim, keys.data());
    for (int h = 0; h < kv_heads; ++h) {
      for (int head = 0; head < group; head += some) {
        const auto tile = [&](int row, int count, float* to) {
          const int first = window ? std::max(0, row - window + 1) / kKvChunk : 0;
          const size_t before = static_cast<size_t>(row) * heads * dim;
          return AttentionTile{q.data() + before,
                               to + before,
                               block_table.data(),
                               row,
                               count,
                               h,
                               h * group + head,
                               std::min(some, group - head),
                               first,
                               (row + count - 1) / kKvChunk - first + 1,
                               nullptr};
        };
        for (int row = 0; row < tokens; row += rows) {
          const AttentionTile whole = tile(row, std::min(rows, tokens - row), out.data());
          kernels->attention_tile(a, cache, whole, &whole);
        }
        AttentionTile last = tile(tokens - 1, 1, apart.data());
        const size_t chunk_floats = static_cast<size_t>(last.heads) * partial_size(cache.padded_dim());
        std::vector<float> partials(last.chunks * chunk_floats);
        last.partials = partials.data();
        for (int chunk = 0; chunk < last.chunks; ++chunk) {
          AttentionTile part = last;
          part.first_chunk += chunk;
          part.chunks = 1;
          part.partials += chunk * chunk_floats;
          kernels->attention_tile(a, cache, part, nullptr);
        }
        kernels->merge_partials(a, last);
      }
    }
    const size_t end = static_cast<size_t>(heads) * dim;
    check(std::memcmp(apart.data() + apart.size() - end, out.data() + out.size() - end, end * sizeof(float)) == 0,
          "split attention", *kernels, tokens, heads, dim);
    if (expected.empty()) expected = out;
    check(equal(out, expected), "attention", *kernels, tokens, heads, dim);
  }
}

// Two callers share a pool, job after job of a few tasks; pools come and go.
void check_pool() {
  for (int threads : {1, 2, 3, 5}) {
    ThreadPool pool(threads);
    const auto caller = [&](unsigned seed) {
      std::mt19937 random(seed);
      for (int job = 0; job < 2000; ++job) {
        const int tasks = static_cast<int>(random() % 12);
        std::vector<int> done(tasks);  // not atomic: each task is one thread's, and run() publishes it
        {
          std::lock_guard<std::mutex> lock(pool.mutex());
          pool.run(tasks, [&](int task, int thread) { done[task] += 1 + 0 * thread; });
        }
        for (int count : done) {
          if (count == 1) continue;
          std::fprintf(stderr, "a task of %d ran %d times\n", tasks, count);
          std::exit(1);
        }
        if (job % 500 == 0) std::this_thread::sleep_for(std::chrono::microseconds(200));  // workers fall asleep
      }
    };
    std::thread other(caller, 1);
    caller(2);
    other.join();
  }
  for (int i = 0; i < 20; ++i) ThreadPool(3).run(i, [](int, int) {});
}

}  // namespace

int main() {
  std::mt19937 random(0);
  for (int m : {1, 2, 3, 5, 6, 7, 13, 49})
    for (int n : {1, 17, 64, 131})
      for (int k : {1, 31, 32, 96, 260})
        for (int group_size : {32, 64, k}) check_gemms(random, m, n, k, group_size);
  for (int n : {1, 3, 8, 17, 64, 131}) check_activations(random, n);
  for (KvType type : {KvType::kFloat32, KvType::kBfloat16, KvType::kInt8})
    for (int group : {1, 4, 7, 50})
      for (int dim : {8, 20, 64, 256})
        for (int tokens : {1, 17, 300})
          check_attention(random, type, group, dim, tokens, tokens % 2 ? 16 : 128, tokens % 3 ? 0 : 100);
  check_pool();
  std::puts("clean");
}

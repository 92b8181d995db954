#include "pack.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>

namespace fptq {
namespace {

// Longest K whose dot product of int8 by int8, or 16 times int4 by int8, fits in 32 bits.
constexpr int kMaxK = (1 << 17) - kSumGroup;
constexpr size_t kHugePage = size_t{2} << 20;

size_t round_up(size_t value, size_t unit) { return (value + unit - 1) / unit * unit; }

void check_shape(int n, int k) {
  if (n <= 0 || k <= 0 || k > kMaxK)
    throw std::invalid_argument("a weight of " + std::to_string(n) + " x " + std::to_string(k) +
                                " cannot be packed: N must be positive and K within 1.." + std::to_string(kMaxK));
}

template <class F>
void each_panel(int n, ThreadPool* pool, const F& f) {
  const int panels = (n + kPanelCols - 1) / kPanelCols;
  if (!pool) {
    for (int p = 0; p < panels; ++p) f(p);
    return;
  }
  std::lock_guard<std::mutex> lock(pool->mutex());
  pool->run(panels, [&f](int p, int) { f(p); });
}

using Packed = std::shared_ptr<PackedWeight>;

uint32_t float_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// Of scale [N][groups], those of high-nibble columns divided by 16.
float panel_scale(const PackedWeight& packed, const float* scale, size_t groups, size_t row, size_t group) {
  const float value = scale[row * groups + group];
  return packed.bits == 4 && row / 16 % 2 ? value / 16 : value;
}

Packed allocate(const float* scale, int n, int k, int group_size, int bits) {
  check_shape(n, k);
  if (bits != 4 && bits != 8) throw std::invalid_argument("weights have 4 or 8 bits, not " + std::to_string(bits));
  if (group_size <= 0 || (group_size % kSumGroup && group_size != k))
    throw std::invalid_argument("group size " + std::to_string(group_size) + " is neither a multiple of 32 nor K");
  const size_t panels = (n + kPanelCols - 1) / kPanelCols, groups = (k + group_size - 1) / group_size;
  Packed packed(new PackedWeight{}, [](PackedWeight* w) {
    std::free(w->data);
    std::free(w->scales);
    delete w;
  });
  packed->n = n;
  packed->k = k;
  packed->group_size = static_cast<int>(round_up(group_size, kSumGroup));
  packed->bits = bits;
  packed->data = static_cast<uint8_t*>(allocate_lines(panels * round_up(k, kSumGroup) * kPanelCols * bits / 8));
  uint32_t low = 0;
  for (size_t row = 0; row < static_cast<size_t>(n); ++row)
    for (size_t g = 0; g < groups; ++g) low |= float_bits(panel_scale(*packed, scale, groups, row, g)) & 0xffff;
  packed->bf16_scales = low == 0;
  packed->scales = allocate_lines(panels * groups * kPanelCols * (packed->bf16_scales ? 2 : 4));
  return packed;
}

constexpr size_t kBlock = 128;   // k of one pass over a panel's rows: a cache line of each where codes have 4 bits
using BlockWords = uint32_t[kBlock / 4];

// load(row, k0, width, words) gives codes k0..k0+width of a row, each plus 2^(bits-1), four to a word.
template <class Load>
void pack_panel(PackedWeight& packed, const float* scale, size_t p, const Load& load) {
  const size_t n = packed.n, k = packed.k, kp = round_up(k, kSumGroup);
  const size_t row_bytes = kPanelCols * packed.bits / 2;   // of four k
  const size_t rows = std::min<size_t>(kPanelCols, n - p * kPanelCols);
  uint8_t* line = packed.data + p * (kp / 4) * row_bytes;
  for (size_t k0 = 0; k0 < kp; k0 += kBlock) {
    uint32_t words[kBlock / 4][kPanelCols] = {};   // four codes of each column
    for (size_t j = 0; j < rows; ++j) {
      BlockWords row = {};
      load(p * kPanelCols + j, k0, std::min(kBlock, k - k0), row);
      for (size_t s = 0; s < kBlock / 4; ++s) words[s][j] = row[s];
    }
    for (size_t s = 0; s < std::min(kBlock, kp - k0) / 4; ++s, line += row_bytes) {
      const uint32_t* word = words[s];
      if (packed.bits == 8) {
        std::memcpy(line, word, row_bytes);
        continue;
      }
      for (size_t l = 0; l < 2; ++l, word += 32) {
        uint32_t both[16];
        for (size_t j = 0; j < 16; ++j) both[j] = word[j] | word[16 + j] << 4;
        std::memcpy(line + 64 * l, both, sizeof both);
      }
    }
  }
  const size_t groups = (k + packed.group_size - 1) / packed.group_size;
  for (size_t g = 0; g < groups; ++g) {
    for (size_t j = 0; j < kPanelCols; ++j) {
      const size_t row = p * kPanelCols + j;
      const size_t i = (p * groups + g) * kPanelCols + j;
      const float value = row < n ? panel_scale(packed, scale, groups, row, g) : 0.0f;
      if (packed.bf16_scales) static_cast<uint16_t*>(packed.scales)[i] = static_cast<uint16_t>(float_bits(value) >> 16);
      else static_cast<float*>(packed.scales)[i] = value;
    }
  }
}

// Four nibbles into the bytes of a word, the lowest first.
inline uint32_t spread(uint32_t nibbles) {
  nibbles = (nibbles | nibbles << 8) & 0x00ff00ffu;
  return (nibbles | nibbles << 4) & 0x0f0f0f0fu;
}

// One panel [K][64] of rows [N][K].
template <class T>
void pack_float_panel(const T* weight, T* data, size_t n, size_t k, size_t p) {
  constexpr size_t kBlockK = 64 / sizeof(T);   // a cache line of each row
  const size_t rows = std::min<size_t>(kPanelCols, n - p * kPanelCols);
  const T* source = weight + p * kPanelCols * k;
  T* panel = data + p * kPanelCols * k;
  for (size_t k0 = 0; k0 < k; k0 += kBlockK) {
    T block[kBlockK][kPanelCols] = {};
    const size_t width = std::min(kBlockK, k - k0);
    for (size_t j = 0; j < rows; ++j)
      for (size_t i = 0; i < width; ++i) block[i][j] = source[j * k + k0 + i];
    std::memcpy(panel + k0 * kPanelCols, block, width * sizeof block[0]);
  }
}

}  // namespace

void use_huge_pages(void* memory, size_t bytes) {
#if defined(MADV_HUGEPAGE)
  const uintptr_t address = reinterpret_cast<uintptr_t>(memory);
  const uintptr_t begin = round_up(address, kHugePage), end = (address + bytes) / kHugePage * kHugePage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)memory, (void)bytes;
#endif
}

void* allocate_lines(size_t bytes) {
  void* memory = nullptr;
  if (posix_memalign(&memory, bytes < kHugePage ? 64 : kHugePage, bytes)) throw std::bad_alloc();
  use_huge_pages(memory, bytes);
  return memory;
}

std::shared_ptr<const PackedWeight> pack_weight(const int8_t* codes, const float* scale, int n, int k, int group_size,
                                                int bits) {
  const Packed packed = allocate(scale, n, k, group_size, bits);
  const uint32_t offset = bits == 4 ? 0x08080808u : 0x80808080u;
  uint32_t outside = 0;
  const auto load = [&](size_t row, size_t k0, size_t width, BlockWords& words) {
    std::memcpy(words, codes + row * k + k0, width);
    for (uint32_t& word : words) {
      outside |= word ^ word << 1;   // within ±8 the upper five bits of a byte are equal
      word ^= offset;
      if (bits == 4) word &= 0x0f0f0f0fu;
    }
  };
  each_panel(n, nullptr, [&](size_t p) { pack_panel(*packed, scale, p, load); });
  if (bits == 4 && outside & 0xf0f0f0f0u) throw std::invalid_argument("4-bit codes must lie within -8..7");
  return packed;
}

std::shared_ptr<const PackedWeight> pack_weight(const void* words, const float* scale, int n, int k, int group_size,
                                                int bits, ThreadPool* pool) {
  const Packed packed = allocate(scale, n, k, group_size, bits);
  const size_t row_bytes = (static_cast<size_t>(k) * bits + 31) / 32 * 4;
  const char* rows = static_cast<const char*>(words);
  const auto load4 = [=](size_t row, size_t k0, size_t width, BlockWords& out) {
    uint16_t nibbles[kBlock / 4] = {};
    std::memcpy(nibbles, rows + row * row_bytes + k0 / 2, (width + 1) / 2);
    for (size_t s = 0; s < kBlock / 4; ++s) out[s] = spread(nibbles[s]);
  };
  const auto load8 = [=](size_t row, size_t k0, size_t width, BlockWords& out) {
    std::memcpy(out, rows + row * row_bytes + k0, width);
  };
  each_panel(n, pool, [&](size_t p) {
    bits == 4 ? pack_panel(*packed, scale, p, load4) : pack_panel(*packed, scale, p, load8);
  });
  return packed;
}

std::shared_ptr<const FloatWeight> pack_float(const void* weight, FloatType type, int n, int k, ThreadPool* pool) {
  check_shape(n, k);
  const size_t panels = (n + kPanelCols - 1) / kPanelCols;
  std::shared_ptr<FloatWeight> packed(new FloatWeight{}, [](FloatWeight* w) {
    std::free(w->data);
    delete w;
  });
  packed->type = type;
  packed->n = n;
  packed->k = k;
  packed->data = allocate_lines(panels * k * kPanelCols * float_bytes(type));
  each_panel(n, pool, [&](size_t p) {
    float_bytes(type) == 2
        ? pack_float_panel(static_cast<const uint16_t*>(weight), static_cast<uint16_t*>(packed->data), n, k, p)
        : pack_float_panel(static_cast<const uint32_t*>(weight), static_cast<uint32_t*>(packed->data), n, k, p);
  });
  return packed;
}

}  // namespace fptq

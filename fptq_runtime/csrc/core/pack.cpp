#include "core/pack.h"

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

constexpr size_t kHugePage = size_t{2} << 20;
constexpr int kMaxN = 1 << 26;  // sizes in panels fit in 32 bits

size_t round_up(size_t value, size_t unit) { return (value + unit - 1) / unit * unit; }

// The longest K: its dot product of int8 by int8, or 16 times int4 by int8, fits in 32 bits.
int max_k(const Layout& layout) { return (1 << 17) - layout.k_unit; }

void check_shape(int n, int k, const Layout& layout) {
  if (n <= 0 || n > kMaxN || k <= 0 || k > max_k(layout))
    throw std::invalid_argument("a weight of " + std::to_string(n) + " x " + std::to_string(k) +
                                " cannot be packed: N must be within 1.." + std::to_string(kMaxN) +
                                " and K within 1.." + std::to_string(max_k(layout)));
}

template <class F>
void each_panel(int n, const Layout& layout, ThreadPool* pool, const F& f) {
  const int panels = ceil_div(n, layout.panel_cols);
  if (!pool) {
    for (int p = 0; p < panels; ++p) f(p);
    return;
  }
  std::lock_guard<std::mutex> lock(pool->mutex());
  pool->run(panels, [&f](int p, int) { f(p); });
}

std::shared_ptr<PackedWeight> allocate(const float* scale, int n, int k, int group_size, int bits,
                                       const Layout& layout) {
  check_shape(n, k, layout);
  if (bits != 4 && bits != 8) throw std::invalid_argument("weights have 4 or 8 bits, not " + std::to_string(bits));
  if (group_size <= 0 || (group_size % layout.k_unit && group_size != k))
    throw std::invalid_argument("group size " + std::to_string(group_size) + " is neither a multiple of " +
                                std::to_string(layout.k_unit) + " nor K");
  const size_t groups = ceil_div(k, group_size), columns = round_up(n, layout.panel_cols);
  std::shared_ptr<PackedWeight> packed(new PackedWeight{}, [](PackedWeight* w) {
    std::free(w->data);
    std::free(w->scales);
    delete w;
  });
  packed->layout = &layout;
  packed->n = n;
  packed->k = k;
  packed->group_size = static_cast<int>(round_up(group_size, layout.k_unit));
  packed->bits = bits;
  packed->data = static_cast<uint8_t*>(allocate_lines(layout.weight_size(n, k, bits)));
  uint32_t low = 0;
  for (size_t row = 0; row < static_cast<size_t>(n); ++row) {
    for (size_t g = 0; g < groups; ++g) {
      const float stored = layout.stored_scale(row, bits, scale[row * groups + g]);
      uint32_t word;
      std::memcpy(&word, &stored, sizeof word);
      low |= word & 0xffff;
    }
  }
  packed->bf16_scales = low == 0;
  packed->scales = allocate_lines(columns * groups * (packed->bf16_scales ? 2 : 4));
  return packed;
}

using Words = uint32_t (&)[kCodeBlock / 4];

// int8 [N][K].
void load_codes(const CodeRows& rows, size_t row, size_t k0, size_t width, Words words) {
  std::memset(words, 0, sizeof words);
  std::memcpy(words, rows.data + row * rows.row_bytes + k0, width);
  const uint32_t offset = rows.bits == 4 ? 0x08080808u : 0x80808080u, kept = rows.bits == 4 ? 0x0f0f0f0fu : ~0u;
  for (uint32_t& word : words) word = (word ^ offset) & kept;
}

// Four nibbles into the bytes of a word, the lowest first.
inline uint32_t spread(uint32_t nibbles) {
  nibbles = (nibbles | nibbles << 8) & 0x00ff00ffu;
  return (nibbles | nibbles << 4) & 0x0f0f0f0fu;
}

void load_nibbles(const CodeRows& rows, size_t row, size_t k0, size_t width, Words words) {
  uint16_t nibbles[kCodeBlock / 4] = {};
  std::memcpy(nibbles, rows.data + row * rows.row_bytes + k0 / 2, (width + 1) / 2);
  for (size_t s = 0; s < kCodeBlock / 4; ++s) words[s] = spread(nibbles[s]);
}

void load_bytes(const CodeRows& rows, size_t row, size_t k0, size_t width, Words words) {
  std::memset(words, 0, sizeof words);
  std::memcpy(words, rows.data + row * rows.row_bytes + k0, width);
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
                                                int bits, const Layout& layout) {
  const auto packed = allocate(scale, n, k, group_size, bits, layout);
  const size_t size = static_cast<size_t>(n) * k;
  if (bits == 4 && std::any_of(codes, codes + size, [](int8_t code) { return code < -8 || code > 7; }))
    throw std::invalid_argument("4-bit codes must lie within -8..7");
  const CodeRows rows{load_codes, reinterpret_cast<const char*>(codes), static_cast<size_t>(k), bits};
  each_panel(n, layout, nullptr, [&](size_t p) { layout.pack_weight(rows, scale, p, *packed); });
  return packed;
}

std::shared_ptr<const PackedWeight> pack_weight(const void* words, const float* scale, int n, int k, int group_size,
                                                int bits, const Layout& layout, ThreadPool* pool) {
  const auto packed = allocate(scale, n, k, group_size, bits, layout);
  const CodeRows rows{bits == 4 ? load_nibbles : load_bytes, static_cast<const char*>(words),
                      (static_cast<size_t>(k) * bits + 31) / 32 * 4, bits};
  each_panel(n, layout, pool, [&](size_t p) { layout.pack_weight(rows, scale, p, *packed); });
  return packed;
}

std::shared_ptr<const FloatWeight> pack_float(const void* weight, FloatType type, int n, int k, const Layout& layout,
                                              ThreadPool* pool) {
  check_shape(n, k, layout);
  std::shared_ptr<FloatWeight> packed(new FloatWeight{}, [](FloatWeight* w) {
    std::free(w->data);
    delete w;
  });
  packed->layout = &layout;
  packed->type = type;
  packed->n = n;
  packed->k = k;
  packed->data = allocate_lines(layout.float_size(n, k) * float_bytes(type));
  each_panel(n, layout, pool, [&](size_t p) { layout.pack_float(weight, p, *packed); });
  return packed;
}

}  // namespace fptq

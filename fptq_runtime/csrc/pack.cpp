#include "pack.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>

namespace fptq {
namespace {

// Longest K whose dot product of int8 by int8, or 16 times int4 by int8, fits in 32 bits.
constexpr int kMaxK = (1 << 17) - kSumGroup;

size_t round_up(size_t value, size_t unit) { return (value + unit - 1) / unit * unit; }

void check_shape(int n, int k) {
  if (n <= 0 || k <= 0 || k > kMaxK)
    throw std::invalid_argument("a weight of " + std::to_string(n) + " x " + std::to_string(k) +
                                " cannot be packed: N must be positive and K within 1.." + std::to_string(kMaxK));
}

}  // namespace

void* allocate_lines(size_t bytes) {
  constexpr size_t kLine = 64, kHugePage = size_t{2} << 20;
  const size_t alignment = bytes < kHugePage ? kLine : kHugePage;
  void* memory = nullptr;
  if (posix_memalign(&memory, alignment, bytes)) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
  if (bytes >= kHugePage) madvise(memory, bytes / kHugePage * kHugePage, MADV_HUGEPAGE);
#endif
  return memory;
}

std::shared_ptr<const PackedWeight> pack_weight(const int8_t* codes, const float* scale, int n, int k, int group_size,
                                                int bits) {
  check_shape(n, k);
  if (bits != 4 && bits != 8) throw std::invalid_argument("weights have 4 or 8 bits, not " + std::to_string(bits));
  if (group_size <= 0 || (group_size % kSumGroup && group_size != k))
    throw std::invalid_argument("group size " + std::to_string(group_size) + " is neither a multiple of 32 nor K");

  const size_t panels = (n + kPanelCols - 1) / kPanelCols;
  const size_t kp = round_up(k, kSumGroup);
  const size_t row_bytes = kPanelCols * bits / 2;   // of four k
  const size_t groups = (k + group_size - 1) / group_size;
  const auto release = [](const PackedWeight* w) {
    std::free(w->data);
    std::free(w->scales);
    delete w;
  };
  std::unique_ptr<PackedWeight, decltype(release)> packed(new PackedWeight{}, release);
  packed->n = n;
  packed->k = k;
  packed->group_size = static_cast<int>(round_up(group_size, kSumGroup));
  packed->bits = bits;
  packed->data = static_cast<uint8_t*>(allocate_lines(panels * (kp / 4) * row_bytes));

  constexpr size_t kSteps = kSumGroup / 4;
  uint32_t outside = 0;
  for (size_t p = 0; p < panels; ++p) {
    const size_t rows = std::min<size_t>(kPanelCols, n - p * kPanelCols);
    for (size_t k0 = 0; k0 < kp; k0 += kSumGroup) {
      uint32_t words[kSteps][kPanelCols] = {};   // four codes of each column
      const size_t width = std::min<size_t>(kSumGroup, k - k0);
      for (size_t j = 0; j < rows; ++j) {
        uint32_t row[kSteps] = {};
        std::memcpy(row, codes + (p * kPanelCols + j) * k + k0, width);
        for (size_t s = 0; s < kSteps; ++s) words[s][j] = row[s];
      }
      uint8_t* line = packed->data + (p * (kp / 4) + k0 / 4) * row_bytes;
      for (size_t s = 0; s < kSteps; ++s, line += row_bytes) {
        uint32_t* word = words[s];
        if (bits == 8) {
          for (size_t j = 0; j < kPanelCols; ++j) word[j] ^= 0x80808080u;
          std::memcpy(line, word, row_bytes);
          continue;
        }
        for (size_t j = 0; j < kPanelCols; ++j) {
          outside |= word[j] ^ (word[j] << 1);   // within ±8 the upper five bits of a byte are equal
          word[j] = (word[j] ^ 0x08080808u) & 0x0f0f0f0fu;
        }
        for (size_t l = 0; l < 2; ++l, word += 32) {
          uint32_t both[16];
          for (size_t j = 0; j < 16; ++j) both[j] = word[j] | word[16 + j] << 4;
          std::memcpy(line + 64 * l, both, sizeof both);
        }
      }
    }
  }
  if (outside & 0xf0f0f0f0u) throw std::invalid_argument("4-bit codes must lie within -8..7");

  const auto panel_scale = [&](size_t p, size_t g, size_t j) {
    const size_t row = p * kPanelCols + j;
    const float value = row < static_cast<size_t>(n) ? scale[row * groups + g] : 0.0f;
    return bits == 4 && j / 16 % 2 ? value / 16 : value;
  };
  const auto each_scale = [&](auto f) {
    for (size_t p = 0, i = 0; p < panels; ++p)
      for (size_t g = 0; g < groups; ++g)
        for (size_t j = 0; j < kPanelCols; ++j, ++i) f(i, panel_scale(p, g, j));
  };
  const auto float_bits = [](float value) {
    uint32_t word;
    std::memcpy(&word, &value, sizeof word);
    return word;
  };
  uint32_t low = 0;
  each_scale([&](size_t, float value) { low |= float_bits(value) & 0xffff; });
  packed->bf16_scales = low == 0;
  packed->scales = allocate_lines(panels * groups * kPanelCols * (packed->bf16_scales ? 2 : 4));
  each_scale([&](size_t i, float value) {
    if (packed->bf16_scales) static_cast<uint16_t*>(packed->scales)[i] = static_cast<uint16_t>(float_bits(value) >> 16);
    else static_cast<float*>(packed->scales)[i] = value;
  });
  return std::shared_ptr<const PackedWeight>(packed.release(), release);
}

std::shared_ptr<const FloatWeight> pack_float(const void* weight, bool bf16, int n, int k) {
  check_shape(n, k);
  const size_t panels = (n + kPanelCols - 1) / kPanelCols;
  const size_t element = bf16 ? 2 : 4;
  const auto release = [](const FloatWeight* w) {
    std::free(w->data);
    delete w;
  };
  std::unique_ptr<FloatWeight, decltype(release)> packed(new FloatWeight{}, release);
  packed->bf16 = bf16;
  packed->n = n;
  packed->k = k;
  const size_t size = panels * k * kPanelCols * element;
  char* data = static_cast<char*>(allocate_lines(size));
  packed->data = data;
  std::memset(data, 0, size);
  const char* source = static_cast<const char*>(weight);
  for (size_t row = 0; row < static_cast<size_t>(n); ++row) {
    char* column = data + (row / kPanelCols * k * kPanelCols + row % kPanelCols) * element;
    for (size_t i = 0; i < static_cast<size_t>(k); ++i)
      std::memcpy(column + i * kPanelCols * element, source + (row * k + i) * element, element);
  }
  return std::shared_ptr<const FloatWeight>(packed.release(), release);
}

}  // namespace fptq

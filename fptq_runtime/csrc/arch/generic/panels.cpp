#include "arch/generic/panels.h"

#include <algorithm>
#include <cstring>

namespace fptq {
namespace {

size_t padded(int k) { return static_cast<size_t>(k + kSumGroup - 1) / kSumGroup * kSumGroup; }
size_t columns(int n) { return static_cast<size_t>(n + kPanelCols - 1) / kPanelCols * kPanelCols; }

size_t codes_size(size_t rows, int k) { return rows * padded(k); }

size_t sums_size(size_t rows, int k) {
  return (count_panels(static_cast<int>(rows), kTileRows) * (padded(k) / kSumGroup) + 1) * kSumRows;
}

void copy_row(const Activations& from, int m, Activations& out, int to) {
  const size_t kp = padded(from.k), blocks = kp / kSumGroup;
  const auto place = [&](const Activations& rows, int row, size_t& height, size_t& sums) {
    const int panel = panel_of(row, rows.rows), begin = panel_begin(panel, rows.rows);
    height = panel_begin(panel + 1, rows.rows) - begin;
    sums = panel * blocks * kSumRows + row - begin;
    return rows.codes + begin * kp + (row - begin) * 4;
  };
  size_t height, sums, out_height, out_sums;
  const int8_t* codes = place(from, m, height, sums);
  int8_t* out_codes = place(out, to, out_height, out_sums);
  for (size_t s = 0; s < kp / 4; ++s) std::memcpy(out_codes + s * out_height * 4, codes + s * height * 4, 4);
  for (size_t b = 0; b < blocks; ++b) out.sums[out_sums + b * kSumRows] = from.sums[sums + b * kSumRows];
  out.scales[to] = from.scales[m];
}

void read_row(const Activations& rows, int m, int8_t* codes, int32_t* sums) {
  const int panel = panel_of(m, rows.rows), begin = panel_begin(panel, rows.rows);
  const size_t height = panel_begin(panel + 1, rows.rows) - begin, kp = padded(rows.k), blocks = kp / kSumGroup;
  for (size_t s = 0; s < kp / 4; ++s)
    std::memcpy(codes + 4 * s, rows.codes + begin * kp + (s * height + m - begin) * 4, 4);
  for (size_t b = 0; b < blocks; ++b) sums[b] = rows.sums[(panel * blocks + b) * kSumRows + m - begin];
}

size_t weight_size(int n, int k, int bits) { return columns(n) * padded(k) * bits / 8; }

float stored_scale(size_t row, int bits, float scale) { return bits == 4 && row / 16 % 2 ? scale / 16 : scale; }

void pack_weight(const CodeRows& codes, const float* scale, size_t p, PackedWeight& packed) {
  const size_t n = packed.n, k = packed.k, kp = padded(packed.k);
  const size_t row_bytes = kPanelCols * packed.bits / 2;  // of four k
  const size_t rows = std::min<size_t>(kPanelCols, n - p * kPanelCols);
  uint8_t* line = packed.data + p * (kp / 4) * row_bytes;
  for (size_t k0 = 0; k0 < kp; k0 += kCodeBlock) {
    uint32_t words[kCodeBlock / 4][kPanelCols] = {};  // four codes of each column
    for (size_t j = 0; j < rows; ++j) {
      uint32_t row[kCodeBlock / 4];
      codes.load(codes, p * kPanelCols + j, k0, std::min<size_t>(kCodeBlock, k - k0), row);
      for (size_t s = 0; s < kCodeBlock / 4; ++s) words[s][j] = row[s];
    }
    for (size_t s = 0; s < std::min<size_t>(kCodeBlock, kp - k0) / 4; ++s, line += row_bytes) {
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
      const size_t row = p * kPanelCols + j, i = (p * groups + g) * kPanelCols + j;
      const float value = row < n ? stored_scale(row, packed.bits, scale[row * groups + g]) : 0.0f;
      uint32_t bits;
      std::memcpy(&bits, &value, sizeof bits);
      if (packed.bf16_scales) static_cast<uint16_t*>(packed.scales)[i] = static_cast<uint16_t>(bits >> 16);
      else static_cast<float*>(packed.scales)[i] = value;
    }
  }
}

size_t float_size(int n, int k) { return columns(n) * k; }

template <class T>
void pack_float_as(const T* weight, T* data, size_t n, size_t k, size_t p) {
  constexpr size_t kBlockK = 64 / sizeof(T);  // a cache line of each row
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

void pack_float(const void* weight, size_t p, FloatWeight& packed) {
  const size_t n = packed.n, k = packed.k;
  if (float_bytes(packed.type) == 2)
    pack_float_as(static_cast<const uint16_t*>(weight), static_cast<uint16_t*>(packed.data), n, k, p);
  else pack_float_as(static_cast<const uint32_t*>(weight), static_cast<uint32_t*>(packed.data), n, k, p);
}

}  // namespace

const Layout panels = {
    .tile_rows = kTileRows,
    .panel_cols = kPanelCols,
    .k_unit = kSumGroup,
    .codes_size = codes_size,
    .sums_size = sums_size,
    .copy_row = copy_row,
    .read_row = read_row,
    .weight_size = weight_size,
    .stored_scale = stored_scale,
    .pack_weight = pack_weight,
    .float_size = float_size,
    .pack_float = pack_float,
};

}  // namespace fptq

// The layout of the generic and the AVX2, AVX-VNNI and AVX-512 VNNI paths: int8 products in fours of k, 64 columns
// wide.
//
// Activations lie panel by panel as the GEMM reads them: a panel of R rows from row m on at m · Kp, [Kp/4][R][4], zero
// beyond K; Kp = K rounded up to 32. Their sums are [ceil(M/6)][Kp/32][8]; 8 more are read, not used, beyond the last.
//
// Integer weights lie in "x32" panels. 4 bits: [N/64][Kp/4][2 lines of 64 bytes]; line l, byte 4j+b holds
// W[64p + 32l + j][4s+b] + 8 in the low nibble and W[64p + 32l + 16 + j][4s+b] + 8 in the high one, whose scales are
// divided by 16. 8 bits: [N/64][Kp/4][4 lines of 64 bytes]; line l, byte 4j+b holds W[64p + 16l + j][4s+b] + 128.
//
// Float weights lie in panels [N/64][K][64], N rounded up with zeros.
#pragma once

#include "core/kernels.h"

namespace fptq {

constexpr int kTileRows = 6;
constexpr int kPanelCols = 64;
constexpr int kSumGroup = 32;  // activations carry one sum per 32 k
constexpr int kSumRows = 8;    // stride of an activation panel's sums

static inline int panel_begin(int panel, int rows) { return panel_begin(panel, rows, kTileRows); }
static inline int panel_of(int row, int rows) { return panel_of(row, rows, kTileRows); }

extern const Layout panels;

}  // namespace fptq

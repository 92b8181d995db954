"""The kernels of a linear layer; linear.py says which sums they make, and in which order."""

from __future__ import annotations

import triton
import triton.language as tl

from fptq_runtime.kernels.triton.sums import epilogue
from fptq_runtime.kernels.triton.unpack import multiplied, unpacked


@triton.jit
def _dot_product(w, x, acc):
    """w · x + acc; acc None is 0."""
    if x.dtype == tl.int8:
        return tl.dot(w, x, acc, out_dtype=tl.int32)
    else:
        return tl.dot(w, x, acc, input_precision="ieee")


@triton.jit
def _accumulate(acc, products, scale, CODES: tl.constexpr):
    """A group's products, [ROWS, COLS], times its scale (or multiplier), [ROWS]."""
    if acc.dtype == tl.int32:  # two-level
        if CODES == "int4":
            products = products >> 4  # exact
        return acc + products * scale.to(tl.int32)[:, None]
    else:
        return tl.fma(products.to(tl.float32), tl.broadcast_to(scale.to(tl.float32)[:, None], acc.shape), acc)


@triton.jit
def _scales(scale_rows, block, limit, WIDTH: tl.constexpr, DOTS: tl.constexpr, LOADS: tl.constexpr,
            SLICES: tl.constexpr, UNROLL: tl.constexpr, MASKED: tl.constexpr):
    """Those of a turn, LOADS a block, each [ROWS]."""
    scales = ()
    for i in tl.static_range(UNROLL * LOADS):
        piece = (block * DOTS + i * (DOTS // LOADS)) // SLICES * 64
        held = not MASKED or (block + i // LOADS) * (WIDTH * DOTS) < limit
        scales = scales + (tl.load(scale_rows + piece, mask=held, other=0),)  # type: ignore[assignment] # noqa: RUF005
    return scales


@triton.jit
def _segment(
    w_rows, x_cols, scale_rows,  # pointers [ROWS], [COLS], [ROWS]
    inside,  # [COLS]
    first, K, block_stride,
    CODES: tl.constexpr, ARITHMETIC: tl.constexpr, WIDTH: tl.constexpr, SLICES: tl.constexpr, MASKED: tl.constexpr,
    UNROLL: tl.constexpr, LENGTH: tl.constexpr,
):
    """Σ over LENGTH blocks from the first; MASKED where those beyond K are not all there. [ROWS, COLS]

    FOLDED: multipliers enter the codes, and nothing else is done to products; a turn of few columns takes fewer
    instructions to multiply these.
    """
    ROWS: tl.constexpr = w_rows.shape[0]
    COLS: tl.constexpr = x_cols.shape[0]
    element: tl.constexpr = x_cols.dtype.element_ty
    NONE: tl.constexpr = 0.0 if element.is_floating() else 0
    TWO: tl.constexpr = CODES == "int4" or CODES == "fp4"
    DOTS: tl.constexpr = 2 if TWO else 1
    JOINT: tl.constexpr = ARITHMETIC == "row" or SLICES % DOTS == 0  # a block lies within a group
    FOLDED: tl.constexpr = ARITHMETIC == "two-level" and element == tl.int8 and COLS >= 64
    CHAINED: tl.constexpr = FOLDED or (ARITHMETIC == "row" and element != tl.float8e4nv)  # FP8 dots keep few bits
    LOADS: tl.constexpr = 1 if JOINT else 2
    AHEAD: tl.constexpr = ARITHMETIC != "row" and (FOLDED or COLS <= 32)  # else a turn's products hide their loads
    TOTAL: tl.constexpr = tl.int32 if element == tl.int8 and ARITHMETIC != "grouped" else tl.float32
    acc = tl.zeros((ROWS, COLS), TOTAL)
    columns = tl.arange(0, WIDTH)
    limit = tl.minimum(K, (first + LENGTH) * (WIDTH * DOTS))
    ahead = ()
    if AHEAD:
        ahead = _scales(scale_rows, first, limit, WIDTH, DOTS, LOADS, SLICES, UNROLL, MASKED)
    for step in range(0, LENGTH, UNROLL):
        b = first + step
        scales = ahead
        if AHEAD:  # the last turn reads its own again
            ahead = _scales(scale_rows, tl.minimum(b + UNROLL, first + (LENGTH - 1) // UNROLL * UNROLL), limit, WIDTH,
                            DOTS, LOADS, SLICES, UNROLL, MASKED)
        elif ARITHMETIC != "row":
            scales = _scales(scale_rows, b, limit, WIDTH, DOTS, LOADS, SLICES, UNROLL, MASKED)
        for u in tl.static_range(UNROLL):
            k = (b + u) * (WIDTH * DOTS) + columns
            wp = w_rows[:, None] + ((b + u) * block_stride + columns)[None, :]
            xp = x_cols[None, :] + k[:, None]
            if MASKED:
                p = tl.load(wp, mask=(k < limit)[None, :], other=0)
                x = tl.load(xp, mask=inside[None, :] & (k < limit)[:, None], other=NONE)
            else:
                p = tl.load(wp)
                x = tl.load(xp, mask=inside[None, :], other=NONE)
            if FOLDED:
                low = multiplied(p, tl.broadcast_to(scales[u * LOADS][:, None], p.shape), HIGH=False)
            else:
                low = unpacked(p, HIGH=False, CODES=CODES, element=element)
            if CHAINED:
                acc = _dot_product(low, x, acc)
            else:
                products = _dot_product(low, x, None)
            if TWO:
                if MASKED:
                    x = tl.load(xp + WIDTH, mask=inside[None, :] & (k + WIDTH < limit)[:, None], other=NONE)
                else:
                    x = tl.load(xp + WIDTH, mask=inside[None, :], other=NONE)
                if FOLDED:
                    high = multiplied(p, tl.broadcast_to(scales[u * LOADS + LOADS - 1][:, None], p.shape), HIGH=True)
                else:
                    high = unpacked(p, HIGH=True, CODES=CODES, element=element)
                if CHAINED:
                    acc = _dot_product(high, x, acc)
                elif JOINT:
                    products = _dot_product(high, x, products)
                else:
                    acc = _accumulate(acc, products, scales[u * LOADS], CODES)
                    products = _dot_product(high, x, None)
            if not CHAINED:
                if ARITHMETIC == "row":
                    acc = acc + products
                else:
                    acc = _accumulate(acc, products, scales[u * LOADS + LOADS - 1], CODES)
    return acc


@triton.jit
def _write(total, m_first, n_first, scale_ptr, x_scale_ptr, bias_ptr, residual_ptr, out_ptr, M, N,
           CODES: tl.constexpr, ARITHMETIC: tl.constexpr, SCALED: tl.constexpr, X_SCALE: tl.constexpr,
           BIAS: tl.constexpr, RESIDUAL: tl.constexpr):
    """The outputs of the accumulators [rows, columns] that begin at row m_first and column n_first of y."""
    SHIFTED: tl.constexpr = ARITHMETIC == "two-level" and total.dtype == tl.int32
    UNIT: tl.constexpr = (1 if SHIFTED else 0.0625) if CODES == "int4" else 64 if CODES == "fp4" else 1
    ROW_SCALED: tl.constexpr = SCALED and ARITHMETIC != "grouped"
    rows, columns = tl.arange(0, total.shape[0]), tl.arange(0, total.shape[1])
    n, m = n_first + rows, m_first + columns
    valid = (n < N)[:, None] & (m < M)[None, :]
    at = m_first.to(tl.int64) * N + n_first + ((columns * N)[None, :] + rows[:, None])
    row_scale, x_scale, bias, residual = total, total, total, total
    if ROW_SCALED:
        row_scale = tl.load(scale_ptr + n, mask=n < N, other=0)[:, None]
    if X_SCALE == "one":
        x_scale = tl.load(x_scale_ptr)
    elif X_SCALE == "row":
        x_scale = tl.load(x_scale_ptr + m, mask=m < M, other=0)[None, :]
    if BIAS:
        bias = tl.load(bias_ptr + n, mask=n < N, other=0)[:, None]
    if RESIDUAL:
        residual = tl.load(residual_ptr + at, mask=valid, other=0)
    y = epilogue(total, row_scale, x_scale, bias, residual, UNIT, ROW_SCALED, X_SCALE, BIAS, RESIDUAL)
    tl.store(out_ptr + at, y, mask=valid)


@triton.jit(do_not_specialize=["M"])  # one compilation for every batch
def linear_kernel(
    x_ptr,  # [M, K]
    w_ptr,
    scale_ptr,  # [tiles, groups or 1, 64]
    multiplier_ptr,  # [tiles, groups, 64]
    x_scale_ptr, bias_ptr,
    residual_ptr,  # [M, N]
    out_ptr,  # float32 [M, N]; SPLIT: sums of segments, [segments, M, N]
    M, N, K, w_count, tile_stride, row_stride, block_stride, groups,
    CODES: tl.constexpr, ARITHMETIC: tl.constexpr, WIDTH: tl.constexpr, SLICES: tl.constexpr, SCALED: tl.constexpr,
    X_SCALE: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, SEGMENTS: tl.constexpr, LENGTH: tl.constexpr,
    SPLIT: tl.constexpr, MASKED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, UNROLL: tl.constexpr,
):
    """A program has ROWS rows of W and COLS of x, over SEGMENTS of LENGTH blocks; SPLIT: each of them is a program."""
    BAND: tl.constexpr = 8  # column tiles that take turns at one row tile, so that W is read from memory once
    n_tiles, m_tiles = tl.cdiv(N, ROWS), tl.cdiv(M, COLS)
    band = tl.program_id(0) // (BAND * n_tiles)
    within = tl.program_id(0) % (BAND * n_tiles)
    height = tl.minimum(m_tiles - band * BAND, BAND)
    n_first = (within // height) * ROWS
    m_first = (band * BAND + within % height) * COLS
    offsets = tl.arange(0, ROWS)
    n = n_first + offsets
    first_tile = n_first // 64
    row = tl.minimum(n, w_count - 1)
    tile = row // 64 - first_tile
    w_rows = w_ptr + first_tile.to(tl.int64) * tile_stride + (tile * tile_stride + row % 64 * row_stride)
    m = m_first + tl.arange(0, COLS)
    inside = m < M
    x_cols = x_ptr + m_first.to(tl.int64) * K + tl.arange(0, COLS) * K
    scale_rows = w_rows
    if ARITHMETIC == "grouped":
        scale_rows = scale_ptr + first_tile.to(tl.int64) * groups * 64 + (tile * groups * 64 + row % 64)
    elif ARITHMETIC == "two-level":
        scale_rows = multiplier_ptr + first_tile.to(tl.int64) * groups * 64 + (tile * groups * 64 + row % 64)
    first = tl.program_id(1) * LENGTH
    if SEGMENTS == 1:
        total = _segment(w_rows, x_cols, scale_rows, inside, first, K, block_stride, CODES=CODES,
                         ARITHMETIC=ARITHMETIC, WIDTH=WIDTH, SLICES=SLICES, MASKED=MASKED, UNROLL=UNROLL,
                         LENGTH=LENGTH)
    else:
        total = tl.zeros((ROWS, COLS), tl.float32)
        for _ in range(SEGMENTS):
            total += _segment(w_rows, x_cols, scale_rows, inside, first, K, block_stride, CODES=CODES,
                              ARITHMETIC=ARITHMETIC, WIDTH=WIDTH, SLICES=SLICES, MASKED=MASKED, UNROLL=UNROLL,
                              LENGTH=LENGTH)
            first += LENGTH
    if SPLIT:
        at = (tl.program_id(1).to(tl.int64) * M + m_first) * N + n_first
        tl.store(out_ptr + at + ((tl.arange(0, COLS) * N)[None, :] + offsets[:, None]), total,
                 mask=(n < N)[:, None] & inside[None, :])
    elif COLS == 256:  # by quarters, or the residuals of all fill the registers
        halves = tl.split(tl.reshape(total, (ROWS, 2, COLS // 2)).permute(0, 2, 1))
        for i in tl.static_range(2):
            quarters = tl.split(tl.reshape(halves[i], (ROWS, 2, COLS // 4)).permute(0, 2, 1))
            for j in tl.static_range(2):
                _write(quarters[j], m_first + (2 * i + j) * (COLS // 4), n_first, scale_ptr, x_scale_ptr, bias_ptr,
                       residual_ptr, out_ptr, M, N, CODES=CODES, ARITHMETIC=ARITHMETIC, SCALED=SCALED, X_SCALE=X_SCALE,
                       BIAS=BIAS, RESIDUAL=RESIDUAL)
    else:
        _write(total, m_first, n_first, scale_ptr, x_scale_ptr, bias_ptr, residual_ptr, out_ptr, M, N, CODES=CODES,
               ARITHMETIC=ARITHMETIC, SCALED=SCALED, X_SCALE=X_SCALE, BIAS=BIAS, RESIDUAL=RESIDUAL)


@triton.jit
def expand_kernel(w_ptr, scale_ptr, multiplier_ptr, out_ptr, N, K, blocks, groups, CODES: tl.constexpr,
                   ARITHMETIC: tl.constexpr, WIDTH: tl.constexpr, SLICES: tl.constexpr, INTEGER: tl.constexpr):
    """A tile's block, row by row: codes times multipliers (INTEGER), or the floats that they stand for."""
    tile, block = tl.program_id(0), tl.program_id(1)
    rows, columns = tl.arange(0, 64), tl.arange(0, WIDTH)
    DOTS: tl.constexpr = 2 if CODES == "int4" or CODES == "fp4" else 1
    start = (tile.to(tl.int64) * blocks + block) * (64 * WIDTH)
    p = tl.load(w_ptr + start + (rows[:, None] * WIDTH + columns[None, :]))
    if CODES == "int8":
        p = p.to(tl.int8, bitcast=True)
    for i in tl.static_range(DOTS):
        group = tl.minimum((block * DOTS + i) // SLICES, groups - 1)
        w = unpacked(p, HIGH=i == 1, CODES=CODES, element=tl.float32)
        if CODES == "int4":
            w = w * 0.0625
        elif CODES == "fp4":
            w = w * 64
        if ARITHMETIC == "two-level":
            w = w * tl.load(multiplier_ptr + (tile * groups + group) * 64 + rows)[:, None].to(tl.float32)
        if ARITHMETIC == "grouped":
            w = w * tl.load(scale_ptr + (tile * groups + group) * 64 + rows)[:, None].to(tl.float32)
        elif not INTEGER:
            w = w * tl.load(scale_ptr + tile * 64 + rows)[:, None]
        n = tile * 64 + rows
        k = (block * DOTS + i) * WIDTH + columns
        at = n.to(tl.int64)[:, None] * K + k[None, :]
        tl.store(out_ptr + at, w.to(out_ptr.dtype.element_ty), mask=(n < N)[:, None] & (k < K)[None, :])

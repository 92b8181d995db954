"""From packed codes to what a dot multiplies, four weights of a register at a time.

In PTX, for the compiler unpacks bytes one by one; the interpreter runs the same instructions (interpreter.py).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _low(p):
    """int8: 16 times the two's complement low nibble."""
    return tl.inline_asm_elementwise("{ .reg .b32 t; shl.b32 t, $1, 4; and.b32 $0, t, 0xF0F0F0F0; }", "=r,r", [p],
                                     dtype=tl.int8, is_pure=True, pack=4)


@triton.jit
def _high(p):
    return tl.inline_asm_elementwise("and.b32 $0, $1, 0xF0F0F0F0;", "=r,r", [p], dtype=tl.int8, is_pure=True, pack=4)


@triton.jit
def multiplied(p, multiplier, HIGH: tl.constexpr):
    """int8: the nibble's two's complement times a multiplier of 0 to 15, as uint8 of p's shape.

    (code + 8) · m + 128 - 8 m fits a byte for every code, so that no carry leaves it; turning its top bit makes it
    code · m. 0x6A: (t & 0x0F…) ^ 0x08…
    """
    if HIGH:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 t, c, m; and.b32 m, $2, 0xFF; mad.lo.u32 c, m, 0xF7F7F7F8, 0x80808080; shr.u32 t, $1, 4; "
            "lop3.b32 t, t, 0x0F0F0F0F, 0x08080808, 0x6A; mad.lo.u32 t, t, m, c; xor.b32 $0, t, 0x80808080; }",
            "=r,r,r", [p, multiplier], dtype=tl.int8, is_pure=True, pack=4)
    else:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 t, c, m; and.b32 m, $2, 0xFF; mad.lo.u32 c, m, 0xF7F7F7F8, 0x80808080; "
            "lop3.b32 t, $1, 0x0F0F0F0F, 0x08080808, 0x6A; mad.lo.u32 t, t, m, c; xor.b32 $0, t, 0x80808080; }",
            "=r,r,r", [p, multiplier], dtype=tl.int8, is_pure=True, pack=4)


@triton.jit
def _e4m3_low(p):
    """uint8: E4M3 of 1/64 of the low nibble's E2M1; both exponents' biases differ by 6, subnormals included."""
    return tl.inline_asm_elementwise(
        "{ .reg .b32 s, m; shl.b32 s, $1, 4; and.b32 s, s, 0x80808080; shl.b32 m, $1, 2; "
        "lop3.b32 $0, m, 0x1C1C1C1C, s, 0xEA; }", "=r,r", [p], dtype=tl.uint8, is_pure=True, pack=4)


@triton.jit
def _e4m3_high(p):
    return tl.inline_asm_elementwise(
        "{ .reg .b32 s, m; and.b32 s, $1, 0x80808080; shr.u32 m, $1, 2; lop3.b32 $0, m, 0x1C1C1C1C, s, 0xEA; }",
        "=r,r", [p], dtype=tl.uint8, is_pure=True, pack=4)


@triton.jit
def _e4m3_value(bits):
    """float32 of E4M3 bits by integer operations, which every device has. NaN is read as ±480."""
    wide = bits.to(tl.int32)
    return (((wide & 0x80) << 24) | ((wide & 0x7F) << 20)).to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120


@triton.jit
def unpacked(p, HIGH: tl.constexpr, CODES: tl.constexpr, element: tl.constexpr):
    """The weights of one dot, in the type of x."""
    if p.dtype == element:  # straight from shared memory, no register in between
        return p
    elif CODES == "int4":
        w = _high(p) if HIGH else _low(p)
        return w if element == tl.int8 else w.to(element)
    elif CODES == "int8" or CODES == "float":
        return p.to(element)
    else:
        if CODES == "fp4":
            bits = _e4m3_high(p) if HIGH else _e4m3_low(p)
        else:
            bits = p
        if element == tl.float8e4nv:
            return bits.to(tl.float8e4nv, bitcast=True)
        else:
            return _e4m3_value(bits).to(element)

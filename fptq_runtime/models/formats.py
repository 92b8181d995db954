"""Quantized weights as compressed-tensors, GPTQ and AWQ store them, brought to what the kernels run: symmetric codes
with a scale a group where that is exact, else the floats that the codes stand for.

`Stored` is what all formats have in common. Sources: compressed-tensors' compressors; AutoGPTQ's and GPTQModel's
`qweight`, `qzeros`, `scales`, `g_idx`; AutoAWQ's gemm packing.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from fptq_runtime.artifact.scheme import LayerScheme, QuantizationArgs
from fptq_runtime.kernels.base import Array, QuantizedWeight
from fptq_runtime.models.tensors import CheckpointError, Tensors

AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)  # of each eight, in the order of a word's nibbles

WIDENED = "asymmetric 4-bit codes, which int8 codes hold exactly in twice the bytes"
DEQUANTIZED_ZERO = "asymmetric 8-bit codes, which are kept as floats, exactly and in more bytes"
DEQUANTIZED_ORDER = "groups of scattered channels (act-order), which are kept as floats, exactly and in more bytes"
DEQUANTIZED_GROUP = "groups that no kernel takes, which are kept as floats, exactly and in more bytes"


@dataclass
class Stored:
    """W[n, k] = (codes[n, k] - zero[n, g]) · scale[n, g], g = g_idx[k] or k // group_size."""

    packed: Array  # as artifact/numerics.py's pack_codes packs the codes, [N, ceil(K · num_bits / 32)]
    scale: Array  # float [N, G]
    num_bits: Literal[4, 8]
    group_size: int
    zero: npt.NDArray[np.int16] | None = None  # [N, G]
    g_idx: Array | None = None  # [K]


def read_weight(tensors: Tensors, name: str, n: int, k: int, scheme: LayerScheme,
                notes: Counter[str]) -> QuantizedWeight | Array:
    """The weight [n, k] of linear `name`. `notes` counts layers that had to be stored differently, by reason. Raises
    CheckpointError."""
    if scheme.weights.type == "float":
        return _float_codes(tensors, name, n, k, scheme.weights)
    if scheme.format == "int-quantized":
        stored = _int_quantized(tensors, name, n, k, scheme.weights)
    elif scheme.format in ("gptq", "gptq_v2"):
        stored = _gptq(tensors, name, n, k, scheme.weights, scheme.format == "gptq")
    elif scheme.format == "awq":
        stored = _awq(tensors, name, n, k, scheme.weights)
    else:
        stored = _pack_quantized(tensors, name, n, k, scheme.weights)
    if not np.isfinite(stored.scale).all():
        raise CheckpointError(f"{name}: its scales hold values that are not finite")
    return runnable(name, stored, k, notes)


def runnable(name: str, stored: Stored, k: int, notes: Counter[str]) -> QuantizedWeight | Array:
    """A kernel's weight where it is exact, else float32 [N, K]."""
    group, groups, bits = stored.group_size, stored.scale.shape[1], stored.num_bits
    index = np.arange(k) // group
    scattered = stored.g_idx is not None and not np.array_equal(stored.g_idx, index)
    if stored.g_idx is not None and scattered:
        index = stored.g_idx
        if not (index.min() >= 0 and index.max() < groups):
            raise CheckpointError(f"{name}: its g_idx names groups that are not in 0 to {groups - 1}")
    fits = not scattered and (group == k or (k % group == 0 and group % 32 == 0))
    if fits and (stored.zero is None or not stored.zero.any()):
        return QuantizedWeight(stored.packed, stored.scale, bits, group)
    codes = unpack(stored.packed, bits, k)
    if stored.zero is not None:
        codes -= stored.zero[:, index]
    if fits and codes.min() >= -128 and codes.max() <= 127:
        notes[WIDENED] += 1
        return QuantizedWeight(pack(codes, 8), stored.scale, 8, group)
    notes[DEQUANTIZED_ORDER if scattered else DEQUANTIZED_ZERO if fits else DEQUANTIZED_GROUP] += 1
    return codes.astype(np.float32) * stored.scale.astype(np.float32)[:, index]


def align(weights: Sequence[QuantizedWeight]) -> list[QuantizedWeight] | None:
    """The same weights with the same bits and groups, so that their rows can be stacked: 4 bits become 8 and a scale
    is repeated for parts of its group. None where no kernel could run that."""
    if len({weight.type for weight in weights}) > 1:
        return None
    bits = max(weight.num_bits for weight in weights)
    group = math.gcd(*(weight.group_size for weight in weights))
    k = weights[0].k
    if any(w.type == "float" and (w.num_bits, w.group_size) != (bits, group) for w in weights) \
            or (group % 32 and group != k):
        return None
    return [_aligned(weight, bits, group) for weight in weights]


def _aligned(weight: QuantizedWeight, bits: Literal[4, 8], group: int) -> QuantizedWeight:
    if weight.num_bits != bits:
        weight = replace(weight, packed=pack(unpack(weight.packed, weight.num_bits, weight.k), bits), num_bits=bits)
    if weight.group_size != group:
        weight = replace(weight, scale=np.repeat(weight.scale, weight.group_size // group, axis=1), group_size=group)
    return weight


def dequantize(weight: QuantizedWeight) -> Array:
    """float32 [N, K] of integer codes."""
    codes = unpack(weight.packed, weight.num_bits, weight.k).astype(np.float32)
    return codes * np.repeat(weight.scale.astype(np.float32), weight.group_size, axis=1)


def pack(codes: npt.NDArray[np.integer], num_bits: int) -> Array:
    """artifact/numerics.py's pack_codes: codes [N, K] to int32 [N, ceil(K · num_bits / 32)]."""
    unsigned = (codes.astype(np.int16) + 2 ** (num_bits - 1)).astype(np.uint8)
    unsigned = np.pad(unsigned, ((0, 0), (0, -codes.shape[1] % (32 // num_bits))))
    if num_bits == 4:
        unsigned = unsigned[:, 0::2] | (unsigned[:, 1::2] << 4)
    return np.ascontiguousarray(unsigned).view(np.int32)


def unpack(packed: Array, num_bits: int, k: int) -> npt.NDArray[np.int16]:
    """The inverse of `pack`: [N, k]."""
    octets = np.ascontiguousarray(packed).view(np.uint8)
    if num_bits == 4:
        octets = np.stack((octets & 15, octets >> 4), axis=-1).reshape(octets.shape[0], -1)
    codes: npt.NDArray[np.int16] = octets[:, :k].astype(np.int16) - 2 ** (num_bits - 1)
    return codes


def _float_codes(tensors: Tensors, name: str, n: int, k: int, args: QuantizationArgs) -> QuantizedWeight:
    group = _group(name, k, args)
    packed = (tensors.get(f"{name}.weight_packed", (n, math.ceil(k / 2)), ("U8",)) if args.num_bits == 4 else
              tensors.get(f"{name}.weight", (n, k), ("F8_E4M3",)))
    scale = tensors.get(f"{name}.weight_scale", (n, k // group))
    if not np.isfinite(scale).all():
        raise CheckpointError(f"{name}.weight_scale holds values that are not finite")
    return QuantizedWeight(packed, scale, _bits(args), group, "float")


def _pack_quantized(tensors: Tensors, name: str, n: int, k: int, args: QuantizationArgs) -> Stored:
    shape = tensors.get(f"{name}.weight_shape", (2,), ("I64", "I32"))
    if shape.tolist() != [n, k]:
        raise CheckpointError(f"{name}.weight_shape is {shape.tolist()}, but config.json asks for {[n, k]}")
    packed = tensors.get(f"{name}.weight_packed", (n, math.ceil(k * args.num_bits / 32)), ("I32",))
    return _compressed(tensors, name, n, k, args, packed)


def _int_quantized(tensors: Tensors, name: str, n: int, k: int, args: QuantizationArgs) -> Stored:
    codes = tensors.get(f"{name}.weight", (n, k), ("I8",))
    limit = 2 ** (args.num_bits - 1)
    if not -limit <= codes.min() <= codes.max() < limit:
        raise CheckpointError(f"{name}.weight holds codes that are not of {args.num_bits} bits")
    return _compressed(tensors, name, n, k, args, pack(codes, args.num_bits))


def _compressed(tensors: Tensors, name: str, n: int, k: int, args: QuantizationArgs, packed: Array) -> Stored:
    """What both of compressed-tensors' integer formats have beside the codes."""
    group = _group(name, k, args)
    groups = k // group
    if args.strategy == "tensor":
        scale = np.broadcast_to(tensors.get(f"{name}.weight_scale", (1,)), (n, 1))
    else:
        scale = tensors.get(f"{name}.weight_scale", (n, groups))
    zero = None
    if not args.symmetric:
        point = f"{name}.weight_zero_point"
        if args.strategy == "tensor":
            zero = np.broadcast_to(tensors.get(point, (1,), ("I8",)), (n, 1))
        elif tensors.shape(point) == (n, groups):
            zero = tensors.get(point, (n, groups), ("I8",))
        else:  # packed along the rows
            words = tensors.get(point, (math.ceil(n * args.num_bits / 32), groups), ("I32",))
            zero = unpack(words.T, args.num_bits, n).T
        zero = zero.astype(np.int16)
    g_idx = None
    if tensors.shape(f"{name}.weight_g_idx") is not None:
        g_idx = tensors.get(f"{name}.weight_g_idx", (k,), ("I32", "I64"))
        g_idx = None if (g_idx == -1).all() else g_idx  # compressed-tensors' word for none
    return Stored(packed, scale, _bits(args), group, zero, g_idx)


def _gptq(tensors: Tensors, name: str, n: int, k: int, args: QuantizationArgs, minus_one: bool) -> Stored:
    """minus_one: what the checkpoint's label says about zeros that its values do not decide.

    Bits and groups are the tensors' own, since GPTQModel lets them differ by layer.
    """
    rows, groups = ((tensors.shape(f"{name}.{part}") or (0,))[0] for part in ("qweight", "scales"))
    if rows not in (math.ceil(k / 8), math.ceil(k / 4)):
        raise CheckpointError(f"{name}.qweight has {rows} rows, which for {k} input features is neither 4 nor 8 bits")
    bits: Literal[4, 8] = 4 if rows == math.ceil(k / 8) else 8
    group = _group_of(name, k, groups, args)
    packed = np.ascontiguousarray(tensors.get(f"{name}.qweight", (rows, n), ("I32",)).T)
    words = tensors.get(f"{name}.qzeros", (groups, math.ceil(n * bits / 32)), ("I32",))
    scale = tensors.get(f"{name}.scales", (groups, n)).T
    half = 2 ** (bits - 1)
    stored = unpack(words, bits, n).T + half  # [N, G]
    g_idx = None
    if tensors.shape(f"{name}.g_idx") is not None:
        g_idx = tensors.get(f"{name}.g_idx", (k,), ("I32", "I64"))
    if args.symmetric:
        if not ((stored == half).all() or (stored == half - 1).all()):
            raise CheckpointError(f"{name}.qzeros holds other zeros than {half}, although the checkpoint is symmetric")
        zero = None
    else:
        zero = stored - half
        if _zeros_minus_one(unpack(packed, bits, k) + half, stored, minus_one):
            # One from each was subtracted from the whole word, so that a zero of 0 borrows from the next.
            ones = np.uint32(0x11111111 if bits == 4 else 0x01010101)
            zero = unpack(words.view(np.uint32) + ones, bits, n).T
    return Stored(packed, scale, bits, group, zero, g_idx)


def _zeros_minus_one(codes: Array, stored: Array, label: bool) -> bool:
    """Whether the true zeros are one above the stored ones: asymmetric codes average to the true zero, as a layer's
    weights average to about nothing. The label decides where the layer is too small to tell (three standard errors are
    more than a quarter of a code) or its average is not within a quarter of either."""
    above = float(codes.mean() - stored.mean())
    error = float(codes.std()) / math.sqrt(codes.size)
    if 3 * error > 0.25 or min(abs(above), abs(above - 1)) > 0.25:
        return label
    return above > 0.5


def _group_of(name: str, k: int, groups: int, args: QuantizationArgs) -> int:
    """The config's group size where it makes so many groups, else the one that does (GPTQModel's `dynamic`)."""
    group = min(args.group_size or k, k)
    if groups == -(-k // group):
        return group
    if groups < 1 or k % groups:
        raise CheckpointError(f"{name}.scales has {groups} groups, which do not divide {k} input features")
    return k // groups


def _awq(tensors: Tensors, name: str, n: int, k: int, args: QuantizationArgs) -> Stored:
    if n % 8:
        raise CheckpointError(f"{name}: {n} output features are not a multiple of 8, which AWQ packs together")
    groups = (tensors.shape(f"{name}.scales") or (0,))[0]
    codes = _awq_columns(tensors.get(f"{name}.qweight", (k, n // 8), ("I32",)), n)  # [K, N]
    zero = _awq_columns(tensors.get(f"{name}.qzeros", (groups, n // 8), ("I32",)), n)  # [G, N]
    scale = tensors.get(f"{name}.scales", (groups, n)).T
    return Stored(pack(codes.T, 4), scale, 4, _group_of(name, k, groups, args), zero.T)


def _awq_columns(words: Array, n: int) -> npt.NDArray[np.int16]:
    """int32 [rows, N / 8] to codes [rows, N], less 8."""
    nibbles = unpack(words, 4, n).reshape(words.shape[0], -1, 8)
    columns = np.empty_like(nibbles)
    columns[..., AWQ_COLUMNS] = nibbles
    return columns.reshape(words.shape[0], n)


def _group(name: str, k: int, args: QuantizationArgs) -> int:
    group = args.group_size or k
    if k % group:
        raise CheckpointError(f"{name}: {k} input features are not a multiple of the group size {group}")
    return group


def _bits(args: QuantizationArgs) -> Literal[4, 8]:
    return 4 if args.num_bits == 4 else 8

"""Weights on their way from a checkpoint's modules to the linears of a block: what all formats have in common, brought
to what the kernels run (symmetric codes with a scale a group where that is exact, else the floats that the codes stand
for), stacked, and taken apart again.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from fptq_runtime.kernels.base import Array, Linear, Norm, QuantizedWeight
from fptq_runtime.models.block import LinearSpec, NormSpec
from fptq_runtime.models.fields import ModelError
from fptq_runtime.models.tensors import CheckpointError

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


def runnable(name: str, stored: Stored, k: int, notes: Counter[str]) -> QuantizedWeight | Array:
    """A kernel's weight where it is exact, else float32 [N, K]. `notes` counts what is in another form, by reason.
    Raises CheckpointError."""
    if not np.isfinite(stored.scale).all():
        raise CheckpointError(f"{name}: its scales hold values that are not finite")
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


def fuse(name: str, parts: Sequence[Linear], order: Array | None = None, experts: int = 1) -> Linear:
    """Stack linears that read the same input, and their low-rank factors: `down` once where all have the same, else
    block by block. Where some have more bits or smaller groups the others follow, and float ones make all float, since
    both are exact. Raises ModelError where activations differ, or weights in another way."""
    first = parts[0]
    if any(part.act != first.act for part in parts):
        raise ModelError(f"{name}: {', '.join(p.name for p in parts)} read one input but quantize it differently")
    biases = [part.bias for part in parts]
    if any(bias is None for bias in biases) != all(bias is None for bias in biases):
        biases = [np.zeros(p.rows, np.float32) if p.bias is None else p.bias for p in parts]
    bias = None if biases[0] is None else _stack(biases)
    weight = _stack_weights([part.weight for part in parts])
    if weight is None:
        raise ModelError(f"{name}: {', '.join(p.name for p in parts)} are fused but quantized differently")
    fused = Linear(name, weight, bias, first.act, _stack_low_rank(name, parts), experts)
    return fused if order is None else replace(_take_rows(fused, name, order), experts=experts)


def multiplied(linear: Linear, factor: Array) -> Linear:
    """What makes `factor` [N] times what this does, of numpy's arrays or torch's. Scales are float32 then: codes were
    chosen by them as they are."""
    def times(array: Array) -> Array:
        rows = factor.reshape(-1, *[1] * (array.ndim - 1))
        if not hasattr(array, "new_tensor"):
            return array * rows
        wide = array.float()
        return wide * wide.new_tensor(rows)

    weight = linear.weight
    if isinstance(weight, QuantizedWeight):
        made: Any = replace(weight, scale=times(weight.scale))
    else:
        made = times(weight)
        made = made.to(weight.dtype) if hasattr(weight, "new_tensor") else made
    return replace(linear, weight=made, bias=None if linear.bias is None else times(linear.bias),
                   low_rank=None if linear.low_rank is None else (linear.low_rank[0], times(linear.low_rank[1])))


def unfuse(linear: Linear, spec: LinearSpec) -> list[tuple[str, Linear]]:
    """The inverse of `fuse`, and of `multiplied`: each module of the spec, by its name."""
    if spec.multiplier is not None:
        linear = multiplied(linear, 1 / spec.multiplier)
    restored = linear if spec.order is None else _take_rows(linear, linear.name, spec.order.argsort())
    starts = [sum(spec.sizes[:i]) for i in range(len(spec.sizes))]
    parts = [(name, _take_rows(restored, name, slice(start, start + size)))
             for name, start, size in zip(spec.modules, starts, spec.sizes, strict=True)]
    if spec.transposed:
        parts = [(name, part if isinstance(part.weight, QuantizedWeight) else replace(part, weight=part.weight.T))
                 for name, part in parts]
    return parts


def unstack(norm: Norm, spec: NormSpec) -> list[tuple[str, Norm]]:
    """A norm as the modules of its spec hold it."""
    weight = norm.weight - spec.offset if spec.offset else norm.weight
    if not spec.scaled:
        return []
    if spec.order is not None:
        stored = spec.order.argsort()
        weight, norm = weight[..., stored], replace(norm, bias=None if norm.bias is None else norm.bias[..., stored])
    if len(spec.modules) == 1:
        return [(spec.modules[0], replace(norm, weight=weight))]
    return [(name, replace(norm, weight=weight[i], bias=None if norm.bias is None else norm.bias[i]))
            for i, name in enumerate(spec.modules)]


def _stack_weights(weights: Sequence[Array | QuantizedWeight]) -> Array | QuantizedWeight | None:
    """None where they cannot be brought to one form."""
    quantized = [w for w in weights if isinstance(w, QuantizedWeight)]
    if not quantized:
        return _stack(weights)
    if len(quantized) < len(weights):
        if any(w.type == "float" for w in quantized):
            return None
        return _stack([dequantize(w) if isinstance(w, QuantizedWeight) else w for w in weights])
    aligned = align(quantized)
    if aligned is None:
        return None
    return replace(aligned[0], packed=_stack([w.packed for w in aligned]), scale=_stack([w.scale for w in aligned]))


def _stack(arrays: Sequence[Array]) -> Array:
    """Along the first dimension; in float32 where their types differ."""
    if len({array.dtype for array in arrays}) > 1:
        return np.concatenate([array.astype(np.float32) for array in arrays])
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def _stack_low_rank(name: str, parts: Sequence[Linear]) -> tuple[Array, Array] | None:
    factors = [part.low_rank for part in parts if part.low_rank is not None]
    if not factors:
        return None
    if len(factors) != len(parts):
        raise ModelError(f"{name}: {', '.join(p.name for p in parts)} are fused, but not all have low-rank factors")
    first = factors[0][0]
    if all(np.array_equal(down, first) for down, _ in factors):
        return first, _stack([up for _, up in factors])
    ranks = [down.shape[0] for down, _ in factors]
    padded = [np.pad(up, ((0, 0), (sum(ranks[:i]), sum(ranks[i + 1:])))) for i, (_, up) in enumerate(factors)]
    return _stack([down for down, _ in factors]), _stack(padded)


def _take_rows(linear: Linear, name: str, rows: Array | slice) -> Linear:
    weight = linear.weight
    taken = (
        replace(weight, packed=weight.packed[rows], scale=weight.scale[rows])
        if isinstance(weight, QuantizedWeight)
        else weight[rows]
    )
    bias = None if linear.bias is None else linear.bias[rows]
    low_rank = None if linear.low_rank is None else (linear.low_rank[0], linear.low_rank[1][rows])
    return Linear(name, taken, bias, linear.act, low_rank)

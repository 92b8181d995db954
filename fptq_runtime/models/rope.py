"""Rotary position embeddings: what config.json says of them, and their tables.

The formulas are those of transformers' modeling_rope_utils: linear (position interpolation, arXiv 2306.15595), dynamic
(NTK), llama3 (Llama 3.1's smoothing), yarn (arXiv 2309.00071), longrope (arXiv 2402.13753), proportional (Gemma 4's).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, get_args

import numpy as np

from fptq_runtime.kernels.base import Float32Array, Float64Array
from fptq_runtime.models.fields import Fields, ModelError

RopeType = Literal["default", "linear", "dynamic", "llama3", "yarn", "longrope", "proportional"]

_CHUNK = 1 << 15  # angles at a time, since sines are taken in double precision: they stay in a core's cache
# fdlibm's: π/2 in parts, of which the first two have 33 bits, and minimax polynomials within π/4 of 0
_HALF_PI = (1.57079632673412561417, 6.07710050630396597660e-11, 2.02226624879595063154e-21)
_SINE = (1.58969099521155010221e-10, -2.50507602534068634195e-08, 2.75573137070700676789e-06,
         -1.98412698298579493134e-04, 8.33333333332248946124e-03, -1.66666666666666324348e-01)
_COSINE = (-1.13596475577881948265e-11, 2.08757232129817482790e-09, -2.75573143513906633035e-07,
           2.48015872894767294178e-05, -1.38888888888741095749e-03, 4.16666666666666019037e-02)


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding of the first `dim` dimensions of a head, with Hugging Face's names for its scaling.

    "dynamic" and "longrope" compute with one set of frequencies up to `original_max_position_embeddings` and with
    another beyond. Which one is chosen once, by the longest sequence that is served: factors that changed with a
    sequence's length would change the keys that are in the cache already. attention_factor multiplies cos and sin.
    """

    theta: float
    dim: int
    rope_type: RopeType = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 0
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    rotated: int = 0  # of "proportional": how many of the dim / 2 pairs turn at all

    def extends(self, max_positions: int) -> bool:
        """Sequences so long are computed with the frequencies for long ones, short ones among them too."""
        return self.rope_type in ("dynamic", "longrope") and max_positions > self.original_max_position_embeddings

    def describe(self, max_positions: int) -> str:
        """For people, with the choice that depends on the longest sequence."""
        if self.rope_type not in ("dynamic", "longrope"):
            return self.rope_type
        return f"{self.rope_type}, {'long' if self.extends(max_positions) else 'short'} frequencies"


def read_ropes(fields: Fields, head_dim: int, max_position_embeddings: int, theta: float,
               local_theta: float, local_theta_name: str = "") -> tuple[RopeConfig, RopeConfig]:
    """Of layers that attend to everything, and of those with a window, in a family whose `rope_parameters` are by layer
    type. Before transformers 5 the second was its base frequency alone, and `rope_scaling` was the first's, as it still
    is where both are there. local_theta_name: the config's name for that base frequency. Raises ModelError."""
    where = f"{fields.where}: rope_parameters"
    by_type = _mapping(fields.data.get("rope_parameters"), where)
    full = {**_mapping(by_type.get("full_attention"), where), **_mapping(fields.data.get("rope_scaling"), where)}
    local = _mapping(by_type.get("sliding_attention"), where)
    others = {name: value for name, value in fields.data.items()
              if name not in ("rope_scaling", "rope_parameters", "original_max_position_embeddings")}
    sizes = head_dim, max_position_embeddings
    return (read_rope(Fields({**others, "rope_parameters": full}, fields.where), *sizes, theta=theta),
            read_rope(Fields({**others, "rope_parameters": local}, fields.where), *sizes, theta=local_theta,
                      theta_name=local_theta_name))


def _mapping(given: Any, where: str) -> Mapping[str, Any]:
    if given is not None and not isinstance(given, Mapping):
        raise ModelError(f"{where} must be an object, not {given!r}")
    return given or {}


def read_rope(fields: Fields, head_dim: int, max_position_embeddings: int, theta: float = 10000.0,
              partial: float | None = None, theta_name: str = "rope_theta",
              partial_name: str = "partial_rotary_factor", aliases: Mapping[str, RopeType] = MappingProxyType({}),
              ) -> RopeConfig:
    """What config.json says of rope: transformers 5 writes `rope_parameters`; before it was `rope_theta` beside
    `rope_scaling`, which still wins where both are there. theta, partial: the family's defaults; without the second it
    turns whole heads alone. theta_name, partial_name: what it calls them outside of rope_parameters. aliases: what it
    calls the types. Raises ModelError."""
    data, where = fields.data, f"{fields.where}: rope_parameters"
    given = _mapping(data.get("rope_scaling") or data.get("rope_parameters"), where)
    outside: dict[str, Any] = {
        "rope_theta": data.get(theta_name), "partial_rotary_factor": data.get(partial_name),
        "rope_type": given.get("type", "default"),
    }
    rope = Fields({**outside, **{name: value for name, value in given.items() if value is not None}}, where)
    if isinstance(said := rope.data["rope_type"], str) and said in aliases:
        rope = Fields({**rope.data, "rope_type": aliases[said]}, where)
    kind: RopeType = rope.only("rope_type", get_args(RopeType), "default")
    theta = rope.number("rope_theta", theta, low=1.0)
    if partial is None and kind != "proportional":
        rope.only("partial_rotary_factor", (None, 1, 1.0), None)
    share = rope.number("partial_rotary_factor", partial or 1.0, low=1e-6, high=1.0)
    if kind == "proportional":
        factor = rope.number("factor", 1.0, low=1e-6, high=1e6)
        return RopeConfig(theta, _even(head_dim, where), kind, factor, rotated=int(share * head_dim // 2))
    dim = _even(int(head_dim * share), where)
    if kind == "default":
        return RopeConfig(theta, dim)
    original = rope.integer("original_max_position_embeddings", max_position_embeddings, high=1 << 24)
    if isinstance(data.get("original_max_position_embeddings"), int):  # Phi-3's place for it
        original = fields.integer("original_max_position_embeddings", high=1 << 24)
    if kind == "longrope":
        return _longrope(rope, theta, dim, original, max_position_embeddings)
    if kind == "yarn" and rope.get("factor") is None:
        factor = max_position_embeddings / original
    else:
        factor = rope.number("factor", low=1e-6, high=1e6)
    if kind == "linear":
        return RopeConfig(theta, dim, kind, factor)
    if kind == "dynamic":
        if dim <= 2:
            raise ModelError(f"{where}: dynamic needs more than two rotated dimensions")
        return RopeConfig(theta, dim, kind, factor, original_max_position_embeddings=max_position_embeddings)
    if kind == "llama3":
        return RopeConfig(theta, dim, kind, factor, rope.number("low_freq_factor", low=1e-6),
                          rope.number("high_freq_factor", low=1e-6), original)
    scale, all_dim = rope.number("mscale", 0.0), rope.number("mscale_all_dim", 0.0)
    attention = _mscale(factor, scale) / _mscale(factor, all_dim) if scale and all_dim else _mscale(factor)
    return RopeConfig(
        theta, dim, kind, factor, original_max_position_embeddings=original,
        attention_factor=rope.number("attention_factor", attention),
        beta_fast=rope.number("beta_fast", 32.0) or 32.0, beta_slow=rope.number("beta_slow", 1.0) or 1.0,
        truncate=rope.flag("truncate", True),
    )


def _longrope(rope: Fields, theta: float, dim: int, original: int, max_positions: int) -> RopeConfig:
    factor = rope.number("factor", max_positions / original, low=1e-6, high=1e6)
    attention = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 and original > 1 else 1.0
    return RopeConfig(
        theta, dim, "longrope", factor, original_max_position_embeddings=original,
        attention_factor=rope.number("attention_factor", attention),
        short_factor=rope.numbers("short_factor", dim // 2), long_factor=rope.numbers("long_factor", dim // 2),
    )


def _even(dim: int, where: str) -> int:
    if dim < 2 or dim % 2:
        raise ModelError(f"{where}: {dim} rotated dimensions of a head; they must be an even number")
    return dim


def _mscale(factor: float, scale: float = 1.0) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def read_mscale(fields: Fields, rope: RopeConfig) -> float:
    """What DeepSeek multiplies queries and keys by where rope is scaled."""
    given = _mapping(fields.data.get("rope_scaling") or fields.data.get("rope_parameters"), fields.where)
    scale = Fields(given, f"{fields.where}: rope_parameters").number("mscale_all_dim", 0.0)
    return _mscale(rope.factor, scale) if scale and rope.rope_type != "default" else 1.0


def rope_tables(rope: RopeConfig, max_positions: int) -> tuple[Float32Array, Float32Array]:
    """cos and sin of every position, each float32 [max_positions, dim / 2]. Angles are rounded to float32 as in
    transformers, which large positions feel."""
    frequencies = inverse_frequencies(rope, max_positions)
    cos, sin = (np.empty((max_positions, rope.dim // 2), np.float32) for _ in range(2))
    factor, rows = np.float32(rope.attention_factor), max(1, _CHUNK // len(frequencies))
    for start in range(0, max_positions, rows):
        positions = np.arange(start, min(start + rows, max_positions), dtype=np.float32)
        turned = _turn((positions[:, None] * frequencies).astype(np.float64))  # [P, dim / 2]
        for table, values in zip((cos, sin), turned, strict=True):
            np.multiply(values, factor, out=table[start : start + rows], casting="same_kind")
    return cos, sin


def _turn(angles: Float64Array) -> tuple[Float64Array, Float64Array]:
    """cos and sin of angles >= 0 as a fixed sequence of correctly rounded operations: numpy's differ from one CPU to
    another."""
    quarters = np.rint(angles * (2 / math.pi))
    rest = angles
    for part in _HALF_PI:
        rest = rest - quarters * part
    square = rest * rest
    sine, cosine = np.full_like(square, _SINE[0]), np.full_like(square, _COSINE[0])
    for series, coefficients in ((sine, _SINE), (cosine, _COSINE)):
        for coefficient in coefficients[1:]:
            series *= square
            series += coefficient
    sine *= square * rest
    sine += rest
    cosine *= square * square
    cosine -= 0.5 * square
    cosine += 1
    quadrant = quarters.astype(np.int64) & 3
    odd = (quadrant & 1).astype(bool)
    return (np.where(odd, sine, cosine) * (1 - ((quadrant + 1) & 2)),
            np.where(odd, cosine, sine) * (1 - (quadrant & 2)))


def inverse_frequencies(rope: RopeConfig, max_positions: int) -> Float32Array:
    """float32 [dim / 2], for sequences of up to max_positions tokens."""
    exponents = np.arange(0, rope.dim, 2, dtype=np.float32) / np.float32(rope.dim)
    theta, factor = rope.theta, np.float32(rope.factor)
    if rope.rope_type == "dynamic" and rope.extends(max_positions):
        stretched = rope.factor * max_positions / rope.original_max_position_embeddings - (rope.factor - 1)
        theta *= stretched ** (rope.dim / (rope.dim - 2))
    powers = np.array([theta**exponent for exponent in exponents.tolist()], np.float32)  # not numpy's, as in _turn
    inverse: Float32Array = np.float32(1) / powers
    match rope.rope_type:
        case "linear":
            return inverse / factor
        case "proportional":
            inverse[rope.rotated :] = 0
            return inverse / factor
        case "longrope":
            stretch = rope.long_factor if rope.extends(max_positions) else rope.short_factor
            return np.float32(1) / (np.array(stretch, np.float32) * powers)
        case "llama3":
            return _llama3(rope, inverse)
        case "yarn":
            return _yarn(rope, inverse, np.float32(1) / (factor * powers))
        case _:
            return inverse


def _llama3(rope: RopeConfig, inverse: Float32Array) -> Float32Array:
    """Long wavelengths are divided, short ones kept, those between blended."""
    original, factor = rope.original_max_position_embeddings, np.float32(rope.factor)
    wavelength = np.float32(2 * math.pi) / inverse
    smooth = (np.float32(original) / wavelength - np.float32(rope.low_freq_factor)) / np.float32(
        rope.high_freq_factor - rope.low_freq_factor)
    blended = (1 - smooth) * inverse / factor + smooth * inverse
    low, high = original / rope.low_freq_factor, original / rope.high_freq_factor
    return np.where(wavelength > low, inverse / factor, np.where(wavelength < high, inverse, blended))


def _yarn(rope: RopeConfig, extrapolated: Float32Array, interpolated: Float32Array) -> Float32Array:
    def turning(rotations: float) -> float:
        """The dimension that turns so often within the original context."""
        turns = math.log(rope.original_max_position_embeddings / (rotations * 2 * math.pi))
        return rope.dim * turns / (2 * math.log(rope.theta))

    low, high = turning(rope.beta_fast), turning(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    high += 0.001 * (low == high)
    ramp = np.clip((np.arange(rope.dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low), 0, 1)
    kept = 1 - ramp
    blended: Float32Array = interpolated * (1 - kept) + extrapolated * kept
    return blended

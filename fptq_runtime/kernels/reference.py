"""Every op in plain torch, float32: the oracle, the quantizer's forward, and a backend for any machine.

Quantized inputs are fake-quantized floats, so autograd passes through. Weights are dequantized once, at 4 bytes each.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from ml_dtypes import bfloat16, float8_e4m3fn

from fptq_runtime.artifact.numerics import dequantize, fake_quantize, token_scale, unpack_codes
from fptq_runtime.config import KVCacheDtype, ModelConfig
from fptq_runtime.kernels.base import (
    Activation,
    ActivationQuant,
    Array,
    AttentionSpec,
    Curve,
    Embedding,
    Float32Array,
    GatedDelta,
    Int32Array,
    Linear,
    LowRank,
    Norm,
    Ops,
    QuantizedWeight,
    Recurrent,
    Routing,
    SampleInput,
    SampleOutput,
    ShortConv,
    StateSpace,
    StepInput,
    StepLimits,
    Work,
)
from fptq_runtime.kernels.sampling import sample_reference

_ML_DTYPES = {np.dtype(bfloat16): torch.bfloat16, np.dtype(float8_e4m3fn): torch.float8_e4m3fn}


def limit_threads(threads: int) -> None:
    """Of torch, in the whole process; 0 leaves them as they are."""
    if threads:
        torch.set_num_threads(threads)


class ReferenceBackend:
    name = "reference"
    asynchronous = False

    def __init__(self, threads: int = 0) -> None:
        limit_threads(threads)

    def prepare(self, parameter: Any) -> Any:
        """The same classes with torch tensors, all but the embedding in float32."""
        if isinstance(parameter, Linear):
            weight = parameter.weight
            weight = dequantized(weight) if isinstance(weight, QuantizedWeight) else to_torch(weight).float()
            down, up = parameter.low_rank or (None, None)
            low_rank = None if down is None else (_floats(down), _floats(up))
            return replace(parameter, weight=weight, bias=_floats(parameter.bias), low_rank=low_rank)
        if isinstance(parameter, Norm):
            return _float_norm(parameter)
        if isinstance(parameter, Embedding):
            return Embedding(to_torch(parameter.weight))
        if isinstance(parameter, AttentionSpec):
            rope = None if parameter.rope is None else (to_torch(parameter.rope[0]), to_torch(parameter.rope[1]))
            return replace(parameter, q_norm=_float_norm(parameter.q_norm), k_norm=_float_norm(parameter.k_norm),
                           rope=rope, alibi_slopes=_floats(parameter.alibi_slopes), sinks=_floats(parameter.sinks))
        if isinstance(parameter, Routing):
            return replace(parameter, bias=_floats(parameter.bias))
        if isinstance(parameter, ShortConv):
            return replace(parameter, weight=_floats(parameter.weight), bias=_floats(parameter.bias))
        if isinstance(parameter, GatedDelta):
            return replace(parameter, a_log=_floats(parameter.a_log), dt_bias=_floats(parameter.dt_bias),
                           norm_weight=_floats(parameter.norm_weight))
        if isinstance(parameter, StateSpace):
            return replace(parameter, a_log=_floats(parameter.a_log), d=_floats(parameter.d),
                           dt_bias=_floats(parameter.dt_bias), norm_weight=_floats(parameter.norm_weight))
        raise TypeError(f"cannot prepare a {type(parameter).__name__}")

    def adaptable(self, linear: Linear, slots: int) -> AdaptableLinear:
        return AdaptableLinear(**vars(linear), slots=[[] for _ in range(slots + 1)])

    def adapt(self, linear: AdaptableLinear, slot: int, parts: Sequence[LowRank]) -> None:
        linear.slots[slot] = [replace(part, down=_floats(part.down), up=_floats(part.up)) for part in parts]

    def compile(self, forward: Callable[[Ops[Any]], Any], limits: StepLimits,
                sharing: ReferenceExecutor | None = None) -> ReferenceExecutor:
        return ReferenceExecutor(forward, ReferenceCache(limits) if sharing is None else sharing.cache)

    def sample(self, logits: Float32Array, batch: SampleInput) -> SampleOutput:
        return sample_reference(logits, batch)

    def token_bytes(self, model: ModelConfig, dtype: KVCacheDtype) -> int:
        """Of floats, whichever dtype they are rounded to."""
        return 2 * 4 * model.cached_layers * model.num_kv_heads * model.head_dim

    def step_bytes(self, model: ModelConfig, limits: StepLimits) -> int:
        return 0

    def free_memory(self) -> None:
        return None

    def roofs(self) -> None:
        return None

    @property
    def fingerprint(self) -> str:
        return str(self.describe())

    def describe(self) -> dict[str, str]:
        return {"backend": "reference", "kernel": f"torch {torch.__version__}, float32, fake-quantized"}


@dataclass
class AdaptableLinear(Linear):
    """slots: an adapter's parts in each; of slot 0 none."""

    slots: list[list[LowRank]] = field(default_factory=list)


class ReferenceCache:
    """Paged keys and values, stored as the floats that a dtype's codes stand for, each [layers, slots, heads, dim]; and
    the states of recurrent layers, by their names."""

    def __init__(self, limits: StepLimits) -> None:
        shape = (limits.num_layers, limits.num_blocks * limits.block_size, limits.num_kv_heads, limits.head_dim)
        self.block_size = limits.block_size
        self.dtype: KVCacheDtype = limits.kv_dtype
        self.keys = torch.zeros(shape)
        self.values = torch.zeros(shape)
        self._num_states = limits.num_states
        self._states: dict[str, torch.Tensor] = {}

    def write(self, layer: int, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.keys[layer, slots] = round_kv(keys, self.dtype)
        self.values[layer, slots] = round_kv(values, self.dtype)

    def state(self, recurrent: Recurrent, slot: int) -> torch.Tensor:
        """Of one sequence, to be written in place. [state_floats]"""
        if recurrent.name not in self._states:
            self._states[recurrent.name] = torch.zeros(self._num_states, recurrent.state_floats)
        return self._states[recurrent.name][slot]

    @torch.inference_mode()
    def copy_state(self, source: int, target: int) -> None:
        for states in self._states.values():
            states[target] = states[source]

    def read(self, layer: int, block_table: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of positions 0 to length - 1. Each [length, heads, dim]"""
        positions = torch.arange(length)
        slots = block_table[positions // self.block_size] * self.block_size + positions % self.block_size
        return self.keys[layer, slots], self.values[layer, slots]


class ReferenceExecutor:
    def __init__(self, forward: Callable[[Ops[Any]], Any], cache: ReferenceCache) -> None:
        self._forward = forward
        self.cache = cache
        self.seconds = {"forward": 0.0}
        self.blocks = None

    def copy_state(self, source: int, target: int) -> None:
        self.cache.copy_state(source, target)

    def work(self, tokens: int, rows: int) -> Work:
        return Work(0, 0)  # nothing to hold it against: it has no roofs

    def step(self, batch: StepInput, reuse: bool = False, sampled: None = None) -> Float32Array:
        started = time.perf_counter()
        with torch.inference_mode():
            logits: torch.Tensor = self._forward(ReferenceOps(batch, self.cache))
        self.seconds["forward"] += time.perf_counter() - started
        return logits.numpy()


@dataclass(frozen=True)
class Routed:
    """Rows on their way through experts, ordered by expert and then by row. Tensors are [rows · top_k]."""

    rows: torch.Tensor
    weights: torch.Tensor
    counts: tuple[int, ...]  # rows of each expert
    top_k: int


class ReferenceOps:
    """The ops of one step. cache None: every sequence is whole in the batch and attends to itself alone, its keys and
    values rounded as a cache of `kv_dtype` would. device: where the parameters are."""

    def __init__(self, batch: StepInput, cache: ReferenceCache | None, kv_dtype: KVCacheDtype = "float32",
                 device: str = "cpu") -> None:
        self.batch = batch
        self._cache = cache
        self._kv_dtype = kv_dtype if cache is None else cache.dtype
        self._device = device
        self._positions = self._indices(batch.positions)
        self._own_kv: tuple[torch.Tensor, torch.Tensor] | None = None

    def embed(self, table: Embedding) -> torch.Tensor:
        return F.embedding(self._indices(self.batch.token_ids), table.weight).float()

    def embed_positions(self, table: Embedding) -> torch.Tensor:
        return F.embedding(self._positions, table.weight).float()

    def columns(self, xs: Sequence[torch.Tensor], index: Int32Array) -> torch.Tensor:
        picked = torch.cat(tuple(xs), -1).index_select(1, self._indices(np.maximum(index, 0)))
        return picked.masked_fill(self._indices(index) < 0, 0.0)

    def norm(self, x: torch.Tensor, norm: Norm, act: ActivationQuant | None) -> torch.Tensor:
        return quantize_activations(_normalise(x, norm), act)

    def quantize(self, x: torch.Tensor, act: ActivationQuant | None) -> torch.Tensor:
        return quantize_activations(x, act)

    def linear(self, x: torch.Tensor, linear: Linear, residual: torch.Tensor | None = None) -> torch.Tensor:
        assert isinstance(linear.weight, torch.Tensor)
        y = matmul(x, linear.weight, linear.bias)
        if linear.low_rank is not None:
            down, up = linear.low_rank
            y = y + F.linear(F.linear(x, down), up)
        if isinstance(linear, AdaptableLinear):
            self._adapt(x, y, linear.slots)
        return y if residual is None else y + residual

    def _adapt(self, x: torch.Tensor, y: torch.Tensor, slots: list[list[LowRank]]) -> None:
        batch = self.batch
        of_rows = np.repeat(batch.adapters, np.diff(batch.query_start_loc))
        if len(x) != len(of_rows):
            of_rows = of_rows[batch.logits_rows]
        for slot in set(of_rows.tolist()):
            rows = torch.from_numpy(np.flatnonzero(of_rows == slot))
            for part in slots[slot]:
                columns = slice(part.first, part.first + len(part.up))
                y[rows, columns] += part.scale * F.linear(F.linear(x[rows], part.down), part.up)

    def activation(self, x: torch.Tensor, activation: Activation, act: ActivationQuant | None) -> torch.Tensor:
        return quantize_activations(_activate(x, activation), act)

    def add(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x + y

    def scale(self, x: torch.Tensor, factor: float) -> torch.Tensor:
        return x * factor

    def softcap(self, x: torch.Tensor, cap: float) -> torch.Tensor:
        return (x / cap).tanh() * cap

    def rope_and_cache(self, qkv: torch.Tensor, attention: AttentionSpec) -> torch.Tensor:
        heads, kv_heads, dim = attention.num_heads, attention.num_kv_heads, attention.head_dim
        width = heads + 2 * kv_heads
        rows = qkv[:, qkv.shape[1] - width * dim :].reshape(-1, width, dim)
        q, k, v = torch.split(rows, [heads, kv_heads, kv_heads], dim=1)  # each [M, its heads, D]
        if not attention.norm_after_rope:
            q, k = _normalise_heads(q, attention.q_norm), _normalise_heads(k, attention.k_norm)
        if attention.rope is not None:
            cos, sin = (table[self._positions][:, None] for table in attention.rope)  # [M, 1, R / 2]
            q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        if attention.norm_after_rope:
            q, k = _normalise_heads(q, attention.q_norm), _normalise_heads(k, attention.k_norm)
        if self._cache is None:
            self._own_kv = round_kv(k, self._kv_dtype), round_kv(v, self._kv_dtype)
        else:
            self._cache.write(attention.layer, torch.from_numpy(self.batch.slot_mapping).long(), k, v)
        return q.reshape(-1, heads * dim)

    def attention(self, q: torch.Tensor, attention: AttentionSpec, act: ActivationQuant | None,
                  selected: bool = False) -> torch.Tensor:
        batch = self.batch
        rows = q.reshape(-1, attention.num_heads, attention.head_dim)
        if self._kv_dtype == "int8":  # so that q · K is a product of integers
            rows = round_kv(rows, "int8")
        attended = []
        for s, length in enumerate(batch.seq_lens.tolist()):
            first, last = batch.query_start_loc[s : s + 2].tolist()
            if self._cache is None:
                assert self._own_kv is not None
                k, v = (kv[first:last] for kv in self._own_kv)
            else:
                k, v = self._cache.read(attention.layer, torch.from_numpy(batch.block_tables[s]).long(), length)
            attended.append(_attend(rows[first:last], k, v, self._positions[first:last], attention))
        out = torch.cat(attended).reshape(q.shape)
        return quantize_activations(self.select_rows(out) if selected else out, act)

    def short_conv(self, x: torch.Tensor, conv: ShortConv) -> torch.Tensor:
        size = conv.channels
        convolved = x[:, :size] * x[:, size : 2 * size] if conv.gated else x[:, :size]
        made = []
        for rows, state in self._states(conv):
            window = torch.cat((state.view(conv.taps - 1, size), convolved[rows.start : rows.stop]))
            y = F.conv1d(window.T[None], conv.weight[:, None], conv.bias, groups=size)[0].T  # [rows, channels]
            state.copy_(window[len(window) - conv.taps + 1 :].flatten())
            made.append(F.silu(y) if conv.silu else y)
        y = torch.cat(made)
        return y * x[:, 2 * size :] if conv.gated else torch.cat((y, x[:, size:]), -1)

    def gated_delta(self, x: torch.Tensor, ba: torch.Tensor, delta: GatedDelta) -> torch.Tensor:
        keys, values, heads = delta.key_size, delta.value_size, delta.value_heads
        v, z = (x[:, start : start + values].reshape(len(x), heads, -1) for start in (2 * keys, 2 * keys + values))
        q, k = (_unit(x[:, start : start + keys].reshape(len(x), delta.key_heads, -1))
                .repeat_interleave(heads // delta.key_heads, 1) for start in (0, keys))  # [M, value heads, key_dim]
        q = q * delta.key_dim**-0.5
        beta = ba[:, :heads].sigmoid()
        a: torch.Tensor = ba[:, heads:] + delta.dt_bias
        decay = (-delta.a_log.exp() * F.softplus(a)).exp()
        made = []
        for rows, state in self._states(delta):
            s = state.view(heads, delta.key_dim, delta.value_dim).clone()
            for t in rows:
                s = s * decay[t, :, None, None]
                change = (v[t] - (s * k[t, :, :, None]).sum(1)) * beta[t, :, None]
                s = s + k[t, :, :, None] * change[:, None]
                made.append((s * q[t, :, :, None]).sum(1))
            state.copy_(s.flatten())
        normed = _normalise(torch.stack(made), Norm("rms", delta.norm_weight, None, delta.eps))
        return (normed * F.silu(z)).flatten(1)

    def state_space(self, x: torch.Tensor, space: StateSpace) -> torch.Tensor:
        heads, groups, inner, part = space.heads, space.groups, space.channels, space.groups * space.state
        given, b, c, z, dt = torch.split(x, [inner, part, part, inner, heads], -1)
        given = given.reshape(-1, heads, space.head_dim)
        b, c = (each.reshape(-1, groups, space.state).repeat_interleave(heads // groups, 1) for each in (b, c))
        step = F.softplus(dt + space.dt_bias).clamp(space.dt_min, space.dt_max)[..., None]  # [M, heads, 1]
        decay = (step * -space.a_log.exp().reshape(heads, -1)).exp()  # [M, heads, 1 or state]
        made = []
        for rows, state in self._states(space):
            s = state.view(heads, space.head_dim, space.state).clone()
            for t in rows:
                s = s * decay[t, :, None] + (step[t] * given[t])[..., None] * b[t, :, None]
                made.append((s * c[t, :, None]).sum(-1))
            state.copy_(s.flatten())
        y = (torch.stack(made) + given * space.d[:, None]).flatten(1)
        if not space.gate_last:
            y = y * F.silu(z)
        if space.norm_weight is not None:
            each = Norm("rms", space.norm_weight.reshape(groups, -1), None, space.eps)
            y = _normalise(y.reshape(len(y), groups, -1), each).flatten(1)
        gated: torch.Tensor = y * F.silu(z) if space.gate_last else y
        return gated

    def _states(self, recurrent: Recurrent) -> Iterator[tuple[range, torch.Tensor]]:
        """Each sequence's rows, and its state before them, to be written in place: zeros where it begins."""
        batch = self.batch
        for s, (length, slot) in enumerate(zip(batch.seq_lens.tolist(), batch.state_slots.tolist(), strict=True)):
            first, last = batch.query_start_loc[s : s + 2].tolist()
            state = torch.zeros(recurrent.state_floats, device=self._device) if self._cache is None \
                else self._cache.state(recurrent, slot)
            if length == last - first:
                state.zero_()
            if first < last:
                yield range(first, last), state

    def select_rows(self, x: torch.Tensor) -> torch.Tensor:
        return x.index_select(0, self._indices(self.batch.logits_rows))

    def route(self, logits: torch.Tensor, routing: Routing) -> Routed:
        experts, weights = choose_experts(logits, routing)
        order = experts.flatten().argsort(stable=True)
        counts = experts.flatten().bincount(minlength=routing.num_experts)
        return Routed(order // routing.top_k, weights.flatten()[order], tuple(counts.tolist()), routing.top_k)

    def dispatch(self, x: torch.Tensor, routed: Routed) -> torch.Tensor:
        return x.index_select(0, routed.rows)

    def expert_linear(self, x: torch.Tensor, linear: Linear, routed: Routed) -> torch.Tensor:
        weights: Any = linear.weight
        n = weights.shape[0] // linear.experts
        made = []
        for expert, part in enumerate(x.split(routed.counts)):  # type: ignore[no-untyped-call]
            if len(part):
                own = slice(expert * n, expert * n + n)
                made.append(matmul(part, weights[own], None if linear.bias is None else linear.bias[own]))
        return torch.cat(made) if made else x.new_zeros((0, n))

    def combine(self, x: torch.Tensor, routed: Routed, residual: torch.Tensor | None = None) -> torch.Tensor:
        y = x.new_zeros((len(x) // routed.top_k, x.shape[1])).index_add(0, routed.rows, x * routed.weights[:, None])
        return y if residual is None else y + residual

    def gate(self, x: torch.Tensor, logit: torch.Tensor) -> torch.Tensor:
        return x * logit[:, : x.shape[1]].sigmoid()

    def _indices(self, array: Int32Array) -> torch.Tensor:
        return torch.from_numpy(array).long().to(self._device)


def matmul(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [rows, K] · weight [N, K]ᵀ + bias in float32, where a bfloat16 weight makes it a product of bfloat16."""
    if weight.dtype == torch.float32:
        return F.linear(x, weight, bias)
    y = F.linear(x.to(weight.dtype), weight).float()
    return y if bias is None else y + bias


def choose_experts(logits: torch.Tensor, routing: Routing) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each row of logits [rows, experts], the chosen experts, ascending, and their weights. Each [rows, top_k]"""
    match routing.scoring:
        case "softmax":
            scores = logits.softmax(-1)
        case "sigmoid":
            scores = logits.sigmoid()
        case "sparsemixer":
            scores = logits
    choice = scores if routing.bias is None else scores + routing.bias
    if routing.top_groups < routing.groups:
        grouped = choice.unflatten(-1, (routing.groups, -1))
        best = grouped.topk(routing.group_best, -1).values.sum(-1).sort(dim=-1, descending=True, stable=True).indices
        left = torch.zeros_like(best, dtype=torch.bool).scatter_(-1, best[:, : routing.top_groups], True)
        choice = grouped.masked_fill(~left[:, :, None], float("-inf")).flatten(-2)
    experts = choice.sort(dim=-1, descending=True, stable=True).indices[:, : routing.top_k].sort(-1).values
    sparse = routing.scoring == "sparsemixer"
    weights = _share_of_near(logits, experts, routing.jitter) if sparse else scores.gather(-1, experts)
    if routing.normalise:
        weights = weights / weights.sum(-1, keepdim=True)
    return experts, weights * routing.scale


def _share_of_near(logits: torch.Tensor, experts: torch.Tensor, jitter: float) -> torch.Tensor:
    """The softmax of each expert's logit among itself and what is near below it. [rows, top_k]"""
    own, index = logits.gather(-1, experts)[:, :, None], torch.arange(logits.shape[1], device=logits.device)
    others = logits[:, None].expand(-1, experts.shape[1], -1)  # [rows, top_k, experts]
    before = (others > own) | ((others == own) & (index < experts[:, :, None]))
    far = (own - others) / others.abs().maximum(own) > 2 * jitter
    near = others.masked_fill(before | far, float("-inf")).softmax(-1)
    return near.gather(-1, experts[:, :, None])[:, :, 0]


def to_torch(array: Array) -> torch.Tensor:
    """The same memory as a tensor; a tensor as it is."""
    if isinstance(array, torch.Tensor):
        return array
    dtype = _ML_DTYPES.get(array.dtype)
    return torch.from_numpy(array) if dtype is None else torch.from_numpy(array.view(f"i{array.itemsize}")).view(dtype)


def to_numpy(tensor: Array) -> Array:
    """The inverse of `to_torch`."""
    if not isinstance(tensor, torch.Tensor):
        return tensor
    for ours, theirs in _ML_DTYPES.items():
        if tensor.dtype == theirs:
            bits = torch.int16 if tensor.itemsize == 2 else torch.int8
            return tensor.contiguous().view(bits).numpy().view(ours)
    return tensor.numpy()


def dequantized(weight: QuantizedWeight) -> torch.Tensor:
    """float32 [N, K]"""
    codes = unpack_codes(to_torch(weight.packed), weight.num_bits, weight.k)
    return dequantize(codes, to_torch(weight.scale))


def quantize_activations(x: torch.Tensor, act: ActivationQuant | None) -> torch.Tensor:
    """A linear's input [rows, K] as it will be read: quantized as `act` says and back."""
    if act is None:
        return x
    return fake_quantize(x, token_scale(x, act.type) if act.scale is None else act.scale, act.type)


def round_kv(x: torch.Tensor, dtype: KVCacheDtype) -> torch.Tensor:
    """What a cache of that dtype gives back; int8 has one scale a token and head. Shape [..., dim]."""
    if dtype == "float32":
        return x
    if dtype == "bf16":
        return x.bfloat16().float()
    return fake_quantize(x, token_scale(x))


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor,
            attention: AttentionSpec) -> torch.Tensor:
    """q [Q, heads, D] against k, v [T, kv heads, D] at positions 0..T-1. Returns [Q, heads, D]."""
    repeats = attention.num_heads // attention.num_kv_heads
    keys, values = (x.repeat_interleave(repeats, dim=1).transpose(0, 1)[None] for x in (k, v))  # [1, heads, T, D]
    if attention.softcap is not None or attention.sinks is not None:
        return _attend_plainly(q, keys[0], values[0], positions, attention)
    bias = None if _is_plain_causal(q, k, attention) else _attention_bias(positions, k.shape[0], attention)
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None], keys, values, attn_mask=bias, is_causal=bias is None, scale=attention.softmax_scale
    )
    return out[0].transpose(0, 1)


def _attend_plainly(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor,
                    attention: AttentionSpec) -> torch.Tensor:
    """What torch's own attention does not know: capped scores and sinks. keys, values [heads, T, D]"""
    scores = q.transpose(0, 1) @ keys.transpose(1, 2) * attention.softmax_scale  # [heads, Q, T]
    if attention.softcap is not None:
        scores = (scores / attention.softcap).tanh() * attention.softcap
    scores = scores + _attention_bias(positions, keys.shape[1], attention)
    if attention.sinks is not None:
        sinks: torch.Tensor = attention.sinks
        scores = torch.cat((scores, sinks[:, None, None].expand(-1, scores.shape[1], 1)), -1)
    weights = scores.softmax(-1)[..., : keys.shape[1]]
    return (weights @ values).transpose(0, 1)


def _is_plain_causal(q: torch.Tensor, k: torch.Tensor, attention: AttentionSpec) -> bool:
    """A whole sequence, for which torch needs no mask in memory."""
    return q.shape[0] == k.shape[0] and attention.sliding_window is None and attention.alibi_slopes is None


def _attention_bias(positions: torch.Tensor, length: int, attention: AttentionSpec) -> torch.Tensor:
    """What is added to the scores of queries at `positions` [Q]: [Q, length], or [heads, Q, length] with ALiBi."""
    key_positions = torch.arange(length, device=positions.device)
    distance = positions[:, None] - key_positions
    hidden = distance < 0
    if attention.sliding_window is not None:
        hidden = hidden | (distance >= attention.sliding_window)
    bias = torch.zeros(distance.shape, device=positions.device).masked_fill(hidden, float("-inf"))
    if attention.alibi_slopes is None:
        return bias
    slopes: torch.Tensor = attention.alibi_slopes
    return bias + slopes[:, None, None] * key_positions.float()


def _normalise(x: torch.Tensor, norm: Norm) -> torch.Tensor:
    if norm.kind == "layer":
        return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)
    weight: torch.Tensor = norm.weight
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps) * weight


def _unit(x: torch.Tensor) -> torch.Tensor:
    """Divided by its length along the last dimension, as transformers has it."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def _normalise_heads(x: torch.Tensor, norm: Norm | None) -> torch.Tensor:
    """x [M, heads, D], by heads or all of them as one row, as the weight's shape says."""
    if norm is None:
        return x
    if norm.weight.ndim == 1 and norm.weight.numel() != x.shape[-1]:
        return _normalise(x.flatten(1), norm).view_as(x)
    if norm.weight.ndim == 1:
        return _normalise(x, norm)
    weight: torch.Tensor = norm.weight
    own = _normalise(x, replace(norm, weight=torch.ones_like(weight[0]), bias=None)) * weight
    return own if norm.bias is None else own + norm.bias


def _activate(x: torch.Tensor, activation: Activation) -> torch.Tensor:
    if activation.curve == "clamped_swiglu":
        gate, up = x.chunk(2, dim=-1)
        gate, up = gate.clamp(max=activation.limit), up.clamp(-activation.limit, activation.limit)
        return gate * torch.sigmoid(1.702 * gate) * (up + 1)
    if activation.gated:
        gate, up = x.chunk(2, dim=-1)
        return _curve(gate, activation.curve) * up
    return _curve(x, activation.curve)


def _curve(x: torch.Tensor, curve: Curve) -> torch.Tensor:
    match curve:
        case "silu":
            return F.silu(x)
        case "gelu_tanh":
            return F.gelu(x, approximate="tanh")
        case "gelu":
            return F.gelu(x)
        case "relu":
            return F.relu(x)
        case "relu2":
            return F.relu(x).square()
        case _:
            raise ValueError(f"{curve} is gated")


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The first dimensions of x [M, heads, D], twice as many as cos and sin [M, 1, R / 2] have."""
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)


def _float_norm(norm: Norm | None) -> Any:
    if norm is None:
        return None
    return replace(norm, weight=_floats(norm.weight), bias=_floats(norm.bias))


def _floats(array: Array | None) -> torch.Tensor | None:
    return None if array is None else to_torch(array).float()

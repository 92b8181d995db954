"""The contract between a model and a backend: parameters, one step's input, the ops, and who runs them.

A decoder is a function of `Ops` and nothing else. A backend that computes eagerly hands it ops whose values are
tensors; a backend that compiles hands it ops that record, once, and keeps the program.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Annotated, Any, Literal, Protocol, TypeVar, get_args, get_type_hints

import numpy as np
import numpy.typing as npt

from fptq_runtime.artifact.scheme import NumberType
from fptq_runtime.config import KVCacheDtype, ModelConfig

V = TypeVar("V")

# A parameter's values: a numpy array (bfloat16 is ml_dtypes'), often mapped from the checkpoint's file. The reference
# backend fills the same classes with torch tensors.
Array = Any

# Rows of logits [R, V], float32: numpy's where the backend computes in memory, a tensor where it computes on a device.
# Only the backend that made them reads them, and `logits_array`.
Logits = Any

Int32Array = npt.NDArray[np.int32]
UInt8Array = npt.NDArray[np.uint8]
UInt32Array = npt.NDArray[np.uint32]
Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]

GREEDY_BELOW = 1e-5  # vLLM's bound: a temperature below is 0


@dataclass(frozen=True)
class ActivationQuant:
    """8-bit quantization of a linear layer's input. int: q = clamp(round(x / scale), -128, 127), half to even; float:
    the nearest FP8 E4M3.

    scale: the static per-tensor scale; None means dynamic per token, scale = max|x| / 127.5 of each row, or / 448
    (compressed-tensors' symmetric formula).
    """

    scale: float | None = None
    type: NumberType = "int"


@dataclass
class QuantizedWeight:
    """W[n, k] = codes[n, k] · scale[n, k // group_size]."""

    packed: Array  # as artifact/numerics.py's pack_codes packs the codes
    scale: Array  # float [N, K / group_size]
    num_bits: Literal[4, 8]
    group_size: int  # K where quantized per channel
    type: NumberType = "int"

    @property
    def k(self) -> int:
        return int(self.scale.shape[1]) * self.group_size


@dataclass
class Linear:
    """y = x · Wᵀ + bias. `act` says how x is quantized before; None leaves it in float.

    low_rank: down [r, K] and up [N, r], in float: y += (x · downᵀ) · upᵀ, of the same quantized x. Each row of down
    that the quantizer makes is int8 times a power of two, for integer kernels.
    experts: so many linears of equal size whose rows are stacked, N in all; a row of x is read by one of them, and
    they quantize it alike.
    """

    name: str
    weight: Array | QuantizedWeight  # [N, K]
    bias: Array | None = None  # [N]
    act: ActivationQuant | None = None
    low_rank: tuple[Array, Array] | None = None
    experts: int = 1

    @property
    def rows(self) -> int:
        """N."""
        return int((self.weight.packed if isinstance(self.weight, QuantizedWeight) else self.weight).shape[0])

    def expert(self, index: int) -> Linear:
        """One of them by itself: the same memory."""
        size = self.rows // self.experts
        own = slice(index * size, (index + 1) * size)
        weight = self.weight
        taken = (replace(weight, packed=weight.packed[own], scale=weight.scale[own])
                 if isinstance(weight, QuantizedWeight) else weight[own])
        return Linear(f"{self.name}.{index}", taken, None if self.bias is None else self.bias[own], self.act)


@dataclass(frozen=True)
class LowRank:
    """What an adapter adds to columns first to first + n of a linear's output: scale · (x · downᵀ) · upᵀ, x as the
    linear reads it, quantized or not."""

    first: int
    down: Array  # [r, K]
    up: Array  # [n, r]
    scale: float


@dataclass
class Norm:
    """RMSNorm (no bias) or LayerNorm over the last dimension."""

    kind: Literal["rms", "layer"]
    weight: Array  # [H]
    bias: Array | None  # [H]
    eps: float


@dataclass
class Embedding:
    weight: Array  # [V, H]


Parameter = Linear | Norm | Embedding

Curve = Literal["silu", "gelu_tanh", "gelu", "relu", "relu2", "clamped_swiglu"]


@dataclass(frozen=True)
class Activation:
    """What an MLP does between its linears: curve(x), or where it is gated curve(x[:, :I]) · x[:, I:].

    "gelu" is the exact one (erf), "relu2" is relu(x)². "clamped_swiglu" is gpt-oss's and always gated: with the gate at
    most `limit` and up within ±limit it is gate · sigmoid(1.702 · gate) · (up + 1).
    """

    curve: Curve
    gated: bool = False
    limit: float = 7.0

    def width(self, columns: int) -> int:
        """Columns that it makes of so many."""
        return columns // 2 if self.gated else columns


@dataclass
class AttentionSpec:
    """Causal grouped-query attention of one layer; query head h reads KV head h // (num_heads / num_kv_heads).

    sliding_window: a query at position p sees keys at positions > p - sliding_window.
    rope: cos and sin, each float32 [max positions, R / 2], for the first R of head_dim dimensions, the halves paired as
    (i, i + R / 2); the others stay as they are. None: no rope in this layer.
    alibi_slopes: float32 [num_heads]; slope · key position is added to the score.
    q_norm, k_norm: RMSNorm or LayerNorm, before rope or, with `norm_after_rope`, after it. A weight [head_dim] is every
    head's, each normalised by itself; [heads, head_dim] holds each head's own; [heads · head_dim], of more than one
    head, normalises all heads as one row.
    softcap: scores become softcap · tanh(score / softcap) before anything is added to them.
    sinks: float32 [num_heads]; exp(sink) joins each row's softmax sum, and has no value.
    """

    layer: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    softmax_scale: float
    sliding_window: int | None = None
    rope: tuple[Array, Array] | None = None
    alibi_slopes: Array | None = None
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    norm_after_rope: bool = False
    softcap: float | None = None
    sinks: Array | None = None


@dataclass
class Routing:
    """Which experts a token goes to by its router's logits, and what each one's output counts.

    Scores are the softmax or the sigmoid of the logits, or the logits themselves ("sparsemixer", arXiv 2409.12136: what
    an expert counts is its softmax among itself and all that score less, without those that are further below it than
    2 · `jitter` of the greater of its logit and their magnitude). Of equal groups of experts the `top_groups` with the
    greatest sums of their `group_best` best scores stay, of their experts the `top_k` of the best scores, the lower
    index on ties; `bias` float32 [num_experts] is added to scores in these choices alone. An expert's output counts its
    score, divided by the sum of all chosen where `normalise`, times `scale`.
    """

    num_experts: int
    top_k: int
    scoring: Literal["softmax", "sigmoid", "sparsemixer"] = "softmax"
    normalise: bool = True
    scale: float = 1.0
    bias: Array | None = None
    groups: int = 1
    top_groups: int = 1
    group_best: int = 1
    jitter: float = 0.0


@dataclass
class ShortConv:
    """Causal convolution of a row's first columns, each by itself: y[t] = Σ_j weight[:, j] · x[t + j + 1 - taps] +
    bias, x being zero before its sequence begins, then silu where `silu`; the columns behind pass as they are. `gated`:
    a row is B | x | C, of `channels` each, and becomes C · y of B · x. State: what is convolved of the last taps - 1
    tokens.
    """

    name: str
    channels: int
    taps: int
    silu: bool = False
    gated: bool = False
    weight: Array = None  # [channels, taps]
    bias: Array | None = None  # [channels]

    @property
    def state_floats(self) -> int:
        return self.channels * (self.taps - 1)


@dataclass
class GatedDelta:
    """The gated delta rule (arXiv 2412.06464). A row is q | k | v | z, of `key_heads` heads of key_dim and
    `value_heads` of value_dim; value head h reads key head h // (value_heads / key_heads). b and a are a number for
    each value head.

    q and k are divided by their lengths, q by sqrt(key_dim) too. With decay = exp(-exp(a_log) · softplus(a + dt_bias))
    and beta = sigmoid(b), a head's state S [key_dim, value_dim], zeros before a sequence begins, becomes
    S' = decay · S + k (v - k · decay · S) beta, and its output is RMSNorm(q · S') · silu(z), with norm_weight and eps.
    """

    name: str
    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    eps: float
    a_log: Array = None  # float32 [value_heads]
    dt_bias: Array = None  # float32 [value_heads]
    norm_weight: Array = None  # [value_dim]

    @property
    def key_size(self) -> int:
        return self.key_heads * self.key_dim

    @property
    def value_size(self) -> int:
        return self.value_heads * self.value_dim

    @property
    def state_floats(self) -> int:
        return self.key_dim * self.value_size


@dataclass
class StateSpace:
    """The selective state space of Mamba (arXiv 2312.00752) and Mamba-2 (arXiv 2405.21060). A row is x | B | C | z |
    dt, of `heads` heads of head_dim numbers of x and of z, `groups` groups of `state` numbers of B and of C, and a
    number dt for each head; head h reads group h // (heads / groups).

    With step = softplus(dt + dt_bias), within dt_min and dt_max, and decay = exp(-exp(a_log) · step), of a head or,
    where heads have one channel, of each of its states, a head's state S [head_dim, state], zeros before a sequence
    begins, becomes S' = decay · S + step · x Bᵀ, and its output is S' · C + d · x, times silu(z). norm_weight: then
    RMSNorm of each group's channels; with `gate_last` silu(z) comes after it.
    """

    name: str
    heads: int
    head_dim: int
    groups: int
    state: int
    dt_min: float = 0.0
    dt_max: float = math.inf
    eps: float = 0.0
    gate_last: bool = False
    a_log: Array = None  # float32 [heads], or [heads, state]
    d: Array = None  # float32 [heads]
    dt_bias: Array = None  # float32 [heads]
    norm_weight: Array | None = None  # [channels]

    @property
    def channels(self) -> int:
        return self.heads * self.head_dim

    @property
    def convolved(self) -> int:
        """Numbers of x | B | C."""
        return self.channels + 2 * self.groups * self.state

    @property
    def state_floats(self) -> int:
        return self.channels * self.state


Recurrent = ShortConv | GatedDelta | StateSpace


def arrays_of(contract: type) -> list[tuple[str, str, str]]:
    """(name, dtype, shape) of each array of a dataclass, in order: what the backends lay them out and check them by."""
    def dtype(hint: Any) -> str:
        arguments = get_args(hint)
        return dtype(arguments[-1]) if arguments else str(hint.__name__)

    hints = get_type_hints(contract, include_extras=True)
    return [(field.name, dtype(hints[field.name].__origin__), hints[field.name].__metadata__[0])
            for field in fields(contract)]


@dataclass(frozen=True)
class StepInput:
    """One step: M tokens of S sequences, packed one sequence after the other. A field's annotation is its shape.

    Rows query_start_loc[s] to query_start_loc[s + 1] belong to sequence s, at consecutive positions that end with
    seq_lens[s] - 1. slot = block · block_size + offset within the block; -1, on a device: the row is kept nowhere.
    state_slots: where recurrent layers keep each sequence's state, below StepLimits.num_states and no two alike: as of
    its tokens before these, or anything where it begins at position 0.
    """

    token_ids: Annotated[Int32Array, "M"]  # below 0, where an earlier sample is given: -1 - d is what its draw d draws
    positions: Annotated[Int32Array, "M"]
    slot_mapping: Annotated[Int32Array, "M"]
    query_start_loc: Annotated[Int32Array, "S + 1"]
    seq_lens: Annotated[Int32Array, "S"]  # tokens in the cache after this step
    block_tables: Annotated[Int32Array, "S, blocks"]  # rows padded with 0
    logits_rows: Annotated[Int32Array, "R"]  # which of the M rows need logits; R may be 0
    state_slots: Annotated[Int32Array, "S"]
    adapters: Annotated[Int32Array, "S"] = field(default_factory=lambda: np.zeros(0, np.int32))  # slots; 0: none

    def __post_init__(self) -> None:
        if self.adapters.size == 0:
            object.__setattr__(self, "adapters", np.zeros(len(self.seq_lens), np.int32))

    @classmethod
    def whole(cls, windows: Sequence[Sequence[int]], block_size: int = 16) -> StepInput:
        """Whole sequences, each in cache blocks of its own, one after the other; every row wants logits."""
        lengths = [len(window) for window in windows]
        blocks = [-(-length // block_size) for length in lengths]
        firsts = [sum(blocks[:s]) for s in range(len(blocks))]
        tables = np.zeros((len(windows), max(blocks)), np.int32)
        for s, (first, count) in enumerate(zip(firsts, blocks, strict=True)):
            tables[s, :count] = np.arange(first, first + count)
        positions = [np.arange(length, dtype=np.int32) for length in lengths]
        return cls(
            token_ids=np.concatenate([np.asarray(window, np.int32) for window in windows]),
            positions=np.concatenate(positions),
            slot_mapping=np.concatenate([p + np.int32(first * block_size)
                                         for p, first in zip(positions, firsts, strict=True)]),
            query_start_loc=np.cumsum([0, *lengths], dtype=np.int32),
            seq_lens=np.asarray(lengths, np.int32),
            block_tables=tables,
            logits_rows=np.arange(sum(lengths), dtype=np.int32),
            state_slots=np.arange(len(windows), dtype=np.int32),
        )


@dataclass(frozen=True)
class StepLimits:
    """The largest step an executor must take, and its KV cache, of so many layers that attend. kept_states: slots for
    states of recurrent layers, beside one for each of max_seqs."""

    max_tokens: int
    max_seqs: int
    max_logits_rows: int
    max_model_len: int
    num_blocks: int
    block_size: int
    kv_dtype: KVCacheDtype
    num_layers: int
    num_kv_heads: int
    head_dim: int
    kept_states: int = 0

    @classmethod
    def of(cls, model: ModelConfig, *, max_tokens: int, max_model_len: int, num_blocks: int, max_seqs: int = 1,
           max_logits_rows: int | None = None, block_size: int = 16, kv_dtype: KVCacheDtype = "float32",
           kept_states: int = 0) -> StepLimits:
        """For a model. max_logits_rows: as many as tokens unless given."""
        return cls(max_tokens, max_seqs, max_tokens if max_logits_rows is None else max_logits_rows, max_model_len,
                   num_blocks, block_size, kv_dtype, model.cached_layers, model.num_kv_heads, model.head_dim,
                   kept_states)

    @property
    def num_states(self) -> int:
        return self.max_seqs + self.kept_states


PARAMETERS = np.dtype([
    ("seed", "u8"), ("temperature", "f8"), ("top_p", "f8"), ("min_p", "f8"), ("repetition_penalty", "f8"),
    ("presence_penalty", "f8"), ("frequency_penalty", "f8"), ("top_k", "i8"),
])  # top_k 0, top_p 1, min_p 0, repetition_penalty 1 and the other penalties 0 are off


@dataclass(frozen=True)
class SampleInput:
    """D rows of logits, each to draw a token from or to score a token with.

    Where mask_rows[d] is not -1, the logit of each token t whose bit, t % 32 of word t / 32 of that mask, is 0 counts
    as -inf from the beginning, whatever it is. Then draw d, in this order:
    1. bias: logits[bias_ids] += bias_values, for entries bias_start[d] to bias_start[d + 1]; -inf suppresses.
    2. repetition: logits of all tokens in the history are divided by the penalty where positive, else multiplied.
    3. presence + frequency · count is subtracted for the tokens of the output, which begins at output_start[d].
    4. temperature below GREEDY_BELOW: the largest logit, the lower id on ties. Else weights = exp((x - max) / t).
    5. min_p keeps weights >= min_p; of those top_k the k largest logits, the lower id first on ties; of those top_p
       the fewest largest that hold that share of their weight.
    6. The first kept id at which the running sum, by ascending id, exceeds uniform · the sum.

    uniform: 53 bits of Philox4x64-10 keyed by the seed, the position its counter; numpy's random.Philox.
    """

    parameters: Annotated[npt.NDArray[np.void], "D"]  # of PARAMETERS
    rows: Annotated[Int32Array, "D"]  # ascending
    token_ids: Annotated[Int32Array, "D"]  # the token to score; -1: draw
    positions: Annotated[npt.NDArray[np.int64], "D"]  # what the randomness is counted by
    num_logprobs: Annotated[Int32Array, "D"]  # how many of the best tokens to report beside the own; -1: report nothing
    mask_rows: Annotated[Int32Array, "D"]  # which of the masks holds the tokens that are allowed; -1: all are
    masks: Annotated[UInt32Array, "masks, words"]  # words: ceil(V / 32), where there is a mask
    bias_start: Annotated[Int32Array, "D + 1"]
    bias_ids: Annotated[Int32Array, "biases"]  # no id twice in a draw
    bias_values: Annotated[Float32Array, "biases"]
    history_start: Annotated[Int32Array, "D + 1"]  # each draw's own tokens; none where no penalty applies
    output_start: Annotated[Int32Array, "D"]
    history: Annotated[Int32Array, "tokens"]


@dataclass(frozen=True)
class SampleOutput:
    """Log-probabilities are of the logits as they came, masked: x - max - log Σ exp(x - max). Entries that nobody asked
    for are undefined."""

    token_ids: Annotated[Int32Array, "D"]  # drawn or scored; -1 where logits are NaN, or their maximum is not finite
    logprobs: Annotated[Float64Array, "D"]
    top_ids: Annotated[Int32Array, "D, width"]  # as many as most num_logprobs, V at most; the best first, the lower id
    top_logprobs: Annotated[Float64Array, "D, width"]  # first on ties

    @classmethod
    def empty(cls, batch: SampleInput) -> SampleOutput:
        draws, width = batch.rows.size, int(batch.num_logprobs.max(initial=0))
        return cls(np.full(draws, -1, np.int32), np.empty(draws), np.empty((draws, width), np.int32),
                   np.empty((draws, width)))

    def result(self) -> SampleOutput:
        return self


class PendingSample(Protocol):
    """What a device draws, maybe later; the next step may read its tokens before the host does."""

    def result(self) -> SampleOutput:
        """Waits for it."""
        ...


@dataclass(frozen=True)
class Work:
    """Of one step's linears: a multiply-add is one; each weight and its scales are read once. Of experts those count
    that the last step reached, where a backend counts them and it had as many tokens; else as many as are reached by
    tokens that go to any expert alike."""

    multiply_adds: int
    weight_bytes: int


@dataclass(frozen=True)
class Roofs:
    """What a machine's threads reach together: integer GOPS (a multiply-add is two), GB/s read from memory."""

    gops: float
    read_gb_per_s: float


class Ops(Protocol[V]):
    """The network's vocabulary. Float values are float32 [rows, width]; a value made with `act` set is quantized
    and only a linear with that same `act` may read it. Parameters are what `Backend.prepare` returned; a prepared
    linear has its `act`."""

    def embed(self, table: Any) -> V:
        """Rows of the table for the step's token ids. [M, H]"""
        ...

    def embed_positions(self, table: Any) -> V:
        """Rows of the table for the step's positions. [M, H]"""
        ...

    def columns(self, xs: Sequence[V], index: Int32Array) -> V:
        """Columns of xs side by side: column index[j] at j, zeros where that is -1. [rows, len(index)]"""
        ...

    def norm(self, x: V, norm: Any, act: ActivationQuant | None) -> V:
        """Normalise each row, then quantize."""
        ...

    def quantize(self, x: V, act: ActivationQuant | None) -> V:
        """x as a linear with that `act` reads it; x itself where `act` is None."""
        ...

    def linear(self, x: V, linear: Any, residual: V | None = None) -> V:
        """x · Wᵀ + bias + residual, and what the adapter of a row's sequence adds to that, where the linear was made
        `adaptable`. [rows, N]"""
        ...

    def activation(self, x: V, activation: Activation, act: ActivationQuant | None) -> V:
        """Apply it to each row, then quantize. [rows, N] to [rows, activation.width(N)]"""
        ...

    def add(self, x: V, y: V) -> V:
        """x + y, both [rows, width]."""
        ...

    def scale(self, x: V, factor: float) -> V:
        """x · factor."""
        ...

    def softcap(self, x: V, cap: float) -> V:
        """cap · tanh(x / cap)."""
        ...

    def rope_and_cache(self, qkv: V, attention: Any) -> V:
        """Split rows that end with q | k | v, q/k norm, rope, write k and v to the cache. Returns q.
        [M, heads · head_dim]"""
        ...

    def attention(self, q: V, attention: Any, act: ActivationQuant | None, selected: bool = False) -> V:
        """Paged causal attention that reads every key and value from the cache, then quantize. [M, heads · dim], or
        where `selected` only the step's logits_rows of it, [R, heads · dim]."""
        ...

    def short_conv(self, x: V, conv: Any) -> V:
        """What a `ShortConv` makes of all rows, whose sequences' states it moves on. [M, channels], or as wide as x."""
        ...

    def gated_delta(self, x: V, ba: V, delta: Any) -> V:
        """What a `GatedDelta` makes of all rows, whose sequences' states it moves on. ba: b | a. [M, value_size]"""
        ...

    def state_space(self, x: V, space: Any) -> V:
        """What a `StateSpace` makes of all rows, whose sequences' states it moves on. [M, channels]"""
        ...

    def select_rows(self, x: V) -> V:
        """The step's logits_rows. [R, H]"""
        ...

    def route(self, logits: V, routing: Any) -> Any:
        """Where each row of a router's logits [rows, experts] goes: the `routed` of the ops of experts."""
        ...

    def dispatch(self, x: V, routed: Any) -> V:
        """Each row once for each expert it goes to, all rows of an expert together. [rows · top_k, width]"""
        ...

    def expert_linear(self, x: V, linear: Any, routed: Any) -> V:
        """`linear` of dispatched rows, each by its own expert. [rows · top_k, N / experts]"""
        ...

    def combine(self, x: V, routed: Any, residual: V | None = None) -> V:
        """What a row's experts made of it, weighed and added, experts ascending, + residual. [rows, width]"""
        ...

    def gate(self, x: V, logit: V) -> V:
        """x [rows, width] · sigmoid of the logit [rows, 1], or of its first columns [rows, width or more]."""
        ...


class DeviceLostError(RuntimeError):
    """The device computes nothing for this process any more; a new one may have more luck."""


class Executor(Protocol):
    """A model bound to a backend, a KV cache and the limits it was compiled for."""

    @property
    def seconds(self) -> dict[str, float]:
        """Spent inside all steps so far, by kind of op."""
        ...

    @property
    def blocks(self) -> UInt8Array | None:
        """The KV cache by block, [num_blocks, bytes], to read and write between steps; None where it cannot be."""
        ...

    def copy_state(self, source: int, target: int) -> None:
        """Between steps: have recurrent layers keep in slot `target` what they keep in slot `source`."""
        ...

    def work(self, tokens: int, rows: int) -> Work:
        """What the linears of a step with that many tokens and rows of logits must do at least."""
        ...

    def step(self, batch: StepInput, reuse: bool = False, sampled: Any = None) -> Logits:
        """Run one step and return logits [R, V]. They are the caller's to keep, except with `reuse`, which spares a
        fresh array: then they hold until the next step. sampled: what the backend, which is asynchronous, gave for the
        sample that the step's token ids refer to."""
        ...


class Backend(Protocol):
    """asynchronous: a step and a sample return before they are computed, and a step may read an earlier sample."""

    name: str
    asynchronous: bool

    def prepare(self, parameter: Any) -> Any:
        """Take a Linear, Norm, Embedding, AttentionSpec, Routing or Recurrent into the backend's own form. The caller
        drops its arrays afterwards, so that a model loads with little more memory than its packed weights."""
        ...

    def adaptable(self, linear: Any, slots: int) -> Any:
        """A prepared linear that shares its memory with this one and takes adapters into slots 1 to `slots`."""
        ...

    def adapt(self, linear: Any, slot: int, parts: Sequence[LowRank]) -> None:
        """Put an adapter's parts of an adaptable linear into a slot, or empty it: for the steps that begin after. A
        row's bits depend on its own adapter alone. Where the linear reads int8, the parts may be held as int8, too,
        with a scale for each of the rank."""
        ...

    def compile(self, forward: Callable[[Ops[Any]], Any], limits: StepLimits, sharing: Any = None) -> Executor:
        """`forward` returns the logits value, or any other floats of the selected rows. The executor has a KV cache of
        its own, unless it is `sharing` that of another which this backend compiled for as many blocks."""
        ...

    def sample(self, logits: Logits, batch: SampleInput) -> PendingSample:
        """Draw or score tokens, given rows of logits [R, V]; they are the same afterwards."""
        ...

    def token_bytes(self, model: ModelConfig, dtype: KVCacheDtype) -> int:
        """What its KV cache takes for one token, in all layers that have one."""
        ...

    def step_bytes(self, model: ModelConfig, limits: StepLimits) -> int:
        """What the largest step takes of a device's memory beside weights and cache; 0 where it is the machine's."""
        ...

    def free_memory(self) -> int | None:
        """Bytes of the device's memory that nobody holds; None where it is the machine's own."""
        ...

    def roofs(self) -> Roofs | None:
        """Measured now, on what runs the model; None where a backend has none to reach."""
        ...

    @property
    def fingerprint(self) -> str:
        """What decides, beside parameters and tokens, which bits are computed."""
        ...

    def describe(self) -> dict[str, str]:
        """What really runs: ISA and kernel by kind of layer prepared so far, for /info and `fptq bench`."""
        ...


def logits_array(logits: Logits) -> Float32Array:
    """Any backend's logits as numpy's, [R, V]; waits for a device."""
    array: Float32Array = logits if isinstance(logits, np.ndarray) else logits.cpu().numpy()
    return array

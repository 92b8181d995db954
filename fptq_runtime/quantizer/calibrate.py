"""Calibration data, and what a block's inputs look like on it. Everything runs the decoder that is served."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from fptq_runtime.artifact.io import TextRecord
from fptq_runtime.errors import FptqError
from fptq_runtime.kernels.base import Int32Array, Linear, Routing, StepInput
from fptq_runtime.kernels.reference import ReferenceBackend, ReferenceOps, Routed, choose_experts
from fptq_runtime.models.block import Block, Model, Stem, prepare_block
from fptq_runtime.models.tokenizer import Tokenizer

MINIBATCH_FLOATS = 1 << 22  # of a block's widest intermediate, 16 MiB: small enough for malloc to reuse
MINIBATCH_ROWS = 256  # but not fewer: each minibatch reads the whole block
BF16_WEIGHTS = 1 << 19  # of a linear; from here on a product in bfloat16 takes a quarter to a half of the time
SAMPLE_ROWS = 1024  # input rows kept of each linear, to measure errors on
MASSIVE = 20.0  # times the largest |x| of the median token
FIRST_COUNTS = 100.0
LONGEST = 3.0
BAND = 1024  # rows of a Hessian added up at a time, from the diagonal on: half of it is the other half's mirror image


class CalibrationError(FptqError):
    """Text that cannot be calibrated or measured on. One line, for the user."""


@dataclass(frozen=True)
class Text:
    """A named text; sha256 is of its bytes as read."""

    name: str
    content: str
    sha256: str

    def record(self, tokens: int) -> TextRecord:
        return TextRecord(name=self.name, sha256=self.sha256, tokens=tokens)


def read_text(path: Path | str) -> Text:
    """A UTF-8 text file. Raises CalibrationError."""
    try:
        data = Path(path).read_bytes()
        return _text(Path(path).name, data)
    except OSError as error:
        raise CalibrationError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None


def packaged_text(name: Literal["calibration", "heldout"]) -> Text:
    """The text that comes with the package: public-domain tales; "heldout" is never calibrated on."""
    data = resources.files("fptq_runtime.quantizer").joinpath("data", f"{name}.txt").read_bytes()
    return _text(f"fptq {name}.txt", data)


def _text(name: str, data: bytes) -> Text:
    return Text(name, data.decode("utf-8"), hashlib.sha256(data).hexdigest())


def bos_prefix(tokenizer: Tokenizer) -> list[int]:
    """What the tokenizer puts before a prompt, as it will when the model is served: [BOS], or nothing."""
    text = "a"
    whole, plain = tokenizer.encode(text), tokenizer.encode(text, add_special_tokens=False)
    return whole[: next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)]


def sample_windows(text: Text, tokenizer: Tokenizer, lengths: Sequence[int], seed: int) -> list[list[int]]:
    """One window of each length, BOS included, from a random place of the text. Raises CalibrationError."""
    bos = bos_prefix(tokenizer)
    token_ids = tokenizer.encode(text.content, add_special_tokens=False)
    if len(token_ids) < max(lengths):
        raise CalibrationError(f"{text.name} has {len(token_ids)} tokens, fewer than one sample of {max(lengths)}")
    generator = torch.Generator().manual_seed(seed)
    windows = []
    for body in (length - len(bos) for length in lengths):
        start = int(torch.randint(len(token_ids) - body + 1, (1,), generator=generator))
        windows.append(bos + token_ids[start : start + body])
    return windows


def random_windows(tokenizer: Tokenizer, vocab_size: int, lengths: Sequence[int], seed: int) -> list[list[int]]:
    """Windows of tokens drawn uniformly from the vocabulary, BOS first: calibration without data."""
    bos = bos_prefix(tokenizer)
    generator = torch.Generator().manual_seed(seed)
    known = min(vocab_size, tokenizer.vocab_size)
    return [bos + torch.randint(known, (length - len(bos),), generator=generator).tolist() for length in lengths]


def check_token_ids(windows: Sequence[Sequence[int]], vocab_size: int) -> None:
    """Raises CalibrationError where a token, which a tokenizer may have that the model was not resized for, has no
    embedding."""
    largest = max((max(window) for window in windows if window), default=0)
    if largest >= vocab_size:
        raise CalibrationError(f"the tokenizer gives token {largest}, but the model's vocabulary has {vocab_size} "
                               f"tokens, 0 to {vocab_size - 1}; resize its embeddings to the tokenizer, or take the "
                               "text or the special token that it stands for out")


def in_bf16(linear: Linear) -> Linear:
    """A block's linear as a walk over many rows computes it: a large one with bfloat16 weights, where this CPU
    multiplies those faster. An input code of eight bits is exact in bfloat16; what is rounded is a fraction of its
    step."""
    weight = linear.weight
    assert isinstance(weight, torch.Tensor)
    if weight.numel() < BF16_WEIGHTS or not torch.cpu.get_capabilities().get("avx512_bf16", False):
        return linear
    return replace(linear, weight=weight.bfloat16())


OpsFactory = Callable[[StepInput], ReferenceOps]


def _plain_ops(batch: StepInput) -> ReferenceOps:
    return ReferenceOps(batch, None)


class HiddenStates:
    """The hidden states of a set of windows, in minibatches, taken through the model one part at a time."""

    def __init__(self, model: Model, windows: Sequence[Sequence[int]]) -> None:
        check_token_ids(windows, model.config.vocab_size)
        self.model = model
        widest = max(max(linear.n // linear.experts, linear.k) for block in model.blocks for linear in block.linears)
        rows = max(MINIBATCH_ROWS, MINIBATCH_FLOATS // widest)
        self.batches: list[StepInput] = []
        pending: list[Sequence[int]] = []
        for window in windows:
            if pending and sum(map(len, pending)) + len(window) > rows:
                self.batches.append(StepInput.whole(pending))
                pending = []
            pending.append(window)
        self.batches.append(StepInput.whole(pending))
        self.states: list[torch.Tensor] = []  # [rows, hidden] each

    @torch.inference_mode()
    def run_stem(self, stem: Stem) -> None:
        self.states = [stem.forward(_plain_ops(batch)) for batch in self.batches]

    @torch.inference_mode()
    def run_block(self, block: Block, ops: OpsFactory = _plain_ops) -> None:
        self.states = list(self.block_outputs(block, ops))

    def block_outputs(self, block: Block, ops: OpsFactory = _plain_ops) -> Iterator[torch.Tensor]:
        """What the block makes of each minibatch; the states stay as they are."""
        block = _fast(block)
        for batch, state in zip(self.batches, self.states, strict=True):
            yield block.forward(ops(batch), state)

    @torch.inference_mode()
    def negative_log_likelihood(self, head: Block) -> tuple[float, int]:
        """Sum over every token but the first of its window, in nats, and how many tokens that is."""
        chunk = max(1, MINIBATCH_FLOATS // self.model.config.vocab_size)
        total, count = 0.0, 0
        for batch, state in zip(self.batches, self.states, strict=True):
            predicts, target = next_tokens(batch)
            for start in range(0, len(predicts), chunk):
                rows = predicts[start : start + chunk]
                logits = head.forward(_plain_ops(batch), state[torch.from_numpy(rows)])
                total += sum_nll(logits, target[start : start + chunk])
            count += len(predicts)
        return total, count


def _fast(block: Block) -> Block:
    """As a walk computes it: all rows, also of the last block."""
    return replace(block.with_linears(lambda name, linear: in_bf16(linear)), last=False)


def next_tokens(batch: StepInput) -> tuple[np.ndarray, np.ndarray]:
    """Rows that have a next token in their own sequence, and that token's id."""
    last = batch.query_start_loc[1:] - 1
    rows = np.setdiff1d(np.arange(len(batch.token_ids)), last)
    return rows, batch.token_ids[rows + 1]


def sum_nll(logits: torch.Tensor, targets: np.ndarray) -> float:
    """logits [R, V], targets [R]; accumulated in double precision."""
    picked = logits.gather(1, torch.from_numpy(targets).long()[:, None])[:, 0]
    return float((logits.logsumexp(-1).double() - picked.double()).sum())


@dataclass(frozen=True)
class Rows:
    """What a linear reads of a minibatch: x [rows, K], and each row's position in its sequence. counts: of experts,
    whose rows follow one another, how many rows each reads."""

    x: torch.Tensor
    positions: Int32Array
    counts: tuple[int, ...] | None = None

    def experts(self) -> list[Rows]:
        """Each one's own; where there are none, all."""
        if self.counts is None:
            return [self]
        ends = np.cumsum(self.counts)
        return [Rows(self.x[end - count : end], self.positions[end - count : end])
                for end, count in zip(ends, self.counts, strict=True)]


@dataclass
class Moments:
    """Σ over the rows x [K] that a linear reads, and x̃ that it would read in the float model.

    The first token of every sequence, whose keys and values all that follow attend to, counts FIRST_COUNTS times. It is
    also the one with massive activations, so a row's length counts as LONGEST times the median's at most.
    """

    hessian: torch.Tensor  # [K, K], 2xxᵀ, symmetric: its upper triangle counts
    drift: torch.Tensor | None = None  # [K, K], 2(x̃ - x)xᵀ

    @classmethod
    def zeros(cls, k: int, drift: bool) -> Moments:
        return cls(torch.zeros(k, k), torch.zeros(k, k) if drift else None)

    def add(self, rows: Rows, exact: torch.Tensor | None = None) -> None:
        """Count what is read of a minibatch; `exact` is what the float model reads there."""
        x = rows.x
        square = x.square().sum(-1).clamp_min(1e-30)
        share = (LONGEST**2 * square.median() / square).clamp_max(1)
        counts = torch.from_numpy(np.where(rows.positions == 0, FIRST_COUNTS, 1.0)).float()
        share = (share * counts).sqrt_()[:, None]
        x = x * share
        for start in range(0, x.shape[1], BAND):
            self.hessian[start : start + BAND, start:].addmm_(x[:, start : start + BAND].T, x[:, start:], alpha=2)
        if exact is not None and self.drift is not None:
            self.drift.addmm_((exact * share - x).T, x, alpha=2)

    def divide(self, scale: torch.Tensor) -> None:
        """Follow a transform that divides the input's channels by `scale` [K]."""
        for moment in (self.hessian, self.drift):
            if moment is not None:
                moment.div_(scale).div_(scale[:, None])


@dataclass
class InputStats:
    """One linear's input over the calibration set: per-channel moments, and some of its rows. experts: each one's own,
    whose sum this is; without rows where calibration did not reach it."""

    low: torch.Tensor  # [K], the least x
    high: torch.Tensor  # [K], the largest x
    total: torch.Tensor  # [K], float64, the sum of x
    square_sum: torch.Tensor  # [K], float64
    rows: int
    peak_position: int  # where in its sequence the largest |x| stands
    sample: torch.Tensor  # [at most about SAMPLE_ROWS, K]
    moments: Moments | None = None  # where a step asked for them, until what it reads is another x
    experts: tuple[InputStats, ...] = ()

    @classmethod
    def unseen(cls, k: int) -> InputStats:
        """Of an input that calibration did not reach: no channel is more than another."""
        zeros = torch.zeros(k)
        return cls(zeros, zeros, zeros.double(), torch.ones(k, dtype=torch.float64), 0, 0, torch.zeros(0, k))

    @classmethod
    def of_experts(cls, experts: Sequence[InputStats], thin: int) -> InputStats:
        """All of them in one, with every `thin`-th row of their samples."""
        seen = [stats for stats in experts if stats.rows]
        first = max(seen, key=lambda stats: stats.range)
        return cls(
            torch.stack([stats.low for stats in seen]).amin(0), torch.stack([stats.high for stats in seen]).amax(0),
            torch.stack([stats.total for stats in seen]).sum(0),
            torch.stack([stats.square_sum for stats in seen]).sum(0),
            sum(stats.rows for stats in seen), first.peak_position,
            torch.cat([stats.sample for stats in seen])[::thin], experts=tuple(experts),
        )

    def parts(self) -> tuple[InputStats, ...]:
        """Of each expert, or itself."""
        return self.experts or (self,)

    @property
    def amax(self) -> torch.Tensor:
        """max |x| of each channel. [K]"""
        return torch.maximum(self.high, -self.low)

    @property
    def range(self) -> float:
        return float(self.amax.max())

    @property
    def spiked(self) -> bool:
        """Whether the range is the first token's alone: massive activations (arXiv 2402.17762), beside which all other
        tokens would have a few codes."""
        if self.peak_position != 0 or not len(self.sample):
            return False
        return self.range > MASSIVE * float(self.sample.abs().amax(-1).median())

    @property
    def mean(self) -> torch.Tensor:
        return (self.total / max(self.rows, 1)).float()

    @property
    def mean_square(self) -> torch.Tensor:
        return (self.square_sum / max(self.rows, 1)).float()

    def divide(self, scale: torch.Tensor) -> None:
        """Follow a transform that divides the input's channels by `scale` [K], which is positive."""
        self.low, self.high = self.low / scale, self.high / scale
        self.total = self.total / scale.double()
        self.square_sum = self.square_sum / scale.double().square()
        self.sample = self.sample / scale
        if self.moments is not None:
            self.moments.divide(scale)
        for expert in self.experts:
            expert.divide(scale)

    def shift(self, offset: torch.Tensor) -> None:
        """Follow a transform that subtracts `offset` [K] from the input's channels."""
        self.low, self.high = self.low - offset, self.high - offset
        self.square_sum = self.square_sum - 2 * offset.double() * self.total + self.rows * offset.double().square()
        self.total = self.total - self.rows * offset.double()
        self.sample = self.sample - offset
        self.moments = None
        for expert in self.experts:
            expert.shift(offset)


@dataclass
class _Observed:
    low: torch.Tensor | None = None
    high: torch.Tensor | None = None
    total: torch.Tensor | None = None
    square_sum: torch.Tensor | None = None
    rows: int = 0
    peak: float = -1.0
    peak_position: int = 0
    sample: list[torch.Tensor] = field(default_factory=list)
    moments: Moments | None = None

    def update(self, rows: Rows, stride: int) -> None:
        x = rows.x
        low, high, total, square_sum = x.amin(0), x.amax(0), x.sum(0).double(), x.square().sum(0).double()
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)
        self.total = total if self.total is None else self.total + total
        self.square_sum = square_sum if self.square_sum is None else self.square_sum + square_sum
        self.rows += x.shape[0]
        peak = float(torch.maximum(high, -low).max())
        if peak > self.peak:
            self.peak = peak
            self.peak_position = int(rows.positions[int(x.abs().amax(-1).argmax())])
        self.sample.append(x[::stride].clone())

    def stats(self, name: str, k: int) -> InputStats:
        if self.low is None:
            return InputStats.unseen(k)
        assert self.high is not None
        assert self.total is not None and self.square_sum is not None
        if not bool(torch.isfinite(self.square_sum).all()):
            raise CalibrationError(f"the input of {name} is not finite on the calibration data; "
                                   "the model's weights may be damaged")
        return InputStats(self.low, self.high, self.total, self.square_sum, self.rows, self.peak_position,
                          torch.cat(self.sample), self.moments)


class ChosenExperts:
    """Which experts the rows of one run over a block went to."""

    def __init__(self) -> None:
        self._chosen: list[torch.Tensor] = []  # [rows, top_k] each

    def ops(self, batch: StepInput) -> ReferenceOps:
        """An `OpsFactory`."""
        return _RoutingOps(batch, self._chosen)

    def agreement(self, other: ChosenExperts) -> float | None:
        """The share of a row's experts that another run chose too; None where nothing was chosen."""
        if not self._chosen:
            return None
        mine, theirs = torch.cat(self._chosen), torch.cat(other._chosen)
        return float((mine[:, :, None] == theirs[:, None]).any(-1).float().mean())


class _RoutingOps(ReferenceOps):
    def __init__(self, batch: StepInput, chosen: list[torch.Tensor]) -> None:
        super().__init__(batch, None)
        self._chosen = chosen

    def route(self, logits: torch.Tensor, routing: Routing) -> Routed:
        self._chosen.append(choose_experts(logits, routing)[0])
        return super().route(logits, routing)


Inputs = dict[str, Rows]  # of a minibatch, by the linears that read them


class _Captured(Exception):
    """Nothing else was asked for."""


class _CapturingOps(ReferenceOps):
    """Keeps what the linears of these names read; unless `whole`, stops where the last of them has read it."""

    def __init__(self, batch: StepInput, names: Collection[str], whole: bool = False) -> None:
        super().__init__(batch, None)
        self._names = names
        self._whole = whole
        self.seen: dict[str, Rows] = {}

    def linear(self, x: torch.Tensor, linear: Linear, residual: torch.Tensor | None = None) -> torch.Tensor:
        self._see(linear, Rows(x, self.batch.positions))
        return super().linear(x, linear, residual)

    def expert_linear(self, x: torch.Tensor, linear: Linear, routed: Routed) -> torch.Tensor:
        self._see(linear, Rows(x, self.batch.positions[routed.rows.numpy()], routed.counts))
        return super().expert_linear(x, linear, routed)

    def _see(self, linear: Linear, rows: Rows) -> None:
        if linear.name in self._names:
            self.seen[linear.name] = rows
        if len(self.seen) == len(self._names) and not self._whole:
            raise _Captured


@torch.inference_mode()
def block_inputs(states: HiddenStates, block: Block, names: Sequence[str] | None = None, *, advance: bool = False
                 ) -> Iterator[Inputs]:
    """What the block's linears of these names (all that are quantizable unless given) read, minibatch by minibatch,
    fake-quantized as its `act` says. Weights may be float or quantized; the block runs no further than it must, unless
    the states are to `advance` through it."""
    block = _fast(prepare_block(block, ReferenceBackend()))
    wanted = {block.linears[name].name: name for name in names or block.spec.quantizable}
    before = states.states
    if advance:
        states.states = []
    for batch, state in zip(states.batches, before, strict=True):
        ops = _CapturingOps(batch, wanted, whole=advance)
        with suppress(_Captured):
            output = block.forward(ops, state)
            if advance:
                states.states.append(output)
        yield {wanted[name]: x for name, x in ops.seen.items()}


def paired_inputs(inputs: Iterator[Inputs], exact: Iterator[Inputs] | None) -> Iterator[tuple[Inputs, Inputs]]:
    """What linears read of each minibatch, and what they read in the float model: nothing where `exact` is None."""
    return zip(inputs, itertools.repeat({}) if exact is None else exact, strict=exact is not None)


@torch.inference_mode()
def observe_block(states: HiddenStates, block: Block, *, moments: bool = False,
                  exact: HiddenStates | None = None) -> dict[str, InputStats]:
    """Run a float block over the states and describe the input of each of its quantizable linears; with its `moments`
    where these are asked for, `exact` being the same windows through the float model, which go on through the block."""
    names = block.spec.quantizable
    observed = {name: [_Observed() for _ in range(block.linears[name].experts)] for name in names}
    stride = _stride(states)
    exactly = None if exact is None else block_inputs(exact, block, advance=True)
    for inputs, wanted in paired_inputs(block_inputs(states, block), exactly):
        for name, rows in inputs.items():
            for found, own in zip(observed[name], rows.experts(), strict=True):
                if not len(own.x):
                    continue
                found.update(own, stride)
                if moments:
                    add_moments(found, own, None if rows.counts else wanted.get(name))
    return {name: _stats(block, name, found) for name, found in observed.items()}


def _stats(block: Block, name: str, found: Sequence[_Observed]) -> InputStats:
    linear, spec = block.linears[name], block.spec
    parts = [one.stats(linear.name, spec.linear(name).k) for one in found]
    if linear.experts == 1:
        return parts[0]
    assert spec.routing is not None
    return InputStats.of_experts(parts, spec.routing.top_k)


def add_moments(to: _Observed | InputStats, rows: Rows, exact: Rows | None) -> None:
    """exact: None for an expert, which other rows may reach in the float model."""
    to.moments = to.moments or Moments.zeros(rows.x.shape[1], exact is not None)
    to.moments.add(rows, None if exact is None else exact.x)


def _stride(states: HiddenStates) -> int:
    """Odd, so that sampled rows fall on every position of a window."""
    return sum(state.shape[0] for state in states.states) // SAMPLE_ROWS | 1

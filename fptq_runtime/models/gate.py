"""The gate before a server: small computations of a model's own parameters, done by the kernels that are to serve it
and compared with what `quantizer/record.py` recorded when the artifact was made.

A probe injects its input as the rows of an embedding and reads what one op, or one block, makes of them; none spans two
blocks, so that depth amplifies nothing. What an integer kernel computes from given codes is exact, and tolerances are
the rounding of float32 sums. Only a whole block may tip codes: its tolerance was measured by tipping them. Of the
kernels that let the artifact through when it was made nothing is tolerated: on every ISA they compute the same bits.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from ml_dtypes import bfloat16
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from fptq_runtime.artifact.files import open_file, path_of
from fptq_runtime.artifact.io import GOLDEN, Manifest
from fptq_runtime.config import KVCacheDtype, ModelConfig
from fptq_runtime.errors import FptqError
from fptq_runtime.kernels.base import (
    ActivationQuant,
    Array,
    Backend,
    Embedding,
    Executor,
    Float32Array,
    Float64Array,
    Ops,
    Routing,
    StepInput,
    StepLimits,
    V,
    logits_array,
)
from fptq_runtime.models.block import Block, Stem
from fptq_runtime.models.decoder import Decoder
from fptq_runtime.models.golden import GoldenMismatch, check_golden

Kind = Literal["stem", "norm", "linear", "rope", "attention", "order", "block"]

# A linear's input: one row of codes times these, which no rounding touches. The row of zeros shows the bias alone.
SIGNS = np.array([1, -1, 1, -1, -1, 0, 1, -1], np.float32)
POWERS = np.array([1, 2**-3, 4, 2**-6, 2, 0, 0.5, 16], np.float32)
ROUNDING = 2.0**-24  # of a float32
SCALARS = 1e-5  # of a norm or a rotation, relative
ATTENDED = 1e-4  # of attention: a softmax makes a score's last bit a share of its weight

BLOCK = 16
PREFIX = 40  # tokens of the attention probe's sequence
PREFIX_ROWS = (1, 17, PREFIX - 1)  # whose outputs are recorded
EDGE, TAIL = 16, 8  # tokens about the far edge of the window, and before the query that looks back at it
WINDOW = 600  # how far that query looks back where attention has no window
SHORT = ".short"
ROPE_POSITIONS = (0, 1, 17, 130, 1023, 8191, 32767)


logger = logging.getLogger(__name__)


class GateError(FptqError):
    """This machine's kernels do not compute what was recorded. One line that names what differs and what to do."""


def part_name(part: Block) -> str:
    """As recorded: "layers.3", or "head"."""
    return part.spec.name or "head"


@dataclass(frozen=True)
class LinearFacts:
    """What a linear reads: K columns quantized as `act` said when it was recorded, of which each `group` gives one
    exact integer; 1 where it sums floats. experts: how many linears its rows are."""

    k: int
    act: ActivationQuant | None
    group: int = 1
    experts: int = 1

    @property
    def roundings(self) -> float:
        """That a sum of its groups may collect. Where one term is far greater than all others each addition after it
        rounds by that term's last bit, half of it at most; lanes and tiles share the additions of floats."""
        return 4 + 2 * math.sqrt(self.k / max(self.group, 32))

    def row(self, name: str) -> Float32Array:
        """[k], what quantizes to the codes."""
        codes = self._codes(name)
        return codes if self.act is None or self.act.scale is None else codes * np.float32(self.act.scale)

    def _codes(self, name: str) -> Float32Array:
        """[k], with magnitudes from 64 to 127, which bfloat16 holds too, or of FP8's from 64 to 448.

        A dynamic scale must come out as 1: the greatest is 127.5, which every rounding makes 127, or 448.
        """
        bits = _random_bits(name, self.k)
        if self.act is not None and self.act.type == "float":
            magnitudes = np.minimum((8 + (bits >> 1 & 7)) << (3 + (bits >> 4) % 3), 448)
        else:
            magnitudes = 64 + (bits >> 1 & 63)
        row: Float32Array = np.where(bits & 1, 1, -1).astype(np.float32) * magnitudes.astype(np.float32)
        if self.act is not None and self.act.scale is None:
            row[zlib.crc32(name.encode()) % self.k] = 127.5 if self.act.type == "int" else 448
        return row

    def read_row(self, name: str) -> Float64Array:
        """[k], the row as the linear reads it: codes times the scale, unrounded."""
        codes = self._codes(name).astype(np.float64)
        codes[codes == 127.5] = 127
        return codes if self.act is None or self.act.scale is None else codes * self.act.scale

    @property
    def multipliers(self) -> Float32Array:
        """[8]. A static scale leaves only the sign to choose, a dynamic one only the size: of -127.5 it makes -128 or
        -127."""
        if self.act is None:
            return SIGNS * POWERS
        return SIGNS if self.act.scale is not None else POWERS


@dataclass(frozen=True)
class AttentionFacts:
    """The geometry of one layer's attention, and of the sequence that shows it: a prefix, the tokens about the edge of
    the window of a query far behind, and the tokens up to that query. Between lie copies of the prefix's first block.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int | None
    rope_positions: tuple[int, ...]

    @property
    def width(self) -> int:
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    @property
    def back(self) -> int:
        """The far query, at position `far`, sees keys at positions > far - back if there is a window."""
        return self.window or WINDOW

    @property
    def far(self) -> int:
        """The far query's position. far - back and far - back + 1 are the 8th and 9th of a block that begins after the
        prefix."""
        return self.back + 7 + -(-PREFIX // BLOCK) * BLOCK

    def has_far(self, max_positions: int) -> bool:
        """It is within reach, and the edge, the tail and the prefix are apart."""
        return self.far < max_positions and self.back >= EDGE + TAIL

    @property
    def rows(self) -> Float32Array:
        """[PREFIX + EDGE + TAIL, width] of q, k and v. What one side of the window's edge adds is made as large as all
        that lies between."""
        count = PREFIX + EDGE + TAIL
        bits = _random_bits(f"qkv {self.width}", count * self.width)
        rows: Float32Array = (np.where(bits & 1, 1, -1) * (64 + (bits >> 1 & 63)) / 64).astype(np.float32)
        rows = rows.reshape(count, -1)
        rows[PREFIX + 7 : PREFIX + 9, -self.num_kv_heads * self.head_dim :] *= np.float32(max(1, self.back / 8))
        return rows


@dataclass(frozen=True)
class Golden:
    """What was recorded: arrays by name, float32 or bfloat16. A layer whose attention is that of the layer before has
    no arrays of its own for it.

    short: where ropes choose their frequencies by how many positions are served, up to so many those hold of which the
    names end with SHORT. bits: what the backend with the fingerprint `kernels` computed, by probe eight digits a row.
    """

    short: int = 0
    linears: dict[str, LinearFacts] = field(default_factory=dict)
    attention: dict[str, AttentionFacts] = field(default_factory=dict)
    stem_ids: tuple[int, ...] = ()
    arrays: dict[str, Array] = field(default_factory=dict)
    kernels: str = ""
    bits: dict[str, str] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """A safetensors file."""
        facts = {
            "short": self.short,
            "linears": {name: [facts.k, None if facts.act is None else [facts.act.scale, facts.act.type], facts.group,
                               *([facts.experts] if facts.experts > 1 else [])]
                        for name, facts in self.linears.items()},
            "attention": {name: [f.num_heads, f.num_kv_heads, f.head_dim, f.window, f.rope_positions]
                          for name, f in self.attention.items()},
            "stem_ids": self.stem_ids,
            "kernels": self.kernels,
            "bits": self.bits,
        }
        # safetensors writes bfloat16 from numpy but does not read it
        arrays = {name: np.ascontiguousarray(array.view(np.uint16) if array.dtype == bfloat16 else array)
                  for name, array in self.arrays.items()}
        return save(arrays, metadata={"fptq": json.dumps(facts)})

    @classmethod
    def read(cls, path: Path) -> Golden:
        """Raises GateError where the file is missing or malformed."""
        try:
            with open_file(path) as opened, safe_open(path_of(opened), "numpy") as file:
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                facts = json.loads(file.metadata()["fptq"])
            return cls(
                facts["short"],
                {name: LinearFacts(k, None if act is None else ActivationQuant(*act), *sizes)
                 for name, (k, act, *sizes) in facts["linears"].items()},
                {name: AttentionFacts(heads, kv_heads, dim, window, tuple(positions))
                 for name, (heads, kv_heads, dim, window, positions) in facts["attention"].items()},
                tuple(facts["stem_ids"]),
                {name: array.view(bfloat16) if array.dtype == np.uint16 else array for name, array in arrays.items()},
                facts.get("kernels", ""),
                _bits(facts.get("bits", {})),
            )
        except (OSError, SafetensorError, AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
            raise GateError(f"{path} is missing or malformed ({error}): quantize the model again") from None


def _bits(facts: dict[str, str]) -> dict[str, str]:
    """Raises ValueError or TypeError where one is no row of checksums."""
    for name, value in facts.items():
        if not re.fullmatch("([0-9a-f]{8})+", value):
            raise ValueError(f"bits of {name} are no checksums")
    return dict(facts)


@dataclass(frozen=True)
class Outcome:
    """One probe's greatest deviation, as a multiple of what is tolerated there. probe, bits: its name and value in
    Golden.bits. same: nothing else was recorded of these kernels."""

    kind: Kind
    name: str
    ratio: float
    where: str = ""
    probe: str = ""
    bits: str = ""
    same: bool = True

    @property
    def deviation(self) -> float:
        return self.ratio if self.same else math.inf

    @property
    def passes(self) -> bool:
        return self.deviation <= 1


def check_artifact(path: Path, manifest: Manifest, decoder: Decoder, backend: Backend, max_positions: int,
                   kv_dtype: KVCacheDtype = "int8", kinds: Sequence[Kind] | None = None) -> float | None:
    """`check` with what an artifact holds. One of format 1 holds golden logits, in which a tipped code of a deep model
    grows as large as a fault: they only warn, and None is returned."""
    if manifest.format_version > 1:
        return check(decoder, backend, Golden.read(path / GOLDEN), max_positions, kv_dtype, kinds)
    try:
        check_golden(decoder, backend, manifest.golden)
    except GoldenMismatch as error:
        logger.warning("%s; in an artifact of format 1 that need not be a fault: `fptq verify %s --renew` records "
                       "golden values that can tell", error, path)
    return None


def check(decoder: Decoder, backend: Backend, golden: Golden, max_positions: int,
          kv_dtype: KVCacheDtype = "int8", kinds: Sequence[Kind] | None = None) -> float:
    """Run the probes of some kinds, all by default. Returns the greatest deviation as a multiple of its tolerance;
    raises GateError where that is above 1, or bits are others than were recorded of these kernels.

    max_positions: how many the loaded rope tables hold. kv_dtype: of the cache that will serve, checked beside float32.
    """
    outcomes = passed(probe(decoder, backend, golden, max_positions, kv_dtype, kinds), backend)
    return max(outcome.ratio for outcome in outcomes)


def passed(outcomes: Iterable[Outcome], backend: Backend) -> list[Outcome]:
    """All of them; raises GateError where one does not pass."""
    found = list(outcomes)
    failed = [outcome for outcome in found if not outcome.passes]
    if failed:
        raise GateError(_refusal(failed, len(found), backend))
    return found


def _refusal(failed: Sequence[Outcome], count: int, backend: Backend) -> str:
    worst = next(outcome for outcome in failed if outcome.kind != "block" or all(o.kind == "block" for o in failed))
    about = backend.describe()
    kernels = " ".join((about["backend"], *([about["isa"]] if "isa" in about else [])))
    others = "" if len(failed) == 1 else f" ({len(failed)} of {count} probes differ)"
    advice = "if another machine or --backend reference refuses it too, the artifact is not what was quantized: " \
             "quantize again; else please report it with this line"
    if about.get("isa") not in (None, "generic"):
        advice = f"try FPTQ_ISA=generic; {advice}"
    if worst.ratio <= 1:
        return (f"{worst.name} ({worst.kind}) has other bits than the same kernels computed when the artifact was made"
                f"{others}: this machine, or its build of the {kernels} kernels, is at fault; {advice}")
    return (f"{worst.name} ({worst.kind}{worst.where}) is {worst.ratio:.3g} times further from its golden values than "
            f"rounding explains{others}: the {kernels} kernels and the artifact disagree; {advice}")


def probe(decoder: Decoder, backend: Backend, golden: Golden, max_positions: int, kv_dtype: KVCacheDtype = "int8",
          kinds: Sequence[Kind] | None = None) -> Iterator[Outcome]:
    """Every probe's outcome, from the stem to the head. What a probe cannot even run is infinitely far away."""
    run = _Gate(decoder.config, backend, golden, max_positions, kv_dtype)
    for name, kind, outcomes in itertools.chain(run.stem(decoder.stem), *map(run.part, decoder.blocks),
                                                run.part(decoder.head)):
        if kinds is None or kind in kinds:
            try:
                yield from outcomes
            except (ValueError, KeyError, AssertionError, IndexError, RuntimeError) as error:
                yield Outcome(kind, name, np.inf, f": {error}")


_Probes = tuple[str, Kind, Iterator[Outcome]]


class _Gate:
    """Makes the probes of a part: what each is named, its kind, and what it will find."""

    def __init__(self, config: ModelConfig, backend: Backend, golden: Golden, max_positions: int,
                 kv_dtype: KVCacheDtype) -> None:
        self._config = config
        self._backend = backend
        self._golden = golden
        self._max_positions = max_positions
        self._caches: tuple[KVCacheDtype, ...] = ("float32",) if kv_dtype == "float32" else ("float32", kv_dtype)
        self._suffix = SHORT if max_positions <= golden.short else ""
        self._attention = ""  # the layer whose recorded attention holds
        self._tables: dict[AttentionFacts, Any] = {}
        self._linears = 0
        self._bits = golden.bits if golden.kernels == backend.fingerprint else {}

    def stem(self, stem: Stem) -> Iterator[_Probes]:
        yield "embedding", "stem", self.embedding(stem.embedding)
        if stem.positions is not None:
            yield "positions", "stem", self.positions(stem.positions)
        if stem.norm is not None:
            yield "stem.norm", "norm", self.norm("stem.norm", stem.norm)

    def part(self, part: Block) -> Iterator[_Probes]:
        name = part_name(part)
        for key, norm in part.norms.items():
            yield f"{name}.{key}", "norm", self.norm(f"{name}.{key}", norm)
        for key, linear in part.linears.items():
            yield f"{name}.{key}", "linear", self.linear(f"{name}.{key}", linear)
        if part.attention is not None:
            if name in self._golden.attention:
                self._attention = name
            yield name, "rope", self.rope(name, part.attention)
            for dtype in self._caches:
                yield name, "attention", self.attention(name, part.attention, dtype)
        if part.spec.name:
            yield name, "block", self.block(name, part)

    def embedding(self, table: Any) -> Iterator[Outcome]:
        ids = np.array(self._golden.stem_ids, np.int32)
        executor = self._backend.compile(lambda ops: ops.select_rows(ops.embed(table)), probe_limits(len(ids)))
        yield self._outcome("stem", "embedding", _run(executor, ids), self._golden.arrays["stem"], 0)

    def positions(self, table: Any) -> Iterator[Outcome]:
        expected = self._golden.arrays["positions"]
        ids = np.zeros(min(len(expected), self._max_positions), np.int32)
        embedding = self._table(np.zeros((1, expected.shape[1]), np.float32))
        executor = self._backend.compile(
            lambda ops: ops.select_rows(ops.add(ops.embed(embedding), ops.embed_positions(table))),
            probe_limits(len(ids)))
        yield self._outcome("stem", "positions", _run(executor, ids), expected[: len(ids)], 0)

    def norm(self, name: str, norm: Any) -> Iterator[Outcome]:
        expected = self._golden.arrays[f"{name}.expected"]
        table = self._table(norm_row(name, expected.size)[None])
        executor = self._backend.compile(
            lambda ops: ops.select_rows(ops.norm(ops.embed(table), norm, None)), probe_limits(3))
        y = _run(executor, np.zeros(3, np.int32))
        yield self._outcome("norm", name, y, expected[None],
                            self._golden.arrays[f"{name}.tolerance"].astype(np.float64))

    def linear(self, name: str, linear: Any) -> Iterator[Outcome]:
        """By one row, as when decoding, and by some that fill tiles of another height from linear to linear."""
        facts, arrays = self._golden.linears[name], self._golden.arrays
        factors, experts = facts.multipliers, facts.experts
        self._linears += 1
        heights = (1, 2 + self._linears % 12) if experts == 1 else (1, 1 + self._linears % 4)
        # the rows of each run: which expert reads them, and their multiplier
        reader = np.concatenate([np.tile(np.arange(experts), h) for h in heights])
        factor = factors[np.concatenate([np.repeat(np.arange(h), experts) + np.tile(np.arange(experts), h)
                                         for h in heights]) % len(factors)][:, None]
        table, choice = self._table(factor * facts.row(name)), self._table(np.eye(experts)[reader])
        routing = self._backend.prepare(Routing(experts, 1))

        def forward(ops: Ops[V]) -> V:
            x = ops.quantize(ops.embed(table), linear.act)
            if experts == 1:
                return ops.select_rows(ops.linear(x, linear))
            routed = ops.route(ops.embed(choice), routing)
            return ops.select_rows(ops.combine(ops.expert_linear(ops.dispatch(x, routed), linear, routed), routed))

        executor = self._backend.compile(forward, probe_limits(max(heights) * experts))
        y = np.concatenate([_run(executor, rows.astype(np.int32)) for rows in
                            np.split(np.arange(len(reader)), [heights[0] * experts])])
        factor = factor.astype(np.float64)
        bias = np.zeros(len(arrays[f"{name}.expected"]))
        if f"{name}.bias" in arrays:
            bias = arrays[f"{name}.bias"].astype(np.float64)
        bias, recorded, allowed = (array.reshape(experts, -1)[reader] for array in (
            bias, arrays[f"{name}.expected"], arrays[f"{name}.tolerance"].astype(np.float64)))
        expected = factor * recorded + bias
        tolerance = np.abs(factor) * allowed + 4 * ROUNDING * np.abs(bias)
        if self._backend.name == "reference":  # a group's products are floats too, at most so many times its sum
            tolerance *= math.sqrt(facts.group)
        yield self._outcome("linear", name, y, expected, tolerance)

    def rope(self, name: str, attention: Any) -> Iterator[Outcome]:
        """Queries at positions far apart, each in a sequence of its own."""
        facts = self._golden.attention[self._attention]
        positions = [position for position in facts.rope_positions if position < self._max_positions]
        table = self._table_of(facts)
        executor = self._backend.compile(
            lambda ops: ops.select_rows(ops.rope_and_cache(ops.embed(table), attention)),
            probe_limits(len(positions), facts, _layers(name), positions[-1] + 1, len(positions)))
        y = rotate(executor, positions)
        expected = self._golden.arrays[f"{self._attention}.rope{self._suffix}"][: len(positions)]
        yield self._outcome("rope", name, y, expected, SCALARS * np.abs(expected).max(-1, keepdims=True))

    def attention(self, name: str, attention: Any, dtype: KVCacheDtype) -> Iterator[Outcome]:
        facts, arrays = self._golden.attention[self._attention], self._golden.arrays
        table = self._table_of(facts)

        def forward(ops: Ops[V]) -> V:
            return ops.attention(ops.rope_and_cache(ops.embed(table), attention), attention, None, True)

        executor = self._backend.compile(
            forward, attention_limits(facts, self._max_positions, _layers(name), dtype))
        passes, rows = attend(executor, facts, self._max_positions)
        expected = arrays[f"{self._attention}.attention{self._suffix}"][: len(rows)]
        rounded = arrays[f"{self._attention}.attention_tolerance{self._suffix}"][: len(rows), None]
        tolerance = ATTENDED * np.abs(expected).max(-1, keepdims=True) if dtype == "float32" else rounded
        yield self._outcome("attention", f"{name}, {dtype} cache", rows, expected, tolerance)
        # torch, and numpy under Triton's interpreter, add in an order that depends on how many rows there are
        bound = 0 if self._backend.name == "native" else ATTENDED * np.abs(passes[0]).max()
        for way, other in zip(("in chunks", "token by token"), passes[1:], strict=True):
            yield _outcome("order", f"{name}, {dtype} cache, {way}", other, passes[0], bound)

    def block(self, name: str, block: Block) -> Iterator[Outcome]:
        """What the block adds to its input, each row as a whole: wiring."""
        arrays, whole = self._golden.arrays, replace(block, last=False)
        x = arrays[f"{name}.input{self._suffix}"][: self._max_positions].astype(np.float32)
        table = self._table(x)
        limits = StepLimits.of(self._config, max_tokens=len(x), max_model_len=len(x), num_blocks=-(-len(x) // BLOCK))
        executor = self._backend.compile(
            lambda ops: ops.select_rows(whole.forward(ops, ops.embed(table))), limits)
        y = _run(executor, np.arange(len(x), dtype=np.int32))
        added = y.astype(np.float64) - x
        expected = arrays[f"{name}.added{self._suffix}"][: len(x)].astype(np.float64)
        deviation = np.sqrt(np.square(added - expected).mean(-1))
        outcome = _outcome("block", name, deviation[:, None], np.zeros((len(x), 1)),
                           arrays[f"{name}.block_tolerance{self._suffix}"][: len(x), None].astype(np.float64))
        yield self._compared(outcome, y)

    def _outcome(self, kind: Kind, name: str, y: Array, expected: Array, tolerance: Any) -> Outcome:
        return self._compared(_outcome(kind, name, y, expected, tolerance), y)

    def _compared(self, outcome: Outcome, y: Array) -> Outcome:
        """With y's bits, which fewer positions may leave fewer rows of than were recorded, or more."""
        key = f"{outcome.kind} {outcome.name}{self._suffix}"
        bits = "".join(f"{zlib.crc32(row.astype('<f4').tobytes()):08x}" for row in y)
        known = self._bits.get(key, bits)
        return replace(outcome, probe=key, bits=bits, same=bits.startswith(known) or known.startswith(bits))

    def _table(self, rows: Float32Array) -> Any:
        return self._backend.prepare(Embedding(np.ascontiguousarray(rows, np.float32)))

    def _table_of(self, facts: AttentionFacts) -> Any:
        if facts not in self._tables:
            self._tables = {facts: self._table(facts.rows)}
        return self._tables[facts]



def probe_limits(tokens: int, facts: AttentionFacts | None = None, layers: int = 1, length: int = 16, seqs: int = 1,
                 dtype: KVCacheDtype = "float32") -> StepLimits:
    """Those of a probe; without attention the cache is the least there is."""
    return StepLimits(
        max_tokens=tokens, max_seqs=seqs, max_logits_rows=tokens, max_model_len=max(length, tokens),
        num_blocks=-(-tokens // BLOCK) if facts is None else 10, block_size=BLOCK, kv_dtype=dtype, num_layers=layers,
        num_kv_heads=1 if facts is None else facts.num_kv_heads, head_dim=16 if facts is None else facts.head_dim,
    )


def rotate(executor: Executor, positions: Sequence[int]) -> Float32Array:
    """Row i of the table as a query at positions[i]. [positions, heads · head_dim]"""
    count, lengths = len(positions), np.array(positions, np.int32) + 1
    last = (lengths - 1) // BLOCK
    tables = np.zeros((count, last[-1] + 1), np.int32)
    tables[np.arange(count), last] = np.arange(count)
    rows = np.arange(count, dtype=np.int32)
    return logits_array(executor.step(StepInput(
        token_ids=rows, positions=lengths - 1,
        slot_mapping=(rows * BLOCK + (lengths - 1) % BLOCK).astype(np.int32),
        query_start_loc=np.arange(count + 1, dtype=np.int32), seq_lens=lengths, block_tables=tables, logits_rows=rows,
        state_slots=rows,
    )))


def attention_limits(facts: AttentionFacts, max_positions: int, layers: int = 1, dtype: KVCacheDtype = "float32"
                     ) -> StepLimits:
    prefix = min(PREFIX, max_positions)
    return probe_limits(prefix, facts, layers, facts.far + 1 if facts.has_far(max_positions) else prefix, 1, dtype)


def attend(executor: Executor, facts: AttentionFacts, max_positions: int) -> tuple[list[Float32Array], Float32Array]:
    """The prefix whole, in chunks and token by token, each time in other blocks, which lie apart and hold what was
    there before: three times [prefix, heads · head_dim]. And the rows to compare: PREFIX_ROWS of the first time and the
    far query's, as far as positions reach."""
    prefix, passes = min(PREFIX, max_positions), []
    for blocks, sizes in (((2, 0, 1), (prefix,)), ((5, 3, 4), (7, 16, prefix)), ((0, 5, 2), (25, *[1] * prefix))):
        rows, start = [], 0
        for size in sizes:
            size = min(size, prefix - start)
            if size:
                rows.append(_feed(executor, np.array(blocks), start, np.arange(start, start + size)))
            start += size
        passes.append(np.concatenate(rows))
    compared = [passes[0][row] for row in PREFIX_ROWS if row < prefix]
    if not facts.has_far(max_positions):
        return passes, np.stack(compared)
    first, edge, tail = -(-PREFIX // BLOCK), (facts.far - facts.back) // BLOCK, (facts.far - TAIL + 1) // BLOCK
    table = np.zeros(facts.far // BLOCK + 1, np.int64)
    table[:first] = 0, 5, 2
    table[edge], table[tail:] = 6, range(7, 7 + len(table) - tail)
    _feed(executor, table, edge * BLOCK, np.arange(PREFIX, PREFIX + EDGE))
    tail_rows = _feed(executor, table, facts.far - TAIL + 1, np.arange(TAIL) + PREFIX + EDGE)
    return passes, np.stack([*compared, tail_rows[-1]])


def _feed(executor: Executor, table: npt.NDArray[np.int64], start: int, token_ids: npt.NDArray[np.int64]
          ) -> Float32Array:
    """A step of one sequence, its tokens at positions from `start` on; every row's output."""
    positions = np.arange(start, start + len(token_ids))
    rows = np.arange(len(token_ids), dtype=np.int32)
    return logits_array(executor.step(StepInput(
        token_ids=token_ids.astype(np.int32), positions=positions.astype(np.int32),
        slot_mapping=(table[positions // BLOCK] * BLOCK + positions % BLOCK).astype(np.int32),
        query_start_loc=np.array([0, len(rows)], np.int32), seq_lens=np.array([positions[-1] + 1], np.int32),
        block_tables=table[None].astype(np.int32), logits_rows=rows, state_slots=np.zeros(1, np.int32),
    )))


def norm_row(name: str, width: int) -> Float32Array:
    """[width], of both signs and so small that epsilon shows."""
    bits = _random_bits(name, width)
    row: Float32Array = (np.where(bits & 1, 1, -1) * (64 + (bits >> 1 & 63)) * 2.0**-13).astype(np.float32)
    return row


def _run(executor: Executor, token_ids: npt.NDArray[np.int32]) -> Float32Array:
    """One sequence from position 0 on; every row's output."""
    return logits_array(executor.step(StepInput.whole([token_ids.tolist()], BLOCK)))


def _random_bits(name: str, count: int) -> npt.NDArray[np.int64]:
    """15 of each, the same for a name on every machine: numpy keeps the streams of its bit generators."""
    return (np.random.PCG64(zlib.crc32(name.encode())).random_raw(count) >> np.uint64(49)).astype(np.int64)


def _outcome(kind: Kind, name: str, y: Array, expected: Array, tolerance: Any) -> Outcome:
    deviation = np.abs(y.astype(np.float64) - expected)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.where(deviation == 0, 0, deviation / tolerance)
    ratios[~np.isfinite(y)] = np.inf
    worst = int(ratios.argmax())
    row, column = divmod(worst, ratios.shape[-1])
    where = f" row {row}" if kind == "block" else f" column {column}"
    return Outcome(kind, name, float(ratios.flat[worst]), where)


def _layers(name: str) -> int:
    """That a cache must have for this one."""
    return int(name.rsplit(".", 1)[1]) + 1

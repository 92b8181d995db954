"""The block as data: its linears and norms by name, what writes what each linear reads, and its forward over the ops.

A family is one file that returns a `Model`. Whoever transforms, observes, trains, analyses, writes or exports a block
iterates its linears and norms and asks its edges; nobody else knows how a family's block is built.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from fptq_runtime.config import ModelConfig
from fptq_runtime.kernels.base import (
    Activation,
    Array,
    Backend,
    Ops,
    Recurrent,
    Routing,
)
from fptq_runtime.models.readout import Basis
from fptq_runtime.models.rope import RopeConfig


@dataclass(frozen=True)
class Stacked:
    """One tensor of a float checkpoint with all experts of a linear, [experts, rows, k], or `transposed` [experts, k,
    rows], and `tensor`_bias [experts, rows]. interleaved: a row of each of an expert's modules in turn."""

    tensor: str
    transposed: bool = False
    interleaved: bool = False


@dataclass(frozen=True, eq=False)
class LinearSpec:
    """One linear of a block: `modules` of the checkpoint, whose rows it stacks.

    modules: names after the block's prefix. sizes: rows of each. k: what they read. bias: whether config.json says that
    they have one; a tensor that it does not announce is not loaded, as transformers does not. order: order[j] is the
    stacked row of the checkpoint that stands at row j here. transposed: stored as [k, rows] (GPT-2's Conv1D). experts:
    how many the modules are, one after the other; stacked: another way in which a float checkpoint holds them. kept: in
    float whatever a recipe says: a router, whose choices rounding would change. inner: it reads what the block made,
    not the residual stream or a norm of that. normalised: each row is divided by its length first. multiplier: [n],
    what the rows here are the checkpoint's times.
    """

    name: str
    modules: tuple[str, ...]
    sizes: tuple[int, ...]
    k: int
    bias: bool = False
    order: Array | None = None
    transposed: bool = False
    experts: int = 1
    stacked: Stacked | None = None
    kept: bool = False
    inner: bool = False
    normalised: bool = False
    multiplier: Array | None = None

    @property
    def n(self) -> int:
        """Of all experts together."""
        return sum(self.sizes)


@dataclass(frozen=True, eq=False)
class NormSpec:
    """One norm of a block: of the checkpoint's module, or of several whose weights are stacked as rows.

    shape: of its weight, all modules together. offset: is added to what the checkpoint stores (Gemma's 1 + w). scaled:
    it has a weight at all; a norm without one multiplies by ones. order: order[j] is the checkpoint's channel, of the
    last dimension, that stands at j here. inner: of what a linear of the block made, not of the residual stream.
    """

    name: str
    modules: tuple[str, ...]
    shape: tuple[int, ...]
    kind: Literal["rms", "layer"]
    eps: float
    bias: bool = False
    offset: float = 0.0
    scaled: bool = True
    order: Array | None = None
    inner: bool = False


@dataclass(frozen=True)
class Edge:
    """`readers` are linears that read what `writer` writes, so that a channel can be divided there and multiplied here.

    through: None: the writer is a norm, and input i is its channel i. "attention": the last rows of the writer are the
    heads' values, and query heads that share one read the same rows. "gate": input i is the writer's i-th last row
    times a gate. "conv": likewise, times what a convolution made of the other rows. "relu": input i is relu of the
    writer's row i, and only what is positive passes through that.
    A linear without an edge reads what cannot be divided: a curve's output, or the residual stream itself.
    """

    writer: str
    readers: tuple[str, ...]
    through: Literal["attention", "gate", "conv", "relu"] | None = None


@dataclass(frozen=True)
class Attention:
    """A layer's attention before its arrays are loaded; `AttentionSpec` has the meaning of each field. alibi: with
    ALiBi's slopes. sinks: the checkpoint's tensor. gated: each number that it makes is multiplied by a gate of its own
    before `o` reads it. value_dim: how many of head_dim numbers of a value there are where the others are zeros."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    softmax_scale: float
    sliding_window: int | None = None
    rope: RopeConfig | None = None
    alibi: bool = False
    q_norm: NormSpec | None = None
    k_norm: NormSpec | None = None
    norm_after_rope: bool = False
    softcap: float | None = None
    sinks: str | None = None
    gated: bool = False
    value_dim: int | None = None

    @property
    def value_size(self) -> int:
        """Of all values, without zeros."""
        return self.num_kv_heads * (self.value_dim or self.head_dim)

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim


@dataclass(frozen=True, eq=False)
class RecurrentSpec:
    """One recurrent op of a block. kernel: its arrays are not loaded yet. arrays: the checkpoint's tensor behind each
    of its fields, and its shape there; of three dimensions the middle one is 1."""

    kernel: Recurrent
    arrays: Mapping[str, tuple[str, tuple[int, ...]]]


@dataclass(frozen=True, eq=False)
class BlockSpec:
    """A part of the network that reads and writes the residual stream: a layer, or the head.

    name: "layers.3"; "" for the head. prefix: what the checkpoint's names begin with. linears: in the order in which
    they are computed. residual: the linears and norms whose outputs are added to the residual stream.
    """

    name: str
    prefix: str
    forward: Callable[[Ops[Any], Block, Any], Any]
    linears: tuple[LinearSpec, ...]
    norms: tuple[NormSpec, ...]
    edges: tuple[Edge, ...]
    residual: tuple[str, ...] = ()
    attention: Attention | None = None
    activation: Activation | None = None
    routing: Routing | None = None
    routing_bias: str | None = None
    recurrent: tuple[RecurrentSpec, ...] = ()

    @property
    def quantizable(self) -> tuple[str, ...]:
        """The linears that a recipe may quantize."""
        return tuple(linear.name for linear in self.linears if not linear.kept)

    def linear(self, name: str) -> LinearSpec:
        return next(linear for linear in self.linears if linear.name == name)

    def edge(self, reader: str) -> Edge | None:
        """What writes this linear's input; None where nothing of it can be divided."""
        return next((edge for edge in self.edges if reader in edge.readers), None)

    def modules(self, linear: str) -> tuple[str, ...]:
        """The checkpoint's full names of what a linear stacks."""
        return tuple(self.prefix + module for module in self.linear(linear).modules)

    def full_name(self, linear: str) -> str:
        """As reports and kernels know it: "layers.3.up"; the head's as the checkpoint names it."""
        return f"{self.name}.{linear}" if self.name else self.modules(linear)[0]


@dataclass
class Block:
    """A block's parameters by the names of its spec: `Linear`, `Norm`, `AttentionSpec` (with its own norms), `Routing`
    and `Recurrent`, or what a backend made of them. last: only rows that need logits leave it. bases: of
    linears that read something else than their model's do, by their names; None: not all have one that would say it."""

    spec: BlockSpec
    linears: dict[str, Any]
    norms: dict[str, Any]
    attention: Any = None
    last: bool = False
    routing: Any = None
    bases: Mapping[str, Basis] | None = field(default_factory=dict)
    recurrent: tuple[Any, ...] = ()

    @property
    def readout(self) -> Basis | None:
        """Of a head that reads other rows than its model's does."""
        return (self.bases or {}).get("head")

    def forward(self, ops: Ops[Any], x: Any) -> Any:
        """The residual stream after it. [rows, H]; the head: logits [rows, V]."""
        return self.spec.forward(ops, self, x)

    def with_linears(self, change: Callable[[str, Any], Any]) -> Block:
        """A copy with change(name, linear) in place of each linear."""
        return replace(self, linears={name: change(name, linear) for name, linear in self.linears.items()})

    def each_norm(self) -> Iterator[tuple[NormSpec, Any]]:
        """The block's norms and its attention's, before a backend took them."""
        for spec in self.spec.norms:
            yield spec, self.norms[spec.name]
        for role, spec in head_norms(self.spec):
            yield spec, getattr(self.attention, role)


@dataclass(frozen=True)
class StemSpec:
    """What comes before the first block: token embeddings times `scale`, plus learned positions, then a norm.

    positions: the module of learned positions, whose first `position_offset` rows no position uses (OPT).
    """

    embedding: str
    scale: float = 1.0
    positions: str | None = None
    position_offset: int = 0
    norm: NormSpec | None = None


@dataclass
class Stem:
    spec: StemSpec
    embedding: Any
    positions: Any = None
    norm: Any = None

    def forward(self, ops: Ops[Any]) -> Any:
        """[M, H]"""
        x = ops.embed(self.embedding)
        if self.spec.scale != 1.0:
            x = ops.scale(x, self.spec.scale)
        if self.positions is not None:
            x = ops.add(x, ops.embed_positions(self.positions))
        return x if self.norm is None else ops.norm(x, self.norm, None)


@dataclass(frozen=True)
class Model:
    """A family's answer to one config.json.

    bare_prefix: what some checkpoints of the family leave out of every name. loaded_prefix: what transformers has in
    its place, where that is something else. width_field: the config's name for the MLP's width where it has one of its
    own. rewritten: what the config.json of an artifact says in place of the
    source's. What config counts of blocks, it has from them.
    """

    config: ModelConfig
    stem: StemSpec
    blocks: tuple[BlockSpec, ...]
    head: BlockSpec
    bare_prefix: str = "model."
    loaded_prefix: str = ""
    width_field: str | None = "intermediate_size"
    rewritten: Mapping[str, Any] = field(default_factory=dict)
    ropes: tuple[RopeConfig, ...] = field(init=False)

    def __post_init__(self) -> None:
        found = dict.fromkeys(block.attention.rope for block in self.blocks
                              if block.attention is not None and block.attention.rope is not None)
        object.__setattr__(self, "ropes", tuple(found))
        object.__setattr__(self, "config", replace(
            self.config, attention_layers=sum(block.attention is not None for block in self.blocks),
            state_bytes=sum(4 * op.kernel.state_floats for block in self.blocks for op in block.recurrent)))

    @property
    def has_experts(self) -> bool:
        return any(block.routing is not None for block in self.blocks)

    @property
    def parts(self) -> tuple[BlockSpec, ...]:
        """Every block, and the head."""
        return (*self.blocks, self.head)

    @property
    def head_module(self) -> str:
        """The checkpoint's name of the head's linear."""
        return self.head.modules(self.head.linears[0].name)[0]

    def linear_names(self) -> tuple[str, ...]:
        """Of every module of every linear, the head's last."""
        return tuple(name for part in self.parts for linear in part.linears for name in part.modules(linear.name))


def prepare_stem(stem: Stem, backend: Backend) -> Stem:
    """Hand the stem's parameters to a backend."""
    return Stem(stem.spec, *(None if part is None else backend.prepare(part)
                             for part in (stem.embedding, stem.positions, stem.norm)))


def prepare_block(block: Block, backend: Backend) -> Block:
    """Hand a block's parameters to a backend."""
    return replace(
        block,
        linears={name: backend.prepare(linear) for name, linear in block.linears.items()},
        norms={name: backend.prepare(norm) for name, norm in block.norms.items()},
        attention=None if block.attention is None else backend.prepare(block.attention),
        routing=None if block.routing is None else backend.prepare(block.routing),
        recurrent=tuple(map(backend.prepare, block.recurrent)),
    )


def head_norms(spec: BlockSpec) -> list[tuple[str, NormSpec]]:
    """q_norm and k_norm, where attention has them."""
    attention = spec.attention
    if attention is None:
        return []
    pairs = (("q_norm", attention.q_norm), ("k_norm", attention.k_norm))
    return [(role, norm) for role, norm in pairs if norm is not None]

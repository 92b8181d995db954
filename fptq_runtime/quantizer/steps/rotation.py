"""QuaRot (arXiv 2404.00456), the part that costs nothing at run time: rotations that the weights take in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch

from fptq_runtime.kernels.base import Embedding
from fptq_runtime.kernels.reference import to_numpy, to_torch
from fptq_runtime.models.block import Block, Edge, Model, Stem
from fptq_runtime.models.readout import Basis, Turn
from fptq_runtime.quantizer.steps.base import QuantizationError, Step


class Rotation(Step):
    """Rotate the residual stream, so that no channel of what the linears read is an outlier.

    Norm gains move into the linears that read them: RMSNorm without gains commutes with every orthogonal map. The
    embedding, o and down then write rotated rows; qkv, up and the head undo it as they read.

    heads: also rotate what each head makes of its values: exact, because every head has the same rotation.
    optional: a model that no rotation keeps the function of stays as it is, instead of being refused.
    """

    type: Literal["rotation"] = "rotation"
    heads: bool = True
    optional: bool = False
    seed: int = 0

    def check(self, model: Model) -> None:
        if not self.optional and (obstacle := self._obstacle(model)):
            raise QuantizationError(f"rotation does not work on {model.config.architecture}: {obstacle}; leave the "
                                    "step out")

    @staticmethod
    def _obstacle(model: Model) -> str | None:
        """What of the family a rotation would change."""
        for part in model.parts:
            readers = {reader: edge.writer for edge in part.edges if edge.through is None for reader in edge.readers}
            if any(norm.kind != "rms" for norm in part.norms):
                return "its LayerNorm subtracts the mean, which no rotation keeps"
            if any(writer not in (linear.name for linear in part.linears) for writer in part.residual):
                return "a norm behind its linears scales what is added to each channel, which no rotation keeps"
            written = {edge.readers[0] for edge in part.edges if edge.through is not None}
            unread = [linear.name for linear in part.linears if linear.name not in readers
                      and linear.name not in written and linear.name not in part.residual and not linear.inner]
            if unread:
                return f"its {unread[0]} reads the residual stream without a norm"
        if model.stem.norm is not None or model.stem.positions is not None:
            return "its embedding is normed or has learned positions"
        return None

    def transform_stem(self, model: Model, stem: Stem) -> None:
        if self._obstacle(model):
            return
        weight = to_torch(stem.embedding.weight)
        rotated = self._residual(model)(weight.float())
        stem.embedding = Embedding(rotated.to(torch.float16 if weight.dtype == torch.bfloat16 else weight.dtype))

    def transform_block(self, model: Model, block: Block) -> None:
        if self._obstacle(model):
            return
        residual = self._residual(model)
        inner = {norm.name for norm in block.spec.norms if norm.inner}
        for edge in block.spec.edges:
            if edge.through is None and edge.writer not in inner:
                _rotate_readers(block, edge, residual)
            elif edge.through == "attention" and self.heads and not _gated(block):
                _rotate_values(block, edge, self.seed + 1)
        for name in block.spec.residual:
            writer = block.linears[name]
            by_expert = writer.weight.unflatten(0, (writer.experts, -1)).transpose(1, 2)
            writer.weight = residual(by_expert).transpose(1, 2).reshape(writer.weight.shape)
            if writer.bias is not None:
                writer.bias = residual(writer.bias.unflatten(0, (writer.experts, -1))).flatten()

    def _residual(self, model: Model) -> RandomHadamard:
        return RandomHadamard(model.config.hidden_size, self.seed)


class RandomHadamard:
    """x [..., size] times a fixed orthogonal matrix: random signs, a Hadamard matrix (Sylvester's) over the largest
    power of two that divides `size`, and a random orthogonal matrix over the odd rest."""

    def __init__(self, size: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        odd = size // (size & -size)
        self.signs = torch.randint(0, 2, (size,), generator=generator).float() * 2 - 1
        self.odd = torch.linalg.qr(torch.randn(odd, odd, generator=generator, dtype=torch.float64)).Q.float()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        size, odd = self.signs.numel(), self.odd.shape[0]
        y = (x * self.signs).reshape(-1, size // odd, odd)
        width = 1
        while width < size // odd:
            first, second = y.reshape(-1, 2, width * odd).unbind(1)
            y = torch.stack((first + second, first - second), 1)
            width *= 2
        if odd > 1:
            y = y.reshape(-1, odd) @ self.odd
        return y.reshape(x.shape) / math.sqrt(size // odd)


def _gated(block: Block) -> bool:
    """What the heads make of their values is multiplied number by number, which no rotation goes through."""
    return block.spec.attention is not None and block.spec.attention.gated


def _rotate_readers(block: Block, edge: Edge, residual: RandomHadamard) -> None:
    """y = W · diag(g) · x of a normalised x is W · diag(g) · Q of a normalised x · Q."""
    norm = block.norms[edge.writer]
    for name in edge.readers:
        reader = block.linears[name]
        reader.weight = residual(reader.weight * norm.weight)
    _note(block, edge.readers, norm.weight, residual)
    norm.weight = torch.ones_like(norm.weight)


def _note(block: Block, readers: Sequence[str], gains: torch.Tensor, rotation: RandomHadamard) -> None:
    if block.bases is not None:
        turn = Turn(to_numpy(rotation.signs), to_numpy(rotation.odd))
        block.bases = {**block.bases, **{name: block.bases.get(name, Basis()).turned(to_numpy(gains.float()), turn)
                                         for name in readers}}


def _rotate_values(block: Block, edge: Edge, seed: int) -> None:
    """The v rows end q | k | v; o reads the heads' values side by side."""
    attention = block.spec.attention
    assert attention is not None
    values, dim = attention.value_size, attention.value_size // attention.num_kv_heads
    rotation = RandomHadamard(dim, seed)
    qkv, o = block.linears[edge.writer], block.linears[edge.readers[0]]
    rows = qkv.weight[-values:].reshape(attention.num_kv_heads, dim, -1)
    rotated = rotation(rows.transpose(1, 2)).transpose(1, 2).reshape(values, -1)
    qkv.weight = torch.cat((qkv.weight[:-values], rotated))
    if qkv.bias is not None:
        qkv.bias = torch.cat((qkv.bias[:-values], rotation(qkv.bias[-values:].reshape(-1, dim)).flatten()))
    o.weight = rotation(o.weight.reshape(-1, dim)).reshape(o.weight.shape)
    _note(block, edge.readers, torch.ones(o.weight.shape[1]), rotation)

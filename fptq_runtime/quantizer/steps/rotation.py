"""QuaRot (arXiv 2404.00456), the part that costs nothing at run time: rotations that the weights take in."""

from __future__ import annotations

import math
from typing import Literal

import torch

from fptq_runtime.config import ModelConfig
from fptq_runtime.kernels.base import Embedding, Linear, Norm
from fptq_runtime.kernels.reference import to_torch
from fptq_runtime.models.decoder import Block, Head, Stem
from fptq_runtime.quantizer.steps.base import QuantizationError, Step


class Rotation(Step):
    """Rotate the residual stream, so that no channel of what the linears read is an outlier.

    Norm gains move into the linears that read them: RMSNorm without gains commutes with every orthogonal map. The
    embedding, o and down then write rotated rows; qkv, up and the head undo it as they read.

    heads: also rotate what each head makes of its values: exact, because every head has the same rotation.
    """

    type: Literal["rotation"] = "rotation"
    heads: bool = True
    seed: int = 0

    def check(self, config: ModelConfig) -> None:
        if config.norm != "rms":
            raise QuantizationError(f"rotation does not work on {config.architecture}: its LayerNorm subtracts the "
                                    "mean, which no rotation keeps; leave the step out")

    def transform_stem(self, config: ModelConfig, stem: Stem) -> None:
        weight = to_torch(stem.embedding.weight)
        rotated = self._residual(config)(weight.float())
        stem.embedding = Embedding(rotated.to(torch.float16 if weight.dtype == torch.bfloat16 else weight.dtype))

    def transform_block(self, config: ModelConfig, index: int, block: Block) -> None:
        residual = self._residual(config)
        for norm, reader in ((block.input_norm, block.qkv), (block.mlp_norm, block.up)):
            _rotate_reader(norm, reader, residual)
        if self.heads:
            _rotate_values(config, block, RandomHadamard(config.head_dim, self.seed + 1))
        for writer in (block.o, block.down):
            writer.weight = residual(writer.weight.T).T.contiguous()
            if writer.bias is not None:
                writer.bias = residual(writer.bias)

    def transform_head(self, config: ModelConfig, head: Head) -> None:
        _rotate_reader(head.norm, head.lm_head, self._residual(config))

    def _residual(self, config: ModelConfig) -> RandomHadamard:
        return RandomHadamard(config.hidden_size, self.seed)


class RandomHadamard:
    """x [..., size] times a fixed orthogonal matrix: random signs, a Hadamard matrix (Sylvester's) over the largest
    power of two that divides `size`, and a random orthogonal matrix over the odd rest."""

    def __init__(self, size: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        odd = size // (size & -size)
        self._signs = torch.randint(0, 2, (size,), generator=generator).float() * 2 - 1
        self._odd = torch.linalg.qr(torch.randn(odd, odd, generator=generator, dtype=torch.float64)).Q.float()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        size, odd = self._signs.numel(), self._odd.shape[0]
        y = (x * self._signs).reshape(-1, size // odd, odd)
        width = 1
        while width < size // odd:
            first, second = y.reshape(-1, 2, width * odd).unbind(1)
            y = torch.stack((first + second, first - second), 1)
            width *= 2
        if odd > 1:
            y = y.reshape(-1, odd) @ self._odd
        return y.reshape(x.shape) / math.sqrt(size // odd)


def _rotate_reader(norm: Norm, reader: Linear, residual: RandomHadamard) -> None:
    """y = W · diag(g) · x of a normalised x is W · diag(g) · Q of a normalised x · Q."""
    reader.weight = residual(reader.weight * norm.weight)
    norm.weight = torch.ones_like(norm.weight)


def _rotate_values(config: ModelConfig, block: Block, rotation: RandomHadamard) -> None:
    """The v rows end q | k | v; o reads the heads' values side by side."""
    values = config.num_kv_heads * config.head_dim
    qkv, o = block.qkv, block.o
    rows = qkv.weight[-values:].reshape(config.num_kv_heads, config.head_dim, -1)
    rotated = rotation(rows.transpose(1, 2)).transpose(1, 2).reshape(values, -1)
    qkv.weight = torch.cat((qkv.weight[:-values], rotated))
    if qkv.bias is not None:
        bias = rotation(qkv.bias[-values:].reshape(-1, config.head_dim)).flatten()
        qkv.bias = torch.cat((qkv.bias[:-values], bias))
    o.weight = rotation(o.weight.reshape(-1, config.head_dim)).reshape(o.weight.shape)

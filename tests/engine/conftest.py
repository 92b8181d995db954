"""Real kernels and weights, for tests of what an engine makes of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

import fptq_runtime
from fptq_runtime.artifact.numerics import pack_codes, quantize_weight
from fptq_runtime.kernels.base import ActivationQuant, Backend, Linear, QuantizedWeight
from fptq_runtime.kernels.reference import to_numpy, to_torch
from fptq_runtime.models.block import Block, prepare_block, prepare_stem
from fptq_runtime.models.decoder import Decoder
from fptq_runtime.models.loader import Checkpoint, load_block, load_head, load_stem

DEMO = Path(fptq_runtime.__file__).parent / "demo"


def quantized(linear: Linear, act: ActivationQuant, num_bits: int = 4) -> Linear:
    codes, scale = quantize_weight(to_torch(linear.weight), num_bits, 128)
    packed = to_numpy(pack_codes(codes, num_bits))
    return replace(linear, weight=QuantizedWeight(packed, to_numpy(scale), 4 if num_bits == 4 else 8, 128), act=act)


def w4a8_decoder(backend: Backend) -> Decoder:
    """The demo model, its linears rounded to nearest: dynamic and static activations, and a last layer left in
    float."""
    checkpoint = Checkpoint(DEMO)
    config = checkpoint.model_config

    def block(index: int) -> Block:
        loaded = load_block(checkpoint, index)
        if index == config.num_layers - 1:
            return loaded
        act = ActivationQuant() if index % 2 else ActivationQuant(0.05)
        return loaded.with_linears(
            lambda name, linear: quantized(linear, act if name in ("qkv", "up") else ActivationQuant()))

    head = load_head(checkpoint).with_linears(lambda _, linear: quantized(linear, ActivationQuant(), num_bits=8))
    return Decoder(config, prepare_stem(load_stem(checkpoint), backend),
                   [prepare_block(block(i), backend) for i in range(config.num_layers)], prepare_block(head, backend))


@pytest.fixture(scope="module")
def native() -> tuple[Decoder, Backend]:
    pytest.importorskip("fptq_runtime._native", reason="the native extension is not built")
    from fptq_runtime.kernels.cpu import CpuBackend

    backend = CpuBackend(threads=2)
    return w4a8_decoder(backend), backend

"""Qwen3: Llama with an RMSNorm over each head of q and k."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fptq_runtime.config import ModelConfig
from fptq_runtime.models.block import Model, NormSpec
from fptq_runtime.models.fields import Fields, dense_config
from fptq_runtime.models.llama import llama_like, read_attention
from fptq_runtime.models.qwen2 import read_windows


def qwen3(fields: Fields) -> Model:
    config = dense_config(fields, "Qwen3ForCausalLM", default_head_dim=128, default_positions=32768)
    return qwen3_like(fields, config, read_windows(fields, config))


def qwen3_like(fields: Fields, config: ModelConfig, windows: Sequence[int | None]) -> Model:
    eps, bias = fields.number("rms_norm_eps", 1e-6, high=1.0), fields.flag("attention_bias", False)
    attention = replace(
        read_attention(fields, config),
        q_norm=NormSpec("q_norm", ("self_attn.q_norm",), (config.head_dim,), "rms", eps),
        k_norm=NormSpec("k_norm", ("self_attn.k_norm",), (config.head_dim,), "rms", eps),
    )
    return llama_like(fields, config, attention, windows=windows, qkv_bias=bias, o_bias=bias)

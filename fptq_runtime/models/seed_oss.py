"""Seed-OSS: Llama with biases of q, k and v, and of o where it says so."""

from __future__ import annotations

from fptq_runtime.models.block import Model
from fptq_runtime.models.fields import Fields, dense_config
from fptq_runtime.models.llama import biased_llama


def seed_oss(fields: Fields) -> Model:
    config = dense_config(fields, "SeedOssForCausalLM", default_head_dim=128, default_positions=524288)
    return biased_llama(fields, config, qkv_bias=fields.flag("attention_bias", True),
                        o_bias=fields.flag("attention_out_bias", False))

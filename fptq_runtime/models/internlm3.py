"""InternLM 3: Llama, whose biases have other names."""

from __future__ import annotations

from fptq_runtime.models.block import Model
from fptq_runtime.models.fields import Fields, ModelError, dense_config
from fptq_runtime.models.llama import biased_llama


def internlm3(fields: Fields) -> Model:
    config = dense_config(fields, "InternLM3ForCausalLM", default_head_dim=128, default_positions=32768)
    bias = fields.flag(("qkv_bias", "attention_bias"), False)
    if bias != fields.flag(("bias", "mlp_bias"), False):
        raise ModelError(f"{fields.where}: qkv_bias and bias must be the same; transformers has no other InternLM 3")
    return biased_llama(fields, config, qkv_bias=bias, o_bias=bias, mlp_bias=bias, eps=1e-5)

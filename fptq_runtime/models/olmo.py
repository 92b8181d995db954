"""OLMo: Llama with LayerNorms that have no weight."""

from __future__ import annotations

from fptq_runtime.models.block import Model
from fptq_runtime.models.fields import Fields, ModelError, dense_config
from fptq_runtime.models.layers import norms_of
from fptq_runtime.models.llama import biased_llama

EPS = 1e-5  # config.json does not say it


def olmo(fields: Fields) -> Model:
    config = dense_config(fields, "OlmoForCausalLM")
    if fields.get("clip_qkv") is not None:
        raise ModelError(f"{fields.where}: clip_qkv is not supported; an OLMo without it is")
    return biased_llama(fields, config, mlp_bias=False, norm=norms_of("layer", config.hidden_size, EPS, scaled=False))

"""AFM (Arcee): Llama with a squared ReLU in place of the gated MLP."""

from __future__ import annotations

from fptq_runtime.models.block import Model
from fptq_runtime.models.fields import Fields, dense_config
from fptq_runtime.models.llama import biased_llama


def arcee(fields: Fields) -> Model:
    config = dense_config(fields, "ArceeForCausalLM", default_positions=4096)
    return biased_llama(fields, config, gated=False, curve="relu2", eps=1e-5)

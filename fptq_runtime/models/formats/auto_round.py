"""AutoRound's checkpoints: GPTQ's tensors, or AWQ's, under a config of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fptq_runtime.artifact.scheme import SchemeError
from fptq_runtime.models.formats.awq import Awq
from fptq_runtime.models.formats.facts import refuse_unknown
from fptq_runtime.models.formats.gptq import Gptq
from fptq_runtime.models.tensors import Tensors

METHODS = ("auto-round", "auto_round", "intel/auto-round")
GPTQ = ("auto_round:auto_gptq", "auto_round:gptq", "auto_round:auto_gptq:exllamav2")  # zeros less one
GPTQ_V2 = ("auto_round", "auto_round:gptqmodel", "auto_round:exllamav2")  # zeros as they are
AWQ = ("auto_round:auto_awq", "auto_round:awq")
READ = ("quant_method", "bits", "group_size", "sym", "packing_format", "backend", "data_type", "act_bits",
        "act_data_type", "extra_config")
HARMLESS = (  # how the codes were found, and what activations of 16 bits are called
    "iters", "lr", "minmax_lr", "nsamples", "seqlen", "batch_size", "gradient_accumulate_steps", "low_gpu_mem_usage",
    "low_cpu_mem_usage", "enable_quanted_input", "enable_minmax_tuning", "enable_norm_bias_tuning", "scale_dtype",
    "amp", "autoround_version", "block_name_to_quantize", "quant_block_list", "to_quant_block_names", "dataset",
    "lm_head", "act_group_size", "act_sym", "act_dynamic", "damp_percent", "desc_act", "true_sequential",
    "not_use_best_mse", "dynamic_max_gap", "enable_alg_ext", "super_bits", "super_group_size",
)


def open_auto_round(config: Mapping[str, Any], tensors: Tensors) -> Gptq | Awq:
    """Raises SchemeError."""
    refuse_unknown(config, "auto-round's quantization_config", READ, HARMLESS)
    each = config.get("extra_config") or {}
    if not isinstance(each, Mapping) or not all(isinstance(of_layer, Mapping) for of_layer in each.values()):
        raise SchemeError("auto-round: extra_config must be an object for each layer that it names")
    for name, of_layer in ("", config), *each.items():
        where = f"auto-round: {name or 'quantization_config'}"
        for width in ("bits", "act_bits"):
            if type(of_layer.get(width)) not in (int, type(None)):
                raise SchemeError(f"{where}: {width} must be an integer, not {of_layer[width]!r}")
        if (of_layer.get("bits") or 4) < 16 and of_layer.get("data_type") not in (None, "int"):
            raise SchemeError(f"{where} has data_type {of_layer['data_type']!r}; only 'int' is supported")
        if (of_layer.get("act_bits") or 16) < 16:
            raise SchemeError(f"{where} quantizes activations to {of_layer['act_bits']} bits, which is not supported")
    packing = config.get("packing_format") or config.get("backend") or "auto"
    packing = GPTQ[0] if packing == "auto" else packing
    symmetric = config.get("sym") is not False
    shared = {"bits": config.get("bits", 4), "group_size": config.get("group_size", 128)}
    if packing in AWQ:
        return Awq({**shared, "zero_point": not symmetric}, tensors)
    if packing not in (*GPTQ, *GPTQ_V2):
        raise SchemeError(f"auto-round: packing_format {packing!r} is not supported; "
                          f"{', '.join((*GPTQ, *GPTQ_V2, *AWQ))} are")
    layout = "gptq" if packing in GPTQ else "gptq_v2"
    return Gptq({**shared, "sym": symmetric, "checkpoint_format": layout}, tensors)

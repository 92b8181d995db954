"""A quantized model in the form that vLLM loads: compressed-tensors, every quantized input dynamic per token.

What vLLM's compressed-tensors loader matches (`CompressedTensorsConfig._get_scheme_from_parts`): 4-bit weights,
symmetric per group or channel, with dynamic per-token int8 inputs, as int-quantized; 8-bit ones per channel likewise;
either with float inputs as pack-quantized. It reads lm_head in float.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from ml_dtypes import bfloat16

from fptq_runtime import __version__
from fptq_runtime.artifact.io import ArtifactWriter, check_files, check_output, is_artifact
from fptq_runtime.artifact.scheme import LayerScheme
from fptq_runtime.kernels.base import ActivationQuant, Array, Backend, Embedding, Linear, Norm, QuantizedWeight
from fptq_runtime.models.formats import dequantize, unpack
from fptq_runtime.models.loader import Checkpoint, CheckpointError, load_block, load_head, load_model, load_stem
from fptq_runtime.models.tokenizer import Tokenizer
from fptq_runtime.quantizer.calibrate import Text
from fptq_runtime.quantizer.evaluate import perplexity, text_windows
from fptq_runtime.quantizer.export import copy_companions, linear_scheme, module_tensors, quantization_config


@dataclass(frozen=True)
class Export:
    """Perplexity of the artifact and of what was written, on `tokens` tokens of `text`. static_inputs: how many linears
    had a static input scale, which the export drops."""

    perplexity_before: float
    perplexity_after: float
    text: str
    text_sha256: str
    tokens: int
    static_inputs: int
    bytes: int


def export(path: Path, out: Path, text: Text, backend: Backend, text_tokens: int | None = None,
           overwrite: bool = False, progress: bool = False) -> Export:
    """Write the quantized model at `path` to the directory `out`, whole or not at all; overwrite: in place of an
    artifact or an earlier export there. Raises ValueError, one line, where vLLM could not run a layer."""
    check_output(out, overwrite, path)
    if is_artifact(path):
        check_files(path)
    checkpoint = Checkpoint(path)
    if not checkpoint.quantized:
        raise CheckpointError(f"{path} is not quantized; vLLM loads it as it is")
    windows = text_windows(text, Tokenizer(path), checkpoint.model_config.max_position_embeddings, text_tokens)
    schemes: dict[str, LayerScheme] = {}
    ignored: list[str] = []
    static = 0
    with ArtifactWriter(out, overwrite) as writer:
        for name, module in _modules(checkpoint):
            if isinstance(module, Linear):
                static += module.act is not None and module.act.scale is not None
                tensors, scheme = _linear(name, module, name == checkpoint.spec.lm_head)
                if scheme is None:
                    ignored.append(name)
                else:
                    schemes[name] = scheme
                writer.add_tensors(tensors)
            else:
                writer.add_tensors(module_tensors(name, module))
        writer.finish_tensors()
        config = {**checkpoint.config, "tie_word_embeddings": checkpoint.tied}
        config["quantization_config"] = quantization_config(schemes, checkpoint.spec.lm_head, ignored)
        writer.add_file("config.json", json.dumps(config, indent=2) + "\n")
        copy_companions(path, writer)
        before, after = (perplexity(load_model(Checkpoint(model), backend), backend, windows, progress=progress)
                         for model in (path, writer.directory))
        measured: dict[str, Any] = {
            "perplexity_before": before[0], "perplexity_after": after[0], "text": text.name,
            "text_sha256": text.sha256, "tokens": before[1], "static_inputs": static,
        }
        size = writer.publish({"target": "vllm", "fptq_version": __version__, **measured})
    return Export(**measured, bytes=size)


def _modules(checkpoint: Checkpoint) -> Iterator[tuple[str, Linear | Norm | Embedding]]:
    spec, config = checkpoint.spec, checkpoint.model_config
    yield from spec.stem_modules(load_stem(checkpoint))
    for index in range(config.num_layers):
        yield from spec.block_modules(config, index, load_block(checkpoint, index))
    for name, module in spec.head_modules(load_head(checkpoint)):
        if not (checkpoint.tied and name == spec.lm_head):
            yield name, module


def _linear(name: str, linear: Linear, head: bool) -> tuple[dict[str, Array], LayerScheme | None]:
    """A linear's tensors, and its scheme where it stays quantized."""
    weight = linear.weight
    if linear.low_rank is not None:
        raise CheckpointError(f"{name} has a low-rank correction, which vLLM does not read; quantize without it")
    if not isinstance(weight, QuantizedWeight):
        if linear.act is not None:
            raise CheckpointError(f"{name} has float weights but quantized inputs, which vLLM does not run")
        return module_tensors(name, linear), None
    if weight.type == "float":
        raise CheckpointError(f"{name} has floating-point codes; only integer ones are exported for vLLM")
    if head:
        return module_tensors(name, replace(linear, weight=dequantize(weight).astype(bfloat16), act=None)), None
    if weight.num_bits == 8 and weight.group_size != weight.k and linear.act is not None:
        raise CheckpointError(f"{name} has 8-bit weights in groups and 8-bit inputs; vLLM runs them per channel only")
    dynamic = replace(linear, act=None if linear.act is None else ActivationQuant())
    tensors, scheme = module_tensors(name, dynamic), linear_scheme(dynamic)
    assert scheme is not None
    if linear.act is None:
        return tensors, scheme
    del tensors[f"{name}.weight_packed"], tensors[f"{name}.weight_shape"]
    tensors[f"{name}.weight"] = unpack(weight.packed, weight.num_bits, weight.k).astype(np.int8)
    return tensors, replace(scheme, format="int-quantized")

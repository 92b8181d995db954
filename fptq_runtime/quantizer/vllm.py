"""A quantized model in the form that vLLM loads: compressed-tensors, every quantized input dynamic per token.

What vLLM's compressed-tensors loader matches: pack-quantized weights of 4 bits, symmetric per group or channel, with
dynamic per-token int8 inputs, go to its fast kernels (`CompressedTensorsWNA8Int`); int-quantized, they would go
to a reference loop. 8-bit ones go there per channel, and either runs with float inputs too. It reads lm_head in float.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ml_dtypes import bfloat16

from fptq_runtime import __version__
from fptq_runtime.artifact.io import ArtifactWriter, check_files, check_output, is_artifact
from fptq_runtime.artifact.scheme import LayerScheme
from fptq_runtime.kernels.base import ActivationQuant, Array, Backend, Embedding, Linear, Norm, QuantizedWeight
from fptq_runtime.models.formats.compressed_tensors import linear_scheme, quantization_config
from fptq_runtime.models.loader import Checkpoint, CheckpointError, load_block, load_head, load_model, load_stem
from fptq_runtime.models.tokenizer import Tokenizer
from fptq_runtime.models.weights import dequantize
from fptq_runtime.quantizer.calibrate import Text
from fptq_runtime.quantizer.evaluate import perplexity, text_windows
from fptq_runtime.quantizer.export import block_modules, block_tensors, copy_companions, stem_modules, tensors_of


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
    artifact or an earlier export there. Raises FptqError where vLLM could not run a layer."""
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
        for modules, tensors in _parts(checkpoint):
            for name, module in modules:
                if isinstance(module, Linear):
                    static += module.act is not None and module.act.scale is not None
                    module = _linear(name, module, name == checkpoint.model.head_module)
                    if (scheme := linear_scheme(module)) is None:
                        ignored.append(name)
                    else:
                        schemes[name] = scheme
                writer.add_tensors(tensors_of(name, module))
            writer.add_tensors(tensors)
        writer.finish_tensors()
        config = {**checkpoint.config, "tie_word_embeddings": checkpoint.tied}
        config["quantization_config"] = quantization_config(schemes, checkpoint.model.head_module, ignored)
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


def _parts(checkpoint: Checkpoint) -> Iterator[tuple[Sequence[tuple[str, Linear | Norm | Embedding]],
                                                     dict[str, Array]]]:
    """Of the stem, each block and the head: its modules, and what is none."""
    yield stem_modules(load_stem(checkpoint)), {}
    for index in range(len(checkpoint.model.blocks)):
        block = load_block(checkpoint, index)
        yield block_modules(block), block_tensors(block)
    head = block_modules(load_head(checkpoint))
    yield [each for each in head if not (checkpoint.tied and each[0] == checkpoint.model.head_module)], {}


def _linear(name: str, linear: Linear, head: bool) -> Linear:
    """As vLLM's kernels take it. Raises CheckpointError where they cannot."""
    weight = linear.weight
    if linear.low_rank is not None:
        raise CheckpointError(f"{name} has a low-rank correction, which vLLM does not read; quantize without it")
    if not isinstance(weight, QuantizedWeight):
        if linear.act is not None:
            raise CheckpointError(f"{name} has float weights but quantized inputs, which vLLM does not run")
        return linear
    if weight.type == "float":
        raise CheckpointError(f"{name} has floating-point codes; only integer ones are exported for vLLM")
    if head:
        return replace(linear, weight=dequantize(weight).astype(bfloat16), act=None)
    if weight.num_bits == 8 and weight.group_size != weight.k and linear.act is not None:
        raise CheckpointError(f"{name} has 8-bit weights in groups and 8-bit inputs; vLLM runs them per channel only")
    return replace(linear, act=None if linear.act is None else ActivationQuant())

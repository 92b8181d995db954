"""A model's parts under the checkpoint's names, in numpy, for the files that the quantizer writes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fptq_runtime.artifact.io import ArtifactWriter
from fptq_runtime.kernels.base import Array, Embedding, Linear, Norm, QuantizedWeight
from fptq_runtime.kernels.reference import to_numpy
from fptq_runtime.models.block import Block, Stem
from fptq_runtime.models.formats.compressed_tensors import module_tensors
from fptq_runtime.models.weights import unfuse, unstack

COMPANIONS = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", "generation_config.json",
    "modules.json", "config_sentence_transformers.json", "sentence_bert_config.json", "[0-9]_*/config.json",
    "LICENSE*", "NOTICE*",
)


def companions(source: Path) -> list[Path]:
    """What lies beside a model's weights and belongs to it."""
    return [file for pattern in COMPANIONS for file in sorted(source.glob(pattern))]


def copy_companions(source: Path, writer: ArtifactWriter) -> None:
    for file in companions(source):
        writer.copy_file(file, file.relative_to(source).as_posix())


def stem_modules(stem: Stem) -> list[tuple[str, Embedding | Norm]]:
    """The stem's parameters under the checkpoint's names."""
    spec = stem.spec
    modules: list[tuple[str, Embedding | Norm]] = [(spec.embedding, stem.embedding)]
    if spec.positions is not None:
        table = to_numpy(stem.positions.weight)
        unused = np.zeros((spec.position_offset, table.shape[1]), table.dtype)
        modules.append((spec.positions, Embedding(np.concatenate((unused, table)))))
    if spec.norm is not None:
        modules += unstack(stem.norm, spec.norm)
    return modules


def block_modules(block: Block) -> list[tuple[str, Linear | Norm]]:
    """A block's parameters under the checkpoint's names, unfused: the inverse of loading."""
    modules: list[tuple[str, Linear | Norm]] = []
    for norm_spec, norm in block.each_norm():
        modules += unstack(norm, norm_spec)
    for linear in block.spec.linears:
        modules += unfuse(block.linears[linear.name], linear)
    return [(block.spec.prefix + name, module) for name, module in modules]


def block_tensors(block: Block) -> dict[str, Array]:
    """What belongs to a block and is neither a linear nor a norm: attention's sinks, the bias of its routing, the
    arrays of its recurrent ops."""
    spec = block.spec
    tensors = {}
    if spec.attention is not None and spec.attention.sinks is not None:
        tensors[spec.prefix + spec.attention.sinks] = to_numpy(block.attention.sinks)
    if spec.routing_bias is not None:
        tensors[spec.prefix + spec.routing_bias] = to_numpy(block.routing.bias)
    for op, recurrent in zip(spec.recurrent, block.recurrent, strict=True):
        tensors |= {spec.prefix + tensor: to_numpy(getattr(recurrent, field)).reshape(shape)
                    for field, (tensor, shape) in op.arrays.items()}
    return tensors


def tensors_of(name: str, module: Linear | Norm | Embedding) -> dict[str, Array]:
    """A module's tensors under their names in the file, whatever holds them now."""
    return module_tensors(name, _in_numpy(module))


def _in_numpy(module: Any) -> Any:
    weight = module.weight
    if isinstance(weight, QuantizedWeight):
        weight = replace(weight, packed=to_numpy(weight.packed), scale=to_numpy(weight.scale))
    else:
        weight = to_numpy(weight)
    if isinstance(module, Embedding):
        return Embedding(weight)
    changed = replace(module, weight=weight, bias=to_numpy(module.bias))
    if isinstance(changed, Linear) and changed.low_rank is not None:
        changed.low_rank = to_numpy(changed.low_rank[0]), to_numpy(changed.low_rank[1])
    return changed

"""One of the shapes with random weights as an artifact on disk, for servers and for other engines to load."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

from fptq_runtime import __version__
from fptq_runtime.artifact.io import ArtifactWriter, Manifest, Provenance, Quality, TextRecord
from fptq_runtime.artifact.scheme import LayerScheme
from fptq_runtime.kernels.base import Backend, Linear
from fptq_runtime.locate import DEMO_MODEL
from fptq_runtime.measure.shapes import CONFIGS, SHAPES, random_parameters
from fptq_runtime.models.block import Block
from fptq_runtime.models.formats.compressed_tensors import linear_scheme, quantization_config
from fptq_runtime.models.golden import compute_golden
from fptq_runtime.models.loader import Checkpoint, load_model
from fptq_runtime.quantizer.export import block_modules, stem_modules, tensors_of


def write_shape_artifact(name: str, path: Path, backend: Backend, head_bits: int = 8, overwrite: bool = False) -> Path:
    """The artifact that quantizing one of `SHAPES` would write, with `random_decoder`'s weights, `backend`'s golden
    logits, and the demo's tokenizer grown to the vocabulary. Raises ArtifactError."""
    model = SHAPES[name]
    config = model.config
    stem, block, head = random_parameters(model, head_bits)
    schemes: dict[str, LayerScheme] = {}
    with ArtifactWriter(path, overwrite, shard_bytes=1 << 30) as writer:
        for module_name, module in stem_modules(stem):
            writer.add_tensors(tensors_of(module_name, module))
        for spec in model.blocks:
            _write(writer, replace(block, spec=spec), schemes)
        _write(writer, head, schemes)
        writer.finish_tensors()
        writer.add_file("config.json", json.dumps({
            **CONFIGS[name], "dtype": "bfloat16", "bos_token_id": 0, "eos_token_id": 1,
            "quantization_config": quantization_config(schemes, model.head_module, []),
        }, indent=2) + "\n")
        for file in ("tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
            writer.copy_file(DEMO_MODEL / file, file)
        writer.add_file("tokenizer.json", _grown_tokenizer(config.vocab_size))
        text = TextRecord(name="none", sha256="0" * 64, tokens=0)
        golden = compute_golden(load_model(Checkpoint(writer.directory), backend), backend, range(32))
        writer.commit(Manifest(
            format_version=1,  # golden logits alone: probes of 7B parameters take minutes to record
            recipe={"name": "random weights"},
            provenance=Provenance(source=name, revision=None, architecture=config.architecture, source_files={},
                                  calibration=text, num_samples=0, sample_length=0, seed=0, fptq_version=__version__),
            layers=(),
            quality=Quality(text=text, window=0, perplexity_before=1.0, perplexity_after=1.0),
            golden=golden,
        ))
    return path


def _write(writer: ArtifactWriter, block: Block, schemes: dict[str, LayerScheme]) -> None:
    for name, module in block_modules(block):
        writer.add_tensors(tensors_of(name, module))
        if isinstance(module, Linear) and (scheme := linear_scheme(module)) is not None:
            schemes[name] = scheme


def _grown_tokenizer(vocab_size: int) -> str:
    """The demo's tokenizer.json with merges of two of its tokens added until it has vocab_size ids: as long to load as
    a real one."""
    tokenizer = json.loads((DEMO_MODEL / "tokenizer.json").read_text("utf-8"))
    vocab, merges = tokenizer["model"]["vocab"], tokenizer["model"]["merges"]
    for left, right in itertools.product(list(vocab), repeat=2):
        if len(vocab) == vocab_size:
            break
        if "<" not in left + right and left + right not in vocab:
            vocab[left + right] = len(vocab)
            merges.append([left, right])
    return json.dumps(tokenizer, ensure_ascii=False)

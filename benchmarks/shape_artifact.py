"""One of the shapes with random weights as an artifact on disk, for servers and for other engines to load."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fptq_runtime import __version__
from fptq_runtime.artifact.io import ArtifactWriter, Manifest, Provenance, Quality, TextRecord
from fptq_runtime.config import ModelConfig
from fptq_runtime.kernels.base import Backend, Linear
from fptq_runtime.locate import DEMO_MODEL
from fptq_runtime.models.families import SPECS, ModelSpec
from fptq_runtime.models.golden import compute_golden
from fptq_runtime.models.loader import Checkpoint, load_model
from fptq_runtime.quantizer.export import linear_scheme, module_tensors, quantization_config
from fptq_runtime.shapes import SHAPES, random_parameters


def write_shape_artifact(name: str, path: Path, backend: Backend, head_bits: int = 8, overwrite: bool = False) -> Path:
    """The artifact that quantizing one of `SHAPES` would write, with `random_decoder`'s weights, `backend`'s golden
    logits, and the demo's tokenizer grown to the vocabulary. Raises ArtifactError."""
    config = SHAPES[name]
    spec = next(spec for spec in SPECS if spec.architecture == config.architecture)
    stem, block, head = random_parameters(config, head_bits)
    with ArtifactWriter(path, overwrite, shard_bytes=1 << 30) as writer:
        for module_name, module in (*spec.stem_modules(stem), *spec.head_modules(head)):
            writer.add_tensors(module_tensors(module_name, module))
        layer = spec.block_modules(config, 0, block)
        tensors = {key: tensor for key, module in layer for key, tensor in module_tensors(key, module).items()}
        prefix = spec.layer(0, "")
        for index in range(config.num_layers):
            writer.add_tensors({spec.layer(index, key.removeprefix(prefix)): t for key, t in tensors.items()})
        writer.finish_tensors()
        linears = [(key, module) for key, module in layer if isinstance(module, Linear)]
        writer.add_file("config.json", json.dumps(_config_json(config, spec, linears, head.lm_head), indent=2) + "\n")
        for file in ("tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
            writer.copy_file(DEMO_MODEL / file)
        writer.add_file("tokenizer.json", _grown_tokenizer(config.vocab_size))
        text = TextRecord(name="none", sha256="0" * 64, tokens=0)
        golden = compute_golden(load_model(Checkpoint(writer.directory), backend), backend, range(32))
        writer.commit(Manifest(
            recipe={"name": "random weights"},
            provenance=Provenance(source=name, revision=None, architecture=config.architecture, source_files={},
                                  calibration=text, num_samples=0, sample_length=0, seed=0, fptq_version=__version__),
            layers=(),
            quality=Quality(text=text, window=0, perplexity_before=1.0, perplexity_after=1.0),
            golden=golden,
        ))
    return path


def _config_json(config: ModelConfig, spec: ModelSpec, layer: Sequence[tuple[str, Linear]], head: Linear
                 ) -> dict[str, Any]:
    """layer: the linears of layer 0 by their names in the file."""
    assert config.rope is not None
    prefix = spec.layer(0, "")
    schemes = {spec.layer(index, name.removeprefix(prefix)): linear_scheme(linear)
               for index in range(config.num_layers) for name, linear in layer}
    schemes[spec.lm_head] = linear_scheme(head)
    return {
        "architectures": [config.architecture], "model_type": "llama", "hidden_act": "silu", "dtype": "bfloat16",
        "vocab_size": config.vocab_size, "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size, "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads, "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim, "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.norm_eps, "rope_parameters": {"rope_type": "default", "rope_theta": config.rope.theta},
        "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 1,
        "quantization_config": quantization_config(
            {name: scheme for name, scheme in schemes.items() if scheme is not None}, spec.lm_head, []),
    }


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

"""GGUF files: gguf-py's dequantization and transformers' own loading are the oracles."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from fptq_runtime.errors import FptqError
from fptq_runtime.kernels.base import QuantizedWeight
from fptq_runtime.models.gguf import GgufTensors, config_of
from fptq_runtime.models.loader import Checkpoint, load_block
from fptq_runtime.models.weights import dequantize
from tests.models.gguf_files import tensors_of, write_gguf
from tests.models.hf import FAMILIES, save_random
from tests.models.test_decoder import assert_agrees
from tests.models.test_formats import PROMPT, assert_close, ours

SIZES = {"num_hidden_layers": 2, "intermediate_size": 160}
KINDS = {"llama": "llama", "llama-tied-bias": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma": "gemma",
         "gemma2": "gemma2", "gemma3": "gemma3", "olmo2": "olmo2", "granite": "granite", "smollm3": "smollm3",
         "starcoder2": "starcoder2"}
CHANGES: dict[str, dict[str, Any]] = {  # to what a GGUF can say
    "gemma": {"attention_bias": False}, "gemma2": {"query_pre_attn_scalar": 16},
    "gemma3": {"query_pre_attn_scalar": 16, "attention_bias": False, "sliding_window_pattern": 6},
    "smollm3": {"no_rope_layer_interval": 4, "use_sliding_window": False, "sliding_window": None},
    "starcoder2": {"sliding_window": None},
}


def beside(file: Path) -> Path:
    """A directory for it, without a tokenizer."""
    (file.parent / "config.json").write_text(json.dumps(config_of(GgufTensors(file))))
    return file.parent


@pytest.mark.parametrize("family", KINDS)
def test_floats_are_the_models(family: str, tmp_path: Path) -> None:
    """The config from its metadata, tensors by llama.cpp's names and orders."""
    model = save_random(family, tmp_path / "float", **CHANGES.get(family, {}))
    (tmp_path / "gguf").mkdir()
    write_gguf(tmp_path / "float", tmp_path / "gguf" / "model.gguf", KINDS[family])
    assert_agrees(beside(tmp_path / "gguf" / "model.gguf"), model, list(range(3, 60)))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma2", "gemma3", "starcoder2"])
def test_transformers_reads_the_same(family: str, tmp_path: Path) -> None:
    """What it makes of metadata, names and orders, by mappings of its own."""
    save_random(family, tmp_path / "float", **CHANGES.get(family, {}))
    (tmp_path / "gguf").mkdir()
    write_gguf(tmp_path / "float", tmp_path / "gguf" / "model.gguf", KINDS[family], Type.Q8_0)
    file = str(tmp_path / "gguf" / "model.gguf")
    read = {**load_gguf_checkpoint(file)["config"], "vocab_size": 211}
    if family == "qwen3":  # whose heads it takes to be of the default size
        read["head_dim"] = 16
    if family == "gemma2":  # whose caps and windows it does not read
        read |= {"sliding_window": 20, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0}
    config = AutoConfig.for_model(**read)
    theirs = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    tensors = load_gguf_checkpoint(file, return_tensors=True, model_to_load=theirs)["tensors"]
    missing = theirs.load_state_dict(tensors, strict=False).missing_keys
    assert set(missing) <= {"lm_head.weight"}
    theirs.tie_weights()
    if family.startswith("gemma"):  # of the scale of scores transformers takes its default
        for layer in theirs.model.layers:
            layer.self_attn.scaling = 16**-0.5
    assert_agrees(beside(tmp_path / "gguf" / "model.gguf"), theirs, list(range(3, 60)))


@pytest.mark.parametrize("kind", [Type.F16, Type.BF16, Type.Q8_0, Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1,
                                  Type.MXFP4])
def test_every_type_that_gguf_writes(kind: Type, tmp_path: Path) -> None:
    model = save_random("llama", tmp_path / "float", **SIZES)
    (tmp_path / "gguf").mkdir()
    try:
        meant = write_gguf(tmp_path / "float", tmp_path / "gguf" / "model.gguf", "llama", kind)
    except NotImplementedError:
        pytest.skip(f"gguf {gguf.__version__ if hasattr(gguf, '__version__') else ''} does not write {kind.name}")
    model.load_state_dict(tensors_of(meant))
    path = beside(tmp_path / "gguf" / "model.gguf")
    with torch.no_grad():
        expected = model(torch.tensor([PROMPT])).logits[0]
    assert_close(ours(path), expected)
    assert_close(ours(path, dequantize=True), expected)


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"])
def test_types_that_llama_cpp_alone_writes(kind: str, tmp_path: Path) -> None:
    """Random blocks, whose meaning is gguf-py's dequantization."""
    which = Type[kind]
    block, size = gguf.GGML_QUANT_SIZES[which]
    save_random("llama", tmp_path / "float", num_hidden_layers=1, hidden_size=256, intermediate_size=256,
                num_attention_heads=16)
    (tmp_path / "gguf").mkdir()
    file = tmp_path / "gguf" / "model.gguf"
    write_gguf(tmp_path / "float", file, "llama")
    raw = np.random.default_rng(0).integers(0, 256, (256, 256 // block * size), dtype=np.uint8)
    raw = np.where(np.isfinite(gguf.dequantize(raw, which)).all(1, keepdims=True), raw, 0)
    replace_tensor(file, "blk.0.ffn_down.weight", raw, which)
    weight = load_block(Checkpoint(beside(file)), 0).linears["down"].weight
    np.testing.assert_array_equal(weight, gguf.dequantize(raw, which))


def replace_tensor(file: Path, name: str, raw: np.ndarray, kind: Type, **metadata: Any) -> None:
    """The file with another tensor of that name, and other metadata."""
    reader = gguf.GGUFReader(file)
    writer = gguf.GGUFWriter(file.with_suffix(".new"), str(reader.fields["general.architecture"].contents()))
    for key, entry in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture" and key not in metadata:
            writer.add_key_value(key, entry.contents(), entry.types[0], entry.types[-1])
    for key, value in metadata.items():
        (writer.add_string if isinstance(value, str) else writer.add_float32 if isinstance(value, float) else
         writer.add_uint32)(key, value)
    for tensor in reader.tensors:
        if tensor.name == name:
            writer.add_tensor(name, raw, raw_dtype=kind)
        else:
            writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file.with_suffix(".new").replace(file)


@pytest.mark.parametrize(("kind", "bits"), [(Type.Q4_0, 4), (Type.Q8_0, 8)])
def test_integers_stay_what_they_are(kind: Type, bits: int, tmp_path: Path) -> None:
    """Codes and scales, of rows in another order too, without rounding."""
    save_random("llama", tmp_path / "float", **SIZES)
    (tmp_path / "gguf").mkdir()
    meant = write_gguf(tmp_path / "float", tmp_path / "gguf" / "model.gguf", "llama", kind)
    linears = load_block(Checkpoint(beside(tmp_path / "gguf" / "model.gguf")), 1).linears
    for name, modules in (("qkv", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
                          ("down", ("mlp.down_proj",))):
        weight = linears[name].weight
        assert isinstance(weight, QuantizedWeight)
        assert (weight.num_bits, weight.group_size) == (bits, 32)
        stacked = np.concatenate([meant[f"model.layers.1.{module}.weight"] for module in modules])
        np.testing.assert_array_equal(dequantize(weight), stacked)


def test_llama3s_frequencies(tmp_path: Path) -> None:
    """They come as a tensor of factors."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    model = save_random("llama3-rope", tmp_path / "float")
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](model.config, torch.device("cpu"))
    plain = 500.0 ** -(torch.arange(0, 16, 2).float() / 16)
    (tmp_path / "gguf").mkdir()
    file = tmp_path / "gguf" / "model.gguf"
    write_gguf(tmp_path / "float", file, "llama", rope_freqs=(plain / scaled).numpy().astype(np.float32))
    assert_agrees(beside(file), model, list(range(3, 60)))


@pytest.mark.parametrize(("rope", "fields"), [
    ({"type": "linear", "factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
    ({"type": "yarn", "factor": 4.0, "original_context_length": 32},
     {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}),
])
def test_scaled_ropes(rope: dict[str, Any], fields: dict[str, Any], tmp_path: Path) -> None:
    model = save_random("qwen2", tmp_path / "float", rope_parameters={"rope_theta": 500.0, **fields})
    (tmp_path / "gguf").mkdir()
    write_gguf(tmp_path / "float", tmp_path / "gguf" / "model.gguf", "qwen2", rope=rope)
    assert_agrees(beside(tmp_path / "gguf" / "model.gguf"), model, list(range(3, 60)))


@pytest.mark.parametrize("keep", [0, 3, 100, 0.5, 0.99])
def test_damaged_files_are_refused(keep: float, tmp_path: Path) -> None:
    save_random("llama", tmp_path / "float", **SIZES)
    file = tmp_path / "model.gguf"
    write_gguf(tmp_path / "float", file, "llama", Type.Q4_0)
    data = file.read_bytes()
    file.write_bytes(data[: int(keep * len(data)) if keep < 1 else int(keep)])
    with pytest.raises(FptqError, match=r"model\.gguf") as error:
        GgufTensors(file)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("key", "value", "words"), [
    ("llama.expert_count", 8, "expert_count"), ("llama.attention.scale", 0.5, "attention.scale"),
    ("llama.attention.value_length", 8, "value_length"), ("llama.rope.dimension_count", 8, "dimension_count"),
    ("llama.rope.scaling.type", "longrope", "longrope"), ("llama.rope.freq_base", "many", "freq_base"),
    ("llama.block_count", 0, "block_count"), ("llama.block_count", 1 << 30, "between 1 and 1024"),
    ("llama.context_length", "x", "context_length"),
])
def test_metadata_that_is_not_taken_is_named(key: str, value: Any, words: str, tmp_path: Path) -> None:
    save_random("llama", tmp_path / "float", **SIZES)
    file = tmp_path / "model.gguf"
    write_gguf(tmp_path / "float", file, "llama")
    replace_tensor(file, "", np.zeros(0, np.uint8), Type.F32, **{key: value})
    with pytest.raises(FptqError, match=words) as error:
        config_of(GgufTensors(file))
    assert "\n" not in str(error.value)


def test_foreign_architectures_are_named(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "rwkv7")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(FptqError, match="rwkv7"):
        GgufTensors(tmp_path / "model.gguf")


def test_families_of_ggufs_are_families() -> None:
    assert set(KINDS) <= set(FAMILIES)

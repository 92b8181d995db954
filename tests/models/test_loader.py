"""What a damaged, foreign or hostile checkpoint is answered with."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from fptq_runtime.artifact.scheme import SchemeError
from fptq_runtime.kernels.reference import ReferenceBackend
from fptq_runtime.models import loader
from fptq_runtime.models.chat_template import ChatTemplateError
from fptq_runtime.models.families import FAMILIES as BY_ARCHITECTURE
from fptq_runtime.models.families import parse_config
from fptq_runtime.models.fields import ModelError
from fptq_runtime.models.loader import Checkpoint, CheckpointError, load_block, load_head, load_model, load_stem
from fptq_runtime.models.tokenizer import Tokenizer
from tests.models.hf import FAMILIES, LLAMA, change_config, save_random

DEMO = Path(__file__).parents[2] / "fptq_runtime" / "demo"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    save_random("llama", path)
    return path


@pytest.fixture
def copy(llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llama, tmp_path / "model"))


def load_everything(path: Path) -> None:
    checkpoint = Checkpoint(path)
    load_stem(checkpoint)
    load_head(checkpoint)
    for index in range(checkpoint.model_config.num_layers):
        load_block(checkpoint, index)


def assert_refused(path: Path, *words: str) -> None:
    with pytest.raises((CheckpointError, ModelError, SchemeError)) as caught:
        load_everything(path)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


@pytest.mark.parametrize(("changes", "words"), [
    ({"hidden_size": 10**12}, ["hidden_size", "1000000000000"]),
    ({"num_hidden_layers": -1}, ["num_hidden_layers", "-1"]),
    ({"vocab_size": "many"}, ["vocab_size", "'many'"]),
    ({"vocab_size": True}, ["vocab_size", "True"]),
    ({"max_position_embeddings": 1 << 24}, ["max_position_embeddings", "16777216"]),
    ({"head_dim": 512}, ["head_dim", "512"]),
    ({"num_key_value_heads": 5}, ["6 attention heads", "5 KV heads"]),
    ({"hidden_act": "quick_gelu"}, ["hidden_act", "quick_gelu", "'silu'"]),
    ({"architectures": ["LlamaForCausualLM"]}, ["did you mean LlamaForCausalLM"]),
    ({"architectures": ["T5ForConditionalGeneration"]}, ["T5ForConditionalGeneration", "not supported"]),
    ({"architectures": []}, ["architectures"]),
    ({"architectures": None, "model_type": "t5"}, ["architectures"]),
    ({"eos_token_id": 10**9}, ["eos_token_id"]),
    ({"rope_parameters": {"rope_type": "dynamite", "rope_theta": 1e4, "factor": 2.0}}, ["rope_type", "dynamite"]),
    ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}}, ["factor"]),
    ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, ["factor"]),
    ({"intermediate_size": 137}, ["mlp.gate_proj.weight", "[136, 96]", "[137, 96]"]),
    ({"num_hidden_layers": 4}, ["no tensor", "model.layers.3"]),
    ({"quantization_config": {"quant_method": "hqq"}}, ["hqq", "compressed-tensors"]),
    ({"quantization_config": {"quant_method": "gptq"}}, ["gptq", "bits", "not supported"]),
])
def test_config_is_refused_by_name(copy: Path, changes: dict[str, Any], words: list[str]) -> None:
    change_config(copy, **changes)
    assert_refused(copy, *words)


@pytest.mark.parametrize(("model_type", "fields"), [
    ("mistral", {}), ("mistral", {"sliding_window": None}), ("mistral", {"sliding_window": 20}),
    ("qwen2", {}), ("qwen2", {"use_sliding_window": True}), ("qwen2", {"use_sliding_window": True,
                                                                      "sliding_window": None}),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 3}),
])
def test_window_is_transformers_own(model_type: str, fields: dict[str, Any]) -> None:
    """Also where the config leaves it out."""
    shape = {**LLAMA, "num_hidden_layers": 30}
    oracle = AutoConfig.for_model(model_type, **shape, **fields)
    model = parse_config({**shape, **fields, "architectures": [f"{model_type.capitalize()}ForCausalLM"]})
    windows = [block.attention.sliding_window for block in model.blocks]
    if model_type == "mistral":
        assert windows == [oracle.sliding_window] * 30
    else:
        assert windows == [oracle.sliding_window if kind == "sliding_attention" else None
                           for kind in oracle.layer_types]


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, 0.99])
def test_truncated_weights_are_refused(copy: Path, keep: float) -> None:
    weights = copy / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[: int(keep * len(data)) if keep < 1 else int(keep)])
    assert_refused(copy, "model.safetensors", "not a readable safetensors file")


@pytest.mark.parametrize(("tensors", "words"), [
    ({"up": (8, 4)}, ["no tensor", "q_proj.low_rank_down"]),
    ({"down": (4, 96)}, ["no tensor", "q_proj.low_rank_up"]),
    ({"down": (4, 96), "up": (96, 3)}, ["q_proj.low_rank_up", "[96, 3]", "[96, 4]"]),
    ({"down": (4, 95), "up": (96, 4)}, ["q_proj.low_rank_down", "[4, 95]", "[4, 96]"]),
    ({"down": (), "up": (96, 4)}, ["q_proj.low_rank_down"]),
    ({"down": (4, 96), "up": (96, 4)}, ["q_proj", "k_proj", "not all have low-rank factors"]),
])
def test_low_rank_factors_that_do_not_fit(copy: Path, tensors: dict[str, tuple[int, ...]], words: list[str]) -> None:
    stored = load_file(copy / "model.safetensors")
    module = "model.layers.0.self_attn.q_proj"
    stored |= {f"{module}.low_rank_{name}": torch.zeros(shape) for name, shape in tensors.items()}
    save_file(stored, copy / "model.safetensors")
    assert_refused(copy, *words)


def test_pickled_weights_are_refused(copy: Path) -> None:
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    assert_refused(copy, "pytorch_model.bin", "safetensors")


def test_integer_weights_are_refused(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.int64)
    save_file(tensors, copy / "model.safetensors")
    assert_refused(copy, "model.norm.weight", "int64")


def test_shard_outside_the_directory_is_refused(copy: Path) -> None:
    index = {"weight_map": {"model.norm.weight": "../model.safetensors"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_refused(copy, "shard")


def test_how_far_loading_is_goes_into_the_log(copy: Path, monkeypatch: pytest.MonkeyPatch,
                                              caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(loader, "LOG_SECONDS", 0)
    with caplog.at_level("INFO"):
        load_model(Checkpoint(copy), ReferenceBackend())
    size = (copy / "model.safetensors").stat().st_size / 1e9
    blocks = json.loads((copy / "config.json").read_text())["num_hidden_layers"]
    assert [record.message for record in caplog.records] == [
        f"loading {copy.name}: {size * done / blocks:.1f} of {size:.1f} GB" for done in range(1, blocks + 1)]


def test_missing_parts_are_named(copy: Path, tmp_path: Path) -> None:
    assert_refused(tmp_path / "nowhere", "nowhere", "not a directory")
    (copy / "config.json").write_text("{")
    assert_refused(copy, "config.json", "not readable JSON")
    (copy / "config.json").unlink()
    assert_refused(copy, "no config.json")


def test_tokenizer_errors(copy: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        Tokenizer(copy)
    (copy / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        Tokenizer(copy)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-10, 10**7) | st.floats(allow_nan=True) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


@given(st.sampled_from(sorted(BY_ARCHITECTURE)), st.data())
def test_no_config_raises_anything_else(architecture: str, data: st.DataObject) -> None:
    names = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim",
             "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "rope_theta", "rope_parameters",
             "rope_scaling", "tie_word_embeddings", "sliding_window", "use_sliding_window", "layer_types", "n_layer",
             "n_head", "eos_token_id", "bos_token_id", "hidden_act", "partial_rotary_factor", "layer_norm_eps"]
    base = {**FAMILIES["llama"][1], "architectures": [architecture]}
    changes = data.draw(st.dictionaries(st.sampled_from(names), json_values, min_size=1, max_size=4))
    with contextlib.suppress(ModelError):
        parse_config({**base, **changes})


def test_chat_template_writes_special_tokens_once() -> None:
    tokenizer = Tokenizer(DEMO)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "Once upon a time"}])
    assert ids[: len(tokenizer.encode("Once upon a time"))] == tokenizer.encode("Once upon a time")
    assert ids.count(tokenizer.bos_token_id) == 1


def test_chat_template_errors_are_the_clients(tmp_path: Path) -> None:
    model = Path(shutil.copytree(DEMO, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors")))
    (model / "chat_template.jinja").write_text("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ChatTemplateError, match="roles must alternate"):
        Tokenizer(model).apply_chat_template([{"role": "user", "content": "hello"}])
    (model / "chat_template.jinja").unlink()
    with pytest.raises(ChatTemplateError, match="no chat template"):
        Tokenizer(model).apply_chat_template([{"role": "user", "content": "hello"}])


@given(st.text(max_size=60))
def test_streamed_text_is_the_decoded_text(text: str) -> None:
    tokenizer = Tokenizer(DEMO)
    prompt = tokenizer.encode("Once upon a time")
    ids = tokenizer.encode(text, add_special_tokens=False)
    stream = tokenizer.stream(prompt_token_ids=prompt)
    streamed = "".join(piece for token in ids if (piece := stream.step(token)) is not None)
    assert tokenizer.decode(prompt + ids).startswith(tokenizer.decode(prompt) + streamed)

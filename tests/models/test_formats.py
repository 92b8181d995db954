"""Checkpoints that other tools wrote: compressed-tensors' own compressors and transformers are one oracle, plain
packers written from GPTQ's and AWQ's public layouts the other."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from fptq_runtime.artifact.scheme import SchemeError
from fptq_runtime.kernels.base import QuantizedWeight
from fptq_runtime.kernels.reference import ReferenceBackend
from fptq_runtime.models.fields import ModelError
from fptq_runtime.models.golden import prompt_logits
from fptq_runtime.models.loader import Checkpoint, CheckpointError, load_block, load_model
from fptq_runtime.models.weights import align, dequantize, pack, unpack
from tests.models.hf import change_config, save_random

PROMPT = [1, 17, 99, 4, 180, 33, 7, 62]
SIZES = {"num_hidden_layers": 2, "intermediate_size": 160}
Linears = dict[str, torch.Tensor]
Writer = Callable[[str, torch.Tensor], tuple[dict[str, torch.Tensor], torch.Tensor]]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("float")
    save_random("llama", path, **SIZES)
    return path


def write(source: Path, out: Path, quantization: dict[str, Any], writer: Writer) -> Linears:
    """The model with each block's linears as `writer` makes them. Returns the weights that these stand for."""
    out.mkdir()
    config = json.loads((source / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    tensors, meant = {}, {}
    for key, tensor in load_file(source / "model.safetensors").items():
        name = key.removesuffix(".weight")
        if "_proj" in key:
            stored, meant[key] = writer(name, tensor)
            tensors |= {f"{name}.{part}": value.contiguous() for part, value in stored.items()}
        else:
            tensors[key] = tensor
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return meant


def ours(path: Path, **options: Any) -> torch.Tensor:
    backend = ReferenceBackend()
    return torch.from_numpy(prompt_logits(load_model(Checkpoint(path, **options), backend), backend, PROMPT))


def theirs(path: Path, weights: Linears | None = None) -> torch.Tensor:
    model, info = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    if weights is not None:
        model.load_state_dict(weights, strict=False)
    with torch.no_grad():
        return model.eval()(torch.tensor([PROMPT])).logits[0]


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> None:
    assert ((actual - expected).abs().amax(-1) / expected.abs().amax(-1)).max() <= tolerance


def changed(path: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
    tensors = load_file(path / "model.safetensors")
    tensor = change(tensors.pop(name))
    save_file(tensors if tensor is None else {**tensors, name: tensor}, path / "model.safetensors")


# compressed-tensors

WEIGHTS: dict[str, dict[str, Any]] = {
    "w4": {"num_bits": 4, "strategy": "group", "group_size": 32},
    "w4-asymmetric": {"num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": False},
    "w4-channel-asymmetric": {"num_bits": 4, "strategy": "channel", "symmetric": False},
    "w4-uneven-groups": {"num_bits": 4, "strategy": "group", "group_size": 16},
    "w8": {"num_bits": 8, "strategy": "channel"},
    "w8-asymmetric": {"num_bits": 8, "strategy": "channel", "symmetric": False},
    "w8-tensor": {"num_bits": 8, "strategy": "tensor"},
}
ACTIVATIONS: dict[str, dict[str, Any] | None] = {
    "a16": None,
    "a8": {"num_bits": 8, "strategy": "token", "dynamic": True},
    "a8-static": {"num_bits": 8, "strategy": "tensor", "dynamic": False},
}


def compress(source: Path, out: Path, stored_as: str, weights: str, activations: str) -> Linears:
    args = QuantizationArgs(**WEIGHTS[weights])
    act = ACTIVATIONS[activations]
    scheme = QuantizationScheme(targets=["Linear"], weights=args, format=stored_as,
                                input_activations=None if act is None else QuantizationArgs(**act))

    def writer(name: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        n, k = weight.shape
        rows = weight.reshape(1, -1) if args.strategy == "tensor" else weight.reshape(n, -1, args.group_size or k)
        scale, zero = calculate_qparams(rows.amin(-1), rows.amax(-1), args)
        compressor = BaseCompressor.get_value_from_registry(stored_as)
        state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
        stored = compressor.compress({part: value.clone() for part, value in state.items()}, scheme)
        if activations == "a8-static":
            stored["input_scale"] = torch.tensor([0.05])
        meant = compressor.decompress(dict(stored), scheme)["weight"]
        return stored, meant

    quantization = {"quant_method": "compressed-tensors", "format": stored_as, "quantization_status": "compressed",
                    "ignore": ["lm_head"], "config_groups": {"group_0": scheme.model_dump(mode="json")}}
    return write(source, out, quantization, writer)


@pytest.mark.parametrize(("stored_as", "weights", "activations"), [
    ("pack-quantized", "w4", "a16"),
    ("pack-quantized", "w4-asymmetric", "a16"),
    ("pack-quantized", "w4-channel-asymmetric", "a16"),
    ("pack-quantized", "w4-uneven-groups", "a16"),
    ("pack-quantized", "w8", "a16"),
    ("pack-quantized", "w8-asymmetric", "a16"),
    ("int-quantized", "w4", "a8"),
    ("int-quantized", "w8", "a8"),
    ("int-quantized", "w8", "a8-static"),
    ("int-quantized", "w8-tensor", "a8"),
    ("int-quantized", "w8-asymmetric", "a8"),
])
def test_compressed_tensors(source: Path, tmp_path: Path, stored_as: str, weights: str, activations: str) -> None:
    """Logits are those of transformers, which decompresses the same directory; packed zero points it cannot load, so
    there the weights are what compressed-tensors decompresses. (Quantized activations may fall to the other side of a
    rounding, so those are held to the size of one such step.)"""
    path = tmp_path / "model"
    meant = compress(source, path, stored_as, weights, activations)
    packed_zeros = stored_as == "pack-quantized" and "asymmetric" in weights
    expected = theirs(source, meant) if packed_zeros else theirs(path)
    assert_close(ours(path), expected, 1e-4 if activations == "a16" else 2e-2)


@pytest.mark.parametrize(("weights", "bits"), [("w4", 4), ("w4-asymmetric", 8), ("w8", 8), ("w8-asymmetric", None),
                                               ("w4-uneven-groups", None)])
def test_codes_stay_codes_where_that_is_exact(source: Path, tmp_path: Path, weights: str, bits: int | None) -> None:
    path = tmp_path / "model"
    meant = compress(source, path, "pack-quantized", weights, "a16")
    checkpoint = Checkpoint(path)
    down = load_block(checkpoint, 0).linears["down"].weight
    assert (down.num_bits if isinstance(down, QuantizedWeight) else None) == bits
    floats = dequantize(down) if isinstance(down, QuantizedWeight) else down
    np.testing.assert_array_equal(floats, meant["model.layers.0.mlp.down_proj.weight"])
    assert (sum(checkpoint.notes.values()) == 7) == (weights not in ("w4", "w8"))


def test_widened_layers_are_logged_once(source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    compress(source, tmp_path / "model", "pack-quantized", "w4-asymmetric", "a16")
    ours(tmp_path / "model")
    [message] = caplog.messages
    assert "14 linear layers have asymmetric 4-bit codes" in message


def test_activations_can_be_chosen_at_load(source: Path, tmp_path: Path) -> None:
    """Also for what is read as floats, whose inputs then stay floats."""
    compress(source, tmp_path / "codes", "pack-quantized", "w4-asymmetric", "a16")
    assert not torch.equal(ours(tmp_path / "codes"), ours(tmp_path / "codes", activations="int8"))
    compress(source, tmp_path / "floats", "pack-quantized", "w8-asymmetric", "a16")
    assert torch.equal(ours(tmp_path / "floats"), ours(tmp_path / "floats", activations="int8"))


@pytest.mark.parametrize(("tensor", "change", "words"), [
    ("q_proj.weight", lambda t: t[:-1], "q_proj.weight has shape"),
    ("q_proj.weight_scale", lambda t: t * torch.nan, "q_proj.*not finite"),
    ("q_proj.weight_scale", lambda t: None, "q_proj.weight_scale"),
    ("q_proj.weight", lambda t: t.float(), "q_proj.weight is float32"),
    ("q_proj.input_scale", lambda t: -t, "q_proj.input_scale must be finite and positive"),
])
def test_damaged_compressed_tensors_are_refused(source: Path, tmp_path: Path, tensor: str,
                                                change: Callable[[torch.Tensor], torch.Tensor | None],
                                                words: str) -> None:
    path = tmp_path / "model"
    compress(source, path, "int-quantized", "w8", "a8-static")
    changed(path, f"model.layers.0.self_attn.{tensor}", change)
    with pytest.raises(CheckpointError, match=words):
        load_block(Checkpoint(path), 0)


def test_asymmetric_activations_are_refused(source: Path, tmp_path: Path) -> None:
    path = tmp_path / "model"
    compress(source, path, "int-quantized", "w8", "a8-static")
    tensors = load_file(path / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.input_zero_point"
    save_file({**tensors, name: torch.tensor([3], dtype=torch.int8)}, path / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"{name} is not zero"):
        load_block(Checkpoint(path), 0)
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["input_activations"]["symmetric"] = False
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(SchemeError, match="asymmetric activations"):
        Checkpoint(path)


def test_scattered_groups_of_compressed_tensors(source: Path, tmp_path: Path) -> None:
    """compressed-tensors no longer writes weight_g_idx, so the expectation is its definition."""
    path = tmp_path / "model"
    compress(source, path, "pack-quantized", "w4", "a16")
    name = "model.layers.0.mlp.down_proj"
    order = torch.randperm(160, generator=torch.Generator().manual_seed(0)).argsort().int() // 32
    tensors = load_file(path / "model.safetensors")
    save_file({**tensors, f"{name}.weight_g_idx": order}, path / "model.safetensors")
    codes = unpack(tensors[f"{name}.weight_packed"].numpy(), 4, 160)
    expected = codes * tensors[f"{name}.weight_scale"].numpy()[:, order]
    np.testing.assert_array_equal(load_block(Checkpoint(path), 0).linears["down"].weight, expected)


# GPTQ and AWQ

def words(codes: np.ndarray, bits: int, places: tuple[int, ...]) -> torch.Tensor:
    """uint codes [rows, columns] to int32 [rows, columns · bits / 32]; column c of a word lies at places[c]."""
    per_word = 32 // bits
    packed = np.zeros((codes.shape[0], -(-codes.shape[1] // per_word)), np.uint32)
    for column in range(codes.shape[1]):
        packed[:, column // per_word] |= codes[:, column].astype(np.uint32) << (bits * places[column % per_word])
    return torch.from_numpy(packed.view(np.int32))


def asymmetric(weight: np.ndarray, bits: int, groups: np.ndarray, symmetric: bool) -> tuple[np.ndarray, ...]:
    """uint codes [N, K], zero [N, G], float16 scale [N, G] of groups [K], and the weights they stand for."""
    top = 2**bits - 1
    count = groups.max() + 1
    low = np.stack([weight[:, groups == g].min(1) for g in range(count)], 1).clip(max=0)
    high = np.stack([weight[:, groups == g].max(1) for g in range(count)], 1).clip(min=0)
    if symmetric:
        scale = (np.maximum(-low, high) * 2 / top).astype(np.float16)
        zero = np.full(low.shape, (top + 1) // 2)
    else:
        scale = ((high - low) / top).astype(np.float16)
        zero = np.rint(-low / scale.astype(np.float32)).clip(0, top).astype(np.int64)
    step = scale.astype(np.float32)[:, groups]
    codes = np.rint(weight / step + zero[:, groups]).clip(0, top).astype(np.int64)
    return codes, zero, scale, (codes - zero[:, groups]).astype(np.float32) * step


def gptq(source: Path, out: Path, *, bits: int = 4, group: int = 32, symmetric: bool = True, minus_one: bool = True,
         label: str | None = "gptq", scattered: bool = False) -> Linears:
    """As GPTQModel writes it. Without `symmetric` a group of row 5 has the zero 0, which borrows from row 6's where one
    is subtracted; words that rows or columns do not fill are filled up."""
    generator = np.random.default_rng(0)

    def writer(name: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        k = weight.shape[1]
        index = np.arange(k) // (k if group == -1 else group)
        index = generator.permutation(index) if scattered else index
        if not symmetric:
            weight = weight.clone()
            weight[5, index == 0] = weight[5, index == 0].abs()
        codes, zero, scale, meant = asymmetric(weight.numpy(), bits, index, symmetric)
        straight = tuple(range(32 // bits))
        ones = sum(1 << bits * place for place in straight) * minus_one
        return {
            "qweight": words(codes, bits, straight).T,
            "qzeros": words(zero.T, bits, straight) - ones,
            "scales": torch.from_numpy(scale.T.copy()),
            "g_idx": torch.from_numpy(index.astype(np.int32)),
        }, torch.from_numpy(meant)

    quantization = {"quant_method": "gptq", "bits": bits, "group_size": group, "sym": symmetric, "desc_act": scattered}
    return write(source, out, quantization | ({} if label is None else {"checkpoint_format": label}), writer)


def awq(source: Path, out: Path) -> Linears:
    def writer(name: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        codes, zero, scale, meant = asymmetric(weight.numpy(), 4, np.arange(weight.shape[1]) // 32, False)
        places = (0, 4, 1, 5, 2, 6, 3, 7)  # even columns in the low half of a word
        return {"qweight": words(codes.T, 4, places), "qzeros": words(zero.T, 4, places),
                "scales": torch.from_numpy(scale.T.copy())}, torch.from_numpy(meant)

    return write(source, out, {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True,
                               "version": "gemm", "modules_to_not_convert": None}, writer)


@pytest.mark.parametrize("options", [
    {}, {"bits": 8}, {"group": -1}, {"symmetric": False}, {"bits": 8, "symmetric": False}, {"scattered": True},
    {"scattered": True, "symmetric": False},
], ids=str)
@pytest.mark.parametrize(("minus_one", "label"), [(True, "gptq"), (False, "gptq_v2"), (False, "gptq"), (True, None)])
def test_gptq(source: Path, tmp_path: Path, options: dict[str, Any], minus_one: bool, label: str | None) -> None:
    """Also where the label says v1 and the zeros are v2's, as far as values can tell: a small layer's 8-bit codes do
    not average to their zero."""
    if options == {"bits": 8, "symmetric": False} and not minus_one:
        label = "gptq_v2"
    meant = gptq(source, tmp_path / "model", minus_one=minus_one, label=label, **options)
    assert_close(ours(tmp_path / "model"), theirs(source, meant))


@pytest.mark.parametrize("packing", [
    {"packing_format": "auto_round:auto_gptq"}, {"backend": "auto_round:exllamav2"}, {}, {"sym": False}, {"sym": None},
    {"packing_format": "auto_round:auto_gptq:exllamav2"},
    {"packing_format": "auto_round:auto_awq", "sym": False},
    *({"packing_format": packing, "sym": False, "bits": bits} for bits in (4, 8)
      for packing in ("auto_round", "auto_round:gptqmodel", "auto_round:auto_gptq"))], ids=str)
def test_auto_round(source: Path, tmp_path: Path, packing: dict[str, Any]) -> None:
    """Its tensors are GPTQ's without g_idx, or AWQ's; a layer that it left in float is said in extra_config. One is
    subtracted from zeros only where its packing is AutoGPTQ's: where codes are of 8 bits nothing else tells."""
    path, said = tmp_path / "model", packing.get("packing_format", "auto_round:auto_gptq")
    meant = awq(source, path) if "auto_awq" in said else gptq(
        source, path, bits=packing.get("bits", 4), symmetric=packing.get("sym") is not False,
        minus_one="auto_gptq" in said)
    tensors = load_file(path / "model.safetensors")
    save_file({name: tensor for name, tensor in tensors.items() if not name.endswith("g_idx")},
              path / "model.safetensors", metadata={"format": "pt"})
    change_config(path, quantization_config={
        "quant_method": "auto-round", "bits": 4, "group_size": 32, "sym": True, "data_type": "int", "iters": 200,
        "autoround_version": "0.9.0", "block_name_to_quantize": "model.layers", **packing,
        "extra_config": {"lm_head": {"bits": 16, "data_type": "float", "act_bits": 16}}})
    assert_close(ours(path), theirs(source, meant))


@pytest.mark.parametrize(("changes", "message"), [
    ({"data_type": "mx_fp"}, "mx_fp"), ({"act_bits": 8}, "activations to 8 bits"), ({"bits": 2}, "2 bits"),
    ({"bits": "4"}, "bits must be an integer, not '4'"), ({"act_bits": "16"}, "act_bits must be an integer"),
    ({"packing_format": "auto_round:llm_compressor"}, "llm_compressor"), ({"rotation": "quarot"}, "rotation"),
    ({"extra_config": {"model.layers.0.mlp.up_proj": {"bits": 4, "data_type": "nv_fp"}}}, "up_proj has data_type"),
])
def test_what_auto_round_says_and_is_not_applied_is_refused(source: Path, tmp_path: Path, changes: dict[str, Any],
                                                            message: str) -> None:
    gptq(source, tmp_path / "model")
    change_config(tmp_path / "model", quantization_config={"quant_method": "auto-round", "bits": 4, "group_size": 32,
                                                           "sym": True, **changes})
    with pytest.raises(SchemeError, match=message):
        Checkpoint(tmp_path / "model")


def test_a_kv_cache_scheme_is_said_and_left(source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It changes no weight: the cache's type is chosen when serving."""
    compress(source, tmp_path / "model", "int-quantized", "w8", "a8")
    expected = ours(tmp_path / "model")
    quantization = json.loads((tmp_path / "model" / "config.json").read_text())["quantization_config"]
    change_config(tmp_path / "model", quantization_config={**quantization, "kv_cache_scheme": {
        "num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False, "symmetric": True}})
    np.testing.assert_array_equal(ours(tmp_path / "model"), expected)
    assert any("kv_cache_scheme is not applied" in message for message in caplog.messages)


@pytest.mark.parametrize("symmetric", [True, False])
def test_gptq_of_sizes_that_fill_no_words(tmp_path: Path, symmetric: bool) -> None:
    save_random("llama", tmp_path / "float", num_hidden_layers=1, intermediate_size=164)
    meant = gptq(tmp_path / "float", tmp_path / "model", symmetric=symmetric)
    assert_close(ours(tmp_path / "model"), theirs(tmp_path / "float", meant))


def test_symmetric_gptq_stays_four_bits(source: Path, tmp_path: Path) -> None:
    meant = gptq(source, tmp_path / "model")
    checkpoint = Checkpoint(tmp_path / "model")
    weight = load_block(checkpoint, 1).linears["down"].weight
    assert isinstance(weight, QuantizedWeight)
    assert (weight.num_bits, weight.group_size) == (4, 32)
    np.testing.assert_array_equal(dequantize(weight), meant["model.layers.1.mlp.down_proj.weight"])
    assert not checkpoint.notes


def test_config_in_a_file_of_its_own(source: Path, tmp_path: Path) -> None:
    """As AutoGPTQ wrote it, its weights under a name of their own too."""
    path = tmp_path / "model"
    meant = gptq(source, path)
    config = json.loads((path / "config.json").read_text())
    quantization = config.pop("quantization_config")
    del quantization["quant_method"]
    (path / "config.json").write_text(json.dumps(config))
    (path / "quantize_config.json").write_text(json.dumps(quantization))
    (path / "model.safetensors").rename(path / "gptq_model-4bit-32g.safetensors")
    assert_close(ours(path), theirs(source, meant))


def test_awq(source: Path, tmp_path: Path) -> None:
    meant = awq(source, tmp_path / "model")
    assert_close(ours(tmp_path / "model"), theirs(source, meant))


@pytest.mark.parametrize(("tensor", "change", "message"), [
    ("qweight", lambda t: t[:-1], "qweight has 11 rows"),
    ("qzeros", lambda t: t + 1, "qzeros holds other zeros than 8"),
    ("scales", lambda t: t[:-1], "qzeros has shape"),
    ("scales", lambda t: t.repeat(2, 1)[:5], "scales has 5 groups"),
    ("scales", lambda t: t * torch.inf, "not finite"),
    ("g_idx", lambda t: t + 1, "groups that are not in 0 to 2"),
])
def test_damaged_gptq_is_refused(source: Path, tmp_path: Path, tensor: str,
                                 change: Callable[[torch.Tensor], torch.Tensor], message: str) -> None:
    gptq(source, tmp_path / "model")
    name = "model.layers.0.self_attn.o_proj"
    changed(tmp_path / "model", f"{name}.{tensor}", change)
    with pytest.raises(CheckpointError, match=f"{name}.*{message}"):
        load_block(Checkpoint(tmp_path / "model"), 0)


@pytest.mark.parametrize(("changes", "message"), [
    ({"bits": 3}, "3 bits"), ({"group_size": 0}, "group_size"), ({"checkpoint_format": "marlin"}, "marlin"),
    ({"quant_method": "awq", "checkpoint_format": None, "version": "gemv"}, "gemv"),
    ({"quant_method": "bitsandbytes"}, "bitsandbytes"),
])
def test_foreign_configs_are_refused_by_name(source: Path, tmp_path: Path, changes: dict[str, Any],
                                             message: str) -> None:
    gptq(source, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["quantization_config"] |= changes
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(SchemeError, match=message):
        Checkpoint(tmp_path / "model")


CT_FACTS: list[tuple[str, str, Any]] = [
    ("quantization_config", "transform_config", {"config_groups": {"u": {"type": "hadamard", "apply": []}}}),
    ("quantization_config", "sparsity_config", {"format": "sparse-24-bitmask", "targets": ["Linear"]}),
    ("quantization_config", "residual_scale", 0.5),
    ("group", "output_activations", {"num_bits": 8}),
    ("group", "rotation", "hadamard"),
    ("weights", "block_structure", [128, 128]),
    ("weights", "exponent_bias", 3),
    ("weights", "dynamic", "local"),
    ("input_activations", "smoothing", {"alpha": 0.5}),
]


@pytest.mark.parametrize(("place", "fact", "value"), CT_FACTS)
def test_facts_that_would_be_ignored_are_refused_by_name(source: Path, tmp_path: Path, place: str, fact: str,
                                                         value: Any) -> None:
    compress(source, tmp_path / "model", "int-quantized", "w8", "a8")
    quantization = json.loads((tmp_path / "model" / "config.json").read_text())["quantization_config"]
    group = quantization["config_groups"]["group_0"]
    places = {"quantization_config": quantization, "group": group}
    (places.get(place) or group[place])[fact] = value
    change_config(tmp_path / "model", quantization_config=quantization)
    with pytest.raises(SchemeError, match=fact.split("_")[0]) as error:
        Checkpoint(tmp_path / "model")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300


@pytest.mark.parametrize(("fact", "value"), [
    ("transform_config", {}), ("transform_config", None), ("sparsity_config", {}),
    ("sparsity_config", {"format": "dense"}), ("version", "0.99"), ("global_compression_ratio", 1.5),
    ("residual_scale", None), ("anything", False),
])
def test_facts_that_change_no_number_are_not(source: Path, tmp_path: Path, fact: str, value: Any) -> None:
    compress(source, tmp_path / "model", "pack-quantized", "w4", "a16")
    expected = ours(tmp_path / "model")
    quantization = json.loads((tmp_path / "model" / "config.json").read_text())["quantization_config"]
    change_config(tmp_path / "model", quantization_config={**quantization, fact: value})
    assert torch.equal(ours(tmp_path / "model"), expected)


@pytest.mark.parametrize(("fact", "value"), [
    ("rotation", "hadamard"), ("adapter", {"lora": {"rank": 8}}), ("residual_scale", 0.5)])
@pytest.mark.parametrize("method", [gptq, awq])
def test_facts_of_gptq_and_awq(source: Path, tmp_path: Path, method: Callable[[Path, Path], Linears], fact: str,
                               value: Any) -> None:
    method(source, tmp_path / "model")
    quantization = json.loads((tmp_path / "model" / "config.json").read_text())["quantization_config"]
    change_config(tmp_path / "model", quantization_config={**quantization, fact: value})
    with pytest.raises(SchemeError, match=f"{method.__name__}.*{fact}") as error:
        Checkpoint(tmp_path / "model")
    assert "\n" not in str(error.value)


# Fused layers

def test_aligned_weights_are_the_same_weights() -> None:
    generator = np.random.default_rng(0)

    def weight(bits: Any, group: int) -> QuantizedWeight:
        codes = generator.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (4, 128))
        return QuantizedWeight(pack(codes, bits), generator.random((4, 128 // group), np.float32), bits, group)

    weights = [weight(4, 128), weight(8, 32), weight(4, 64)]
    aligned = align(weights)
    assert aligned is not None
    assert {(w.num_bits, w.group_size) for w in aligned} == {(8, 32)}
    for before, after in zip(weights, aligned, strict=True):
        np.testing.assert_array_equal(dequantize(before), dequantize(after))
    assert align([weight(4, 128), weight(4, 16)]) is None


def test_mixed_bits_within_a_fused_layer(source: Path, tmp_path: Path) -> None:
    """v_proj in 8 bits, k_proj in float: what GPTQModel's `dynamic` writes."""
    gptq(source, tmp_path / "four")
    gptq(source, tmp_path / "eight", bits=8)
    four, eight, floats = (load_file(path / "model.safetensors") for path in
                           (tmp_path / "four", tmp_path / "eight", source))
    mixed = {name: eight[name] if "v_proj" in name else tensor for name, tensor in four.items()
             if "layers.1" not in name or "k_proj" not in name}
    mixed["model.layers.1.self_attn.k_proj.weight"] = floats["model.layers.1.self_attn.k_proj.weight"]
    save_file(mixed, tmp_path / "four" / "model.safetensors")
    checkpoint = Checkpoint(tmp_path / "four")
    parts = [checkpoint.linear(f"model.layers.0.self_attn.{m}_proj", n, 96, False).weight
             for m, n in (("q", 96), ("k", 32), ("v", 32))]
    fused = load_block(checkpoint, 0).linears["qkv"].weight
    assert isinstance(fused, QuantizedWeight)
    assert fused.num_bits == 8
    np.testing.assert_array_equal(dequantize(fused), np.concatenate([dequantize(part) for part in parts]))
    assert load_block(checkpoint, 1).linears["qkv"].weight.shape == (160, 96)


def test_different_activations_of_one_input_are_refused(source: Path, tmp_path: Path) -> None:
    path = tmp_path / "model"
    compress(source, path, "int-quantized", "w8", "a8-static")
    changed(path, "model.layers.0.self_attn.q_proj.input_scale", lambda t: 2 * t)
    with pytest.raises(ModelError, match="quantize it differently"):
        load_block(Checkpoint(path), 0)

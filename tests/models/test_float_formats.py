"""FP8, NVFP4 and MXFP4 as floats: transformers and compressed-tensors read the same directory, and the quantizer takes
it for a float model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config

from fptq_runtime.artifact.scheme import SchemeError
from fptq_runtime.models.loader import Checkpoint, CheckpointError, load_block
from fptq_runtime.quantizer.pipeline import quantize
from tests.models.hf import change_config, save_random
from tests.models.test_formats import PROMPT, assert_close, changed, ours, theirs, write
from tests.quantizer.models import save_model
from tests.quantizer.test_pipeline import SMALL


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("float")
    save_random("llama", path, num_hidden_layers=2, intermediate_size=160)
    return path


def fp8(source: Path, out: Path, block: tuple[int, int] | None, suffix: str = "weight_scale_inv",
        shape: tuple[int, ...] = (), **facts: Any) -> dict[str, torch.Tensor]:
    """As DeepSeek and Qwen3 store it, in blocks, or with one scale of a tensor in the given shape."""
    def writer(name: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        n, k = weight.shape
        rows, columns = block or (n, k)
        scale = torch.stack([torch.stack([part.abs().max() / 448 for part in band.split(columns, 1)])
                             for band in weight.split(rows, 0)])
        spread = scale.repeat_interleave(rows, 0)[:n].repeat_interleave(columns, 1)[:, :k]
        codes = (weight / spread).to(torch.float8_e4m3fn)
        return {"weight": codes, suffix: scale if block else scale.reshape(shape)}, codes.float() * spread

    return write(source, out, {"quant_method": "fp8", "activation_scheme": "dynamic",
                               "weight_block_size": None if block is None else list(block), **facts}, writer)


@pytest.mark.parametrize("block", [(32, 48), (128, 128), (64, 32)])
def test_blocks_are_those_of_transformers(source: Path, tmp_path: Path, block: tuple[int, int]) -> None:
    """Also where they are cut off at the matrix's end."""
    meant = fp8(source, tmp_path / "model", block)
    assert_close(ours(tmp_path / "model"), theirs(source, meant))
    if all(96 % size == 0 and 160 % size == 0 and 32 % size == 0 for size in block):
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path / "model", dtype=torch.float32, quantization_config=FineGrainedFP8Config(dequantize=True))
        with torch.no_grad():
            assert_close(ours(tmp_path / "model"), model.eval()(torch.tensor([PROMPT])).logits[0].float())


@pytest.mark.parametrize("suffix", ["weight_scale_inv", "weight_scale"])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_one_scale_of_a_tensor(source: Path, tmp_path: Path, suffix: str, shape: tuple[int, ...]) -> None:
    meant = fp8(source, tmp_path / "model", None, suffix, shape)
    assert_close(ours(tmp_path / "model"), theirs(source, meant))


COMPRESSED: dict[str, tuple[str, dict[str, Any]]] = {
    "fp8-channel": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
    "fp8-tensor": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}),
    "fp8-naive": ("naive-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}),
    "nvfp4": ("nvfp4-pack-quantized", {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16,
                                       "scale_dtype": torch.float8_e4m3fn, "zp_dtype": torch.float8_e4m3fn}),
    "mxfp4": ("mxfp4-pack-quantized", {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32,
                                       "scale_dtype": torch.uint8, "zp_dtype": torch.uint8}),
}


def compress(source: Path, out: Path, name: str) -> dict[str, torch.Tensor]:
    stored_as, fields = COMPRESSED[name]
    args = QuantizationArgs(**fields)
    scheme = QuantizationScheme(targets=["Linear"], weights=args, format=stored_as)

    def writer(name: str, weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        n, k = weight.shape
        rows = weight.reshape(1, -1) if args.strategy == "tensor" else weight.reshape(n, -1, args.group_size or k)
        low, high = rows.amin(-1), rows.amax(-1)
        whole = generate_gparam(weight.min(), weight.max()) if args.strategy == "tensor_group" else None
        scale, zero = calculate_qparams(low, high, args, global_scale=whole)
        state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
        if whole is not None:
            state["weight_global_scale"] = whole
        compressor = BaseCompressor.get_value_from_registry(stored_as)
        stored = compressor.compress({part: value.clone() for part, value in state.items()}, scheme)
        return stored, compressor.decompress(dict(stored), scheme)["weight"].float()

    return write(source, out, {
        "quant_method": "compressed-tensors", "format": stored_as, "quantization_status": "compressed",
        "ignore": ["lm_head"], "config_groups": {"group_0": scheme.model_dump(mode="json")}}, writer)


@pytest.mark.parametrize("name", COMPRESSED)
def test_compressed_tensors_floats(source: Path, tmp_path: Path, name: str) -> None:
    """NVFP4's weights compressed-tensors gives in bfloat16."""
    meant = compress(source, tmp_path / "model", name)
    assert_weights(tmp_path / "model", meant, 2**-8 if name == "nvfp4" else 1e-6)
    assert not Checkpoint(tmp_path / "model", dequantize=True).quantized


def assert_weights(path: Path, meant: dict[str, torch.Tensor], tolerance: float) -> None:
    for index in range(2):
        down = load_block(Checkpoint(path, dequantize=True), index).linears["down"].weight
        np.testing.assert_allclose(down, meant[f"model.layers.{index}.mlp.down_proj.weight"], tolerance)


def test_modelopt_nvfp4(source: Path, tmp_path: Path) -> None:
    """ModelOpt multiplies by its second scale where compressed-tensors divides."""
    meant = compress(source, tmp_path / "model", "nvfp4")
    for name in meant:
        module = name.removesuffix(".weight")
        for old, new, change in (("weight_packed", "weight", lambda t: t),
                                 ("weight_global_scale", "weight_scale_2", lambda t: 1 / t)):
            rename(tmp_path / "model", f"{module}.{old}", f"{module}.{new}", change)
    change_config(tmp_path / "model", quantization_config={"quant_method": "modelopt", "quant_algo": "NVFP4"})
    assert_weights(tmp_path / "model", meant, 2**-8)


def rename(path: Path, old: str, new: str, change: Any) -> None:
    tensors = load_file(path / "model.safetensors")
    tensors[new] = change(tensors.pop(old))
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def test_the_quantizer_takes_them(tmp_path: Path) -> None:
    save_model("llama", tmp_path / "float", num_hidden_layers=2)
    meant = fp8(tmp_path / "float", tmp_path / "fp8", (32, 32))
    for file in (tmp_path / "float").glob("tokenizer*"):
        (tmp_path / "fp8" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "text.txt").write_text("It was a bright cold day in the wood, and the clock was striking. " * 20)
    for recipe in ("fptq", "bf16"):
        quantize(tmp_path / "fp8", tmp_path / recipe, recipe, text=tmp_path / "text.txt", **SMALL)
    config = json.loads((tmp_path / "bf16" / "config.json").read_text())
    assert "quantization_config" not in config
    weight = load_block(Checkpoint(tmp_path / "fp8"), 0).linears["down"].weight
    np.testing.assert_array_equal(weight, meant["model.layers.0.mlp.down_proj.weight"])


@pytest.mark.parametrize(("place", "fact", "value"), [
    ("config", "transform_config", {"config_groups": {"u": {"type": "hadamard", "apply": []}}}),
    ("config", "residual_scale", 0.5), ("group", "rotation", "hadamard"), ("weights", "exponent_bias", 3),
])
def test_facts_that_would_be_ignored_are_refused(source: Path, tmp_path: Path, place: str, fact: str,
                                                 value: Any) -> None:
    compress(source, tmp_path / "model", "fp8-tensor")
    quantization = json.loads((tmp_path / "model" / "config.json").read_text())["quantization_config"]
    group = quantization["config_groups"]["group_0"]
    {"config": quantization, "group": group, "weights": group["weights"]}[place][fact] = value
    change_config(tmp_path / "model", quantization_config=quantization)
    with pytest.raises(SchemeError, match=fact.split("_")[0]):
        Checkpoint(tmp_path / "model", dequantize=True)


def test_what_does_not_fit_is_refused(source: Path, tmp_path: Path) -> None:
    fp8(source, tmp_path / "model", (32, 48))
    name = "model.layers.0.self_attn.q_proj.weight_scale_inv"
    changed(tmp_path / "model", name, lambda t: t[:1, :1].repeat(1, 5))
    with pytest.raises(CheckpointError, match=f"{name} has shape"):
        load_block(Checkpoint(tmp_path / "model"), 0)
    changed(tmp_path / "model", name, lambda t: t[:1, :1] * torch.nan)
    with pytest.raises(CheckpointError, match="not finite"):
        load_block(Checkpoint(tmp_path / "model"), 0)
    for facts, words in (({"weight_block_size": [128]}, "weight_block_size"), ({"rotation": "hadamard"}, "rotation"),
                         ({"quant_algo": "W4A8_AWQ"}, "W4A8_AWQ")):
        quantization = {"quant_method": "fp8", **facts}
        change_config(tmp_path / "model", quantization_config=quantization)
        with pytest.raises(SchemeError, match=words):
            Checkpoint(tmp_path / "model")

"""Oracle: compressed-tensors unpacks and dequantizes what we wrote to exactly our values, and accepts our config."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs as TheirArgs
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.quantization.lifecycle.forward import dequantize as their_dequantize
from hypothesis import given, settings
from hypothesis import strategies as st

from fptq_runtime.artifact.numerics import pack_codes, quantize_weight
from fptq_runtime.artifact.scheme import QuantizationArgs, SchemeError
from fptq_runtime.kernels.base import ActivationQuant, Linear, QuantizedWeight
from fptq_runtime.kernels.reference import dequantized, to_torch
from fptq_runtime.models.formats.compressed_tensors import CompressedTensors, linear_scheme, quantization_config
from fptq_runtime.quantizer.export import tensors_of


def quantized(n: int, k: int, num_bits: Literal[4, 8], group: int | None, act: ActivationQuant | None) -> Linear:
    codes, scale = quantize_weight(torch.randn(n, k), num_bits, group, None, torch.bfloat16)
    return Linear("x", QuantizedWeight(pack_codes(codes, num_bits), scale, num_bits, group or k), torch.randn(n), act)


def schemes_in(config: dict[str, Any]) -> CompressedTensors:
    """What its config alone says."""
    return CompressedTensors(config, tensors=None)  # type: ignore[arg-type]


@settings(max_examples=60)
@given(n=st.integers(1, 9), groups=st.integers(1, 3), k=st.integers(1, 140), num_bits=st.sampled_from([4, 8]),
       group=st.sampled_from([None, 32, 64, 128]), seed=st.integers(0, 99))
def test_compressed_tensors_reads_our_weights(n: int, groups: int, k: int, num_bits: Literal[4, 8], group: int | None,
                                              seed: int) -> None:
    torch.manual_seed(seed)
    linear = quantized(n, k if group is None else group * groups, num_bits, group, ActivationQuant(0.25))
    weight = linear.weight
    assert isinstance(weight, QuantizedWeight)
    tensors = {name: to_torch(array) for name, array in tensors_of("m", linear).items()}
    shape = torch.Size(tensors["m.weight_shape"].tolist())
    codes = unpack_from_int32(tensors["m.weight_packed"], num_bits, shape)
    assert torch.equal(pack_to_int32(codes, num_bits), tensors["m.weight_packed"])
    scheme = linear_scheme(linear)
    assert scheme is not None
    args = TheirArgs(**scheme.weights.to_dict())
    theirs = their_dequantize(codes, tensors["m.weight_scale"].float(), args=args, dtype=torch.float32)
    assert torch.equal(theirs, dequantized(weight))
    assert tensors["m.input_scale"].tolist() == [0.25]
    assert torch.equal(tensors["m.bias"], linear.bias)


def test_config_is_theirs_and_ours() -> None:
    linears = {
        "a": quantized(4, 256, 4, 128, ActivationQuant(0.5)),
        "b": quantized(4, 256, 4, 128, ActivationQuant()),
        "c": quantized(4, 96, 4, None, ActivationQuant(0.5)),
        "lm_head": quantized(4, 128, 8, None, ActivationQuant()),
    }
    schemes = {name: scheme for name, linear in linears.items() if (scheme := linear_scheme(linear)) is not None}
    config = quantization_config(schemes, "lm_head", [])
    theirs = QuantizationConfig.model_validate(config)
    assert set(theirs.config_groups) == {"static", "dynamic", "static_channel", "head"}
    assert all(group.format == "pack-quantized" for group in theirs.config_groups.values())
    ours = schemes_in(config)
    assert {name: ours.scheme(name) for name in linears} == schemes
    assert ours.scheme("other") is None


def test_every_format_is_a_group_of_its_own() -> None:
    """FP4, FP8 and integers in one model, each under its format's name, in their reader and in ours."""
    fp8 = ActivationQuant(None, "float")
    args: dict[str, tuple[QuantizationArgs, ActivationQuant]] = {
        "a": (QuantizationArgs(4, "group", 128, type="float"), fp8),
        "b": (QuantizationArgs(4, "channel", type="float"), fp8),
        "c": (QuantizationArgs(8, "channel", type="float"), ActivationQuant(0.5, "float")),
        "d": (QuantizationArgs(4, "group", 128), fp8),
        "e": (QuantizationArgs(4, "group", 128), ActivationQuant()),
    }
    linears = {}
    for name, (weights, act) in args.items():
        codes, scale = quantize_weight(torch.randn(4, 256), weights.num_bits, weights.group_size, type=weights.type)
        linears[name] = Linear(name, QuantizedWeight(pack_codes(codes, weights.num_bits), scale, weights.num_bits,
                                                     weights.group_size or 256, weights.type), act=act)
    schemes = {name: scheme for name, linear in linears.items() if (scheme := linear_scheme(linear)) is not None}
    assert {name: scheme.weights for name, scheme in schemes.items()} == {name: a for name, (a, _) in args.items()}
    config = quantization_config(schemes, "lm_head", [])
    assert config["format"] == "mixed-precision"
    theirs = QuantizationConfig.model_validate(config)
    formats = {group.targets[0]: group.format for group in theirs.config_groups.values()}
    assert formats == {"a": "nvfp4-pack-quantized", "b": "nvfp4-pack-quantized", "c": "float-quantized",
                       "d": "pack-quantized", "e": "pack-quantized"}
    ours = schemes_in(config)
    assert {name: ours.scheme(name) for name in linears} == schemes


@pytest.mark.parametrize(("changes", "message"), [
    ({"format": "pack-quantized"}, "only nvfp4-pack-quantized is supported"),
    ({"format": "mxfp4-pack-quantized"}, "only nvfp4-pack-quantized is supported"),
    ({"weights": {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}}, "not.*tensor_group"),
    ({"weights": {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 0}}, "must be positive"),
    ({"format": "float-quantized", "weights": {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 128}},
     "FP8 weights must be"),
    ({"weights": {"num_bits": 6, "type": "float", "strategy": "channel"}}, "num_bits must be 4 or 8"),
    ({"weights": {"num_bits": 4, "type": "bool", "strategy": "channel"}}, "not bool"),
    ({"input_activations": {"num_bits": 4, "type": "float", "strategy": "token", "dynamic": True}}, "must be 8-bit"),
])
def test_other_floats_are_refused_by_name(changes: dict[str, Any], message: str) -> None:
    weights = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 128}
    group = {"format": "nvfp4-pack-quantized", "weights": weights, "targets": ["Linear"], **changes}
    with pytest.raises(SchemeError, match=message):
        schemes_in({"quant_method": "compressed-tensors", "config_groups": {"group_0": group}})


def test_float_modules() -> None:
    weight = torch.randn(3, 5)
    linear = Linear("x", weight)
    assert linear_scheme(linear) is None
    assert list(tensors_of("m", linear)) == ["m.weight"]

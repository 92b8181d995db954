"""Rotary tables. Oracle: transformers' own rope functions, by the config that it makes of the same fields."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

from fptq_runtime.models.fields import Fields, ModelError
from fptq_runtime.models.rope import inverse_frequencies, read_rope, rope_tables

DIM, POSITIONS = 64, 1024
SIZES = {"head_dim": DIM, "hidden_size": 4 * DIM, "num_attention_heads": 4, "max_position_embeddings": POSITIONS}
LONG = {"short_factor": [1 + i / 40 for i in range(32)], "long_factor": [1 + i / 3 for i in range(32)],
        "original_max_position_embeddings": 512}
YARN = {"factor": 4.0, "original_max_position_embeddings": 256}
SCALED: dict[str, tuple[str, dict[str, Any]]] = {
    "default": ("default", {}),
    "default, partial": ("default", {"partial_rotary_factor": 0.25}),
    "linear": ("linear", {"factor": 4.0}),
    "linear, partial": ("linear", {"factor": 4.0, "partial_rotary_factor": 0.5}),
    "dynamic": ("dynamic", {"factor": 2.0}),
    "dynamic, partial": ("dynamic", {"factor": 3.0, "partial_rotary_factor": 0.75}),
    "llama3": ("llama3", {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                          "original_max_position_embeddings": 128}),
    "llama3, original is max_position_embeddings": (
        "llama3", {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}),
    "yarn": ("yarn", YARN),
    "yarn, partial": ("yarn", {**YARN, "partial_rotary_factor": 0.5}),
    "yarn, original is max_position_embeddings": ("yarn", {"factor": 4.0}),
    "yarn, factor is null": ("yarn", {**YARN, "factor": None}),
    "yarn, mscale": ("yarn", {**YARN, "mscale": 0.7, "mscale_all_dim": 0.9}),
    "yarn, mscale alone": ("yarn", {**YARN, "mscale": 0.7}),
    "yarn, attention_factor": ("yarn", {**YARN, "attention_factor": 1.3, "mscale": 0.7, "mscale_all_dim": 0.9}),
    "yarn, not truncated": ("yarn", {**YARN, "truncate": False}),
    "yarn, betas": ("yarn", {**YARN, "beta_fast": 16, "beta_slow": 2, "truncate": False}),
    "yarn, betas of 0": ("yarn", {**YARN, "beta_fast": 0, "beta_slow": None}),
    "yarn, one dimension": ("yarn", {**YARN, "beta_fast": 4, "beta_slow": 4}),
    "longrope": ("longrope", LONG),
    "longrope, factor": ("longrope", {**LONG, "factor": 3.0}),
    "longrope, factor below 1": ("longrope", {**LONG, "factor": 0.5}),
    "longrope, attention_factor": ("longrope", {**LONG, "attention_factor": 1.2}),
    "longrope, partial": ("longrope", {
        **LONG, "short_factor": LONG["short_factor"][:24], "long_factor": LONG["long_factor"][:24],
        "partial_rotary_factor": 0.75}),
    "proportional": ("proportional", {"partial_rotary_factor": 0.25}),
    "proportional, factor": ("proportional", {"partial_rotary_factor": 0.3, "factor": 8.0}),
    "proportional, whole": ("proportional", {}),
}


def spelled(how: str, kind: str, scaling: dict[str, Any], theta: float = 5e4) -> dict[str, Any]:
    """The same rope as transformers 5, transformers 4 and the first ones wrote it."""
    match how:
        case "rope_parameters":
            return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **scaling}}
        case "rope_scaling":
            return {"rope_theta": theta, "rope_scaling": {"rope_type": kind, **scaling}}
        case _:
            partial = {name: scaling[name] for name in scaling if name == "partial_rotary_factor"}
            rest = {name: value for name, value in scaling.items() if name not in partial}
            return {"rope_theta": theta, **partial, "rope_scaling": {"type": kind, **rest}}


def theirs(fields: dict[str, Any], length: int) -> tuple[np.ndarray, float]:
    """Inverse frequencies for sequences of that length, and what cos and sin are multiplied with."""
    config = LlamaConfig(**SIZES, **fields)
    kind = config.rope_parameters["rope_type"]
    if kind == "default":
        inverse, factor = Phi3RotaryEmbedding.compute_default_rope_parameters(config)
    else:
        inverse, factor = ROPE_INIT_FUNCTIONS[kind](config, None, seq_len=length)
    return inverse.numpy(), factor


def assert_same(fields: dict[str, Any], length: int) -> None:
    inverse, factor = theirs(fields, length)
    rope = read_rope(Fields(fields), DIM, POSITIONS, partial=1.0)
    assert rope is not None
    np.testing.assert_allclose(inverse_frequencies(rope, length), inverse, rtol=1e-6)
    cos, sin = rope_tables(rope, length)
    assert cos.shape == sin.shape == (length, len(inverse))
    angles = torch.arange(length).float()[:, None] * torch.from_numpy(inverse)
    np.testing.assert_allclose(cos, angles.cos() * factor, atol=1e-6 * length)
    np.testing.assert_allclose(sin, angles.sin() * factor, atol=1e-6 * length)


@pytest.mark.parametrize("length", [512, 513, POSITIONS, 2 * POSITIONS + 1])
@pytest.mark.parametrize("how", ["rope_parameters", "rope_scaling", "type"])
@pytest.mark.parametrize("name", SCALED)
def test_tables(name: str, how: str, length: int) -> None:
    """On both sides of what longrope and dynamic were trained for."""
    kind, scaling = SCALED[name]
    if kind == "default" and how != "rope_parameters":
        scaling = {**scaling, "rope_theta": 5e4}  # an object that says nothing would be none
    assert_same(spelled(how, kind, scaling), length)


@settings(max_examples=60)
@given(theta=st.floats(1e3, 1e7), factor=st.floats(1, 64), original=st.integers(64, 4096), fast=st.floats(4, 64),
       slow=st.floats(0.25, 4), truncate=st.booleans(), partial=st.sampled_from([1.0, 0.5]))
def test_any_yarn(theta: float, factor: float, original: int, fast: float, slow: float, truncate: bool, partial: float,
                  ) -> None:
    assert_same({"rope_parameters": {
        "rope_type": "yarn", "rope_theta": theta, "factor": factor, "original_max_position_embeddings": original,
        "beta_fast": fast, "beta_slow": slow, "truncate": truncate, "partial_rotary_factor": partial}}, 300)


@pytest.mark.parametrize("kind", ["llama3", "yarn", "longrope"])
def test_an_original_context_beside_the_rope_wins(kind: str) -> None:
    """Where Phi-3 has it."""
    assert_same({**spelled("rope_parameters", kind, SCALED[kind][1]), "original_max_position_embeddings": 300}, 600)


@pytest.mark.parametrize(("fields", "kind"), [
    ({"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, "linear"),
    ({"rope_scaling": {"type": "yarn", **YARN}, "rope_theta": 3e4}, "yarn"),
    ({"rope_scaling": None}, "dynamic"),
    ({"rope_scaling": {}}, "dynamic"),
])
def test_rope_scaling_wins_over_rope_parameters(fields: dict[str, Any], kind: str) -> None:
    """With all that it says and all that it does not: the other's theta goes too."""
    both = {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 7e5, "factor": 3.0}, **fields}
    rope = read_rope(Fields(both), DIM, POSITIONS, partial=1.0)
    assert rope is not None
    assert rope.rope_type == kind
    assert_same(both, 2 * POSITIONS)


def test_the_side_is_chosen_once_and_said() -> None:
    for name, trained in (("longrope", 512), ("dynamic", POSITIONS)):
        kind, scaling = SCALED[name]
        rope = read_rope(Fields(spelled("rope_parameters", kind, scaling)), DIM, POSITIONS, partial=1.0)
        assert rope is not None
        assert not rope.extends(trained) and rope.extends(trained + 1)
        assert rope.describe(trained) == f"{kind}, short frequencies"
        assert rope.describe(trained + 1) == f"{kind}, long frequencies"


@pytest.mark.parametrize(("kind", "scaling", "message"), [
    ("longrope", {**LONG, "short_factor": [1.0] * 31}, "short_factor must be 32 numbers"),
    ("longrope", {**LONG, "long_factor": [0.0] * 32}, "long_factor must be 32 numbers"),
    ("longrope", {}, "short_factor"),
    ("yarn", {**YARN, "factor": "four"}, "factor"),
    ("llama3", {"factor": 8.0}, "low_freq_factor"),
    ("linear", {}, "factor"),
    ("default", {"partial_rotary_factor": 0.02}, "rotated dimensions"),
    ("default", {"partial_rotary_factor": 1.5}, "partial_rotary_factor"),
    ("mrope", {}, "rope_type 'mrope'"),
])
def test_what_cannot_be_is_refused_by_name(kind: str, scaling: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message) as error:
        read_rope(Fields(spelled("rope_parameters", kind, scaling)), DIM, POSITIONS, partial=1.0)
    assert "\n" not in str(error.value)

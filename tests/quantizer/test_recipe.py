"""What a recipe may say, and the one line that answers everything else."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from fptq_runtime.quantizer.recipe import PRESETS, Recipe, RecipeError, load_recipe, recipe_text


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.name)
def test_presets_survive_yaml(preset: Recipe, tmp_path: Path) -> None:
    assert load_recipe(preset.name) == preset
    path = tmp_path / "recipe.yaml"
    for text in (yaml.safe_dump(preset.model_dump(mode="json")), recipe_text(preset)):
        path.write_text(text)
        assert load_recipe(path) == preset


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.name)
def test_what_is_shown_says_what_each_setting_means(preset: Recipe) -> None:
    for step in preset.steps:
        own = set(type(step).model_fields) - {"type", "seed"}
        assert [name for name in own if not re.search(rf"^# .*\b{name}\b", recipe_text(preset), re.M)] == []


def test_defaults_are_the_methods() -> None:
    rotation, fptq, weights = load_recipe("fptq").steps
    assert rotation.optional
    assert (fptq.v0, fptq.v1, fptq.floor, fptq.paper_policy) == (15, 150, 1, False)
    assert (weights.num_bits, weights.group_size, weights.head_bits) == (4, 128, 8)


def test_a_file_is_named_after_itself(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("steps:\n- {type: fptq, v0: 8, overrides: {'*.o_proj': dynamic}}\n- {type: weights, clip: mse}\n")
    recipe = load_recipe(path)
    assert recipe.name == "mine"
    assert recipe.steps[0].v0 == 8


@pytest.mark.parametrize(("text", "message"), [
    ("steps: [{type: fptq, v2: 3}, {type: weights}]", r"steps\.0\.fptq\.v2: unknown field"),
    ("steps: [{type: fptq}, {type: weights}]\nspeed: 3", "speed: unknown field"),
    ("steps: [{type: ftpq}, {type: weights}]", "ftpq"),
    ("steps: [{type: fptq, v0: -1}, {type: weights}]", r"v0.*greater than 0"),
    ("steps: [{type: fptq, v0: 20, v1: 10}, {type: weights}]", "must not be above v1"),
    ("steps: [{type: fptq, overrides: {'*': quick}}, {type: weights}]", "overrides"),
    ("steps: [{type: fptq}, {type: weights, group_size: 100}]", "group_size"),
    ("steps: [{type: fptq}, {type: weights, num_bits: four}]", "num_bits"),
    ("steps: [{type: weights}, {type: fptq}]", "ends with one step"),
    ("steps: [{type: fptq}]", "ends with one step"),
    ("steps: [{type: rotation}, {type: fptq}, {type: rotation, seed: 1}, {type: weights}]", "two rotations are one"),
    ("steps: [{type: weights}]", "activation schemes"),
    ("steps: []", "steps"),
    ("steps: 3", "steps"),
    ("- a", "mapping"),
    ("", "mapping"),
    ("a: [", "YAML"),
    ("\x00", "YAML"),
])
def test_a_malformed_recipe_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=message) as error:
        load_recipe(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_unknown_names() -> None:
    with pytest.raises(RecipeError, match="did you mean 'rtn-dynamic'"):
        load_recipe("rtn-dynamc")
    with pytest.raises(RecipeError, match="neither a preset"):
        load_recipe("/")

"""Loading whatever a recipe makes: native kernels, golden logits, and activations chosen at load.

Oracles: transformers, which dequantizes with compressed-tensors, and an artifact quantized with the activations
that are chosen.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from fptq_runtime import cli
from fptq_runtime.artifact.io import read_manifest
from fptq_runtime.config import Activations as ActivationChoice
from fptq_runtime.engine.llm import load_engine
from fptq_runtime.kernels.select import select_backend
from fptq_runtime.models.golden import prompt_logits
from fptq_runtime.models.loader import Checkpoint, CheckpointError, load_model
from fptq_runtime.quantizer.pipeline import quantize
from fptq_runtime.quantizer.recipe import Recipe, load_recipe
from fptq_runtime.quantizer.samples import Calibration
from fptq_runtime.quantizer.steps.activations import Activations
from fptq_runtime.quantizer.steps.weights import Weights
from tests.quantizer.models import save_model

pytest.importorskip("fptq_runtime._native", reason="the native extension is not built")

SMALL: dict[str, Any] = {"calibration": Calibration(None, 2, 32), "text_tokens": 200}
W4 = Weights(group_size=32)
RECIPES = {
    "weight-only": Recipe(name="weight-only", steps=(Activations(scheme="float"), W4)),
    "dynamic": Recipe(name="dynamic", steps=(Activations(scheme="dynamic"), W4)),
    "bf16": load_recipe("bf16"),
    "fp16": load_recipe("fp16"),
    "zeroquant-fp": load_recipe("zeroquant-fp"),
}
PROMPT = list(range(3, 60))


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    path = tmp_path_factory.mktemp("artifacts")
    save_model("llama", path / "float")
    for name, recipe in RECIPES.items():
        quantize(path / "float", path / name, recipe, **SMALL)
    return {name: path / name for name in ("float", *RECIPES)}


def native_logits(path: Path, activations: ActivationChoice = "checkpoint") -> np.ndarray[Any, Any]:
    backend = select_backend("native", 1)
    return prompt_logits(load_model(Checkpoint(path, activations), backend), backend, PROMPT)


@pytest.mark.parametrize(("recipe", "linears"), [
    ("weight-only", {"linear int4, float input", "linear int8, float input"}),
    ("bf16", {"linear bfloat16", "linear float32"}),
    ("fp16", {"linear float16", "linear float32"}),
])
def test_every_recipe_runs_on_native_kernels(artifacts: dict[str, Path], recipe: str, linears: set[str],
                                             caplog: pytest.LogCaptureFixture) -> None:
    """With the logits that transformers computes from the same directory."""
    with caplog.at_level(logging.INFO):
        engine = load_engine(artifacts[recipe], backend="native", threads=1, kv_cache_memory=8 << 20)
    assert "golden values agree" in caplog.text
    assert {kind for kind in engine.backend.describe() if kind.startswith("linear")} == linears
    model = AutoModelForCausalLM.from_pretrained(artifacts[recipe], dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = model(torch.tensor([PROMPT])).logits[0].numpy()
    assert np.abs(native_logits(artifacts[recipe]) - expected).max() <= 1e-4 * np.abs(expected).max()


def test_activations_chosen_at_load_are_those_of_a_recipe(artifacts: dict[str, Path],
                                                          caplog: pytest.LogCaptureFixture) -> None:
    """Weight-only with int8 activations is, bit for bit, what quantizing per token gives; golden logits are not
    compared, and that is said."""
    with caplog.at_level(logging.INFO):
        load_engine(artifacts["weight-only"], activations="int8", threads=1, kv_cache_memory=8 << 20)
    [record] = [record for record in caplog.records if "golden" in record.message]
    assert record.levelno == logging.WARNING and "not checked" in record.message
    changed = native_logits(artifacts["weight-only"], "int8")
    np.testing.assert_array_equal(changed, native_logits(artifacts["dynamic"]))
    assert not np.array_equal(changed, native_logits(artifacts["weight-only"]))


@pytest.mark.parametrize("name", ["float", "dynamic", "bf16"])
def test_activations_that_would_change_nothing_are_refused(artifacts: dict[str, Path], name: str) -> None:
    with pytest.raises(CheckpointError, match="activations int8 would change nothing") as caught:
        load_engine(artifacts[name], activations="int8", threads=1)
    assert str(artifacts[name]) in str(caught.value) and "\n" not in str(caught.value)


def test_what_native_cannot_run_is_named(artifacts: dict[str, Path], caplog: pytest.LogCaptureFixture,
                                         capsys: pytest.CaptureFixture[str]) -> None:
    path = artifacts["zeroquant-fp"]
    with caplog.at_level(logging.WARNING):
        engine = load_engine(path, threads=1, kv_cache_memory=8 << 20)
    assert engine.backend.name == "reference"
    assert "slow reference backend" in caplog.text and "model.layers.0.self_attn.q_proj" in caplog.text
    for command in (("verify", path), ("generate", path, "A"), ("eval", path, "--text", __file__)):
        with pytest.raises(SystemExit):
            cli.main([*map(str, command), "--backend", "native"])
        assert "no kernel for model.layers.0.self_attn.q_proj" in capsys.readouterr().err


def test_commands_run_every_artifact(artifacts: dict[str, Path], capsys: pytest.CaptureFixture[str],
                                     monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("A bright cold day in the wood. " * 10)
    served: list[tuple[Path, Any]] = []
    monkeypatch.setattr("fptq_server.main.serve", lambda path, config, **options: served.append((path, options)))

    def fptq(*arguments: object) -> str:
        with pytest.raises(SystemExit) as ended:
            cli.main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert ended.value.code == 0, err
        return str(out)

    native = ("--backend", "native", "--threads", 1)
    for path, option in ((artifacts["bf16"], ()), (artifacts["weight-only"], ()),
                         (artifacts["weight-only"], ("--activations", "int8"))):
        assert len(json.loads(fptq("generate", path, "A", "--max-tokens", 2, "--json", *native, *option))["token_ids"])
        assert json.loads(fptq("eval", path, "--text", text, "--json", *native, *option))["perplexity"] > 1
        bench = json.loads(fptq("bench", path, "--batch", 1, "--context", 8, "--steps", 2, "--seconds", 0, "--json",
                                *native, *option))
        assert ("linear int4" in bench["kernels"]) == bool(option)
        fptq("serve", path, "--port", 0, *option)
        assert served.pop()[1]["activations"] == ("int8" if option else "checkpoint")
        if not option:
            assert "match their hashes" in fptq("verify", path, *native)
    with pytest.raises(SystemExit):
        cli.main(["serve", str(artifacts["float"]), "--port", "0"])
    assert "is not quantized; make an artifact with `fptq quantize" in capsys.readouterr().err and not served


def test_serve_quantizes_a_float_model_once(artifacts: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
                                            ) -> None:
    served: list[tuple[Path, Any]] = []
    monkeypatch.setattr("fptq_server.main.serve", lambda path, config, **options: served.append((path, options)))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    written = []
    for recipe in ("rtn", "rtn", "bf16"):
        with pytest.raises(SystemExit) as ended:
            cli.main(["serve", str(artifacts["float"]), "--quantize", recipe, "--port", "0"])
        assert ended.value.code == 0
        written.append((served[-1][0] / "fptq.json").stat().st_mtime_ns)
    paths = [path for path, _ in served]
    assert paths[0] == paths[1] != paths[2] and written[0] == written[1]
    assert all(path.parent == tmp_path / "fptq" for path in paths)
    assert read_manifest(paths[0]).recipe == load_recipe("rtn").model_dump(mode="json")
    assert {tuple(options["model_names"]) for _, options in served} == {(artifacts["float"].name,)}

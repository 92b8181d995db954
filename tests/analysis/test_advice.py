"""Every way through the workflow, from numbers that are made up."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest

from fptq_runtime import cli
from fptq_runtime.analysis.advice import advise, loss_of

KINDS = ("qkv", "o", "up", "down")


def data(loss: float, *, worst: float = 1.0, weights: float = 0.9, **changes: Any) -> dict[str, Any]:
    """Eight layers of the same divergence, but for one linear that has `worst` times as much."""
    linears = [{"layer": layer, "kind": kind, "kl": 0.01 * (worst if (layer, kind) == (2, "down") else 1)}
               for layer in range(8) for kind in KINDS]
    quantization = [{"name": f"layers.{layer}.{kind}", "kind": kind, "modules": [f"m.{layer}.{kind}_proj"]}
                    for layer in range(8) for kind in KINDS]
    return {
        "model": "my models/a", "recipe": {"name": "rtn"}, "float": {"perplexity": 10.0},
        "quantized": {"perplexity": 10 * (1 + loss), "kl": 0.0},
        "parts": {"weights": {"kl": weights}, "activations": {"kl": 1 - weights}},
        "one_only": {"kinds": {}, "layers": []}, "linears": linears, "activations": [], "sizes": [], "ranges": [],
        "quantization": [*quantization, {"name": "lm_head", "kind": "head", "modules": ["lm_head"]}], **changes,
    }


@pytest.mark.parametrize(("given", "outcome", "asked"), [
    (data(0.004), "serve", 1),
    (data(0.03, worst=50), "keep", 2),
    (data(0.03, weights=0.2), "inputs", 3),
    (data(0.03), "weights", 4),
    (data(0.30), "qat", 5),
])
def test_every_outcome(given: dict[str, Any], outcome: str, asked: int) -> None:
    advice = advise(given)
    assert advice["outcome"] == outcome
    assert [node["asked"] for node in advice["path"]] == [i < asked for i in range(5)]
    [ended] = [node["leaf"] for node in advice["path"] if node["yes"]]
    assert ended == outcome
    assert advice["qat"] == (outcome == "qat")
    assert (advice["next_recipe"] is None) == (outcome == "serve")
    assert advice["next_recipe"] != "rtn"


def test_what_to_keep() -> None:
    assert advise(data(0.03, worst=50))["keep"] == {"m.2.down_proj": 8}
    layers = [{"kl": 0.5 if layer == 3 else 0.01} for layer in range(8)]
    advice = advise(data(0.03, linears=[], one_only={"kinds": {}, "layers": layers}))
    assert set(advice["keep"]) == {f"m.3.{kind}_proj" for kind in KINDS}
    assert "layer 3" in advice["verdict"]


def test_noise_does_not_hide_a_loss() -> None:
    """On little text perplexity may fall while the model has become another."""
    assert loss_of(data(-0.01, quantized={"perplexity": 9.9, "kl": 0.2})) == pytest.approx(0.2214, abs=1e-4)


def test_words_for_what_was_measured() -> None:
    row = {"range_before": 300.0, "median_before": 1.0, "range_after": 6.0, "median_after": 1.0, "peak_position": 0,
           "layer": 3, "kind": "down", "spiked": True}
    said = " ".join(advise(data(
        0.03, activations=[row] * 4,
        sizes=[{"samples": 100, "kl": 0.2}, {"samples": 500, "kl": 0.1}, {"samples": 900, "error": "too few"}],
        ranges=[{"method": "minmax", "kl": 0.3}, {"method": "mse", "kl": 0.2}, {"method": "kl", "error": "no"}],
        one_only={"kinds": {"up": {"kl": 0.3}, "o": {"kl": 0.1}}, "layers": []},
    ))["reasons"])
    for words in ("4 of 4 inputs have a channel over 20 times", "Massive activations at the first token: layer 3 down",
                  "The first token sets the maximum of 4 of 4", "500 give 0.1000", "range: mse",
                  "up costs most", "75%"):
        assert words in said


def test_the_next_commands_can_be_pasted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my recipe.yaml").touch()
    assert advise(data(0.004))["commands"] == []
    for command in (commands := advise(data(0.30), "my recipe.yaml")["commands"]):
        given = shlex.split(command)[1:]
        assert "my models/a" in given
        cli.cli.commands[given[0]].make_context(given[0], given[1:])
    assert [command.split()[1] for command in commands] == ["compare", "quantize", "quantize"]

"""Mixtures of experts: each is rounded with what its own tokens are, by transformers' account of who reads what."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from fptq_runtime.artifact.io import Manifest
from fptq_runtime.artifact.numerics import quantize_weight, unpack_codes
from fptq_runtime.engine.llm import LLM
from fptq_runtime.engine.request import SamplingParams
from fptq_runtime.kernels.reference import ReferenceBackend
from fptq_runtime.models.loader import Checkpoint
from fptq_runtime.models.tokenizer import Tokenizer
from fptq_runtime.quantizer.calibrate import HiddenStates, Moments, Rows, observe_block
from fptq_runtime.quantizer.pipeline import quantize
from fptq_runtime.quantizer.recipe import Recipe, load_recipe
from fptq_runtime.quantizer.report import inspect_text
from fptq_runtime.quantizer.steps.activations import Activations
from fptq_runtime.quantizer.steps.base import QuantizationError
from fptq_runtime.quantizer.steps.gptq import Gptq
from fptq_runtime.quantizer.steps.qat import Qat
from fptq_runtime.quantizer.steps.weights import Weights
from fptq_runtime.quantizer.walk import float_part, float_stem
from tests.models.hf import save_random
from tests.quantizer.models import save_model, through_the_gate
from tests.quantizer.test_pipeline import SMALL

WINDOWS = torch.randint(3, 200, (3, 40), generator=torch.Generator().manual_seed(0))


def test_each_expert_is_observed_on_its_own_tokens(tmp_path: Path) -> None:
    model = save_random("mixtral", tmp_path)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def see(module: Any, args: tuple[torch.Tensor, ...], kwargs: Any) -> None:
        seen.append((args[0], args[1]))  # [tokens, H] and which experts each goes to

    model.model.layers[0].mlp.experts.register_forward_pre_hook(see, with_kwargs=True)
    with torch.no_grad():
        model(WINDOWS)
    [(x, chosen)] = seen
    checkpoint = Checkpoint(tmp_path)
    states = HiddenStates(checkpoint.model, WINDOWS.tolist())
    states.run_stem(float_stem(checkpoint))
    stats = observe_block(states, float_part(checkpoint, 0), moments=True)["experts.up"]
    assert sum(part.rows for part in stats.experts) == stats.rows == 2 * WINDOWS.numel()
    positions = torch.arange(40).repeat(3)
    for expert, part in enumerate(stats.experts):
        mine = (chosen == expert).any(-1)
        assert part.rows == int(mine.sum())
        torch.testing.assert_close(part.amax, x[mine].abs().amax(0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(part.mean_square, x[mine].square().mean(0), rtol=1e-4, atol=1e-5)
        expected = Moments.zeros(x.shape[1], drift=False)
        expected.add(Rows(x[mine], positions[mine].numpy()))
        assert part.moments is not None
        torch.testing.assert_close(part.moments.hessian.triu(), expected.hessian.triu(), rtol=1e-3, atol=1e-2)
    torch.testing.assert_close(stats.amax, x.abs().amax(0), rtol=1e-4, atol=1e-5)


def with_a_lost_expert(path: Path) -> Path:
    """Expert 3's router row is expert 0's, who is chosen where both are as good."""
    save_model("mixtral", path, num_experts_per_tok=1, num_hidden_layers=2)
    tensors = load_file(path / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("block_sparse_moe.gate.weight"):
            tensor[3] = tensor[0]
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def made(source: Path, out: Path, recipe: Recipe | str) -> Manifest:
    text = out.with_suffix(".txt")
    text.write_text("It was a bright cold day in the wood, and the clock was striking thirteen. " * 20)
    return quantize(source, out, recipe, text=text, **SMALL)


def test_what_calibration_did_not_reach_is_said_and_rounded_without_data(tmp_path: Path) -> None:
    source = with_a_lost_expert(tmp_path / "float")
    recipe = Recipe(name="x", steps=(Activations(scheme="dynamic"), Gptq(clip="none", group_size=32)))
    manifest = made(source, tmp_path / "out", recipe)
    experts = [record for record in manifest.layers if record.experts > 1]
    assert [record.name for record in experts] == [f"layers.{i}.experts.{n}" for i in (0, 1) for n in ("up", "down")]
    assert all(record.unseen == (3,) for record in experts)
    report = inspect_text(manifest)
    assert "reached 4 of the experts' linears" in report
    assert "layers.0.experts.up 3; layers.0.experts.down 3" in report
    stored, tensors = load_file(tmp_path / "out" / "model.safetensors"), load_file(source / "model.safetensors")
    nearest = []
    for expert in range(4):
        name = f"model.layers.0.block_sparse_moe.experts.{expert}.w1"
        codes, _ = quantize_weight(tensors[f"{name}.weight"].float(), 4, 32, None, torch.bfloat16)
        nearest.append(torch.equal(unpack_codes(stored[f"{name}.weight_packed"], 4, codes.shape[1]), codes))
    assert nearest == [False, False, False, True]


def test_the_report_has_how_many_experts_are_the_float_models(tmp_path: Path) -> None:
    """Oracle: transformers' routers, on the float checkpoint and on what it makes of the artifact's weights."""
    save_model("qwen2-moe", tmp_path / "float", num_hidden_layers=1)
    recipe = Recipe(name="x", steps=(Activations(scheme="float"), Weights(group_size=32)))
    manifest = made(tmp_path / "float", tmp_path / "out", recipe)
    text = (tmp_path / "out.txt").read_text()
    chosen = []
    for path in (tmp_path / "float", tmp_path / "out"):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        model.model.layers[0].mlp.gate.register_forward_hook(lambda module, args, out: chosen.append(out[2]))
        ids = [1, *Tokenizer(path).encode(text, add_special_tokens=False)][:128]
        with torch.no_grad():
            model(torch.tensor([ids]))
    share = float((chosen[0][:, :, None] == chosen[1][:, None]).any(-1).float().mean())
    assert manifest.quality.routing.keys() == {"layers.0"}
    assert manifest.quality.routing["layers.0"] == pytest.approx(share, abs=0.06)  # of the text's first window alone
    assert manifest.quality.routing["layers.0"] < 1
    assert f"{manifest.quality.routing['layers.0']:.1%} of the experts" in inspect_text(manifest)


@pytest.mark.parametrize("preset", ["fptq-best", "w8a8-dynamic", "awq"])
def test_presets_serve(preset: str, tmp_path: Path) -> None:
    """The whole path of the presets, through the gate of both backends."""
    pytest.importorskip("fptq_runtime._native", reason="the native extension is not built")
    from fptq_runtime.kernels.cpu import CpuBackend

    save_model("qwen2-moe", tmp_path / "float", num_hidden_layers=2)
    manifest = made(tmp_path / "float", tmp_path / "out", preset)
    for backend in (ReferenceBackend(), CpuBackend(2)):
        through_the_gate(tmp_path / "out", manifest, backend)
    experts = load_file(tmp_path / "out" / "model.safetensors")
    stored = sum(tensor.nbytes for name, tensor in experts.items() if ".experts." in name)
    assert manifest.idle_bytes == pytest.approx(stored * 2 / 6, rel=1e-3), "a token goes to 4 of 6"
    assert "of which a token reads" in inspect_text(manifest)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    kept = {f"model.layers.{i}.mlp.{name}" for i in (0, 1) for name in ("gate", "shared_expert_gate")}
    assert kept <= set(config["ignore"]), "routers stay in float"
    targets = [target for group in config["config_groups"].values() for target in group["targets"]]
    assert sum(".experts" in target for target in targets) == 6, "one for all experts of a layer"
    llm = LLM(tmp_path / "out", max_num_seqs=4, kv_cache_memory=1 << 20, threads=2)
    params = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
    prompts = ["It was", "a bright cold day in the wood, and", "the clock", "was striking thirteen. It"]
    alone = [llm.generate([prompt], params)[0][0].token_ids for prompt in prompts]
    assert alone == [answer.token_ids for [answer] in llm.generate(prompts, params)], "whatever the batch"


@pytest.mark.parametrize(("recipe", "why"), [
    (Recipe(name="x", steps=(Qat(), Activations(scheme="dynamic"), Weights())), "no gradient"),
    (Recipe(name="x", steps=(Activations(scheme="dynamic"), Weights(lorc=4))), "lorc does not work on Mixtral"),
])
def test_what_experts_cannot_have_is_refused(recipe: Recipe, why: str, tmp_path: Path) -> None:
    save_model("mixtral", tmp_path / "float", num_hidden_layers=1)
    with pytest.raises(QuantizationError, match=why):
        made(tmp_path / "float", tmp_path / "out", recipe)


def test_a_recipes_up_and_down_are_experts_too(tmp_path: Path) -> None:
    save_model("qwen2-moe", tmp_path / "float", num_hidden_layers=1)
    recipe = load_recipe("rtn-dynamic")
    weights = recipe.weights.model_copy(update={"keep": {"down": 8}})
    manifest = made(tmp_path / "float", tmp_path / "out", recipe.model_copy(update={"steps": (*recipe.steps[:-1],
                                                                                              weights)}))
    assert {record.kind: record.num_bits for record in manifest.layers if record.kind != "head"} == {
        "qkv": 4, "o": 4, "experts.up": 4, "experts.down": 8, "shared.up": 4, "shared.down": 8}

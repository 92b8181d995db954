"""From checkpoint to artifact. Oracles: transformers, which fake-quantizes with compressed-tensors, and its loader."""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from types import MethodType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as Backend
from tokenizers import processors
from transformers import AutoModelForCausalLM
from transformers.models.falcon import modeling_falcon
from transformers.models.falcon_mamba import modeling_falcon_mamba
from transformers.models.gpt2 import modeling_gpt2
from transformers.models.gpt_bigcode import modeling_gpt_bigcode
from transformers.models.mamba import modeling_mamba

from fptq_runtime.artifact.io import ArtifactError, Manifest, read_manifest, verify
from fptq_runtime.config import ModelConfig
from fptq_runtime.engine.adapters import Adapters
from fptq_runtime.kernels.base import StepInput, StepLimits
from fptq_runtime.kernels.reference import ReferenceBackend, quantize_activations
from fptq_runtime.models.decoder import Decoder
from fptq_runtime.models.golden import prompt_logits
from fptq_runtime.models.loader import Checkpoint, load_model
from fptq_runtime.models.lora import check_base
from fptq_runtime.models.weights import unfuse
from fptq_runtime.quantizer import pipeline
from fptq_runtime.quantizer.calibrate import CalibrationError
from fptq_runtime.quantizer.card import model_card
from fptq_runtime.quantizer.export import block_modules
from fptq_runtime.quantizer.pipeline import artifact_bytes, quantize
from fptq_runtime.quantizer.recipe import PRESETS, Recipe, load_recipe
from fptq_runtime.quantizer.report import inspect_text, policy, summarize
from fptq_runtime.quantizer.samples import Calibration
from fptq_runtime.quantizer.steps.activations import Activations
from fptq_runtime.quantizer.steps.awq import Awq
from fptq_runtime.quantizer.steps.base import BlockWork, QuantizationError, Rounding, Target
from fptq_runtime.quantizer.steps.fptq import Fptq
from fptq_runtime.quantizer.steps.gptq import Gptq
from fptq_runtime.quantizer.steps.rotation import Rotation
from fptq_runtime.quantizer.steps.weights import Weights
from fptq_runtime.quantizer.walk import float_part
from tests.models.hf import FAMILIES, STACKED
from tests.models.peft_files import save_lora
from tests.quantizer.models import DEMO, STORIES, save_model, through_the_gate, transplant_outliers

SMALL: dict[str, Any] = {"calibration": Calibration("random", 4, 32), "text_tokens": 400}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("It was a bright cold day in the wood, and the clock was striking thirteen. " * 20)
    return path


STATIC = {"mamba": "*.2.*in_proj", "falcon-mamba": "*.2.*in_proj", "granite-4-h-dense": "*.2.*in_proj",
          "nemotron-h": "*.2.*o_proj"}  # where a family's layer 2 has no attention, or another name for it


def recipe(static: str = "*.2.*att*", **settings: Any) -> Recipe:
    """Static and per-token layers, folds of every kind: layer 1 is equalized, the MLP of layer 2 goes per token."""
    overrides = {"*.1.*": "lae", static: "static", "*.2.*": "dynamic", "*": "static"}
    return Recipe(name="mixed", steps=(Fptq(overrides=overrides), Weights(**settings)))


class _Conv1D(torch.nn.Linear):
    """compressed-tensors quantizes linears, and GPT-2 has others in transformers: the same with its weight as ours."""

    def __init__(self, rows: int, inputs: int) -> None:
        super().__init__(inputs, rows)


def _with_a_batch(module: torch.nn.Module, args: tuple[torch.Tensor]) -> torch.Tensor:
    """OPT's MLP reads [tokens, K], of which compressed-tensors would give each value a dynamic scale of its own."""
    return args[0][None] if args[0].ndim == 2 else args[0]


def _with_wide_scales(artifact: Path) -> Path:
    """transformers widens experts in their scales' type, and would round in bfloat16 where every other linear, and
    ours, does not."""
    tensors = load_file(artifact / "model.safetensors")
    scales = [name for name in tensors if ".experts." in name and name.endswith("weight_scale")]
    if not scales:
        return artifact
    copy = Path(shutil.copytree(artifact, artifact.with_name(f"{artifact.name}-wide")))
    tensors |= {name: tensors[name].float() for name in scales}
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


def _quantize_experts(model: torch.nn.Module, decoder: Decoder) -> None:
    """transformers widens compressed experts when it loads them and leaves what they read in float."""
    for name, module in model.named_modules():
        if getattr(getattr(module, "down_proj", None), "ndim", 0) == 3:
            [block] = [block for block in decoder.blocks
                       if name.startswith((block.spec.prefix, block.spec.prefix.replace("backbone.", "model.")))]
            acts = (block.linears["experts.up"].act, block.linears["experts.down"].act)
            module.forward = MethodType(_experts_of(*acts), module)


def _experts_of(up: Any, down: Any) -> Callable[..., torch.Tensor]:
    def forward(module: Any, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        y = torch.zeros_like(x)
        for slot in range(index.shape[1]):
            chosen = index[:, slot]
            gated = hasattr(module, "gate_up_proj")
            weight = module.gate_up_proj if gated else module.up_proj
            both = torch.einsum("tk,tnk->tn", quantize_activations(x, up), weight[chosen])
            made = module.act_fn(both.chunk(2, -1)[0]) * both.chunk(2, -1)[1] if gated else module.act_fn(both)
            made = quantize_activations(made, down)
            y += weights[:, slot, None] * torch.einsum("tk,tnk->tn", made, module.down_proj[chosen])
        return y

    return forward


def assert_transformers_agrees(artifact: Path, token_ids: list[int]) -> None:
    """Nothing is missing or left over when transformers loads it, and its logits are ours, also of ropes that look at
    the sequence's length.

    Of four short prompts at least two must agree to 1e-3 of max |logit|: the last bit of a float sum may tip an int8
    code in the others, and those then differ as the quantization noise does. Mixtures of experts have so many more
    codes that may tip that rows are counted: those before the first such code agree.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modeling_gpt2, "Conv1D", _Conv1D)
        for pretrained in (modeling_gpt2.GPT2PreTrainedModel, modeling_gpt_bigcode.GPTBigCodePreTrainedModel,
                           modeling_mamba.MambaPreTrainedModel, modeling_falcon_mamba.FalconMambaPreTrainedModel):
            patch.setattr(pretrained, "_init_weights", lambda self, module: None)
        init = modeling_falcon.FalconPreTrainedModel._init_weights
        patch.setattr(modeling_falcon.FalconPreTrainedModel, "_init_weights", lambda self, module: (
            None if isinstance(module, torch.nn.Linear) else init(self, module)))
        patch.setattr(modeling_falcon, "FalconLinear", torch.nn.Linear)
        model, info = AutoModelForCausalLM.from_pretrained(_with_wide_scales(artifact), dtype=torch.float32,
                                                           output_loading_info=True)
    assert not info["missing_keys"]
    assert all(".experts." in key and key.endswith("input_scale") for key in info["unexpected_keys"])
    assert not info["mismatched_keys"]
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and not hasattr(module, "top_k"):  # Phi-3.5-MoE's router is one
            module.register_forward_pre_hook(_with_a_batch)
            module.register_forward_hook(lambda _, args, y: y[0] if args[0].ndim == 2 else y)
    backend, checkpoint = ReferenceBackend(), Checkpoint(artifact)
    prompts = [token_ids[:1] + token_ids[i::4] for i in range(1, 5)]
    checkpoint.max_positions = max(map(len, prompts))
    decoder = load_model(checkpoint, backend)
    _quantize_experts(model, decoder)
    agreeing, rows = 0, []
    for prompt in prompts:
        with torch.no_grad():
            expected = model.eval()(torch.tensor([prompt])).logits[0]
        difference = torch.from_numpy(prompt_logits(decoder, backend, prompt)) - expected
        relative = difference.abs().amax(-1) / expected.abs().amax(-1)
        agreeing += bool(relative.max() <= 1e-3)
        rows += (relative <= 1e-3).tolist()
        assert relative.max() <= 5e-2
    assert agreeing >= 2 or (checkpoint.model.has_experts and sum(rows) >= len(rows) / 2)


SEEDS = {"falcon-h1": {"seed": 1}}  # of which fewer codes lie where a last bit tips them
CASES = [
    *((family, SEEDS.get(family, {}), 128, 8) for family in FAMILIES if family not in STACKED),
    ("llama-tied-bias", {"hidden_size": 128, "num_attention_heads": 8}, 128, 16),
    ("qwen3", {"hidden_size": 160, "num_attention_heads": 8}, 32, 4),
    ("bloom", {"hidden_size": 128, "n_head": 8}, 128, 4),
]


@pytest.mark.parametrize(("family", "sizes", "group_size", "head_bits"), CASES)
def test_every_family(family: str, sizes: dict[str, int], group_size: int, head_bits: int, tmp_path: Path, text: Path,
                      ) -> None:
    """Input sizes that are a multiple of the group and that are not; all three heads."""
    source = tmp_path / "float"
    float_model = save_model(family, source, **sizes)
    made = recipe(STATIC.get(family, "*.2.*att*"), head_bits=head_bits, group_size=group_size)
    manifest = quantize(source, tmp_path / "out", made, text=text, **SMALL)

    acts = {record.activations for record in manifest.layers[:-1]}
    assert acts == {"static", "dynamic"}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] == (head_bits == 16 and float_model.config.tie_word_embeddings)
    token_ids = torch.randint(3, 260, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    assert_transformers_agrees(tmp_path / "out", [1, *token_ids])
    through_the_gate(tmp_path / "out", manifest, ReferenceBackend())


@pytest.mark.parametrize("family", STACKED)
def test_experts_that_transformers_has_in_one_tensor(family: str, tmp_path: Path, text: Path) -> None:
    """They are written one by one, which transformers does not read: oracle is its model with the weights that were
    written."""
    model = save_model(family, tmp_path / "float")
    made = Recipe(name="x", steps=(Activations(scheme="float"), Weights(group_size=32)))
    manifest = quantize(tmp_path / "float", tmp_path / "out", made, text=text, **SMALL)
    backend, checkpoint = ReferenceBackend(), Checkpoint(tmp_path / "out")
    decoder = load_model(checkpoint, backend)
    state = model.state_dict()
    for block in [*decoder.blocks, decoder.head]:
        for linear in block.spec.linears:
            parts = dict(unfuse(block.linears[linear.name], linear))
            if linear.experts == 1:
                state |= {f"{block.spec.prefix}{name}.weight": part.weight for name, part in parts.items()}
                continue
            apart = block.linears[linear.name].weight.unflatten(0, (linear.experts, -1))
            module = linear.modules[0].partition(".experts.")[0]
            name = f"{block.spec.prefix}{module}.experts.{'gate_up' if linear.name == 'experts.up' else 'down'}_proj"
            if family == "gpt-oss":
                apart = apart.transpose(1, 2)
                if linear.name == "experts.up":
                    apart = apart.unflatten(2, (2, -1)).transpose(2, 3).flatten(2)
            assert state[name].shape == apart.shape
            state[name] = apart
    state = {name.replace("router.layer.weight", "router.weight"): tensor for name, tensor in state.items()
             if "router.layer" not in name or name.replace("router.layer", "router") in state}
    model.load_state_dict(state)
    token_ids = torch.randint(3, 260, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    with torch.no_grad():
        expected = model(torch.tensor([token_ids])).logits[0]
    difference = torch.from_numpy(prompt_logits(decoder, backend, token_ids)) - expected
    assert float(difference.abs().max()) <= 1e-4 * float(expected.abs().max())
    through_the_gate(tmp_path / "out", manifest, backend)


ROTATED = Recipe(name="rotated", steps=(
    Rotation(), Activations(scheme="dynamic"), Gptq(group_size=32, head_bits=4, refits=1)))


@pytest.mark.parametrize("made", ["fptq-best", "gptq", "awq", ROTATED], ids=["fptq-best", "gptq", "awq", "rotated"])
def test_searched_weights(made: Recipe | str, tmp_path: Path, text: Path) -> None:
    save_model("llama-tied-bias", tmp_path / "float", hidden_size=128, num_attention_heads=8)
    manifest = quantize(tmp_path / "float", tmp_path / "out", made, text=text, **SMALL)
    assert {record.num_bits for record in manifest.layers[:-1]} == {4}
    assert manifest.layers[-1].num_bits == {"fptq-best": 8, "gptq": 16, "awq": 16}.get(manifest.recipe["name"], 4)
    floats = {record.activations == "float" for record in manifest.layers}
    assert floats == {manifest.recipe["name"] in ("gptq", "awq")}
    token_ids = torch.randint(3, 260, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    assert_transformers_agrees(tmp_path / "out", [1, *token_ids])


def test_steps_are_told_how_the_last_one_rounds(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told, apply = {}, Activations.apply

    def recorded(step: Activations, work: BlockWork) -> None:
        told.update({target.linear.name: target.rounding for target in work.targets.values()})
        apply(step, work)

    monkeypatch.setattr(Activations, "apply", recorded)
    save_model("llama", tmp_path / "float", num_hidden_layers=1)
    made = Recipe(name="mixed", steps=(Activations(scheme="dynamic"), Weights(group_size=32, keep={"*down_proj": 8})))
    quantize(tmp_path / "float", tmp_path / "out", made, text=text, **SMALL)
    assert list(told.values()) == [*[Rounding(4, 32)] * 3, Rounding(8, 32)]


@pytest.mark.parametrize("preset", ["smoothquant", "os+"])
def test_a_preset_names_linears_that_a_family_lacks(tmp_path: Path, text: Path, preset: str) -> None:
    """Mamba has no `down`, whose inputs these give scales of their own."""
    save_model("mamba", tmp_path / "float", num_hidden_layers=1)
    manifest = quantize(tmp_path / "float", tmp_path / "out", preset, text=text, **SMALL)
    through_the_gate(tmp_path / "out", manifest, ReferenceBackend())


@pytest.mark.parametrize(("asked", "expected"), [
    (128, {"qkv": 64, "o": 32, "up": 64, "down": None}), (64, {"qkv": 64, "o": 32, "up": 64, "down": None}),
    (32, {"qkv": 32, "o": 32, "up": 32, "down": None}), (None, dict.fromkeys(("qkv", "o", "up", "down"))),
])
@pytest.mark.parametrize("scheme", ["dynamic", "float"])
def test_the_largest_group_that_divides(tmp_path: Path, text: Path, asked: Any, expected: dict[str, int | None],
                                        scheme: Any) -> None:
    """K = 192, 96 and 172, in an artifact that compressed-tensors reads as we do, and in what inspect shows."""
    save_model("llama", tmp_path / "float", num_hidden_layers=1, hidden_size=192, intermediate_size=172)
    made = Recipe(name="x", steps=(Activations(scheme=scheme), Weights(group_size=asked, keep={"o": 8})))
    manifest = quantize(tmp_path / "float", tmp_path / "out", made, text=text, **SMALL)
    assert {record.kind: record.group_size for record in manifest.layers[:-1]} == expected
    assert {record.kind: record.num_bits for record in manifest.layers[:-1]} == {"qkv": 4, "o": 8, "up": 4, "down": 4}
    groups = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["config_groups"]
    stored = {module: group["weights"]["group_size"] for group in groups.values() for module in group["targets"]}
    assert {record.kind: stored[record.modules[0]] for record in manifest.layers[:-1]} == expected
    shown = inspect_text(manifest)
    for size in expected.values():
        assert ("per channel" if size is None else f"group {size}") in shown
    assert_transformers_agrees(tmp_path / "out", [1, *range(3, 43)])


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    out = tmp_path_factory.mktemp("demo") / "out"
    return out, quantize(DEMO, out, "fptq", calibration=Calibration(num_samples=16), text_tokens=6000)


def test_demo(demo: tuple[Path, Manifest]) -> None:
    out, manifest = demo
    quality = manifest.quality
    assert quality.perplexity_after < 1.06 * quality.perplexity_before
    assert verify(out) == manifest
    assert_transformers_agrees(out, manifest.golden["prompt_token_ids"])
    assert {policy(record) for record in manifest.layers} >= {"static", "dynamic"}
    shown = inspect_text(manifest)
    for word in ("perplexity", "static", "lae", "dynamic", "down_proj", "calibration self", "seed 0"):
        assert word in shown
    legend = shown.rpartition("\n\n")[2]
    assert [line.split()[0] for line in legend.splitlines()] == ["static", "dynamic", "lae", "v", "range", "errors"]


def test_hidden_states_are_turned_back(demo: tuple[Path, Manifest]) -> None:
    """The preset rotates; what embeddings are made of is the source's, but for rounding."""
    tokens, backend = demo[1].golden["prompt_token_ids"], ReferenceBackend()
    ours, source = (load_model(Checkpoint(path), backend) for path in (demo[0], DEMO))
    limits = StepLimits.of(source.config, max_tokens=len(tokens), max_model_len=len(tokens), num_blocks=len(tokens))
    rows, exact = (backend.compile(each.hidden, limits).step(StepInput.whole([tokens])) for each in (ours, source))
    assert ours.head.readout is not None
    turned = ours.head.readout.back(rows.astype(np.float64))
    cosines = (turned * exact).sum(1) / np.linalg.norm(turned, axis=1) / np.linalg.norm(exact, axis=1)
    assert cosines.mean() > 0.95


def test_adapters_of_the_source_are_the_artifacts(tmp_path: Path) -> None:
    """Rotated, scaled and rounded to 8 bits; what an adapter changes is PEFT's change of the source, but for that."""
    recipe = Recipe(name="moving", steps=(Rotation(), Awq(clip=False), Activations(scheme="dynamic"),
                                          Weights(num_bits=8, group_size=None)))
    manifest = quantize(DEMO, tmp_path / "out", recipe, **SMALL)
    tokens, backend = manifest.golden["prompt_token_ids"], ReferenceBackend()
    adapted = save_lora(AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32), tmp_path / "adapter")
    with torch.no_grad():
        exact = [adapted(torch.tensor([tokens])).logits[0].numpy()]
        with adapted.disable_adapter():
            exact.append(adapted(torch.tensor([tokens])).logits[0].numpy())
    checkpoint = Checkpoint(tmp_path / "out")
    bases = checkpoint.bases
    check_base(tmp_path / "out", manifest, bases)
    adapters = Adapters(checkpoint.model, load_model(checkpoint, backend), backend, 1, bases)
    adapters.load("x", tmp_path / "adapter")
    limits = StepLimits.of(adapters.decoder.config, max_tokens=len(tokens), max_model_len=len(tokens),
                           num_blocks=len(tokens))
    executor, batch = backend.compile(adapters.decoder, limits), vars(StepInput.whole([tokens]))
    ours = [executor.step(StepInput(**{**batch, "adapters": np.array([slot], np.int32)})) for slot in (1, 0)]
    errors = [np.linalg.norm(mine - wanted) for mine, wanted in zip(ours, exact, strict=True)]
    assert errors[0] < 2 * errors[1] < 0.1 * np.linalg.norm(exact[0] - exact[1])


def test_the_card_is_the_hubs(demo: tuple[Path, Manifest]) -> None:
    """Read by the hub's own library. It is its owner's to edit."""
    out, manifest = demo
    card = ModelCard.load(out / "README.md")
    assert card.data.to_dict() == {"pipeline_tag": "text-generation", "tags": ["fptq", "compressed-tensors"]}
    before, after = manifest.quality.perplexity_before, manifest.quality.perplexity_after
    for word in (f"{before:.3f} in float, {after:.3f} quantized", "int4", "fptq serve",
                 "the base model's, which its files here do not state"):
        assert word in card.text
    (out / "README.md").write_text("mine")
    assert verify(out) == manifest


def test_the_card_names_base_and_license(demo: tuple[Path, Manifest], tmp_path: Path) -> None:
    """As the hub would have them of a model that was quantized."""
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: llama3\ntags: [x]\n---\n# Llama\n")
    made = demo[1].provenance.model_copy(update={"source": "meta-llama/Llama", "revision": "abc"})
    text = model_card(demo[1].model_copy(update={"provenance": made}), tmp_path, 12_340_000)
    data = ModelCard(text).data.to_dict()
    assert (data["license"], data["license_name"], data["base_model"]) == ("other", "llama3", "meta-llama/Llama")
    assert "| license | llama3 |" in text and "12.34 MB" in text
    (tmp_path / "README.md").write_text("---\nlicense: [\n---\n")
    assert "license" not in ModelCard(model_card(demo[1], tmp_path, 1)).data.to_dict()


@pytest.mark.skipif(not STORIES.is_dir(), reason="../shared is absent")
def test_stories260k(tmp_path: Path, text: Path) -> None:
    """K = 64, one group, and 172, which none divides: per channel."""
    manifest = quantize(STORIES, tmp_path / "out", calibration=Calibration(None, 16, 32), text=text, text_tokens=400)
    assert all(record.group_size is None for record in manifest.layers)
    assert_transformers_agrees(tmp_path / "out", manifest.golden["prompt_token_ids"])


@pytest.mark.slow
def test_outlier_transplant(demo: tuple[Path, Manifest], tmp_path: Path) -> None:
    source = transplant_outliers(DEMO, tmp_path / "outliers")

    def loss(manifest: Manifest) -> float:
        return manifest.quality.perplexity_after / manifest.quality.perplexity_before - 1

    settings: dict[str, Any] = {"calibration": Calibration(num_samples=16), "text_tokens": 6000}
    static = quantize(source, tmp_path / "rtn", "rtn", **settings)
    fptq = quantize(source, tmp_path / "fptq", "fptq", **settings)
    untouched = demo[1]
    assert fptq.quality.perplexity_before == pytest.approx(untouched.quality.perplexity_before, rel=1e-3)
    assert loss(static) > 1
    assert loss(untouched) < 0.06
    assert loss(fptq) <= 1.15 * loss(untouched) + 0.003
    assert any(record.activations == "dynamic" for record in fptq.layers[:-1])
    # Without the rotation it is equalization that has to.
    policy = quantize(source, tmp_path / "policy", Recipe(name="policy", steps=load_recipe("fptq").steps[1:]),
                      **settings)
    assert loss(policy) <= 1.15 * loss(untouched) + 0.003
    assert any(record.equalized for record in policy.layers)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    save_model("llama", tmp_path / "float", num_hidden_layers=1)
    return tmp_path / "float"


@pytest.mark.parametrize("calibration", ["random", "text"])
def test_the_seed_decides_every_byte(source: Path, text: Path, tmp_path: Path, calibration: str) -> None:
    given = text if calibration == "text" else "random"
    outs = [tmp_path / "a", tmp_path / "b", tmp_path / "c"]
    for out, seed in zip(outs, (5, 5, 6), strict=True):
        quantize(source, out, calibration=Calibration(given, 4, 32, seed=seed), text=text, text_tokens=400)
    first, again, other = ({file.name: file.read_bytes() for file in out.iterdir()} for out in outs)
    assert first == again
    assert first != other


def test_next_block_sees_the_quantized_one(tmp_path: Path, text: Path) -> None:
    """The range of layer 1's input differs from the float model's, and only there."""
    save_model("llama", tmp_path / "float")
    args: dict[str, Any] = {"text": text, **SMALL}
    eight = Recipe(name="a", steps=(Fptq(safety=None), Weights(num_bits=8)))
    four = Recipe(name="b", steps=(Fptq(safety=None), Weights(num_bits=4)))
    a, b = (quantize(tmp_path / "float", tmp_path / r.name, r, **args).layers for r in (eight, four))
    assert [layer.range for layer in a[:4]] == [layer.range for layer in b[:4]]
    assert all(x.range != y.range for x, y in zip(a[4:-1], b[4:-1], strict=True))


def damage(path: Path, name: str, value: float) -> None:
    tensors = load_file(path / "model.safetensors")
    tensors[name] = tensors[name].clone()
    if value != value:
        tensors[name].view(-1)[7] = value
    else:
        tensors[name].fill_(value)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(("name", "value", "message"), [
    ("model.layers.0.mlp.down_proj.weight", float("nan"), "down_proj.weight holds NaN"),
    ("model.embed_tokens.weight", float("nan"), "embed_tokens.weight holds NaN"),
    ("model.norm.weight", float("nan"), "model.norm.weight holds NaN"),
])
def test_damaged_weights_are_refused(source: Path, text: Path, tmp_path: Path, name: str, value: float,
                                     message: str) -> None:
    damage(source, name, value)
    with pytest.raises(ValueError, match=message) as error:
        quantize(source, tmp_path / "out", text=text, **SMALL)
    assert "\n" not in str(error.value)
    assert [file.name for file in tmp_path.iterdir()] == ["float"], "nothing is left"


def change_weights(source: Path, changes: dict[str, Callable[[torch.Tensor], torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Of modules of layer 0. Returns all tensors."""
    tensors = load_file(source / "model.safetensors")
    for module, change in changes.items():
        name = f"model.layers.0.{module}.weight"
        tensors[name] = change(tensors[name])
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    return tensors


@pytest.mark.parametrize("preset", [recipe.name for recipe in PRESETS if recipe.name != "qat"])
def test_zeros_stay_zeros(source: Path, text: Path, tmp_path: Path, preset: str) -> None:
    """A block that adds nothing, as layers are grown or cut: every method keeps it exactly, and transformers agrees."""
    change_weights(source, {"self_attn.o_proj": torch.zeros_like, "mlp.down_proj": torch.zeros_like})
    quantize(source, tmp_path / "out", preset, text=text, **SMALL)
    block = float_part(Checkpoint(tmp_path / "out"), 0)
    for name in ("o", "down"):
        weight, low_rank = block.linears[name].weight, block.linears[name].low_rank
        assert not weight.any()
        assert low_rank is None or not (low_rank[1].float() @ low_rank[0].float()).any()
    if preset != "zeroquant-fp":  # whose low-rank factors transformers does not read
        assert_transformers_agrees(tmp_path / "out", [1, *range(3, 43)])


UNROTATED = Recipe(name="w8a8", steps=load_recipe("w8a8-static").steps[1:])  # rotated, no weights have one magnitude


@pytest.mark.parametrize("preset", ["rtn", UNROTATED, "zeroquant-fp"], ids=["rtn", "w8a8", "zeroquant-fp"])
@pytest.mark.parametrize(("module", "change"), [
    ("mlp.down_proj", torch.sign), ("self_attn.o_proj", torch.ones_like), ("self_attn.q_proj", lambda w: 0 * w + 0.3),
])
def test_weights_of_one_magnitude(source: Path, text: Path, tmp_path: Path, preset: Recipe | str, module: str,
                                  change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Every code is at an end of its range, half a step from the weight at most."""
    tensors = change_weights(source, {module: change})
    quantize(source, tmp_path / "out", preset, text=text, **SMALL)
    parts = dict(block_modules(float_part(Checkpoint(tmp_path / "out"), 0)))
    made, exact = parts[f"model.layers.0.{module}"], tensors[f"model.layers.0.{module}.weight"]
    read = made.weight
    if made.low_rank is not None:
        read = read + made.low_rank[1].float() @ made.low_rank[0].float()
    assert float((read - exact).abs().max()) <= 1 / 15 * float(exact.abs().max()) * 1.01


def test_a_rounding_that_loses_the_weights_is_refused(source: Path, text: Path, tmp_path: Path,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    round_ = Weights._round

    def lost(self: Weights, target: Target) -> tuple[torch.Tensor, torch.Tensor]:
        codes, scale = round_(self, target)
        return (torch.zeros_like(codes) if target.name == "up" else codes), scale

    monkeypatch.setattr(Weights, "_round", lost)
    with pytest.raises(QuantizationError, match=r"layers\.0\.up: .* off by 100%") as error:
        quantize(source, tmp_path / "out", "rtn", text=text, **SMALL)
    assert "\n" not in str(error.value)
    assert [file.name for file in tmp_path.iterdir()] == ["float"], "nothing is left"


@pytest.mark.parametrize("preset", ["rtn", "w8a8-static", "zeroquant-fp"])
@pytest.mark.parametrize(("module", "change", "message"), [
    ("mlp.up_proj", lambda weight: weight * 1e38, "not finite"),
    ("input_layernorm", lambda weight: weight * 1e30, "not finite"),
])
def test_overflowing_layers(source: Path, text: Path, tmp_path: Path, preset: str, module: str,
                            change: Callable[[torch.Tensor], torch.Tensor], message: str) -> None:
    change_weights(source, {module: change})
    with pytest.raises(ValueError, match=message) as error:
        quantize(source, tmp_path / "out", preset, text=text, **SMALL)
    assert "\n" not in str(error.value)
    assert [file.name for file in tmp_path.iterdir()] == ["float"], "nothing is left"


@pytest.mark.parametrize("limit", [100, 1000, 20_000, 100_000])
def test_a_full_disk(source: Path, text: Path, tmp_path: Path, limit: int) -> None:
    """A limit on file sizes fails in the same calls; the largest file is a few times the largest limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        with pytest.raises(ValueError, match="cannot write to") as error:
            quantize(source, tmp_path / "out", text=text, **SMALL)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(error.value)
    assert [file.name for file in tmp_path.iterdir()] == ["float"], "nothing is left"


@pytest.mark.parametrize(("changes", "message"), [
    ({"recipe": "fpqt"}, "did you mean 'fptq'"),
    ({"calibration": Calibration("absent.txt")}, "absent.txt"),
    ({"text": "absent.txt"}, "absent.txt"),
    ({"calibration": Calibration("random", num_samples=0)}, "at least one sample"),
    ({"calibration": Calibration("random", sample_length=129)}, "exceed the model's context of 128"),
    ({"calibration": Calibration("random", lengths="absent.csv")}, "absent.csv"),
    ({"recipe": Recipe(name="x", steps=(Fptq(overrides={"*.dwon_proj": "dynamic"}), Weights()))}, "dwon_proj"),
    ({"model": "someone/some-model-that-is-nowhere"}, "someone/some-model-that-is-nowhere"),
    ({"model": "nowhere"}, "neither a directory nor a hub id"),
])
def test_bad_input(source: Path, text: Path, tmp_path: Path, changes: dict[str, Any], message: str,
                   monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    arguments = {"model": source, "out": tmp_path / "out", "text": text, **SMALL, **changes}
    with pytest.raises(ValueError, match=message) as error:
        quantize(**arguments)
    assert "\n" not in str(error.value)
    assert [file.name for file in tmp_path.iterdir()] == ["float"]


@pytest.mark.parametrize(("missing", "message"), [
    ("tokenizer.json", "tokenizer.json"), ("config.json", "config.json"), ("model.safetensors", "model.safetensors")])
def test_missing_files(source: Path, tmp_path: Path, missing: str, message: str) -> None:
    (source / missing).unlink()
    with pytest.raises(ValueError, match=message):
        quantize(source, tmp_path / "out")


def test_calibration_choices_are_recorded(source: Path, text: Path, tmp_path: Path) -> None:
    """Its own text, a workload's lengths and a range that clips: all in the manifest and in what inspect shows."""
    (tmp_path / "trace.csv").write_text("ContextTokens,GeneratedTokens\n10,20\n5,3\n200,1\n")
    made = Recipe(name="clipped", steps=(Activations(scheme="static", range="percentile", quantile=0.95), Weights()))
    calibration = Calibration("self", 4, 32, tmp_path / "trace.csv")
    manifest = quantize(source, tmp_path / "out", made, calibration=calibration, text=text, text_tokens=400)
    made_from = read_manifest(tmp_path / "out").provenance
    assert made_from.calibration.name == "self"
    assert made_from.calibration.tokens == 4 * 32
    assert made_from.lengths is not None
    assert made_from.lengths.clipped == pytest.approx(1 / 3)
    for record in manifest.layers[:-1]:
        assert record.input_scale is not None
        assert record.input_scale < record.range / 127.5
    shown = inspect_text(manifest)
    for word in ("self (128 tokens", "as in trace.csv", "33% of which exceed the context", "range=percentile",
                 "ranges are set at positions"):
        assert word in shown


def test_manifests_from_before_lengths_were_recorded_load(source: Path, text: Path, tmp_path: Path) -> None:
    manifest = quantize(source, tmp_path / "out", text=text, **SMALL)
    dumped = manifest.model_dump(mode="json")
    del dumped["provenance"]["lengths"]
    assert Manifest.model_validate(dumped) == manifest


@pytest.mark.parametrize(("positions", "warned"), [((0, 0, 0, 5), True), ((0, 0, 3, 5), False)])
def test_a_first_token_that_sets_the_ranges_is_pointed_out(source: Path, text: Path, tmp_path: Path,
                                                           positions: tuple[int, ...], warned: bool) -> None:
    manifest = quantize(source, tmp_path / "out", "rtn", text=text, **SMALL)
    layers = tuple(layer.model_copy(update={"peak_position": position})
                   for layer, position in zip(manifest.layers, (*positions, 0), strict=True))
    shown = inspect_text(manifest.model_copy(update={"layers": layers}))
    assert ("warning: the first token" in shown) == warned
    assert f"0 ({4 if warned else 3})" in shown


def test_an_artifact_is_not_quantized_again(source: Path, text: Path, tmp_path: Path) -> None:
    quantize(source, tmp_path / "out", text=text, **SMALL)
    with pytest.raises(ValueError, match="quantized already"):
        quantize(tmp_path / "out", tmp_path / "again", text=text, **SMALL)


def test_an_output_in_the_way_is_noticed_first(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "open_float", None)  # neither fetched nor opened
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    for out, message in ((tmp_path / "full", "exists and is not"), (source, "is the model itself"),
                         (tmp_path, "lies around the model's"),
                         (tmp_path / "full" / "mine.txt" / "out", "is a file")):
        with pytest.raises(ArtifactError, match=message):
            quantize(source, out, overwrite=True)
    with pytest.raises(ArtifactError, match="exists and is not"):
        quantize("owner/name", tmp_path / "full")


@pytest.mark.parametrize("made", ["rtn", "gptq", "w8a8-dynamic", "bf16"])
def test_a_disk_that_is_too_small_is_noticed_first(source: Path, text: Path, tmp_path: Path, made: str,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    """By what the weights will take: as much as they do."""
    quantize(source, tmp_path / "out", made, text=text, text_tokens=200, calibration=Calibration("random", 2, 16))
    expected = artifact_bytes(Checkpoint(source), load_recipe(made).weights)
    written = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert 0.6 * written < expected < 1.1 * written
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=expected - 1))
    monkeypatch.setattr(pipeline, "load_tokenizer", None)
    with pytest.raises(ValueError, match=r"would be written to .*, and .* are free there"):
        quantize(source, tmp_path / "more", made)


def test_the_tokenizer_is_copied_as_it_stands(source: Path, text: Path, tmp_path: Path,
                                              caplog: pytest.LogCaptureFixture) -> None:
    """Whatever transformers makes of it, which for this class is another."""
    config = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps({**config, "tokenizer_class": "GemmaTokenizer"}))
    quantize(source, tmp_path / "out", "rtn", text=text, **SMALL)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    assert "tokenizer.json as it stands" in caplog.text


@pytest.mark.parametrize("calibration", [None, "random", "self", "text"])
@pytest.mark.parametrize("where", ["bos", "text"])
def test_tokens_beyond_the_vocabulary_are_named(source: Path, text: Path, tmp_path: Path, where: str,
                                                calibration: str | None) -> None:
    """Added to a tokenizer whose model was not resized."""
    backend = Backend.from_file(str(source / "tokenizer.json"))
    backend.add_special_tokens(["<new>" if where == "bos" else "the"])
    assert backend.get_vocab_size() == 260
    if where == "bos":
        backend.post_processor = processors.TemplateProcessing(single="<new> $A", special_tokens=[("<new>", 259)])
    backend.save(str(source / "tokenizer.json"))
    cut = json.loads((source / "config.json").read_text())
    tensors = load_file(source / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:259].clone()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    (source / "config.json").write_text(json.dumps({**cut, "vocab_size": 259}))
    with pytest.raises(CalibrationError, match="gives token 259, but the model's vocabulary has 259 tokens"):
        quantize(source, tmp_path / "out", "rtn", text=text, text_tokens=400,
                 calibration=Calibration(text if calibration == "text" else calibration, 4, 32))
    assert not (tmp_path / "out").exists()


def test_a_loss_that_will_be_noticed_is_said_and_what_to_do(demo: tuple[Path, Manifest]) -> None:
    manifest = demo[1]

    def shown(loss: float, recipe: Recipe | None = None, **layer: Any) -> str:
        quality = manifest.quality.model_copy(update={"perplexity_after": manifest.quality.perplexity_before * loss})
        layers = tuple(each.model_copy(update=layer) for each in manifest.layers)
        used = manifest.recipe if recipe is None else recipe.model_dump(mode="json")
        return summarize(manifest.model_copy(update={"quality": quality, "layers": layers, "recipe": used}),
                         "a model", recipe and recipe.name)

    assert "next" not in shown(1.04)
    notable = shown(1.07)
    assert "note: perplexity rose by 7.0%" in notable
    severe = shown(1.43, load_recipe("rtn"))
    assert "warning: perplexity rose by 43%" in severe
    assert "fptq quantize 'a model' 'a model-fptq-best' --recipe fptq-best" in severe
    assert "fptq analyze 'a model' --recipe rtn" in severe
    assert "--recipe rtn --max-loss 5%" in severe
    assert "--recipe w8a8-dynamic" in shown(1.43, load_recipe("fptq-best"))
    trained = shown(1.43, load_recipe("fptq-max"))
    assert "--recipe w8a8-dynamic" in trained
    assert "fptq analyze 'a model' --recipe fptq-best" in trained
    assert "--recipe fptq-best --max-loss 5%" in trained
    assert "--recipe w8a8-dynamic" in shown(1.43, load_recipe("gptq"), activations="float")
    assert "--recipe w8a8-dynamic" in shown(1.43, load_recipe("w8a8-static"), num_bits=8, activations="static")
    assert shown(1.43, load_recipe("w8a8-dynamic"), num_bits=8, activations="dynamic").count("fptq quantize") == 1
    assert "one scale a row" not in severe
    whole = shown(1.0, load_recipe("rtn"), group_size=None)
    assert "linears with 4-bit weights (qkv, o, up, down) have one scale a row" in whole
    assert "int4 per channel" in whole
    assert "int4 group 64" in shown(1.0, load_recipe("rtn"), group_size=64)


def test_an_existing_output_is_kept(source: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    quantize(source, out, text=text, **SMALL)
    with pytest.raises(ValueError, match="exists"):
        quantize(source, out, text=text, **SMALL)
    manifest = quantize(source, out, "rtn", text=text, overwrite=True, **SMALL)
    assert manifest.recipe["name"] == "rtn"
    assert verify(out) == manifest
    shutil.rmtree(out)
    out.mkdir()
    (out / "mine.txt").write_text("precious")
    with pytest.raises(ValueError, match="not an fptq artifact"):
        quantize(source, out, text=text, overwrite=True, **SMALL)
    assert (out / "mine.txt").read_text() == "precious"


def test_context_is_what_bounds_samples(source: Path, text: Path, tmp_path: Path) -> None:
    manifest = quantize(source, tmp_path / "out", calibration=Calibration("random", 2), text=text, text_tokens=400)
    config: ModelConfig = Checkpoint(source).model_config
    assert manifest.provenance.sample_length == config.max_position_embeddings

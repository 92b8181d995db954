"""Every transform alone leaves the float function as it is, for every family it supports, and says so of the others.
Oracle: transformers in double precision, on the untouched checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from fptq_runtime.models.families import FAMILIES as BY_ARCHITECTURE
from fptq_runtime.models.loader import Checkpoint
from fptq_runtime.quantizer.pipeline import quantize
from fptq_runtime.quantizer.steps.awq import Awq
from fptq_runtime.quantizer.steps.base import BlockWork, QuantizationError, Step
from fptq_runtime.quantizer.steps.equalization import Aweq, CrossLayer
from fptq_runtime.quantizer.steps.fptq import Fptq
from fptq_runtime.quantizer.steps.outlier_suppression import OutlierSuppression
from fptq_runtime.quantizer.steps.rotation import Rotation
from fptq_runtime.quantizer.steps.smoothquant import SmoothQuant
from fptq_runtime.quantizer.steps.splitting import ChannelSplitting
from tests.models.hf import FAMILIES
from tests.quantizer.models import save_model
from tests.quantizer.test_pipeline import SMALL, assert_transformers_agrees
from tests.quantizer.walk import float_logits

ROTATED = {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Phi3ForCausalLM",
           "GraniteForCausalLM", "SmolLM3ForCausalLM", "GraniteMoeHybridForCausalLM", "GlmForCausalLM",
           "MinistralForCausalLM", "Ministral3ForCausalLM", "SeedOssForCausalLM", "InternLM3ForCausalLM",
           "ArceeForCausalLM", "Lfm2ForCausalLM", "Qwen3_5ForCausalLM", "MambaForCausalLM", "FalconMambaForCausalLM",
           "FalconH1ForCausalLM",
           "HeliumForCausalLM", "Ernie4_5ForCausalLM", "HunYuanDenseV1ForCausalLM", "GemmaForCausalLM"}
MIXTURES = {"MixtralForCausalLM", "Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM", "OlmoeForCausalLM",
            "Glm4MoeForCausalLM", "GraniteMoeForCausalLM", "GptOssForCausalLM", "DeepseekV2ForCausalLM",
            "DeepseekV3ForCausalLM", "Glm4MoeLiteForCausalLM", "Qwen3NextForCausalLM", "Qwen3_5MoeForCausalLM",
            "NemotronHForCausalLM", "PhimoeForCausalLM"}
BEHIND = {"Olmo2ForCausalLM", "Olmo3ForCausalLM", "Exaone4ForCausalLM"}  # norms behind the linears alone
GATED = ROTATED - {"ArceeForCausalLM", "Lfm2ForCausalLM", "MambaForCausalLM", "FalconMambaForCausalLM"} | BEHIND | {
    "Gemma2ForCausalLM", "Gemma3ForCausalLM", "StableLmForCausalLM", "Glm4ForCausalLM", "CohereForCausalLM",
    "Cohere2ForCausalLM", "OlmoForCausalLM"}
ALL = GATED | MIXTURES | {
    "ArceeForCausalLM", "Lfm2ForCausalLM", "MambaForCausalLM", "FalconMambaForCausalLM",
    "GPTNeoXForCausalLM", "OPTForCausalLM", "GPT2LMHeadModel", "BloomForCausalLM",
    "Starcoder2ForCausalLM", "NemotronForCausalLM", "Jais2ForCausalLM", "PhiForCausalLM", "PersimmonForCausalLM",
    "GPTJForCausalLM", "CodeGenForCausalLM", "GPTBigCodeForCausalLM", "GPTNeoForCausalLM", "FalconForCausalLM",
    "MptForCausalLM"}
RENAMED = {  # tests/models/test_renamed.py
    "InternLM2ForCausalLM", "ExaoneForCausalLM", "MiniCPMForCausalLM", "QWenLMHeadModel", "BaiChuanForCausalLM",
    "BaichuanForCausalLM", "ChatGLMModel", "ChatGLMForConditionalGeneration", "DeciLMForCausalLM"}
PRE_NORMED = ALL - BEHIND - {"OlmoForCausalLM"}  # whose norms have no weights
LAE = {"*": "lae"}

TRANSFORMS: dict[str, tuple[Step, set[str]]] = {  # and the architectures that it supports
    "lae": (Fptq(overrides=LAE), ALL),
    "lae-paper": (Fptq(overrides=LAE, floor=1e-5, search=False), ALL),
    "smoothquant": (SmoothQuant(), PRE_NORMED),
    "smoothquant-0.85": (SmoothQuant(alpha=0.85), PRE_NORMED),
    "os+": (OutlierSuppression(), PRE_NORMED),
    "os+-scale": (OutlierSuppression(shift=False, thresholds=10), PRE_NORMED),
    "aweq": (Aweq(), PRE_NORMED),
    "cle": (CrossLayer(), ALL - {"MambaForCausalLM", "FalconMambaForCausalLM"}),
    "awq": (Awq(), ALL),
    "rotation": (Rotation(), ROTATED | MIXTURES - {"PhimoeForCausalLM"}),
    "rotation-residual": (Rotation(heads=False, seed=1), ROTATED | MIXTURES - {"PhimoeForCausalLM"}),
    "ocs": (ChannelSplitting(), GATED),
    "ocs-channels": (ChannelSplitting(ratio=0.3, group_size=None), GATED),
}

SHALLOW: dict[str, dict[str, Any]] = {  # their softmax is sharp: what float32 rounds away in three layers is 1e-4 of
    "phi4-mini": {"num_hidden_layers": 2},  # the logits
    "nemotron": {"num_hidden_layers": 1},
    "gpt-oss": {"num_hidden_layers": 2},
    "phimoe": {"num_hidden_layers": 1},
    "deepseek-v2": {"num_hidden_layers": 2},
    "qwen3-next": {"num_hidden_layers": 1, "layer_types": ["full_attention"]},
    "mamba": {"num_hidden_layers": 1, "expand": 1, "state_size": 6},
    "falcon-mamba": {"num_hidden_layers": 1},
    "granite-4-h-dense": {"num_hidden_layers": 2},
    "falcon-h1-plain": {"num_hidden_layers": 1},
    "gpt-bigcode-heads": {"n_layer": 1},
    "gpt-neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]]},
}
WINDOWS = torch.randint(3, 260, (3, 40), generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class Saved:
    path: Path
    architecture: str
    experts: bool
    weights: list[torch.Tensor]  # of every block as loaded
    logits: torch.Tensor  # transformers'


@pytest.fixture(scope="module", params=FAMILIES)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    path = tmp_path_factory.mktemp("float")
    model = save_model(request.param, path, **SHALLOW.get(request.param, {}))
    with torch.no_grad():
        logits = model.double()(WINDOWS).logits.flatten(0, 1)
    weights, _ = taken_through(path)
    model = Checkpoint(path).model
    return Saved(path, model.config.architecture, model.has_experts, weights, logits)


def taken_through(path: Path, *steps: Step) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The weights of all blocks after the steps, and the logits."""
    weights: list[torch.Tensor] = []

    def visit(work: BlockWork) -> None:
        weights.extend(target.weight for target in work.targets.values())

    logits = float_logits(path, steps, WINDOWS.tolist(), visit)
    return weights, logits


def supports(saved: Saved, step: Step, supported: set[str]) -> bool:
    """Granite 4 is with experts and without."""
    return saved.architecture in supported and not (saved.experts and isinstance(step, ChannelSplitting))


@pytest.mark.parametrize(("step", "supported"), TRANSFORMS.values(), ids=TRANSFORMS)
def test_the_float_function_is_kept(saved: Saved, step: Step, supported: set[str]) -> None:
    if not supports(saved, step, supported):
        with pytest.raises(QuantizationError, match=saved.architecture):
            taken_through(saved.path, step)
        return
    weights, logits = taken_through(saved.path, step)
    assert not all(map(torch.equal, weights, saved.weights)), "nothing was transformed"
    assert float((logits - saved.logits).abs().max()) <= 1e-4


@pytest.mark.parametrize("order", [1, -1])
def test_transforms_combine(saved: Saved, order: int) -> None:
    """All of them on one model, in either order; of the rotations, of which a recipe has one, the first."""
    steps = [step for step, supported in TRANSFORMS.values() if supports(saved, step, supported)][::order]
    others = [step for step in steps if isinstance(step, Rotation)][1:]
    _, logits = taken_through(saved.path, *(step for step in steps if step not in others))
    assert float((logits - saved.logits).abs().max()) <= 1e-4


def test_every_architecture_is_here() -> None:
    assert set(BY_ARCHITECTURE) - RENAMED == ALL | {"MPTForCausalLM", "PhiMoEForCausalLM"}  # as their own code has it


@pytest.mark.parametrize("family", ["qwen2", "bloom"])
@pytest.mark.parametrize("preset", ["smoothquant", "os+", "aweq", "cle"])
def test_artifacts_load_in_transformers(preset: str, family: str, tmp_path: Path) -> None:
    """No tensor is missing or left over, and shifted and corrected biases are read."""
    save_model(family, tmp_path / "float", **{"n_layer" if family == "bloom" else "num_hidden_layers": 2})
    (tmp_path / "text.txt").write_text("It was a bright cold day in the wood, and the clock was striking. " * 20)
    quantize(tmp_path / "float", tmp_path / "out", preset, text=tmp_path / "text.txt", **SMALL)
    token_ids = torch.randint(3, 260, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    assert_transformers_agrees(tmp_path / "out", [1, *token_ids])

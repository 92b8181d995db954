"""ZeroQuant-FP: FP4 weights, FP8 activations, LoRC. Oracles: full SVD, transformers with compressed-tensors."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.quantization import QuantizationStatus
from compressed_tensors.quantization.lifecycle.forward import dequantize as their_dequantize
from transformers import AutoModelForCausalLM, PreTrainedModel

from fptq_runtime.artifact.numerics import absmax_scale, dequantize, quantize_weight, token_scale
from fptq_runtime.kernels.base import ActivationQuant, QuantizedWeight
from fptq_runtime.kernels.cpu import CpuBackend
from fptq_runtime.kernels.reference import ReferenceBackend, dequantized, quantize_activations
from fptq_runtime.models.golden import check_golden, compute_golden, prompt_logits
from fptq_runtime.models.loader import Checkpoint, load_block, load_model
from fptq_runtime.models.tokenizer import Tokenizer
from fptq_runtime.quantizer.calibrate import HiddenStates, read_text
from fptq_runtime.quantizer.evaluate import text_windows
from fptq_runtime.quantizer.pipeline import quantize
from fptq_runtime.quantizer.recipe import Recipe, RecipeError, load_recipe
from fptq_runtime.quantizer.report import inspect_text
from fptq_runtime.quantizer.samples import Calibration
from fptq_runtime.quantizer.steps.activations import Activations
from fptq_runtime.quantizer.steps.base import relative_error
from fptq_runtime.quantizer.steps.weights import Weights, low_rank_factors
from fptq_runtime.quantizer.walk import float_part, float_stem
from tests.quantizer.models import save_model, through_the_gate
from tests.quantizer.test_folds import work_on

SMALL: dict[str, Any] = {"calibration": Calibration("random", 4, 32), "text_tokens": 400}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("It was a bright cold day in the wood, and the clock was striking thirteen. " * 20)
    return path


def fp(scheme: Any = "dynamic", **weights: Any) -> Recipe:
    return Recipe(name="fp", steps=(Activations(scheme=scheme, grid="float"), Weights(grid="float", **weights)))


def test_fp8_rescues_outlier_channels() -> None:
    """Two channels 300 times larger leave int8 per token a handful of codes for the others; FP8 has exponents."""
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(256, 128, generator=generator), torch.randn(64, 128, generator=generator)
    outliers = torch.ones(128)
    outliers[[3, 77]] = 300
    x, weight = x * outliers, weight / outliers

    def error(act: ActivationQuant) -> float:
        return relative_error(quantize_activations(x, act) @ weight.T, x @ weight.T)

    assert error(ActivationQuant(None, "float")) < 1e-3
    assert error(ActivationQuant()) > 0.3
    static = ActivationQuant(float(absmax_scale(x.abs().max(), 8, "float")), "float")
    assert error(static) < 2e-3


def test_int8_is_better_where_there_are_none() -> None:
    x = torch.rand(64, 128, generator=torch.Generator().manual_seed(0)) * 2 - 1
    fp8, int8 = (quantize_activations(x, ActivationQuant(None, grid)) for grid in ("float", "int"))
    assert (int8 - x).square().mean() < 0.1 * (fp8 - x).square().mean()


def test_fp4_beats_int4_on_heavy_tails() -> None:
    torch.manual_seed(0)
    weight = torch.distributions.StudentT(4.0).sample((64, 512))

    def error(grid: Any) -> float:
        read = dequantize(*quantize_weight(weight, 4, 128, None, torch.bfloat16, grid))
        return float((read - weight).square().mean())

    assert error("float") < 0.8 * error("int")


def test_low_rank_factors_are_the_best_ones() -> None:
    """Within 2 % of what a full SVD leaves, also on a flat spectrum; the same every time, whatever the seed is."""
    weight = torch.randn(160, 256, generator=torch.Generator().manual_seed(1))
    for error in (weight, weight - dequantize(*quantize_weight(weight, 4, 128, type="float"))):
        down, up = low_rank_factors(error, 8)
        assert (down.shape, up.shape) == ((8, 256), (160, 8))
        left = (error - up.float() @ down.float()).square().sum()
        best = torch.linalg.svdvals(error)[8:].square().sum()
        assert best <= left <= 1.02 * best
        state = torch.get_rng_state()
        assert torch.equal(low_rank_factors(error, 8)[0], down)
        assert torch.equal(torch.get_rng_state(), state)
    few = low_rank_factors(torch.randn(3, 5), 8)
    assert [tuple(factor.shape) for factor in few] == [(3, 5), (3, 3)]


@pytest.mark.parametrize("grid", ["int", "float"])
def test_lorc_lowers_the_output_error(tmp_path: Path, grid: Any) -> None:
    errors = []
    for rank in (0, 8):
        _, work = work_on("llama", tmp_path / str(rank))
        with torch.inference_mode():
            Activations(scheme="dynamic", grid=grid).apply(work)
            Weights(grid=grid, lorc=rank).apply(work)
        errors.append([target.error for target in work.targets.values()])
        assert all((target.linear.low_rank is None) == (rank == 0) for target in work.targets.values())
    assert all(with_it < 0.95 * without for without, with_it in zip(*errors, strict=True))


@pytest.mark.parametrize("scheme", ["static", "dynamic"])
def test_lorc_of_integers_is_served_natively(tmp_path: Path, text: Path, scheme: Any) -> None:
    """The reference backend's golden logits are its own, and far from what they are without it."""
    save_model("llama", tmp_path / "float", num_hidden_layers=1)
    logits = []
    for rank in (0, 16):
        recipe = Recipe(name="x", steps=(Activations(scheme=scheme), Weights(lorc=rank)))
        manifest = quantize(tmp_path / "float", tmp_path / str(rank), recipe, text=text, **SMALL)
        backend, reference, checkpoint = CpuBackend(1), ReferenceBackend(), Checkpoint(tmp_path / str(rank))
        decoder = load_model(checkpoint, backend)
        golden = compute_golden(load_model(checkpoint, reference), reference, manifest.golden["prompt_token_ids"])
        assert check_golden(decoder, backend, golden) < 0.02
        through_the_gate(checkpoint.path, manifest, backend)
        logits.append(prompt_logits(decoder, backend, [1, 20, 30, 40]))
    assert abs(logits[0] - logits[1]).max() > 0.05 * abs(logits[0]).max()


@pytest.mark.parametrize(("family", "sizes", "scheme", "weights"), [
    ("llama", {"hidden_size": 128, "num_attention_heads": 8}, "dynamic", {"scales": "m2", "lorc": 8}),
    ("llama-tied-bias", {"intermediate_size": 256}, "static", {"scales": "m1", "group_size": 64, "head_bits": 4}),
    ("qwen3", {"num_hidden_layers": 1}, "dynamic", {"lorc": 3, "keep": {"*.o_proj": 8, "*.down_proj": 16}}),
    ("bloom", {"num_hidden_layers": 1}, "dynamic", {"lorc": 4, "head_bits": 16, "clip": "mse"}),
])
def test_the_artifact_computes_what_the_quantizer_measured(tmp_path: Path, text: Path, family: str, sizes: Any,
                                                           scheme: str, weights: Any) -> None:
    """The perplexity of the blocks in memory is that of those read back, to the last bit or nearly."""
    save_model(family, tmp_path / "float", **sizes)
    manifest = quantize(tmp_path / "float", tmp_path / "out", fp(scheme, **weights), text=text, **SMALL)
    checkpoint, backend = Checkpoint(tmp_path / "out"), ReferenceBackend()
    config = checkpoint.model_config
    windows = text_windows(read_text(text), Tokenizer(tmp_path / "out"), config.max_position_embeddings, 400)
    states = HiddenStates(checkpoint.model, windows)
    states.run_stem(float_stem(checkpoint))
    for index in range(config.num_layers):
        states.run_block(float_part(checkpoint, index))
    loss, tokens = states.negative_log_likelihood(float_part(checkpoint, config.num_layers))
    assert math.exp(loss / tokens) == pytest.approx(manifest.quality.perplexity_after, rel=1e-5)
    through_the_gate(tmp_path / "out", manifest, backend)


def decompressed(path: Path) -> PreTrainedModel:
    """transformers' model, its weights decompressed by compressed-tensors in float32 rather than its bfloat16."""
    model, info = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    model._forward_pre_hooks.clear()
    for module in model.modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is None:
            continue
        scale = module.weight_scale.detach().float()
        codes = (unpack_fp4_from_uint8(module.weight_packed, scale.shape[0], module.weight_packed.shape[1] * 2,
                                       torch.float32)
                 if hasattr(module, "weight_packed") else module.weight.float())
        module.weight = torch.nn.Parameter(their_dequantize(codes, scale, args=scheme.weights, dtype=torch.float32))
        module.weight_scale.data = scale
        module.quantization_status = QuantizationStatus.DECOMPRESSED
        if hasattr(module, "input_scale"):
            module.input_scale.data = module.input_scale.data.float()
    return model.eval()


@pytest.mark.parametrize(("scheme", "scales"), [("static", "m1"), ("dynamic", "m2"), ("dynamic", "float")])
def test_transformers_computes_the_same(tmp_path: Path, text: Path, scheme: str, scales: str) -> None:
    save_model("llama", tmp_path / "float", intermediate_size=192)
    quantize(tmp_path / "float", tmp_path / "out", fp(scheme, scales=scales, group_size=64), text=text, **SMALL)
    model, backend = decompressed(tmp_path / "out"), ReferenceBackend()
    decoder = load_model(Checkpoint(tmp_path / "out"), backend)
    prompt = [1, 20, 30, 40, 50, 60]
    with torch.no_grad():
        expected = model(torch.tensor([prompt])).logits[0]
    difference = torch.from_numpy(prompt_logits(decoder, backend, prompt)) - expected
    assert difference.abs().max() <= 1e-3 * expected.abs().max()


def test_the_preset(tmp_path: Path, text: Path) -> None:
    """FP4 groups in the blocks, an FP8 head, and no integer anywhere."""
    save_model("llama", tmp_path / "float", num_hidden_layers=1, hidden_size=256, intermediate_size=384, head_dim=64,
               num_attention_heads=4, num_key_value_heads=2)
    manifest = quantize(tmp_path / "float", tmp_path / "out", "zeroquant-fp", text=text, **SMALL)
    assert {record.input_type for record in manifest.layers} == {"float"}
    assert [(record.type, record.num_bits, record.group_size, record.rank) for record in manifest.layers] == [
        *[("float", 4, 128, 8)] * 4, ("float", 8, None, 0)]
    shown = inspect_text(manifest)
    for word in ("fp4 group 128 + rank 8", "fp8 per channel", "fp8 dynamic"):
        assert word in shown
    block = load_block(Checkpoint(tmp_path / "out"), 0)
    assert block.linears["qkv"].low_rank[0].shape[0] == 8, "q, k and v share one factor"


def test_weights_and_inputs_are_on_their_grids(tmp_path: Path) -> None:
    _, work = work_on("llama", tmp_path)
    with torch.inference_mode():
        for step in load_recipe("zeroquant-fp").steps:
            step.apply(work)
    for target in work.targets.values():
        weight = target.linear.weight
        assert isinstance(weight, QuantizedWeight)
        values = (dequantized(weight) / weight.scale.float().repeat_interleave(weight.group_size, 1)).abs().unique()
        assert values.tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
        x = target.stats.sample
        read = quantize_activations(x, target.linear.act) / token_scale(x, "float")
        assert torch.allclose(read.to(torch.float8_e4m3fn).float(), read, rtol=1e-6)


@pytest.mark.parametrize(("settings", "message"), [
    ({"scales": "m1"}, "scales 'm1' goes with 4 bits and grid 'float'"),
    ({"scales": "m2", "grid": "float", "num_bits": 8}, "scales 'm2' goes with 4 bits"),
    ({"scales": "two-level", "grid": "float"}, "scales 'two-level' goes with 4 bits and grid 'int'"),
    ({"grid": "float", "num_bits": 16}, "grid goes with num_bits 4 or 8"),
    ({"lorc": 8, "num_bits": 8}, "lorc corrects 4-bit weights"),
    ({"lorc": -1}, "lorc"),
    ({"grid": "fp4"}, "grid"),
])
def test_settings_that_go_nowhere_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe(name="x", steps=[{"type": "activations", "scheme": "dynamic"}, {"type": "weights", **settings}])


def test_clipped_ranges_are_for_integers() -> None:
    with pytest.raises(RecipeError, match="range 'mse' goes with grid 'int'"):
        Recipe(name="x", steps=[
            {"type": "activations", "scheme": "static", "grid": "float", "range": "mse"}, {"type": "weights"}])

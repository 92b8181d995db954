"""Adapters of every kind of block against PEFT's own forward, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ml_dtypes import bfloat16
from safetensors.torch import load_file, save_file

from fptq_runtime.artifact.io import Manifest
from fptq_runtime.artifact.numerics import fake_quantize, pack_codes, quantize_weight, token_scale
from fptq_runtime.engine.adapters import Adapters
from fptq_runtime.kernels.base import (
    ActivationQuant,
    Embedding,
    Linear,
    LowRank,
    Ops,
    QuantizedWeight,
    StepInput,
    StepLimits,
    logits_array,
)
from fptq_runtime.kernels.reference import to_numpy
from fptq_runtime.kernels.select import select_backend
from fptq_runtime.models.block import prepare_block
from fptq_runtime.models.decoder import Decoder
from fptq_runtime.models.loader import Checkpoint, load_model
from fptq_runtime.models.lora import AdapterError, check_base, read_lora
from fptq_runtime.models.readout import READOUT, Bases, Basis, Turn
from fptq_runtime.quantizer.steps.base import Step
from fptq_runtime.quantizer.steps.equalization import CrossLayer
from fptq_runtime.quantizer.steps.fptq import Fptq
from fptq_runtime.quantizer.steps.rotation import Rotation
from fptq_runtime.quantizer.steps.smoothquant import SmoothQuant
from fptq_runtime.quantizer.walk import Walk
from tests.models.hf import FAMILIES, save_random
from tests.models.peft_files import save_lora
from tests.quantizer.walk import in_float

_native = pytest.importorskip("fptq_runtime._native", reason="the native extension is not built")

ISAS = _native.available_isas()
LENGTH = 24
MODELS = ["llama", "qwen2", "qwen3", "gemma3", "phi3", "granite", "gpt-neox", "falcon", "gpt2", "gptj", "bloom"]
CONFIGS: list[dict[str, Any]] = [
    {"lora_alpha": 8},
    {"lora_alpha": 3, "use_rslora": True, "rank_pattern": {"0.*": 7}},
    {"lora_alpha": 5, "alpha_pattern": {"1.*": 11}},
]


@pytest.mark.parametrize("backend_name", ["native", "reference"])
@pytest.mark.parametrize("name", [name for name in MODELS if name in FAMILIES])
def test_logits_are_pefts(name: str, backend_name: str, tmp_path: Path) -> None:
    """Of sequences with two adapters and with none, in one step."""
    model = save_random(name, tmp_path / "model")
    tokens = np.random.default_rng(0).integers(3, 211, (4, LENGTH)).tolist()
    with torch.no_grad():
        plain = model(torch.tensor(tokens)).logits
    expected = {"": plain}
    for i, config in enumerate(CONFIGS):
        fresh = save_random(name, tmp_path / "again")
        adapted = save_lora(fresh, tmp_path / str(i), i, torch.bfloat16 if i else torch.float32, **config)
        with torch.no_grad():
            expected[str(i)] = adapted(torch.tensor(tokens)).logits
        assert not torch.allclose(expected[str(i)], plain, atol=0.1)
    checkpoint = Checkpoint(tmp_path / "model")
    backend = select_backend(backend_name)
    adapters = Adapters(checkpoint.model, load_model(checkpoint, backend), backend, 3)
    for i in range(len(CONFIGS)):
        adapters.load(str(i), tmp_path / str(i))
    names = ["1", "", "0", "2"]
    batch = StepInput.whole(tokens)
    slots = [adapters.acquire(name, 1).slot if name else 0 for name in names]
    step = StepInput(**{**vars(batch), "adapters": np.array(slots, np.int32)})
    limits = StepLimits.of(checkpoint.model_config, max_tokens=4 * LENGTH, max_model_len=LENGTH, num_blocks=16,
                           max_seqs=4)
    logits = logits_array(backend.compile(adapters.decoder, limits).step(step)).reshape(4, LENGTH, -1)
    for i, adapter in enumerate(names):
        np.testing.assert_allclose(logits[i], expected[adapter][i].numpy(), atol=2e-4)
    if backend_name == "native":
        alone = backend.compile(adapters.decoder, limits)
        for i in range(4):
            one = StepInput.whole([tokens[i]])
            alone_step = StepInput(**{**vars(one), "adapters": np.array(slots[i : i + 1], np.int32)})
            assert np.array_equal(logits_array(alone.step(alone_step)), logits[i])


@pytest.mark.parametrize("name", ["nemotron-h", "falcon-h1", "mamba"])
def test_adapters_of_hybrids(name: str, tmp_path: Path) -> None:
    """Under transformers' names for their modules, and of linears with multipliers."""
    model = save_random(name, tmp_path / "model")
    tokens = np.random.default_rng(0).integers(3, 211, LENGTH).tolist()
    adapted = save_lora(model, tmp_path / "adapter", target_modules=r".*(in|q|k|v|o)_proj$")
    with torch.no_grad():
        expected = adapted(torch.tensor([tokens])).logits[0]
    checkpoint, backend = Checkpoint(tmp_path / "model"), select_backend("native")
    adapters = Adapters(checkpoint.model, load_model(checkpoint, backend), backend, 1)
    adapters.load("a", tmp_path / "adapter")
    slots = np.array([adapters.acquire("a", 1).slot], np.int32)
    step = StepInput(**{**vars(StepInput.whole([tokens])), "adapters": slots})
    limits = StepLimits.of(checkpoint.model_config, max_tokens=LENGTH, max_model_len=LENGTH, num_blocks=16, max_seqs=1)
    logits = logits_array(backend.compile(adapters.decoder, limits).step(step))
    assert np.abs(logits - expected.numpy()).max() <= 1e-4 * float(expected.abs().max())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("rank", "n", "k"), [(1, 1, 1), (4, 64, 64), (7, 67, 90), (64, 200, 130), (512, 24, 33)])
def test_every_isa_adds_a_part(isa: str, rank: int, n: int, k: int) -> None:
    """Of float and of quantized rows, which meet the factors as int8, at whatever columns; the rows' neighbours change
    nothing."""
    from fptq_runtime.kernels.cpu import CpuBackend

    random = np.random.default_rng(rank)
    backend = CpuBackend(threads=2, isa=isa)
    weight = random.normal(size=(n + 9, k)).astype(np.float32)
    codes, scale = quantize_weight(torch.from_numpy(weight), 8, k)
    stored = QuantizedWeight(to_numpy(pack_codes(codes, 8)), to_numpy(scale), 8, k)
    table = Embedding(random.normal(size=(32, k)).astype(np.float32))
    down, up = (random.normal(size=size).astype(dtype) for size, dtype in (((rank, k), bfloat16),
                                                                           ((n, rank), np.float16)))
    up[:, 1:2] = 0
    for linear in (Linear("plain", weight), Linear("int8", stored, act=ActivationQuant())):
        embedding, made = backend.prepare(table), backend.adaptable(backend.prepare(linear), 2)
        backend.adapt(made, 2, [LowRank(5, down, up, 0.5)])

        def forward(ops: Ops[Any], x: Any = embedding, y: Any = made) -> Any:
            return ops.select_rows(ops.linear(ops.quantize(ops.embed(x), y.act), y))

        executor = backend.compile(forward, StepLimits(32, 32, 32, 16, 32, 16, "float32", 1, 1, 16))
        batch = StepInput.whole([[token] for token in range(32)])
        plain = executor.step(batch)
        adapters = np.array([i % 3 for i in range(32)], np.int32)
        adapted = executor.step(StepInput(**{**vars(batch), "adapters": adapters}))
        x, first, second = (rows.astype(np.float32) for rows in (table.weight, down, up.T))
        if linear.act is not None:
            x, first, second = (fake_quantize(rows, token_scale(rows)).numpy()
                                for rows in map(torch.from_numpy, (x, first, second)))
        delta = 0.5 * (x.astype(np.float64) @ first.astype(np.float64).T) @ second.astype(np.float64)
        expected = plain.astype(np.float64)
        expected[adapters == 2, 5 : 5 + n] += delta[adapters == 2]
        np.testing.assert_allclose(adapted, expected, rtol=1e-5, atol=1e-5 * np.abs(delta).max())
        one = StepInput(**{**vars(StepInput.whole([[5]])), "adapters": np.array([2], np.int32)})
        assert np.array_equal(executor.step(one)[0], adapted[5])


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkpoint, Path]:
    path = tmp_path_factory.mktemp("lora")
    save_lora(save_random("llama", path / "model"), path / "adapter")
    return Checkpoint(path / "model"), path / "adapter"


@pytest.mark.parametrize(("change", "message"), [
    ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
    ({"bias": "all"}, "bias 'all' is not applied"),
    ({"use_dora": True}, "use_dora is not applied"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save is not applied"),
    ({"layer_replication": [[0, 2]]}, "layer_replication is not applied"),
    ({"target_parameters": ["x"]}, "target_parameters is not applied"),
    ({"use_something_new": 1}, "use_something_new is not applied"),
    ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights 'pissa_niter_4' changes the model itself"),
])
def test_what_is_not_applied_is_refused_by_name(saved: tuple[Checkpoint, Path], change: dict[str, Any], message: str,
                                                tmp_path: Path) -> None:
    checkpoint, adapter = saved
    config = json.loads((adapter / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, **change}))
    (tmp_path / "adapter_model.safetensors").write_bytes((adapter / "adapter_model.safetensors").read_bytes())
    with pytest.raises(AdapterError, match=message):
        read_lora(tmp_path, checkpoint.model)


@pytest.mark.parametrize(("name", "tensor", "message"), [
    ("base_model.model.model.layers.9.mlp.up_proj.lora_A.weight", torch.ones(4, 96), "9.mlp.up_proj is no linear"),
    ("base_model.model.model.embed_tokens.lora_embedding_A", torch.ones(4, 96), "lora_embedding_A is no lora_A or"),
    ("base_model.model.model.layers.0.mlp.up_proj.lora_magnitude_vector", torch.ones(4), "lora_magnitude_vector is no"),
    ("base_model.model.model.layers.0.mlp.up_proj.lora_A.weight", torch.ones(4, 95), "has shape"),
    ("base_model.model.model.layers.0.mlp.up_proj.lora_B.weight", torch.ones(136, 5), "has shape"),
    ("base_model.model.model.layers.0.mlp.up_proj.lora_B.weight", None, "has only one of lora_A and lora_B"),
    ("base_model.model.model.layers.0.mlp.up_proj.lora_A.weight", torch.ones(513, 96), "rank of .* is 513"),
])
def test_tensors_that_do_not_fit(saved: tuple[Checkpoint, Path], name: str, tensor: torch.Tensor | None, message: str,
                                 tmp_path: Path) -> None:
    checkpoint, adapter = saved
    (tmp_path / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors.pop(name, None)
    if tensor is not None:
        tensors[name] = tensor
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(Exception, match=message):
        read_lora(tmp_path, checkpoint.model)


def test_no_adapter_at_all(saved: tuple[Checkpoint, Path], tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="is no directory with an adapter_config"):
        read_lora(tmp_path, saved[0].model)
    (tmp_path / "adapter_config.json").write_bytes((saved[1] / "adapter_config.json").read_bytes())
    with pytest.raises(AdapterError, match="has no adapter_model"):
        read_lora(tmp_path, saved[0].model)


LAE = Fptq(overrides={"*": "lae"})
TARGETS = {"deepseek-v3": ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]}


@pytest.mark.parametrize("steps", [(Rotation(optional=True), CrossLayer(), LAE),
                                   (CrossLayer(), SmoothQuant(), Rotation(optional=True, seed=3), LAE)])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma", "gemma3", "phi3", "gpt-neox", "lfm2", "deepseek-v3"])
def test_adapters_follow_what_a_recipe_moves(name: str, steps: tuple[Step, ...], tmp_path: Path) -> None:
    """The whole model, rotated and scaled but not rounded: logits are PEFT's on the untouched one."""
    model = save_random(name, tmp_path / "model")
    tokens = np.random.default_rng(0).integers(3, 211, (2, LENGTH)).tolist()
    adapted = save_lora(model, tmp_path / "adapter", target_modules=TARGETS.get(name, "all-linear"))
    with torch.no_grad():
        expected = adapted(torch.tensor(tokens)).logits
        with adapted.disable_adapter():
            plain = adapted(torch.tensor(tokens)).logits
    assert not torch.allclose(expected, plain, atol=0.1)
    walk = Walk(Checkpoint(tmp_path / "model"), steps, tokens)
    stem, parts, bases, backend = walk.stem(), [], dict[tuple[str, str], Basis](), select_backend("reference")
    for work in walk.blocks():
        in_float(work)
        assert work.block.bases is not None
        bases |= {(work.block.spec.name, linear): basis for linear, basis in work.block.bases.items()}
        parts.append(prepare_block(work.block, backend))
    decoder = Decoder(walk.model.config, stem, parts[:-1], parts[-1])
    limits = StepLimits.of(walk.model.config, max_tokens=2 * LENGTH, max_model_len=LENGTH, num_blocks=8, max_seqs=2)
    adapters = Adapters(walk.model, decoder, backend, 1, bases)
    adapters.load("x", tmp_path / "adapter")
    step = StepInput(**{**vars(StepInput.whole(tokens)), "adapters": np.array([1, 1], np.int32)})
    logits = logits_array(backend.compile(adapters.decoder, limits).step(step)).reshape(2, LENGTH, -1)
    np.testing.assert_allclose(logits, expected.numpy(), atol=5e-4)


HEAD_ALONE: Bases = {("", "head"): Basis(np.ones(2, np.float32), Turn(np.ones(2, np.float32), np.eye(1)))}


@pytest.mark.parametrize(("steps", "bases", "moved"), [
    (["rotation", "fptq", "gptq"], None, "rotation and fptq"), (["awq", "activations", "weights"], None, "awq"),
    (["rotation", "fptq", "gptq"], HEAD_ALONE, "rotation and fptq"), (["rotation", "fptq", "gptq"], {}, None),
    (["activations", "weights"], None, None), (["qat", "activations", "weights"], None, None),
])
def test_an_artifact_that_does_not_say_what_was_moved(steps: list[str], bases: Bases | None, moved: str | None,
                                                      tmp_path: Path) -> None:
    manifest = Manifest.model_construct(recipe={"steps": [{"type": step} for step in steps]})
    if bases is not None:
        (tmp_path / READOUT).touch()
    if moved is None:
        check_base(tmp_path, manifest, bases or {})
        return
    with pytest.raises(AdapterError, match=f"made with {moved}, which .* Quantize again"):
        check_base(tmp_path, manifest, bases or {})

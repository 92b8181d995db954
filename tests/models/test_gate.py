"""The gate lets right kernels pass, whatever the depth, and finds every planted fault by what is computed."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from benchmarks.gate import RUNTIME, STORED, plant_all
from fptq_runtime import cli
from fptq_runtime.artifact.files import MANIFEST
from fptq_runtime.artifact.io import GOLDEN, ArtifactError, read_manifest, verify
from fptq_runtime.engine.llm import load_engine
from fptq_runtime.kernels.base import ActivationQuant, Backend, QuantizedWeight
from fptq_runtime.kernels.reference import ReferenceBackend, quantize_activations
from fptq_runtime.kernels.select import without_kernel
from fptq_runtime.models.gate import AttentionFacts, GateError, Golden, LinearFacts, check, probe
from fptq_runtime.models.golden import compute_golden
from fptq_runtime.models.loader import Checkpoint, load_head, load_model
from fptq_runtime.quantizer import record as recording
from fptq_runtime.quantizer.pipeline import quantize
from fptq_runtime.quantizer.recipe import Recipe, load_recipe
from fptq_runtime.quantizer.record import record, vouched
from fptq_runtime.quantizer.samples import Calibration
from fptq_runtime.quantizer.steps.activations import Activations
from fptq_runtime.quantizer.steps.fptq import Fptq
from fptq_runtime.quantizer.steps.weights import Weights
from tests.quantizer.models import save_model

native = pytest.importorskip("fptq_runtime._native", reason="the native extension is not built")

from fptq_runtime.kernels.cpu import CpuBackend  # noqa: E402

SMALL: dict[str, Any] = {"calibration": Calibration("random", 2, 24), "text_tokens": 120}
W4 = Weights(group_size=32)
STATIC_AND_DYNAMIC = Recipe(name="mixed", steps=(
    Fptq(overrides={"*.1.*": "dynamic", "*": "static"}), W4))
RECIPES = {
    "mixed": STATIC_AND_DYNAMIC,
    "weight-only": Recipe(name="weight-only", steps=(Activations(scheme="float"), W4)),
    "bf16": load_recipe("bf16"),
    "w8a8-dynamic": load_recipe("w8a8-dynamic"),
    "zeroquant-fp": load_recipe("zeroquant-fp"),
}
PROMPT = [5, 7, 11, 200, 3, 9, 41]


def backends() -> Iterator[Backend]:
    yield from (CpuBackend(2, isa) for isa in native.available_isas())
    yield ReferenceBackend()


def passes_everywhere(path: Path, golden: Golden, **options: Any) -> None:
    for backend in backends():
        checkpoint = Checkpoint(path)
        if isinstance(backend, CpuBackend) and without_kernel(checkpoint.linear_schemes):
            continue
        ratio = check(load_model(checkpoint, backend), backend, golden, checkpoint.max_positions, **options)
        assert ratio < 0.6  # there is room


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With biases, static and dynamic inputs, a window in every layer, and a head of its own."""
    path = tmp_path_factory.mktemp("gate")
    save_model("qwen2-window", path / "float", sliding_window=64, max_window_layers=0, max_position_embeddings=256,
               hidden_size=128, intermediate_size=192, num_attention_heads=8)
    quantize(path / "float", path / "out", STATIC_AND_DYNAMIC, **SMALL)
    return path / "out"


@pytest.mark.parametrize("recipe", RECIPES)
def test_right_kernels_pass_every_recipe(recipe: str, tmp_path: Path) -> None:
    save_model("llama-tied-bias", tmp_path / "float", num_hidden_layers=2)
    quantize(tmp_path / "float", tmp_path / "out", RECIPES[recipe], **SMALL)
    passes_everywhere(tmp_path / "out", Golden.read(tmp_path / "out" / GOLDEN))


@pytest.mark.parametrize("family", ["mistral-window", "qwen3", "gemma3", "phi3", "olmo2", "smollm3", "gpt-neox", "opt",
                                    "gpt2", "stablelm", "stablelm-parallel", "bloom", "cohere", "cohere2", "exaone4",
                                    "glm4", "persimmon", "hunyuan", "gptj", "gpt-neo", "falcon-grouped", "mpt"])
def test_right_kernels_pass_every_kind_of_block(family: str, tmp_path: Path) -> None:
    save_model(family, tmp_path / "float")
    passes_everywhere(tmp_path / "float", record(Checkpoint(tmp_path / "float"), PROMPT), kv_dtype="bf16")


@pytest.mark.parametrize("isa", native.available_isas())
def test_the_same_kernels_must_compute_the_same_bits(isa: str, mixed: Path) -> None:
    """On any ISA, with any cache and as few positions as are served; what other kernels recorded is tolerated."""
    golden, checkpoint, backend = Golden.read(mixed / GOLDEN), Checkpoint(mixed), CpuBackend(1, isa)
    assert golden.kernels == backend.fingerprint
    decoder = load_model(checkpoint, backend)
    check(decoder, backend, golden, checkpoint.max_positions)
    check(decoder, backend, golden, 100, "bf16")
    check(decoder, backend, golden, 20, "float32")
    for named in ("linear layers.1.qkv", "norm layers.0.mlp_norm", "rope layers.0", "block layers.2",
                  "attention layers.0, int8 cache", "linear head.head"):
        bits, (kind, name) = golden.bits[named], named.split(" ", 1)
        other = replace(golden, bits={**golden.bits, named: f"{int(bits[:8], 16) ^ 1:08x}{bits[8:]}"})
        with pytest.raises(GateError, match=rf"^{name} \({kind}\) has other bits than the same kernels"):
            check(decoder, backend, other, checkpoint.max_positions)
        check(decoder, backend, replace(other, kernels="native other"), checkpoint.max_positions)


def test_ropes_that_depend_on_the_served_length_pass_on_both_sides(tmp_path: Path) -> None:
    save_model("phi4-mini", tmp_path / "float")
    golden = record(Checkpoint(tmp_path / "float"), PROMPT)
    longest = Checkpoint(tmp_path / "float").max_positions
    assert 20 < golden.short < longest
    for served in (20, golden.short, longest):
        checkpoint, backend = Checkpoint(tmp_path / "float"), CpuBackend(1)
        checkpoint.max_positions = served
        decoder = load_model(checkpoint, backend)
        assert check(decoder, backend, golden, served) < 0.6
        with pytest.raises(GateError, match=r"layers\.0"):
            check(decoder, backend, replace(golden, short=0 if served < longest else longest), served)


EMULATOR = shutil.which("qemu-x86_64") or shutil.which("qemu-x86_64-static")
EMULATED = """
import sys
from pathlib import Path
from fptq_runtime.kernels.cpu import CpuBackend
from fptq_runtime.models.gate import Golden, check
from fptq_runtime.models.loader import Checkpoint, load_model

path = Path(sys.argv[1])
checkpoint, backend = Checkpoint(path), CpuBackend(1)
ratio = check(load_model(checkpoint, backend), backend, Golden.read(path / "fptq.golden"), checkpoint.max_positions)
print(backend.describe()["isa"], ratio < 0.6)
"""


@pytest.mark.skipif(EMULATOR is None, reason="qemu-x86_64 (Debian: qemu-user) is not installed")
@pytest.mark.parametrize(("cpu", "isa"), [("Haswell", "avx2"), ("EPYC-Milan", "avx2"), ("Nehalem", "generic")])
def test_right_kernels_pass_on_other_cpus(cpu: str, isa: str, mixed: Path) -> None:
    assert EMULATOR is not None
    # numpy's OpenBLAS, left to choose, dies of an illegal instruction on an emulated Nehalem
    run = subprocess.run([EMULATOR, "-cpu", cpu, sys.executable, "-c", EMULATED, str(mixed)], capture_output=True,
                         text=True, timeout=300, env={**os.environ, "OPENBLAS_CORETYPE": "Nehalem"})
    assert run.stdout.split() == [isa, "True"], run.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("layers", "hidden"), [(64, 64), (48, 192), (16, 512), (2, 2048)])
def test_depth_changes_nothing(layers: int, hidden: int, tmp_path: Path) -> None:
    save_model("llama", tmp_path / "float", num_hidden_layers=layers, hidden_size=hidden, intermediate_size=2 * hidden,
               num_attention_heads=hidden // 16)
    quantize(tmp_path / "float", tmp_path / "out", Recipe(name="rtn", steps=(Activations(scheme="dynamic"), W4)),
             **SMALL)
    passes_everywhere(tmp_path / "out", Golden.read(tmp_path / "out" / GOLDEN))


def test_every_planted_fault_is_found(mixed: Path) -> None:
    """Those of tensors with every hash put right, so that nothing but what is computed can tell."""
    found = {found.fault: found for found in plant_all(mixed, lambda: CpuBackend(1))}
    assert set(found) == {*STORED, *RUNTIME}
    assert all(fault.applies for fault in found.values())
    assert [name for name, fault in found.items() if not fault.failed] == []


def test_every_bit_of_a_packed_word_is_seen(mixed: Path) -> None:
    """In weights as the backend gets them, one bit at a time."""
    golden, backend = Golden.read(mixed / GOLDEN), CpuBackend(1)
    checkpoint = Checkpoint(mixed)
    head = load_head(checkpoint)
    [linear] = head.linears.values()
    assert isinstance(linear.weight, QuantizedWeight)
    decoder = load_model(checkpoint, backend)
    packed = np.array(linear.weight.packed)
    for bit in range(32):
        linear.weight.packed = packed.copy()
        linear.weight.packed.view(np.uint32)[bit * 5 % len(packed), bit % packed.shape[1]] ^= np.uint32(1 << bit)
        decoder.head.linears = {name: backend.prepare(linear) for name in head.linears}
        failed = [o for o in probe(decoder, backend, golden, 256, kinds=("linear",)) if not o.passes]
        assert [(o.name, o.where) for o in failed] == [("head.head", f" column {bit * 5 % len(packed)}")]


@pytest.mark.parametrize("act", [ActivationQuant(), ActivationQuant(0.0371), ActivationQuant(None, "float"),
                                 ActivationQuant(0.0371, "float"), None])
def test_a_linears_input_quantizes_to_codes_of_full_range(act: ActivationQuant | None) -> None:
    facts = LinearFacts(1000, act)
    rows = torch.from_numpy(facts.multipliers[:, None] * facts.row("layers.1.up"))
    read = quantize_activations(rows.clone(), act).double().numpy()
    expected = facts.multipliers[:, None].astype(np.float64) * facts.read_row("layers.1.up")
    np.testing.assert_allclose(read, expected, rtol=1e-6)
    codes = facts.read_row("layers.1.up") / (1 if act is None or act.scale is None else act.scale)
    assert np.abs(codes).min() > 63.9 and (codes > 0).any() and (codes < 0).any()
    assert rows[0].bfloat16().float().equal(rows[0]) or (act is not None and act.scale is not None)


def test_the_edge_of_a_window_lies_inside_a_block() -> None:
    for window in range(24, 200):
        facts = AttentionFacts(2, 1, 8, window, (0,))
        assert facts.has_far(300) and (facts.far - window) % 16 == 7 and facts.far - window >= 40


def test_survives_its_file(tmp_path: Path, mixed: Path) -> None:
    golden = Golden.read(mixed / GOLDEN)
    (tmp_path / "again").write_bytes(golden.to_bytes())
    again = Golden.read(tmp_path / "again")
    assert (again.linears, again.attention, again.stem_ids) == (golden.linears, golden.attention, golden.stem_ids)
    assert all(np.array_equal(array, again.arrays[name]) for name, array in golden.arrays.items())
    assert (mixed / GOLDEN).stat().st_size < 0.2 * read_manifest(mixed).size  # of so narrow a model


@pytest.mark.parametrize("content", [None, b"", b"{}", b"\x08\0\0\0\0\0\0\0{}      "])
def test_a_malformed_file_is_refused(content: bytes | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "golden").write_bytes(content)
    with pytest.raises(GateError, match="missing or malformed"):
        Golden.read(tmp_path / "golden")


def test_a_refusal_says_what_differs_and_what_to_do(mixed: Path) -> None:
    golden, backend, checkpoint = Golden.read(mixed / GOLDEN), CpuBackend(1), Checkpoint(mixed)
    golden.arrays["layers.1.o.expected"][3] *= 1.5
    with pytest.raises(GateError) as caught:
        check(load_model(checkpoint, backend), backend, golden, checkpoint.max_positions)
    message = str(caught.value)
    assert re.match(r"layers\.1\.o \(linear column 3\) is \S+ times further", message)
    assert "quantize again" in message and "\n" not in message
    assert "FPTQ_ISA=generic" in message or native.available_isas() == ["generic"]
    del golden.arrays["layers.1.o.expected"]
    assert [o.name for o in probe(load_model(checkpoint, backend), backend, golden, 256) if not o.passes] == [
        "layers.1.o"]


def test_quantize_writes_nothing_that_its_own_kernels_refuse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model("llama", tmp_path / "float")
    kept = recording._keep
    monkeypatch.setattr(recording, "_keep", lambda golden, name, expected, tolerance: kept(
        golden, name, expected * 1.01 if name == "layers.2.down" else expected, tolerance))
    with pytest.raises(GateError, match=r"layers\.2\.down"):
        quantize(tmp_path / "float", tmp_path / "out", RECIPES["weight-only"], **SMALL)
    assert not (tmp_path / "out").exists()


def make_old(path: Path, logits_off: float = 0.0) -> None:
    """An artifact as fptq 0.1.0 wrote it: format 1, golden logits in the manifest."""
    backend, manifest = ReferenceBackend(), read_manifest(path)
    golden = compute_golden(load_model(Checkpoint(path), backend), backend, PROMPT)
    golden["logits"] = [[value + logits_off for value in row] for row in golden["logits"]]
    (path / GOLDEN).unlink()
    files = {name: file for name, file in manifest.files.items() if name != GOLDEN}
    old = manifest.model_copy(update={"format_version": 1, "golden": golden, "files": files})
    text = old.to_json()
    assert '"fptq_version": "' in text
    (path / MANIFEST).write_text(text)


@pytest.mark.parametrize("off", [0.0, 3.0])
def test_old_artifacts_load_warn_and_are_renewed(off: float, mixed: Path, tmp_path: Path,
                                                 caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "old"
    shutil.copytree(mixed, path)
    make_old(path, off)
    load_engine(path, backend="native", threads=1, kv_cache_memory=8 << 20)
    assert any("--renew" in record.message for record in caplog.records) == (off > 0)
    runner = CliRunner()
    shown = runner.invoke(cli.cli, ["verify", str(path)], catch_exceptions=False)
    assert shown.exit_code == 0 and f"fptq verify {path} --renew" in shown.output
    runner.invoke(cli.cli, ["verify", str(path), "--renew"], catch_exceptions=False)
    renewed = verify(path)
    assert renewed.format_version == 2 and GOLDEN in renewed.files
    golden = vouched(path, PROMPT)
    assert (path / GOLDEN).read_bytes() == golden.to_bytes()
    with pytest.raises(ArtifactError, match="already"):
        runner.invoke(cli.cli, ["verify", str(path), "--renew"], catch_exceptions=False)


def test_a_newer_format_names_the_version_that_reads_it(mixed: Path, tmp_path: Path) -> None:
    """Before its unknown fields are called damage."""
    manifest = json.loads((mixed / MANIFEST).read_text())
    assert manifest["format_version"] == 2 and manifest["fptq_version"]
    newer = {**manifest, "format_version": 3, "fptq_version": "7.1.0", "unheard_of": True}
    (tmp_path / MANIFEST).write_text(json.dumps(newer))
    with pytest.raises(ArtifactError, match=r"format 3, which fptq 7\.1\.0 reads"):
        read_manifest(tmp_path)


def test_changed_activations_leave_the_rest_checked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_model("llama", tmp_path / "float")
    quantize(tmp_path / "float", tmp_path / "out", RECIPES["weight-only"], **SMALL)
    with caplog.at_level(logging.WARNING):
        load_engine(tmp_path / "out", activations="int8", threads=1, kv_cache_memory=8 << 20)
    assert any("not checked" in record.message for record in caplog.records)

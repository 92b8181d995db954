"""Calibration data and observed ranges. Oracle: forward hooks on the transformers model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fptq_runtime.kernels.base import StepInput
from fptq_runtime.models.loader import Checkpoint
from fptq_runtime.models.tokenizer import Tokenizer
from fptq_runtime.quantizer import calibrate
from fptq_runtime.quantizer.calibrate import (
    CalibrationError,
    HiddenStates,
    Text,
    bos_prefix,
    observe_block,
    packaged_text,
    random_windows,
    read_text,
    sample_windows,
)
from fptq_runtime.quantizer.walk import float_part, float_stem
from tests.quantizer.models import save_model


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.nn.Module]:
    path = tmp_path_factory.mktemp("llama")
    return path, save_model("llama", path)


def test_observed_inputs_are_what_transformers_feeds_its_linears(
    llama: tuple[Path, torch.nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three samples, two of them in one minibatch."""
    path, model = llama
    checkpoint = Checkpoint(path)
    windows = torch.randint(3, 260, (3, 20), generator=torch.Generator().manual_seed(0)).tolist()
    monkeypatch.setattr(calibrate, "MINIBATCH_FLOATS", 2 * 20 * 2 * 136)
    monkeypatch.setattr(calibrate, "MINIBATCH_ROWS", 1)
    states = HiddenStates(checkpoint.model, windows)
    assert [len(batch.token_ids) for batch in states.batches] == [40, 20]

    seen: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0].flatten(0, 1)}))
    with torch.no_grad():
        expected_loss = float(model(torch.tensor(windows), labels=torch.tensor(windows)).loss)

    states.run_stem(float_stem(checkpoint))
    names = {"qkv": "self_attn.q_proj", "o": "self_attn.o_proj", "up": "mlp.gate_proj", "down": "mlp.down_proj"}
    for index in range(checkpoint.model_config.num_layers):
        block = float_part(checkpoint, index)
        for kind, stats in observe_block(states, block).items():
            x = seen[f"model.layers.{index}.{names[kind]}"]
            torch.testing.assert_close(stats.amax, x.abs().amax(0), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(stats.mean_square, x.square().mean(0), rtol=1e-4, atol=1e-5)
            assert stats.peak_position == int(x.abs().amax(-1).argmax()) % 20
            assert stats.rows == 60
        states.run_block(block)
    loss, count = states.negative_log_likelihood(float_part(checkpoint, checkpoint.model_config.num_layers))
    assert count == 3 * 19
    assert loss / count == pytest.approx(expected_loss, rel=1e-5)


def test_damaged_activations_are_refused(llama: tuple[Path, torch.nn.Module]) -> None:
    checkpoint = Checkpoint(llama[0])
    states = HiddenStates(checkpoint.model, [[1, 2, 3]])
    states.run_stem(float_stem(checkpoint))
    block = float_part(checkpoint, 0)
    block.linears["up"].weight = block.linears["up"].weight * float("nan")
    with pytest.raises(CalibrationError, match=r"layers\.0\.down is not finite"):
        observe_block(states, block)


def test_windows_are_as_served(llama: tuple[Path, torch.nn.Module]) -> None:
    """BOS first, then the text's own tokens; the seed decides which."""
    tokenizer = Tokenizer(llama[0])
    assert bos_prefix(tokenizer) == [1]
    text = Text("t", "The quick brown fox jumps over the lazy dog. " * 4, "")
    ids = tokenizer.encode(text.content, add_special_tokens=False)
    windows = sample_windows(text, tokenizer, [12] * 8, seed=3)
    assert windows == sample_windows(text, tokenizer, [12] * 8, seed=3)
    assert windows != sample_windows(text, tokenizer, [12] * 8, seed=4)
    runs = {tuple(ids[i : i + 11]) for i in range(len(ids) - 10)}
    assert all(len(w) == 12 and w[0] == 1 and tuple(w[1:]) in runs for w in windows)
    drawn = random_windows(tokenizer, 260, [12] * 50, seed=3)
    assert all(len(w) == 12 and w[0] == 1 and max(w) < 259 for w in drawn)
    assert len({t for w in drawn for t in w}) > 150
    with pytest.raises(CalibrationError, match="fewer than one sample"):
        sample_windows(Text("t", "short", ""), tokenizer, [12], seed=0)


def test_packed_windows_do_not_overlap() -> None:
    batch = StepInput.whole([[5, 6, 7], [8], [9, 10]])
    assert batch.token_ids.tolist() == [5, 6, 7, 8, 9, 10]
    assert batch.positions.tolist() == [0, 1, 2, 0, 0, 1]
    assert batch.query_start_loc.tolist() == [0, 3, 4, 6]
    rows, targets = calibrate.next_tokens(batch)
    assert rows.tolist() == [0, 1, 4]
    assert targets.tolist() == [6, 7, 10]
    assert batch.token_ids.dtype == np.int32


def test_texts(tmp_path: Path) -> None:
    """Calibration never sees the measured text."""
    calibration, heldout = packaged_text("calibration"), packaged_text("heldout")
    paragraphs = {p for p in heldout.content.split("\n\n") if len(p) > 80}
    assert paragraphs
    assert not paragraphs & set(calibration.content.split("\n\n"))
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    for path in (tmp_path / "latin", tmp_path / "absent", tmp_path):
        with pytest.raises(CalibrationError, match=path.name):
            read_text(path)


def test_large_linears_multiply_in_bfloat16(llama: tuple[Path, torch.nn.Module], monkeypatch: pytest.MonkeyPatch,
                                            ) -> None:
    """A few roundings to eight bits away from float32; the block itself stays in float32."""
    path, _ = llama
    checkpoint = Checkpoint(path)
    windows = torch.randint(3, 260, (3, 20), generator=torch.Generator().manual_seed(0)).tolist()
    block = float_part(checkpoint, 0)
    found = []
    for smallest in (1 << 30, 1):
        monkeypatch.setattr(calibrate, "BF16_WEIGHTS", smallest)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
        states = HiddenStates(checkpoint.model, windows)
        states.run_stem(float_stem(checkpoint))
        stats = observe_block(states, block)["down"]
        states.run_block(block)
        found.append((stats.amax, torch.cat(states.states)))
    for exact, rounded in zip(*found, strict=True):
        error = (exact - rounded).norm() / exact.norm()
        assert 1e-5 < float(error) < 2e-2
    assert block.linears["up"].weight.dtype == torch.float32

"""Rows of a comparison, against what the parts say one by one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from transformers import AutoModelForCausalLM

from fptq_runtime import cli
from fptq_runtime.kernels.select import select_backend
from fptq_runtime.measure import chat, published
from fptq_runtime.measure import compare as module
from fptq_runtime.measure.compare import Comparison, compare, markdown, plot
from fptq_runtime.measure.published import Published
from fptq_runtime.models.loader import Checkpoint
from fptq_runtime.models.tokenizer import Tokenizer
from fptq_runtime.quantizer.calibrate import Text
from fptq_runtime.quantizer.evaluate import evaluate, sum_kl, text_windows
from fptq_runtime.quantizer.pipeline import quantize
from fptq_runtime.quantizer.recipe import load_recipe
from fptq_runtime.quantizer.samples import Calibration
from fptq_runtime.quantizer.steps.base import QuantizationError
from tests.models.hf import save_random
from tests.quantizer.models import save_model

TEXT = Text("fox", "The quick brown fox jumps over the lazy dog, and then some more. " * 9, "0" * 64)



@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SECONDS", 0.0)
    monkeypatch.setattr(module, "STEPS", 2)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    save_model("llama", path)
    return path


@pytest.fixture(scope="module")
def compared(model: Path) -> Comparison:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "SECONDS", 0.0)
        patch.setattr(module, "STEPS", 2)

        def refusing(*arguments: Any, **options: Any) -> Any:
            if arguments[2].name == "rtn-dynamic":
                raise QuantizationError("rtn-dynamic\n does not know this family")
            return quantize(*arguments, **options)

        patch.setattr(module, "quantize", refusing)
        recipes = [load_recipe(name) for name in ("rtn", "rtn-dynamic", "w8a8-dynamic", "bf16")]
        return compare(model, recipes, TEXT, calibration=Calibration(num_samples=4), max_tokens=300, threads=1)


def test_rows_say_what_evaluate_says(compared: Comparison, model: Path, tmp_path: Path) -> None:
    assert [row.recipe for row in compared.rows] == ["rtn", "rtn-dynamic", "w8a8-dynamic", "bf16"]
    backend = select_backend("auto", 1)
    exact = evaluate(model, TEXT, backend, max_tokens=300, kv_dtype="float32")
    assert compared.original.perplexity == exact.perplexity
    assert compared.tokens == exact.tokens
    manifest = quantize(model, tmp_path / "out", "rtn", calibration=Calibration(num_samples=4), text_tokens=256)
    direct = evaluate(tmp_path / "out", TEXT, backend, max_tokens=300, kv_dtype="int8")
    row = compared.rows[0]
    assert row.measured is not None and row.measured.perplexity == direct.perplexity
    assert row.measured.bytes == manifest.files["model.safetensors"].size
    assert row.quantize_seconds is not None and row.quantize_seconds > 0


def test_closer_recipes_diverge_less(compared: Comparison) -> None:
    rtn, refused, w8, bf16 = compared.rows
    assert rtn.kl and w8.kl and bf16.kl and rtn.top1 and w8.top1 and bf16.top1
    assert rtn.kl > w8.kl > bf16.kl >= 0
    assert rtn.top1 < w8.top1 <= bf16.top1 <= 1
    assert refused.measured is None and refused.error == "rtn-dynamic does not know this family"
    for row in (rtn, w8, bf16):
        assert row.measured is not None
        assert min(row.measured.prefill_tokens_per_s, row.measured.decode_tokens_per_s) > 0


def test_kl_is_torchs(model: Path) -> None:
    """Of transformers' own logits, and of logits far apart."""
    torch.manual_seed(0)
    ids = torch.tensor([text_windows(TEXT, Tokenizer(model), 128, 60)[0]])
    with torch.no_grad():
        exact = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)(ids).logits[0]
    for other in (exact + torch.randn_like(exact), 30 * torch.randn_like(exact), exact):
        expected = torch.nn.functional.kl_div(other.double().log_softmax(-1), exact.double().log_softmax(-1),
                                              reduction="sum", log_target=True)
        assert sum_kl(exact, other) == pytest.approx(float(expected), rel=1e-5, abs=1e-6)


def test_the_table_and_the_plot(compared: Comparison) -> None:
    table = markdown(compared)
    rows = [line for line in table.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in rows}) == 1
    assert [line.split("|")[1].strip() for line in rows[2:]] == ["float", "rtn", "rtn-dynamic", "w8a8-dynamic", "bf16"]
    assert "- rtn-dynamic: rtn-dynamic does not know this family" in table
    root = ElementTree.fromstring(plot(compared))
    assert "http" not in "".join(value for node in root.iter() for value in node.attrib.values())
    assert {"float", "rtn", "bf16"} <= {node.text for node in root.iter("{http://www.w3.org/2000/svg}text")}


def test_json_is_one_flat_object_a_row(compared: Comparison) -> None:
    data = json.loads(json.dumps(compared.to_json()))
    assert {"model", "float", "rows", "text", "tokens", "machine"} <= set(data)
    for row in data["rows"]:
        assert {"recipe", "error"} <= set(row)
        if row["error"] is None:
            assert {"perplexity", "kl", "top1", "bytes", "quantize_seconds", "prefill_tokens_per_s",
                    "decode_tokens_per_s", "decode_batch_8_tokens_per_s", "tasks"} <= set(row)
    assert {"perplexity", "bytes", "prefill_tokens_per_s"} <= set(data["float"])


def test_the_command(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text(TEXT.content)
    (tmp_path / "words.jsonl").write_text('{"text": "the lazy dog"}\n')
    arguments = ["compare", str(model), "--text", str(tmp_path / "text.txt"), "--max-tokens", "100", "--num-samples",
                 "2", "--recipes", "rtn, bf16", "--out", str(tmp_path / "out"), "--threads", "1",
                 "--last-word", str(tmp_path / "words.jsonl")]
    with pytest.raises(SystemExit) as exit_code:
        cli.main([*arguments, "--json"])
    assert exit_code.value.code == 0
    data = json.loads(capsys.readouterr().out)
    assert data == json.loads((tmp_path / "out" / "compare.json").read_text())
    assert [row["recipe"] for row in data["rows"]] == ["rtn", "bf16"]
    assert set(data["float"]["tasks"]) == {"words"}
    table = (tmp_path / "out" / "compare.md").read_text()
    assert "| words |" in table and "![compared](compare.svg)" in table
    assert (tmp_path / "out" / "compare.svg").read_text().startswith("<svg")


def test_the_papers_protocol(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
                             monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the loop that GPTQ's and deepcompressor's scripts run, with transformers' float model; the figures that
    are published of a model of this shape stand beside ours."""
    shape = Checkpoint(model).model_config
    known = Published("Tiny", shape.hidden_size, shape.num_layers, shape.vocab_size, 5.0, {"SmoothQuant": 5.5})
    monkeypatch.setattr(published, "PUBLISHED", (known,))
    monkeypatch.setattr(chat, "MAX_TOKENS", 8)
    monkeypatch.setattr(chat, "PROMPTS", ("Hello",))
    (tmp_path / "text.txt").write_text(TEXT.content)
    arguments = ["compare", str(model), "--protocol", "wikitext2", "--text", str(tmp_path / "text.txt"), "--recipes",
                 "rtn-dynamic", "--num-samples", "2", "--threads", "1", "--chat", "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit):
        cli.main([*arguments, "--json"])
    data = json.loads(capsys.readouterr().out)
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    ids = torch.tensor([Tokenizer(model).encode(TEXT.content)])
    losses = []
    with torch.no_grad():
        for i in range(ids.numel() // 128):
            window = ids[:, i * 128 : (i + 1) * 128]
            losses.append(reference(window, labels=window).loss)
    assert data["float"]["perplexity"] == pytest.approx(float(torch.stack(losses).mean().exp()), rel=1e-3)
    assert data["tokens"] == len(losses) * 127
    assert data["published"]["methods"] == {"SmoothQuant": 5.5}
    assert data["rows"][0]["chat"]["answers"] == data["float"]["chat"]["answers"] == 1
    table = (tmp_path / "out" / "compare.md").read_text()
    rows = [line for line in table.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in rows}) == 1
    assert "| SmoothQuant, published | 5.50 | +10.00% |" in table
    assert published.SOURCE in table


def test_a_checkpoint_from_elsewhere_is_a_row(compared: Comparison, model: Path, tmp_path: Path,
                                              capsys: pytest.CaptureFixture[str]) -> None:
    quantize(model, tmp_path / "made", "rtn", calibration=Calibration(num_samples=4), text_tokens=256)
    save_random("llama", tmp_path / "other", vocab_size=300)
    (tmp_path / "text.txt").write_text(TEXT.content)
    with pytest.raises(SystemExit):
        cli.main(["compare", str(model), "--text", str(tmp_path / "text.txt"), "--text-tokens", "300", "--threads", "1",
                  "--checkpoint", f"theirs={tmp_path / 'made'}", "--checkpoint", f"another={tmp_path / 'other'}",
                  "--out", str(tmp_path / "out")])
    data = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert data["calibration"] is None
    theirs, another = data["rows"]
    ours = compared.rows[0]
    assert ours.measured is not None and theirs["recipe"] == "theirs"
    assert (theirs["perplexity"], theirs["kl"], theirs["top1"]) == (ours.measured.perplexity, ours.kl, ours.top1)
    assert theirs["quantize_seconds"] is None
    assert another["error"].startswith("it has 300 tokens, and")
    assert "| theirs |" in capsys.readouterr().out


@pytest.mark.parametrize(("arguments", "said"), [
    (["--protocol", "wikitext2"], "needs --text FILE"), ([], "--recipes names what is compared"),
])
def test_a_comparison_of_nothing_is_usage(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_code:
        cli.main(["compare", "demo", *arguments])
    assert exit_code.value.code == 2
    assert said in capsys.readouterr().err


def test_wrong_recipes_are_usage(capsys: pytest.CaptureFixture[str]) -> None:
    for recipes in (",", "rtn,ftpq"):
        with pytest.raises(SystemExit) as exit_code:
            cli.main(["compare", "demo", "--recipes", recipes])
        assert exit_code.value.code == 2
    assert "did you mean fptq?" in capsys.readouterr().err


def test_an_artifact_is_not_compared(model: Path, tmp_path: Path) -> None:
    quantize(model, tmp_path / "out", "rtn", calibration=Calibration(num_samples=2), text_tokens=64)
    with pytest.raises(QuantizationError, match="float model"):
        compare(tmp_path / "out", [load_recipe("rtn")], TEXT)

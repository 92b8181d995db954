"""What `fptq quantize` and the commands that read an artifact promise. Oracles: transformers and safetensors."""

from __future__ import annotations

import json
import math
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from fptq_runtime import LLM, SamplingParams
from tests.acceptance.harness import DEMO, HELDOUT, Fptq, wait_until


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prose that fits one window of the demo model."""
    path = tmp_path_factory.mktemp("text") / "tale.txt"
    path.write_text(HELDOUT.read_text(encoding="utf-8")[3000:5500], encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def long_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "tales.txt"
    path.write_text(HELDOUT.read_text(encoding="utf-8")[:60_000], encoding="utf-8")
    return path


def transformers_perplexity(path: Path, text: Path) -> float:
    """One window: BOS, then the text; every token of the text is scored."""
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    ids = tokenizer(text.read_text(encoding="utf-8"), return_tensors="pt").input_ids
    assert ids[0, 0] == tokenizer.bos_token_id
    assert ids.shape[1] <= model.config.max_position_embeddings
    with torch.no_grad():
        return math.exp(model(ids, labels=ids).loss.item())


def perplexity(fptq: Fptq, model: object, text: Path) -> float:
    value = fptq("eval", model, "--text", text, "--json").json["perplexity"]
    assert isinstance(value, float)
    return value


def test_quantize_ends_with_what_it_cost(fptq: Fptq, small_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "small-w4a8"
    result = fptq("quantize", small_model, out)
    assert result.code == 0, result.stderr
    said = (result.stdout + result.stderr).rsplit("\r", 1)[-1].lower()
    assert "perplexity" in said
    assert len(re.findall(r"\d+\.\d+", said)) >= 2, said
    for word in ("static", "lae", "dynamic"):
        assert word in said, said
    assert re.search(r"\d (ki?b|mi?b|gi?b|bytes)", said, re.IGNORECASE), said
    assert [path.name for path in tmp_path.iterdir()] == ["small-w4a8"], "nothing else is left beside it"

    shown = fptq("inspect", out)
    assert shown.code == 0, shown.stderr
    for word in ("perplexity", "static", "dynamic", "recipe", "down_proj"):
        assert word in shown.stdout.lower(), shown.stdout

    assert fptq("verify", out).code == 0


def test_json_is_one_object(fptq: Fptq, small_model: Path, tmp_path: Path, text: Path) -> None:
    out = tmp_path / "out"
    assert fptq("quantize", small_model, out, "--json").json
    assert fptq("inspect", out, "--json").json
    assert fptq("verify", out, "--json").json
    assert fptq("eval", out, "--text", text, "--json").json.keys() >= {"perplexity"}
    assert fptq("generate", out, "Once upon a time", "--json").json
    assert fptq("bench", out, "--batch", 2, "--context", 8, "--steps", 4, "--seconds", 0.1, "--json").json


def test_artifact_is_compressed_tensors(small_artifact: Path) -> None:
    config = json.loads((small_artifact / "config.json").read_text())
    quantization = config["quantization_config"]
    assert quantization["quant_method"] == "compressed-tensors"
    assert config["tie_word_embeddings"] is False
    assert not any("lm_head" in name for name in quantization.get("ignore", []))
    for group in quantization["config_groups"].values():
        assert group["format"] == "pack-quantized"
    tensors = load_file(small_artifact / "model.safetensors")
    packed = [name for name in tensors if name.endswith(".weight_packed")]
    assert len(packed) == 7 + 1, "the seven linear layers of a block and the head"
    for name in packed:
        layer = name.removesuffix(".weight_packed")
        rows, columns = tensors[layer + ".weight_shape"].tolist()
        bits = 8 if layer == "lm_head" else 4
        assert tensors[name].dtype == torch.int32
        assert tensors[name].shape == (rows, columns * bits // 32)
        assert tensors[layer + ".weight_scale"].shape == (rows, 1 if layer == "lm_head" else columns // 128)


def test_eval_is_transformers_perplexity(fptq: Fptq, demo_artifact: Path, text: Path) -> None:
    """Float, and the artifact: transformers fake-quantizes with compressed-tensors; the native kernels' KV is not
    float, hence 1 %."""
    assert perplexity(fptq, DEMO, text) == pytest.approx(transformers_perplexity(DEMO, text), rel=2e-3)
    oracle = transformers_perplexity(demo_artifact, text)
    assert perplexity(fptq, demo_artifact, text) == pytest.approx(oracle, rel=1e-2)


@pytest.mark.parametrize(("backend", "kv_cache_dtype", "same"), [
    ("reference", "float32", 0.5), ("native", "bf16", 0)])
def test_logits_are_transformers(demo_artifact: Path, text: Path, backend: str, kv_cache_dtype: str,
                                 same: float) -> None:
    """Every prompt token's log-probability, and the likeliest token wherever it leads clearly.

    Two correct programs agree to 1e-3 of max |logit| until the last bit of a float sum tips one int8 code; from there
    they differ as the quantization noise does (transformers' sdpa and eager attention do so too). So of many short
    prompts a share must agree throughout, and all of them to 1e-2 in the root mean square.
    """
    model = transformers.AutoModelForCausalLM.from_pretrained(demo_artifact, dtype=torch.float32).eval()
    tokens = transformers.AutoTokenizer.from_pretrained(demo_artifact)(text.read_text(encoding="utf-8")).input_ids
    prompts = [tokens[:1] + tokens[1 + start : 24 + start] for start in range(0, 480, 24)]
    llm = LLM(demo_artifact, backend=backend, kv_cache_dtype=kv_cache_dtype)
    completions = llm.generate(prompts, SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=1))
    agreeing = 0
    for ids, [completion] in zip(prompts, completions, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0]
        largest = logits.abs().max()
        first, *rest = completion.prompt_logprobs
        assert first is None
        assert [entry.token_id for entry in rest] == ids[1:]
        expected = logits.log_softmax(-1)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        difference = (torch.tensor([entry.logprob for entry in rest]) - expected) / largest
        # A log-probability may be off by twice a logit's error.
        assert difference.square().mean().sqrt() <= 2e-2
        agreeing += bool(difference.abs().max() <= 2e-3)
        best, second = logits[:-1].topk(2).values.T
        likeliest = torch.tensor([entry.top[0][0] for entry in rest])
        assert (likeliest == logits[:-1].argmax(-1))[best - second > 5e-2 * largest].all()
    assert agreeing >= same * len(prompts)


def test_quantization_costs_little(fptq: Fptq, demo_artifact: Path, long_text: Path) -> None:
    ratio = perplexity(fptq, demo_artifact, long_text) / perplexity(fptq, DEMO, long_text)
    assert 0.98 < ratio < 1.06


@pytest.mark.parametrize("calibration", [None, "random"])
def test_the_same_seed_gives_the_same_bytes(fptq: Fptq, small_model: Path, tmp_path: Path, calibration: str | None,
                                            ) -> None:
    options = [] if calibration is None else ["--calibration", calibration]
    outs = [tmp_path / "a", tmp_path / "b"]
    for out in outs:
        result = fptq("quantize", small_model, out, "--seed", 7, *options)
        assert result.code == 0, result.stderr
    a, b = ({path.name: path.read_bytes() for path in out.iterdir() if path.name != "fptq.json"} for out in outs)
    assert a == b


def test_recipe_and_calibration_files(fptq: Fptq, small_model: Path, tmp_path: Path, text: Path) -> None:
    """rtn is a recipe by name; text calibrates; what was used is written down."""
    out = tmp_path / "out"
    result = fptq("quantize", small_model, out, "--recipe", "rtn", "--calibration", text)
    assert result.code == 0, result.stderr
    manifest = (out / "fptq.json").read_text()
    assert "rtn" in manifest
    assert text.name in manifest or "sha256" in manifest
    assert fptq("verify", out).code == 0


@pytest.mark.parametrize("made_by", ["a user", "fptq"])
def test_existing_output_is_not_overwritten(fptq: Fptq, small_model: Path, small_artifact: Path, tmp_path: Path,
                                            made_by: str) -> None:
    out = tmp_path / "out"
    if made_by == "fptq":
        shutil.copytree(small_artifact, out)
    else:
        out.mkdir()
        (out / "precious.txt").write_text("mine")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    fptq("quantize", small_model, out).assert_usage_error(re.escape(str(out)), "exist|empty")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_overwrite_replaces_an_artifact_and_nothing_else(fptq: Fptq, small_model: Path, small_artifact: Path,
                                                         tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(small_artifact, out)
    (out / "config.json").write_text("{}")
    result = fptq("quantize", small_model, out, "--overwrite")
    assert result.code == 0, result.stderr
    assert fptq("verify", out).code == 0
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "precious.txt").write_text("mine")
    fptq("quantize", small_model, precious, "--overwrite").assert_usage_error("precious")
    assert (precious / "precious.txt").read_text() == "mine"


def test_output_cannot_be_made(fptq: Fptq, small_model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    fptq("quantize", small_model, tmp_path / "file").assert_error("file")
    fptq("quantize", small_model, tmp_path / "file" / "out").assert_error("file")


@pytest.mark.parametrize("when", ["at the first file", "at the weights"])
def test_killed_quantize_leaves_nothing_that_looks_finished(fptq: Fptq, small_model: Path, tmp_path: Path, when: str,
                                                            ) -> None:
    place = tmp_path / "place"
    place.mkdir()
    out = place / "out"
    wanted = "*" if when == "at the first file" else "*.safetensors"
    process = fptq.start("quantize", small_model, out)
    try:
        wait_until(lambda: process.poll() is not None or any(place.rglob(wanted)), "the run writes something", 250)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait(60)
    if out.exists():  # the kill came after the last step, or OUT is left half made
        assert fptq("verify", out).code == 0
        return
    for left in place.rglob("config.json"):
        fptq("serve", left.parent).assert_error()
    assert fptq("quantize", small_model, out).code == 0, "what a killed run left is not in the way"
    assert fptq("verify", out).code == 0


def flip_bit(path: Path, position: float = 0.6) -> None:
    data = bytearray(path.read_bytes())
    data[int(len(data) * position)] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
                                  "generation_config.json", "fptq.json"])
def test_verify_names_the_file_with_a_flipped_bit(fptq: Fptq, small_artifact: Path, tmp_path: Path, name: str) -> None:
    artifact = tmp_path / "artifact"
    shutil.copytree(small_artifact, artifact)
    flip_bit(artifact / name)
    fptq("verify", artifact).assert_error(re.escape(name))


def test_verify_names_a_file_that_is_gone(fptq: Fptq, small_artifact: Path, tmp_path: Path) -> None:
    artifact = tmp_path / "artifact"
    shutil.copytree(small_artifact, artifact)
    (artifact / "tokenizer.json").unlink()
    fptq("verify", artifact).assert_error("tokenizer.json")


def test_serve_refuses_an_artifact_with_a_flipped_bit(fptq: Fptq, small_artifact: Path, tmp_path: Path) -> None:
    artifact = tmp_path / "artifact"
    shutil.copytree(small_artifact, artifact)
    flip_bit(artifact / "model.safetensors")
    fptq("serve", artifact, "--port", 0).assert_error("model.safetensors")


def test_generate_is_deterministic_when_greedy(fptq: Fptq, demo_artifact: Path) -> None:
    runs = [fptq("generate", demo_artifact, "Once upon a time", "--temperature", 0) for _ in range(2)]
    assert runs[0].code == 0, runs[0].stderr
    assert runs[0].stdout.strip()
    assert runs[0].stdout == runs[1].stdout


@pytest.mark.slow
def test_outlier_transplant(fptq: Fptq, demo_artifact: Path, tmp_path: Path, long_text: Path) -> None:
    """Norm gains of a few channels grow and the weights that read them shrink by the same power of two: the same
    function, bit for bit, with the activation ranges that FPTQ is for."""
    model = tmp_path / "transplant"
    shutil.copytree(DEMO, model)
    tensors = load_file(model / "model.safetensors")
    readers = {"input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
               "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj")}
    channels = torch.tensor([3, 70, 151, 201])
    factors = torch.tensor([32.0, 64.0, 128.0, 256.0], dtype=torch.bfloat16)
    for name in [name for name in tensors if name.endswith("layernorm.weight")]:
        prefix, norm, _ = name.rsplit(".", 2)
        tensors[name][channels] *= factors
        for reader in readers[norm]:
            tensors[f"{prefix}.{reader}.weight"][:, channels] /= factors
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})

    untouched = perplexity(fptq, DEMO, long_text)
    assert perplexity(fptq, model, long_text) == pytest.approx(untouched, rel=1e-3)
    loss = {}
    for recipe in ("fptq", "rtn"):
        out = tmp_path / recipe
        result = fptq("quantize", model, out, "--recipe", recipe, timeout=280)
        assert result.code == 0, result.stderr
        loss[recipe] = perplexity(fptq, out, long_text) / untouched - 1
        if recipe == "fptq":
            table = (result.stdout + result.stderr).lower()
            assert re.search(r"\blae\b", table), table
            assert re.search(r"\bdynamic\b", table), table
    before = perplexity(fptq, demo_artifact, long_text) / untouched - 1
    assert before < 0.06
    assert loss["fptq"] <= 1.15 * before + 0.003, loss
    assert loss["rtn"] > 5 * loss["fptq"] + 0.1, loss

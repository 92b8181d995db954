"""Mistakes at the command line and files that are broken or hostile: one line that names the cause."""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import shutil
import socket
import struct
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tests.acceptance.harness import Fptq, free_port


@pytest.mark.parametrize(("line", "typo", "meant"), [
    ("quantise demo out", "quantise", "quantize"),
    ("sevre demo", "sevre", "serve"),
    ("quantize demo out --sede 1", "--sede", "--seed"),
    ("quantize demo out --recipe fptqq", "fptqq", "fptq"),
    ("quantize demo out --recipe my-recipe.yml", "my-recipe.yml", "my-recipe.yaml"),
    ("quantize demo out --calibration randm", "randm", "random"),
    ("quantize my-artifact/sub/artifct out", "artifct", "artifact"),
    ("serve demo --prot 8000", "--prot", "--port"),
    ("serve demo --kv-cache-dtype int4", "int4", "int8"),
    ("serve demo --kv-cache-memory many", "many", "512MiB"),
    ("serve demoo", "demoo", "demo"),
    ("inspect my-artifcat", "my-artifcat", "my-artifact"),
    ("verify my-artifact/sub/artifct", "artifct", "artifact"),
    ("eval demo --text tales.tx", "tales.tx", "tales.txt"),
    ("generate demo x --temprature 0", "--temprature", "--temperature"),
])
def test_typo_is_answered_with_what_was_meant(fptq: Fptq, tmp_path: Path, line: str, typo: str, meant: str) -> None:
    (tmp_path / "my-artifact" / "sub" / "artifact").mkdir(parents=True)
    (tmp_path / "tales.txt").write_text("Once upon a time.")
    (tmp_path / "my-recipe.yaml").write_text("steps: []")
    result = fptq(*line.split(), cwd=tmp_path)
    result.assert_usage_error(re.escape(typo), rf"(?<![\w-]){re.escape(meant)}(?!\w)")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("args", "names"), [
    (["--port", "99999"], ["--port"]),
    (["--port", "http"], ["--port", "http"]),
    (["--max-num-seqs", "0"], ["max.num.seqs"]),
    (["--max-num-batched-tokens", "-5"], ["max.num.batched.tokens"]),
    (["--max-model-len", "0"], ["max.model.len"]),
    (["--max-model-len", "1000000"], ["max.model.len", "1024|context"]),
    (["--threads", "-1"], ["threads"]),
    (["--kv-cache-memory", "1KiB"], ["kv.cache.memory"]),
    (["--kv-cache-memory", "-1GiB"], ["kv.cache.memory"]),
    (["--api-key", ""], ["api.key"]),
    (["--host", "no.such.host.invalid"], ["host|no.such.host.invalid"]),
])
def test_serve_refuses_a_bad_option(fptq: Fptq, small_artifact: Path, args: list[str], names: list[str]) -> None:
    fptq("serve", small_artifact, *args).assert_error(*names)


def test_port_in_use(fptq: Fptq, small_artifact: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        fptq("serve", small_artifact, "--port", port).assert_error(str(port), "use")


def test_float_model_is_not_an_artifact(fptq: Fptq, small_model: Path) -> None:
    for command in ("serve", "inspect", "verify"):
        fptq(command, small_model).assert_error("quantize|artifact")


def test_artifact_is_not_quantized_again(fptq: Fptq, small_artifact: Path, tmp_path: Path) -> None:
    fptq("quantize", small_artifact, tmp_path / "out").assert_error("quantized")


def test_unknown_hub_id_offline(fptq: Fptq, tmp_path: Path) -> None:
    fptq("quantize", "nobody/nothing", tmp_path / "out").assert_error("nobody/nothing")


@pytest.mark.parametrize(("status", "code", "said"), [
    (403, "GatedRepo", ("some/model is gated", "accept its terms", "HF_TOKEN")),
    (401, "RepoNotFound", ("some/model", "private", "HF_TOKEN")),
    (404, "RevisionNotFound", ("some/model has no revision v2",)),
])
def test_a_hub_that_declines(fptq: Fptq, tmp_path: Path, status: int, code: str, said: tuple[str, ...]) -> None:
    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        env = {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
        fptq("quantize", "some/model@v2", tmp_path / "out", env=env).assert_error(*said)
        hub.shutdown()


def edit_config(**changes: Any) -> Callable[[Path], None]:
    def edit(model: Path) -> None:
        path = model / "config.json"
        config = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))

    return edit


def edit_weights(edit: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def apply(model: Path) -> None:
        tensors = load_file(model / "model.safetensors")
        edit(tensors)
        save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})

    return apply


def edit_bytes(edit: Callable[[bytearray], Any], name: str = "model.safetensors") -> Callable[[Path], None]:
    def apply(model: Path) -> None:
        data = bytearray((model / name).read_bytes())
        edit(data)
        (model / name).write_bytes(data)

    return apply


def truncate(data: bytearray) -> None:
    del data[len(data) // 2:]


def flip(position: int, bit: int) -> Callable[[bytearray], None]:
    def apply(data: bytearray) -> None:
        data[position] ^= 1 << bit

    return apply


def edit_header(edit: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Change what the safetensors header claims, and leave the data."""

    def apply(data: bytearray) -> None:
        [length] = struct.unpack("<Q", data[:8])
        header = json.loads(data[8:8 + length])
        edit(header)
        new = json.dumps(header).encode()
        data[:8 + length] = struct.pack("<Q", len(new)) + new

    return edit_bytes(apply)


def remove(*names: str) -> Callable[[Path], None]:
    def apply(model: Path) -> None:
        for name in names:
            (model / name).unlink()

    return apply


class Hostile:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def as_pickle(model: Path) -> None:
    """A checkpoint that writes `owned` beside itself when it is unpickled."""
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Hostile(model / "owned")))
    (model / "model.safetensors").unlink()


def as_shards(weight_map: dict[str, str]) -> Callable[[Path], None]:
    def apply(model: Path) -> None:
        shard = model / "model-00001-of-00002.safetensors"
        (model / "model.safetensors").rename(shard)
        names = dict.fromkeys(load_file(shard), shard.name)
        index = {"metadata": {}, "weight_map": {**names, **weight_map}}
        (model / "model.safetensors.index.json").write_text(json.dumps(index))

    return apply


Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
BAD_MODELS: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "truncated weights": (edit_bytes(truncate), ["model.safetensors"]),
    "no weights": (edit_bytes(bytearray.clear), ["model.safetensors"]),
    "bit flipped in the header's length": (edit_bytes(flip(6, 3)), ["model.safetensors"]),
    "bit flipped in the header": (edit_bytes(flip(30, 7)), ["model.safetensors"]),
    "header with an absurd shape": (
        edit_header(lambda header: header[Q_PROJ].update(shape=[1 << 40, 1 << 40])), ["model.safetensors|q_proj"]),
    "header with offsets past the end": (
        edit_header(lambda header: header[Q_PROJ].update(data_offsets=[0, 1 << 50])), ["model.safetensors|q_proj"]),
    "weight missing": (edit_weights(lambda tensors: tensors.pop(Q_PROJ)), ["self_attn.q_proj"]),
    "weight of the wrong shape": (
        edit_weights(lambda tensors: tensors.update({Q_PROJ: tensors[Q_PROJ][:100].clone()})), ["self_attn.q_proj"]),
    "weight not a number": (
        edit_weights(lambda tensors: tensors[Q_PROJ].fill_(float("nan"))), ["q_proj", "nan|finite"]),
    "shard missing": (
        as_shards({Q_PROJ: "model-00002-of-00002.safetensors"}), ["model-00002-of-00002.safetensors"]),
    "shard outside": (as_shards({Q_PROJ: "../../../../etc/passwd"}), ["model.safetensors.index.json"]),
    "no config": (remove("config.json"), ["config.json"]),
    "config cut off": (edit_bytes(truncate, "config.json"), ["config.json"]),
    "config not an object": (lambda model: (model / "config.json").write_text("[1]") and None, ["config.json"]),
    "absurd layers": (edit_config(num_hidden_layers=10**9), ["num_hidden_layers"]),
    "absurd width": (edit_config(hidden_size=1 << 60), ["hidden_size"]),
    "absurd vocabulary": (edit_config(vocab_size=-5), ["vocab_size"]),
    "no heads": (edit_config(num_attention_heads=0), ["num_attention_heads"]),
    "heads that do not divide": (edit_config(num_key_value_heads=3), ["heads"]),
    "size that is text": (edit_config(intermediate_size="big"), ["intermediate_size"]),
    "context absurd": (edit_config(max_position_embeddings=1 << 60), ["max_position_embeddings"]),
    "size missing": (edit_config(hidden_size=...), ["hidden_size"]),
    "unknown architecture": (
        edit_config(architectures=["FrobnicatorForCausalLM"], model_type="frobnicator"), ["Frobnicator", "Llama"]),
    "missing tokenizer": (remove("tokenizer.json", "tokenizer_config.json"), ["tokenizer"]),
    "broken tokenizer": (edit_bytes(truncate, "tokenizer.json"), ["tokenizer"]),
    "pickle checkpoint": (as_pickle, ["safetensors", "pickle|pytorch_model.bin"]),
}


@pytest.mark.parametrize("kind", BAD_MODELS)
def test_quantize_names_what_is_wrong_with_a_model(fptq: Fptq, small_model: Path, tmp_path: Path, kind: str) -> None:
    model = tmp_path / "model"
    shutil.copytree(small_model, model)
    spoil, names = BAD_MODELS[kind]
    spoil(model)
    fptq("quantize", model, tmp_path / "out").assert_error(*names)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert not (model / "owned").exists()


def vouch(artifact: Path) -> None:
    """Writes sizes and hashes of what the files are now, and their own digest: what someone who means harm would do."""
    manifest = json.loads((artifact / "fptq.json").read_text())
    for name, record in manifest["files"].items():
        if (artifact / name).exists():
            data = (artifact / name).read_bytes()
            record.update(size=len(data), sha256=hashlib.sha256(data).hexdigest())
    manifest["digest"] = "0" * 64
    text = json.dumps(manifest, indent=1) + "\n"
    head, _, tail = text.rpartition("0" * 64)
    (artifact / "fptq.json").write_text(head + hashlib.sha256(text.encode()).hexdigest() + tail)


SERVED = ["truncated weights", "bit flipped in the header", "config cut off", "absurd layers", "absurd width",
          "absurd vocabulary", "unknown architecture", "missing tokenizer", "pickle checkpoint"]


@pytest.mark.parametrize("vouched", [False, True], ids=["hashes as they were", "hashes forged"])
@pytest.mark.parametrize("kind", SERVED)
def test_serve_names_what_is_wrong_with_an_artifact(fptq: Fptq, small_artifact: Path, tmp_path: Path, kind: str,
                                                    vouched: bool) -> None:
    artifact = tmp_path / "artifact"
    shutil.copytree(small_artifact, artifact)
    before = {path.name: path.read_bytes() for path in artifact.iterdir() if path.name != "fptq.json"}
    spoil, names = BAD_MODELS[kind]
    spoil(artifact)
    if vouched:
        vouch(artifact)
    named = "|".join(names + [path for path, data in before.items()
                              if not (artifact / path).exists() or (artifact / path).read_bytes() != data])
    fptq("serve", artifact, "--port", free_port()).assert_error(named)
    assert not (artifact / "owned").exists()


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"files": 5}'])
def test_broken_manifest(fptq: Fptq, small_artifact: Path, tmp_path: Path, content: str) -> None:
    artifact = tmp_path / "artifact"
    shutil.copytree(small_artifact, artifact)
    (artifact / "fptq.json").write_text(content)
    for command in ("inspect", "serve"):
        fptq(command, artifact).assert_error("fptq.json|unfinished")


@pytest.mark.parametrize(("content", "names"), [
    ("steps: [{", ["recipe.yaml"]),
    ("just a word", ["recipe.yaml"]),
    ("steps: [{type: frobnicate}]", ["recipe.yaml", "frobnicate"]),
    ("!!python/object/apply:os.system ['true']", ["recipe.yaml"]),
])
def test_broken_recipe(fptq: Fptq, small_model: Path, tmp_path: Path, content: str, names: list[str]) -> None:
    (tmp_path / "recipe.yaml").write_text(content)
    fptq("quantize", small_model, tmp_path / "out", "--recipe", tmp_path / "recipe.yaml").assert_usage_error(*names)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00bad", b"too short"])
def test_broken_text(fptq: Fptq, small_model: Path, tmp_path: Path, content: bytes) -> None:
    """An empty text, one that is no UTF-8, and, for calibration, one with next to nothing in it."""
    (tmp_path / "text.txt").write_bytes(content)
    if content != b"too short":
        fptq("eval", small_model, "--text", tmp_path / "text.txt").assert_error("text.txt")
    fptq("quantize", small_model, tmp_path / "out", "--calibration", tmp_path / "text.txt").assert_error("text.txt")

"""One demo server for all, another that is short of everything, and a small model that is quick to quantize."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.acceptance.harness import DEMO, Fptq, Server

API_KEY = "open sesame"


@pytest.fixture(scope="session")
def fptq(tmp_path_factory: pytest.TempPathFactory) -> Fptq:
    return Fptq(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def server(fptq: Fptq, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """`fptq serve demo`, nothing else typed."""
    with Server(fptq, tmp_path_factory.mktemp("log") / "serve.log", "demo") as server:
        yield server


@pytest.fixture(scope="session")
def tight_server(fptq: Fptq, server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The same model with small steps, no prefix cache and a KV cache that a few sequences fill. `server` comes first,
    so that the demo is in the cache."""
    with Server(fptq, tmp_path_factory.mktemp("log") / "serve.log", "demo", "--no-prefix-cache",
                "--max-num-batched-tokens", 48, "--kv-cache-memory", "3MiB", "--served-model-name", "tales",
                "--max-wait", 600, api_key=API_KEY) as server:
        yield server


@pytest.fixture(scope="session")
def demo_artifact(fptq: Fptq, server: Server) -> Path:
    """What `fptq serve demo` left in the user's cache."""
    [manifest] = fptq.cache.glob("**/demo*/fptq.json")
    return manifest.parent


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model's first layer and no chat template."""
    path = tmp_path_factory.mktemp("small") / "small"
    shutil.copytree(DEMO, path, ignore=shutil.ignore_patterns("chat_template*", "model.safetensors"))
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    tensors = {name: tensor for name, tensor in load_file(DEMO / "model.safetensors").items()
               if ".layers." not in name or ".layers.0." in name}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.fixture(scope="session")
def small_artifact(fptq: Fptq, small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("artifact") / "small-w4a8"
    result = fptq("quantize", small_model, path)
    assert result.code == 0, result.stderr
    return path

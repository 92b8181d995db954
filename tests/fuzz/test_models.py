"""Mutated artifacts and checkpoints are refused in one line or load. `make fuzz` tries more; what it found is kept in
tests/models and tests/artifact."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fptq_runtime.locate import DEMO_MODEL, find_artifact
from tests.models.hf import change_config, save_random

CASES = int(os.environ.get("FPTQ_FUZZ_CASES", 150))
FAMILIES = ("llama3-rope", "phi4-mini", "gemma3-scaled", "stablelm", "gpt2")
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32, "mscale": 1.0,
        "mscale_all_dim": 0.5, "beta_fast": 16}


def make_models(path: Path) -> None:
    shutil.copytree(find_artifact("demo"), path / "artifact")
    for family in (*FAMILIES, "llama", "llama-linear-rope"):
        save_random(family, path / family)
        for file in DEMO_MODEL.glob("tokenizer*"):
            shutil.copy(file, path / family)
    change_config(path / "llama", rope_parameters=YARN)
    change_config(path / "llama-linear-rope", rope_parameters={"rope_type": "dynamic", "factor": 4.0})


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models")
    make_models(path)
    return path


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("seed", range(int(os.environ.get("FPTQ_FUZZ_SEEDS", 1))))
def test_mutated_models_load_or_are_refused(models: Path, tmp_path: Path, seed: int) -> None:
    command = [sys.executable, "-m", "tests.fuzz.models", str(seed), str(CASES), str(models), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-6000:]
    outcomes = json.loads(done.stdout)
    assert "failed" not in outcomes, done.stderr[-6000:]
    assert sum(count for name, count in outcomes.items() if name.endswith("refused")) > CASES / 4

"""Bits that flip under a served artifact."""

from __future__ import annotations

import os
import queue
import random
import shutil
from pathlib import Path

import pytest

from fptq_runtime.artifact.io import ArtifactError, check_files, read_manifest
from fptq_runtime.artifact.scrub import Scrub
from fptq_runtime.locate import find_artifact


def flip(path: Path, place: random.Random) -> None:
    """A bit; size and time stay."""
    status = path.stat()
    with path.open("r+b") as file:
        at = place.randrange(status.st_size)
        file.seek(at)
        [byte] = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 1 << place.randrange(8)]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    return Path(shutil.copytree(find_artifact("demo"), tmp_path / "artifact"))


def test_a_scrub_finds_a_flipped_bit_and_its_mending(artifact: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    passes: queue.Queue[list[str]] = queue.Queue()
    scrub = Scrub(artifact, read_manifest(artifact).files, 0.05, passes.put)
    whole = (artifact / "model.safetensors").read_bytes()
    scrub.start()
    assert passes.get(timeout=60) == []
    flip(artifact / "model.safetensors", random.Random(0))
    while not (damaged := passes.get(timeout=60)):
        pass
    assert damaged == ["model.safetensors"]
    with (artifact / "model.safetensors").open("r+b") as file:
        file.write(whole)
    while damaged := passes.get(timeout=60):
        assert damaged == ["model.safetensors"]
    (artifact / "config.json").unlink()  # what is open stays what it was
    (artifact / "new").write_bytes(b"")
    (artifact / "new").replace(artifact / "model.safetensors")
    for _ in range(3):
        assert passes.get(timeout=60) == []
    scrub.stop()
    said = [record.getMessage().partition(":")[0] for record in caplog.records]
    assert said[:2] == ["model.safetensors has changed since it was loaded", "model.safetensors is what it was again"]
    assert sorted(said[2:]) == [f"{name} was replaced or removed since it was loaded"
                                for name in ("config.json", "model.safetensors")]


def test_a_slow_scrub_stops_at_once(artifact: Path) -> None:
    passes: queue.Queue[list[str]] = queue.Queue()
    scrub = Scrub(artifact, read_manifest(artifact).files, 1e6, passes.put)
    scrub.start()
    scrub.stop()
    assert passes.empty()


@pytest.mark.parametrize("seed", range(int(os.environ.get("FPTQ_FLIPS", 10))))
def test_weights_are_verified_where_asked(artifact: Path, seed: int) -> None:
    """What was verified before is believed by size and time, and not where `full`."""
    check_files(artifact)
    place = random.Random(seed)
    files = sorted(read_manifest(artifact).files)
    sizes = [(artifact / name).stat().st_size for name in files]
    [name] = place.choices(files, sizes)
    flip(artifact / name, place)
    check_files(artifact)
    with pytest.raises(ArtifactError, match=f"{name} does not match its sha256"):
        check_files(artifact, full=True)

"""Writing an artifact whole, and finding every byte that changed since."""

from __future__ import annotations

import errno
import json
import logging
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from fptq_runtime import __version__
from fptq_runtime.artifact import io
from fptq_runtime.artifact.files import MANIFEST
from fptq_runtime.artifact.io import (
    ArtifactError,
    ArtifactWriter,
    Manifest,
    Provenance,
    Quality,
    TextRecord,
    check_files,
    is_artifact,
    read_manifest,
    verify,
)

TEXT = TextRecord(name="text", sha256="0" * 64, tokens=3)  # zeros, as an unsigned digest has them
UNSIGNED = Manifest(
    recipe={"name": "x"},
    provenance=Provenance(source="s", revision=None, architecture="A", source_files={}, calibration=TEXT, num_samples=1,
                          sample_length=2, seed=0, fptq_version="0"),
    layers=(),
    quality=Quality(text=TEXT, window=8, perplexity_before=1.0, perplexity_after=1.5),
    golden={"logits": [0.1, -2e-7]},
)
TENSORS = {f"t{i}": np.arange(64, dtype=np.float32) + i for i in range(4)}


def write(out: Path, overwrite: bool = False, shard_bytes: int = 1 << 20) -> Manifest:
    with ArtifactWriter(out, overwrite, shard_bytes) as writer:
        writer.add_tensors(TENSORS)
        writer.finish_tensors()
        writer.add_file("config.json", "{}\n")
        return writer.commit(UNSIGNED)


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    manifest = write(tmp_path / "deep" / "out")
    assert verify(tmp_path / "deep" / "out") == read_manifest(tmp_path / "deep" / "out") == manifest
    assert manifest.model_copy(update={"files": {}, "digest": UNSIGNED.digest, "fptq_version": ""}) == UNSIGNED
    assert manifest.fptq_version == __version__
    assert set(manifest.files) == {"config.json", "model.safetensors"}
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["out"]
    json.loads((tmp_path / "deep" / "out" / MANIFEST).read_text())


def test_shards(tmp_path: Path) -> None:
    """Two tensors of 256 bytes fit a shard of 600."""
    write(tmp_path / "out", shard_bytes=600)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * 256
    assert sorted(set(index["weight_map"].values())) == [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for name, shard in index["weight_map"].items():
        assert np.array_equal(load_file(tmp_path / "out" / shard)[name], TENSORS[name])


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("artifact") / "out"
    write(out)
    return out


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_flipped_bit_is_found_and_its_file_named(artifact: Path, data: st.DataObject) -> None:
    file = data.draw(st.sampled_from(sorted(artifact.iterdir())))
    original = file.read_bytes()
    position = data.draw(st.integers(0, len(original) * 8 - 1))
    changed = bytearray(original)
    changed[position // 8] ^= 1 << position % 8
    try:
        file.write_bytes(changed)
        with pytest.raises(ArtifactError, match=file.name) as error:
            verify(artifact)
        assert "\n" not in str(error.value)
    finally:
        file.write_bytes(original)


@pytest.mark.parametrize("change", ["missing", "shorter", "foreign"])
def test_other_damage(tmp_path: Path, change: str) -> None:
    out = tmp_path / "out"
    write(out)
    name = "model.safetensors"
    if change == "missing":
        (out / name).unlink()
    elif change == "shorter":
        (out / name).write_bytes((out / name).read_bytes()[:-1])
    else:
        name = "model-00002-of-00002.safetensors"
        (out / name).write_bytes(b"")
    with pytest.raises(ArtifactError, match=name):
        verify(out)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format_version": 2}', "\x00", "[" * 10**5])
def test_a_manifest_that_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(ArtifactError) as error:
        read_manifest(tmp_path)
    assert "\n" not in str(error.value)


def test_no_artifact(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="not an fptq artifact"):
        verify(tmp_path)


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt])
def test_nothing_is_left_of_a_failed_run(tmp_path: Path, failure: type[BaseException]) -> None:
    def fail() -> None:
        with ArtifactWriter(tmp_path / "out") as writer:
            writer.add_tensors(TENSORS)
            writer.finish_tensors()
            raise failure

    with pytest.raises(failure):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_leaves_is_refused(tmp_path: Path) -> None:
    """A kill runs no handler: the directory stays as it is when the weights are written."""
    writer = ArtifactWriter(tmp_path / "out").__enter__()
    writer.add_tensors(TENSORS)
    writer.finish_tensors()
    writer.add_file("config.json", "{}\n")
    assert not (tmp_path / "out").exists()
    assert is_artifact(writer.directory)
    with pytest.raises(ArtifactError, match="unfinished"):
        check_files(writer.directory)
    assert write(tmp_path / "out") == verify(tmp_path / "out")


def test_existing_output(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    first = write(out)  # an empty directory is nobody's
    with pytest.raises(ArtifactError, match="exists"):
        write(out)
    assert write(out, overwrite=True) == first
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
    for other in (tmp_path / "file", tmp_path / "dir" / "precious"):
        other.parent.mkdir(exist_ok=True)
        other.write_text("mine")
    for other in (tmp_path / "file", tmp_path / "dir", tmp_path / "file" / "out"):
        with pytest.raises(ArtifactError, match=other.parent.name if other.name == "out" else other.name):
            write(other, overwrite=True)
    assert (tmp_path / "file").read_text() == (tmp_path / "dir" / "precious").read_text() == "mine"


def test_who_may_read_an_artifact_is_the_umasks_choice(tmp_path: Path) -> None:
    write(tmp_path / "out", shard_bytes=600)
    modes = {file.name: file.stat().st_mode for file in (tmp_path / "out").iterdir()}
    assert set(modes.values()) == {modes[MANIFEST]}


@pytest.mark.parametrize("exists", [False, True])
def test_output_through_a_link(tmp_path: Path, exists: bool) -> None:
    if exists:
        (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to("target")
    write(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    verify(tmp_path / "target")


def test_a_mount_point_is_refused_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "is_mount", lambda path: True)
    with pytest.raises(ArtifactError, match="mount point"):
        ArtifactWriter(tmp_path / "out")


@contextmanager
def full_disk() -> Iterator[None]:
    """A limit on file sizes fails in the same calls as a disk without space. Python ignores its signal. Not a fixture:
    pytest's own output may be a larger file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_file_in_a_folder(tmp_path: Path) -> None:
    """sentence-transformers keeps its own there."""
    (tmp_path / "pooling").write_text("{}")
    with ArtifactWriter(tmp_path / "out") as writer:
        writer.add_tensors(TENSORS)
        writer.finish_tensors()
        writer.add_file("config.json", "{}")
        writer.copy_file(tmp_path / "pooling", "1_Pooling/config.json")
        manifest = writer.commit(UNSIGNED)
    assert "1_Pooling/config.json" in manifest.files
    assert verify(tmp_path / "out") == manifest
    (tmp_path / "out" / "1_Pooling" / "config.json").write_text("[]")
    with pytest.raises(ArtifactError, match=r"config\.json does not match"):
        verify(tmp_path / "out")


@pytest.mark.parametrize("large", ["tensors", "text", "copy", "index", "manifest"])
@pytest.mark.parametrize("exists", [False, True])
def test_a_full_disk(tmp_path: Path, large: str, exists: bool) -> None:
    """Whatever is being written when it fills up, nothing of it is left, and what was there stays."""
    out, source, too_much = tmp_path / "out", tmp_path / "source" / "tokenizer.json", "x" * 5000
    source.parent.mkdir()
    source.write_text(too_much if large == "copy" else "{}")
    before = write(out) if exists else None

    def run() -> None:
        with ArtifactWriter(out, overwrite=True, shard_bytes=300 if large == "index" else 1 << 20) as writer:
            writer.add_tensors({"t": np.zeros(2000, np.float32)} if large == "tensors" else TENSORS)
            if large == "index":
                writer.add_tensors({f"{i}-{'n' * 200}": np.zeros(1, np.float32) for i in range(20)})
            writer.finish_tensors()
            writer.add_file("config.json", too_much if large == "text" else "{}")
            writer.copy_file(source, source.name)
            writer.commit(UNSIGNED.model_copy(update={"golden": {"x": too_much}}) if large == "manifest" else UNSIGNED)

    with full_disk(), pytest.raises(ArtifactError, match=f"cannot write to {tmp_path}: ") as error:
        run()
    assert "\n" not in str(error.value)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out"] * exists + ["source"]
    if before is not None:
        assert verify(out) == before


def test_an_artifact_that_cannot_be_replaced_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, rename = write(tmp_path / "out"), Path.rename

    def refused(path: Path, target: Path) -> Path:
        if ".partial-" in path.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refused)
    with pytest.raises(ArtifactError, match="No space left"):
        write(tmp_path / "out", overwrite=True)
    assert verify(tmp_path / "out") == first
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_full_hashes_once_then_size_and_mtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                              caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    out = tmp_path / "out"
    manifest = write(out)
    hashed = []
    read_and_hash = io._hash

    def counted(file: BinaryIO) -> str:
        hashed.append(Path(f"/proc/self/fd/{file.fileno()}").resolve().name)
        return read_and_hash(file)

    monkeypatch.setattr(io, "_hash", counted)
    with caplog.at_level(logging.INFO):
        assert check_files(out) == check_files(out) == manifest
    files = len(manifest.files)
    assert caplog.messages == [f"{out}: hashes of {files} files checked",
                               f"{out}: {files} files unchanged since their hashes were checked"]
    assert sorted(hashed) == sorted(manifest.files)
    weights = out / "model.safetensors"
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(changed)
    with pytest.raises(ArtifactError, match=r"model\.safetensors"):
        check_files(out)
    weights.unlink()
    with pytest.raises(ArtifactError, match=r"model\.safetensors is missing"):
        check_files(out)


def test_a_read_only_cache_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cache").write_text("a file where a directory should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert write(tmp_path / "out") == check_files(tmp_path / "out")


def test_what_a_killed_run_left_goes_with_the_next(tmp_path: Path) -> None:
    """And what a living one is writing stays."""
    abandoned = tmp_path / ".my-out.partial-4194304-abc"  # above any pid
    living = tmp_path / f".my-out.partial-{os.getpid()}-abc"
    for directory in (abandoned, living):
        directory.mkdir()
        (directory / MANIFEST).touch()
    write(tmp_path / "my-out")
    assert not abandoned.exists()
    assert living.exists()


def test_without_a_home_nothing_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container's number that no passwd entry names."""
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert io.cache_directory() is None
    manifest = write(tmp_path / "out")
    assert check_files(tmp_path / "out") == check_files(tmp_path / "out") == manifest

"""Files that are none: pipes, devices, directories and links to nothing, in place of each file that is read."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from fptq_runtime.artifact.files import MANIFEST, FileError, open_file, read_file
from fptq_runtime.artifact.io import check_files, read_manifest, verify
from fptq_runtime.engine.llm import load_engine
from fptq_runtime.errors import FptqError
from fptq_runtime.locate import find_artifact

KINDS: dict[str, tuple[Callable[[Path], object], str]] = {
    "pipe": (os.mkfifo, "a pipe"),
    "endless device": (lambda path: path.symlink_to("/dev/zero"), "a device"),
    "directory": (Path.mkdir, "a directory"),
    "link to nothing": (lambda path: path.symlink_to("../blobs/none"), "a link to ../blobs/none, where there is no"),
    "link to itself": (lambda path: path.symlink_to(path.name), "cannot be opened"),
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> tuple[Callable[[Path], object], str]:
    return KINDS[request.param]


def hub_copy(path: Path) -> Path:
    """As the hub's cache holds it: every file is a link."""
    path.mkdir()
    for file in find_artifact("demo").iterdir():
        (path / file.name).symlink_to(file)
    return path


def test_what_is_read(tmp_path: Path, kind: tuple[Callable[[Path], object], str]) -> None:
    make, said = kind
    make(tmp_path / "x")
    with pytest.raises(FileError, match=said) as error:
        open_file(tmp_path / "x")
    assert str(tmp_path / "x") in str(error.value)
    with pytest.raises(FileNotFoundError):
        open_file(tmp_path / "y")


def test_links_and_limits(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "second").symlink_to("link")
    assert read_file(tmp_path / "second", 5) == b"12345"
    with pytest.raises(FileError, match="more than 0 MiB"):
        read_file(tmp_path / "second", 4)


@pytest.mark.parametrize("name", [MANIFEST, "fptq.golden", "config.json", "model.safetensors", "tokenizer.json"])
def test_an_artifact_is_refused_by_the_files_name(tmp_path: Path, name: str,
                                                  kind: tuple[Callable[[Path], object], str]) -> None:
    path = hub_copy(tmp_path / "model")
    (path / name).unlink()
    kind[0](path / name)
    for load in (check_files, verify, load_engine):
        with pytest.raises(FptqError, match=name.replace(".", r"\.")):
            load(path)


@pytest.mark.parametrize("name", [
    "config.json", "model.safetensors", "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "generation_config.json", "chat_template.jinja"])
def test_a_checkpoint_is_refused_by_the_files_name(tmp_path: Path, name: str,
                                                   kind: tuple[Callable[[Path], object], str]) -> None:
    """Also where the file might be missing."""
    path = hub_copy(tmp_path / "model")
    for removed in {name, MANIFEST, "tokenizer_config.json"}:
        (path / removed).unlink(missing_ok=True)
    kind[0](path / name)
    with pytest.raises(FptqError, match=name.replace(".", r"\.")):
        load_engine(path)


def test_links_to_files_are_followed(tmp_path: Path) -> None:
    path = hub_copy(tmp_path / "model")
    verify(path)
    assert load_engine(path).model_config.vocab_size


@pytest.mark.parametrize("name", ["/dev/zero", "../other", "a/b/c", "a/../b", "a/..", "./a", ".."])
def test_a_manifest_names_only_files_beside_it(tmp_path: Path, name: str) -> None:
    path = hub_copy(tmp_path / "model")
    manifest = read_manifest(path)
    foreign = manifest.model_copy(update={"files": {**manifest.files, name: manifest.files["config.json"]}})
    (path / MANIFEST).unlink()
    (path / MANIFEST).write_text(foreign.to_json())
    with pytest.raises(FptqError, match="is not the name of a file beside it"):
        verify(path)

"""The artifact directory: written whole or not at all, and checked file by file before it is believed.

fptq.json (the `Manifest`) is written last and lists every other file with its size and sha256; its own digest covers
its bytes with the digest itself zeroed.
"""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.numpy import save_file

from fptq_runtime import __version__
from fptq_runtime.artifact.files import MANIFEST, FileError, is_there, open_file, read_file
from fptq_runtime.artifact.scheme import NumberType
from fptq_runtime.errors import FptqError

logger = logging.getLogger(__name__)

GOLDEN = "fptq.golden"  # what models/gate.py compares with; no *.safetensors, which loaders take for weights
FORMAT_VERSION: Literal[2] = 2
CARD = "README.md"
EXPORT = "fptq-export.json"  # in place of it, in a directory for another runtime
_NO_DIGEST = "0" * 64
_MANIFEST_LIMIT = 256 << 20  # bytes of fptq.json that are read at all


class ArtifactError(FptqError):
    """An artifact that is damaged, incomplete or in the way. One line, for the user."""


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TextRecord(_Record):
    """Which tokens something was measured on. sha256 is of the text as read, or of the token ids where they are
    random or the model's own."""

    name: str
    sha256: str
    tokens: int


class LengthsRecord(_Record):
    """What the lengths of calibration windows were drawn from. quantiles: of the windows, 0, 10, 50, 90 and 100 %;
    clipped: the share of the file's sequences that exceed the model's context."""

    name: str
    sha256: str
    windows: int
    quantiles: tuple[int, ...]
    clipped: float


class LayerRecord(_Record):
    """One quantized linear (its modules read the same input). kind: its name in its block, or "head".

    range: max |x| of its input before any transform, peak_position the token position that set it. Errors are squared
    and relative to the float output, averaged over tokens: `activation_error` from quantizing the input alone,
    `error` from input and weights. `input_type` and `type` (of the weights) say what the codes are; `rank` is the
    low-rank correction's. experts: how many the modules are; unseen: those that no token of the calibration set
    reached, which were rounded without data.
    """

    name: str
    kind: str
    modules: tuple[str, ...]
    range: float
    peak_position: int
    equalized: bool
    activations: Literal["static", "dynamic", "float"]
    reason: str
    input_scale: float | None
    input_type: NumberType = "int"
    num_bits: int
    group_size: int | None
    type: NumberType = "int"
    rank: int = 0
    experts: int = 1
    unseen: tuple[int, ...] = ()
    activation_error: float
    error: float


class Quality(_Record):
    """Perplexity of the source model and of the artifact on one text, in windows of `window` tokens. routing: of each
    layer with experts, the share of a token's experts that are those of the source model, given what the layers before
    make of the text."""

    text: TextRecord
    window: int
    perplexity_before: float
    perplexity_after: float
    routing: dict[str, float] = Field(default_factory=dict)


class Provenance(_Record):
    """What the artifact was made from. source_files maps every file of the source to its sha256. With `lengths`, the
    calibration windows have its lengths and num_samples · sample_length tokens in all."""

    source: str
    revision: str | None
    architecture: str
    source_files: dict[str, str]
    calibration: TextRecord
    num_samples: int
    sample_length: int
    lengths: LengthsRecord | None = None
    seed: int
    fptq_version: str


class FileRecord(_Record):
    size: int
    sha256: str


class Manifest(_Record):
    """fptq.json. Format 1 has golden logits in `golden`, format 2 a prompt, and the file `GOLDEN` beside it.
    fptq_version wrote the manifest; format 1 names only the version that quantized. idle_bytes: what the experts take
    that a token does not go to."""

    format_version: Literal[1, 2] = FORMAT_VERSION
    fptq_version: str = ""
    recipe: dict[str, Any]
    provenance: Provenance
    layers: tuple[LayerRecord, ...]
    quality: Quality
    golden: dict[str, Any]
    idle_bytes: int = 0
    files: dict[str, FileRecord] = Field(default_factory=dict)
    digest: str = _NO_DIGEST

    def to_json(self) -> str:
        """The file's text, with its digest filled in."""
        text = json.dumps(self.model_copy(update={"digest": _NO_DIGEST}).model_dump(), indent=1) + "\n"
        return _set_digest(text, hashlib.sha256(text.encode()).hexdigest())

    @property
    def size(self) -> int:
        """Bytes of all files but fptq.json."""
        return sum(record.size for record in self.files.values())

    @property
    def active_size(self) -> int:
        """Of these, what is there for one token: a step reads no more of the weights for it."""
        return self.size - self.idle_bytes


def _set_digest(text: str, digest: str) -> str:
    head, _, tail = text.rpartition(f'"{_NO_DIGEST}"')
    return f'{head}"{digest}"{tail}'


def is_artifact(path: Path) -> bool:
    """It says that it is one; `read_manifest` has more to say."""
    return is_there(path / MANIFEST)


def _is_ours(path: Path) -> bool:
    """fptq wrote it, so that --overwrite may replace it."""
    return (path / MANIFEST).is_file() or (path / EXPORT).is_file()


def read_manifest(path: Path) -> Manifest:
    """fptq.json of an artifact, its digest checked. Raises ArtifactError."""
    file = path / MANIFEST
    try:
        text = read_file(file, _MANIFEST_LIMIT).decode()
        data = json.loads(text or "null")
    except FileNotFoundError:
        raise ArtifactError(f"{path} is not an fptq artifact: it has no {MANIFEST}") from None
    except FileError as error:
        raise ArtifactError(str(error)) from None
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{file} is damaged: {error}") from None
    if not text:
        raise ArtifactError(f"{path} is unfinished: the run that was writing it stopped before its end")
    try:
        manifest = Manifest.model_validate(_readable(file, data))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ArtifactError(f"{file} is damaged or of another version: {where}: {first['msg']}") from None
    if (foreign := next((name for name in manifest.files if not _is_within(name)), None)) is not None:
        raise ArtifactError(f"{file} is damaged: files: {foreign!r} is not the name of a file beside it")
    head, _, tail = text.rpartition(f'"{manifest.digest}"')
    if hashlib.sha256(f'{head}"{_NO_DIGEST}"{tail}'.encode()).hexdigest() != manifest.digest:
        raise ArtifactError(f"{file} is damaged: its contents do not match its digest")
    return manifest


def _is_within(name: str) -> bool:
    """It names a file of an artifact: beside fptq.json, or in a folder there."""
    parts = Path(name).parts
    return "/".join(parts) == name and 1 <= len(parts) <= 2 and ".." not in parts


def _readable(file: Path, manifest: Any) -> Any:
    """The manifest, unless a newer fptq wrote it."""
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if isinstance(version, int) and version > FORMAT_VERSION:
        writer = manifest.get("fptq_version")
        needed = f"fptq {writer}" if isinstance(writer, str) else "a newer fptq"
        raise ArtifactError(f"{file} has format {version}, which {needed} reads; this is fptq {__version__}, which "
                            f"reads formats up to {FORMAT_VERSION}: upgrade it")
    return manifest


def renew(path: Path, golden: bytes, facts: Mapping[str, Any]) -> Manifest:
    """Give an artifact whose hashes hold new golden values. Until fptq.json is replaced, last and at once, it is what
    it was. Raises ArtifactError."""
    old = read_manifest(path)
    record = FileRecord(size=len(golden), sha256=hashlib.sha256(golden).hexdigest())
    new = old.model_copy(update={"format_version": FORMAT_VERSION, "fptq_version": __version__, "golden": dict(facts),
                                 "files": {**old.files, GOLDEN: record}})
    try:
        for name, content in ((GOLDEN, golden), (MANIFEST, new.to_json())):
            partial = path / f".{name}.{os.getpid()}"
            _write_file(partial, content)
            shutil.copymode(path / MANIFEST, partial)
            partial.replace(path / name)
            _sync(path)
    except OSError as error:
        raise ArtifactError(f"cannot write to {path}: {error.strerror}") from None
    return read_manifest(path)


def verify(path: Path) -> Manifest:
    """Re-read and hash every file. Raises ArtifactError that names the files that are damaged, missing or foreign."""
    manifest = read_manifest(path)
    with ThreadPoolExecutor() as executor:
        faults = executor.map(lambda item: _fault(path / item[0], item[1]), manifest.files.items())
    bad = [fault for fault in faults if fault is not None]
    bad += [f"{file.name} is not part of the artifact" for file in sorted(path.glob("*.safetensors*"))
            if file.name not in manifest.files]
    if bad:
        raise ArtifactError(f"{path} is damaged: {'; '.join(bad)}")
    return manifest


def _fault(path: Path, record: FileRecord) -> str | None:
    try:
        with open_file(path) as file:
            if (size := os.fstat(file.fileno()).st_size) != record.size:
                return f"{path.name} has {size} bytes, not {record.size}"
            return None if _hash(file) == record.sha256 else f"{path.name} does not match its sha256"
    except FileNotFoundError:
        return f"{path.name} is missing"
    except FileError as error:
        return str(error)


def check_files(path: Path, full: bool = False) -> Manifest:
    """`verify`, skipped, unless `full`, where this user verified the same artifact before and no size or mtime has
    changed since."""
    manifest = read_manifest(path)
    cache, key = cache_directory(), hashlib.sha256(str(path.resolve()).encode()).hexdigest()
    stamp = None if cache is None else cache / "verified" / f"{key}.json"
    state = {}
    for name in manifest.files:
        try:
            with open_file(path / name) as file:
                status = os.fstat(file.fileno())
        except FileNotFoundError:
            raise ArtifactError(f"{path} is damaged: {name} is missing") from None
        state[name] = [status.st_size, status.st_mtime_ns]
    expected = json.dumps({"digest": manifest.digest, "files": state})
    try:
        if stamp is not None and not full and stamp.read_text() == expected:
            logger.info("%s: %d files unchanged since their hashes were checked", path, len(manifest.files))
            return manifest
    except OSError:
        pass
    verify(path)
    logger.info("%s: hashes of %d files checked", path, len(manifest.files))
    if stamp is None:
        return manifest
    try:
        stamp.parent.mkdir(parents=True, exist_ok=True)
        _write_file(stamp.with_suffix(f".{os.getpid()}"), expected).replace(stamp)
    except OSError:
        pass  # a read-only home only costs the next load another full check
    return manifest


def cache_directory() -> Path | None:
    """Where fptq keeps what it can rebuild: $XDG_CACHE_HOME/fptq, by default ~/.cache/fptq; None where the user has no
    home, as a container's number without a passwd entry."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fptq"
    except RuntimeError:
        return None


def hash_file(path: Path) -> str:
    """sha256 in hexadecimal."""
    with open_file(path) as file:
        return _hash(file)


def _hash(file: BinaryIO) -> str:
    digest, buffer = hashlib.sha256(), memoryview(bytearray(1 << 18))
    while size := file.readinto(buffer):  # type: ignore[attr-defined]
        digest.update(buffer[:size])
    return digest.hexdigest()


def check_output(out: Path, overwrite: bool = False, source: Path | None = None) -> None:
    """Raises ArtifactError where nothing can be written at `out`, so that it is said before any work is done: it
    exists, unless empty or an artifact or export that `overwrite` allows to replace; it, or what it would lie in,
    cannot be written; it is the model directory `source`, or holds it."""
    at = out.resolve()
    if at.is_mount():
        raise ArtifactError(f"{out} is a mount point, which cannot be replaced; choose a directory in it")
    if source is not None and (origin := source.resolve()).is_dir():
        if at == origin:
            raise ArtifactError(f"{out} is the model itself; choose another output directory")
        if at in origin.parents:
            raise ArtifactError(f"{out} lies around the model's own directory; choose another output directory")
    if at.exists() and not (at.is_dir() and not any(at.iterdir())):
        if not _is_ours(at):
            raise ArtifactError(f"{out} exists and is not an fptq artifact; choose another output directory")
        if not overwrite:
            raise ArtifactError(f"{out} exists; choose another output directory or pass --overwrite")
    check_writable(at.parent)


def check_writable(directory: Path) -> None:
    """Raises ArtifactError where files cannot be made in `directory`, which need not exist yet."""
    above = _existing(directory)
    if not above.is_dir():
        raise ArtifactError(f"cannot write to {directory}: {above} is a file")
    if not os.access(above, os.W_OK | os.X_OK):
        raise ArtifactError(f"cannot write to {directory}: {above} is not yours to write to, or read-only")


def check_room(directory: Path, needed: int) -> None:
    """Raises ArtifactError where fewer than `needed` bytes are free for `directory`, which need not exist yet."""
    if (free := shutil.disk_usage(_existing(directory)).free) < needed:
        raise ArtifactError(f"about {format_size(needed)} would be written to {directory}, and {format_size(free)} are "
                            "free there")


def _existing(path: Path) -> Path:
    """It, or the nearest above it that is there."""
    above = path.resolve()
    while not above.exists():
        above = above.parent
    return above


def format_size(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.2f} MB"


class ArtifactWriter:
    """Builds an artifact in a hidden sibling of `out` and renames it into place on `commit`.

    Leaving the `with` block without a commit removes everything. Tensors are written in shards of at most shard_bytes,
    each as soon as it is full. Raises ArtifactError where `check_output` does.
    """

    def __init__(self, out: Path, overwrite: bool = False, shard_bytes: int = 4 << 30) -> None:
        check_output(out, overwrite)
        self._out = out.resolve()  # a link stays, and what it points to is written
        self._shard_bytes = shard_bytes
        self._pending: dict[str, npt.NDArray[Any]] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []
        self._total_bytes = 0

    def __enter__(self) -> ArtifactWriter:
        with self._writing():
            self._out.parent.mkdir(parents=True, exist_ok=True)
            self._remove_abandoned()
            prefix = f".{self._out.name}.partial-{os.getpid()}-"
            self.directory = Path(tempfile.mkdtemp(prefix=prefix, dir=self._out.parent))
            self.directory.chmod(0o755)
            (self.directory / MANIFEST).touch()  # empty: whatever a killed run leaves is refused as unfinished
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None,
                 traceback: TracebackType | None) -> None:
        if self.directory.exists():
            shutil.rmtree(self.directory)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """What goes wrong with the disk is an ArtifactError."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise ArtifactError(f"cannot write to {self._out.parent}: {reason}") from None

    def _remove_abandoned(self) -> None:
        """What killed runs left beside `out`: their process is gone."""
        for directory in self._out.parent.glob(f".{glob.escape(self._out.name)}.partial-*-*"):
            pid = directory.name.rsplit("-", 2)[1]
            if pid.isdecimal() and not _is_running(int(pid)):
                shutil.rmtree(directory, ignore_errors=True)

    def add_tensors(self, tensors: Mapping[str, npt.NDArray[Any]]) -> None:
        """bfloat16 arrays are ml_dtypes'."""
        for name, tensor in tensors.items():
            if self._pending and self._pending_bytes + tensor.nbytes > self._shard_bytes:
                self._write_shard()
            self._pending[name] = np.array(tensor, order="C")
            self._pending_bytes += tensor.nbytes

    def add_file(self, name: str, content: str | bytes) -> None:
        with self._writing():
            _write_file(self.directory / name, content)

    def copy_file(self, source: Path, name: str) -> None:
        """name: within the artifact, in a folder of it or in none."""
        with self._writing():
            (self.directory / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source, self.directory / name)

    def finish_tensors(self) -> None:
        """Write what is pending and name the shards. The directory is loadable from here on."""
        if self._pending:
            self._write_shard()
        if len(self._shards) == 1:
            self._shard(0).rename(self.directory / "model.safetensors")
            return
        weight_map: dict[str, str] = {}
        for i, names in enumerate(self._shards):
            final = f"model-{i + 1:05}-of-{len(self._shards):05}.safetensors"
            self._shard(i).rename(self.directory / final)
            weight_map |= dict.fromkeys(names, final)
        index = {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
        self.add_file("model.safetensors.index.json", json.dumps(index, indent=1) + "\n")

    @property
    def tensor_bytes(self) -> int:
        """Of the shards that are written."""
        return self._total_bytes

    def commit(self, manifest: Manifest) -> Manifest:
        """Hash every file, but not the card, which people edit; write fptq.json and move the directory to where it
        belongs. Returns the manifest as written."""
        with self._writing():
            self._commit(manifest)
        return read_manifest(self._out)

    def _commit(self, manifest: Manifest) -> None:
        files = self._sync_files()
        records = {file.relative_to(self.directory).as_posix():
                   FileRecord(size=file.stat().st_size, sha256=hash_file(file)) for file in files
                   if file.name != CARD}
        unsigned = manifest.model_copy(update={"files": records, "fptq_version": __version__})
        _write_file(self.directory / MANIFEST, unsigned.to_json())
        self._move()

    def publish(self, about: Mapping[str, Any]) -> int:
        """`commit` for a directory that is not to be an artifact: fptq-export.json, which says what it is about, stands
        in for fptq.json. Returns its bytes."""
        self.add_file(EXPORT, json.dumps(about, indent=1) + "\n")
        with self._writing():
            files = self._sync_files()
            size = sum(file.stat().st_size for file in files)
            (self.directory / MANIFEST).unlink()
            self._move()
        return size

    def _sync_files(self) -> list[Path]:
        """All but fptq.json."""
        within = sorted(self.directory.rglob("*"))
        for path in within:
            _sync(path)
        return [path for path in within if path.is_file() and path != self.directory / MANIFEST]

    def _move(self) -> None:
        _sync(self.directory)
        if _is_ours(self._out):
            # A directory cannot be renamed over a full one, so the old artifact steps aside first.
            old = Path(tempfile.mkdtemp(prefix=f".{self._out.name}.old-", dir=self._out.parent))
            self._out.rename(old / "artifact")
            try:
                self.directory.rename(self._out)
            except OSError:
                (old / "artifact").rename(self._out)
                old.rmdir()
                raise
            shutil.rmtree(old)
        else:
            self.directory.rename(self._out)
        _sync(self._out.parent)

    def _shard(self, index: int) -> Path:
        return self.directory / f"shard-{index}.safetensors"

    def _write_shard(self) -> None:
        shard = self._shard(len(self._shards))
        with self._writing():
            save_file(self._pending, shard, metadata={"format": "pt"})
            shutil.copymode(self.directory / MANIFEST, shard)  # safetensors lets only the owner read; the umask decides
        self._shards.append(list(self._pending))
        self._total_bytes += self._pending_bytes
        self._pending = {}
        self._pending_bytes = 0


def _write_file(path: Path, content: str | bytes) -> Path:
    with path.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    return path


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        return True
    return True

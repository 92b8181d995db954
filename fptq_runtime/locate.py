"""From the name a user types to a directory: a path, a Hugging Face hub id, or `demo`, the model in the package."""

from __future__ import annotations

import atexit
import difflib
import hashlib
import logging
import re
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fptq_runtime import __version__
from fptq_runtime.errors import FptqError

if TYPE_CHECKING:
    from fptq_runtime.engine.llm import LLM

logger = logging.getLogger(__name__)

DEMO = "demo"
DEMO_MODEL = Path(__file__).parent / "demo"
DEMO_ARTIFACT = Path(__file__).parent / "demo-w4a8"  # in the wheels that `make wheels` and a release build
HASHED_WHOLE = 64 << 20  # bytes of a file
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?")


class NotFoundError(FptqError):
    """A name that is no directory, no hub id and not `demo`. One line, for the user."""


def find_model(name: str, revision: str | None = None, otherwise: str = "") -> str:
    """What `quantize` takes. `demo` is the float model in the package; `./demo` is a directory of that name.
    Raises NotFoundError where nothing can be meant, which ends with `otherwise` where nothing there has a like name."""
    if not name:
        raise NotFoundError("the model's name is empty")
    path = expand(name)
    if name == DEMO or path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        if revision is not None:
            raise NotFoundError(f"{name} is not a hub id, so it has no revision {revision!r}")
        return str(DEMO_MODEL if name == DEMO else path)
    if path.exists():
        raise NotFoundError(f"{name} is a file; a model is a directory, or a .gguf file")
    if not _HUB_ID.fullmatch(name) or path.parent.is_dir():
        raise NotFoundError(f"no model at {name}{did_you_mean(path, DEMO) or otherwise}")
    return name if revision is None else f"{name.partition('@')[0]}@{revision}"


def find_artifact(name: str) -> Path:
    """The directory of a model that is ready to run. `demo` comes quantized with a wheel, and is quantized into the
    user's cache when first asked for where it does not; a hub id is fetched into huggingface_hub's. Raises FptqError
    (NotFoundError, CheckpointError)."""
    if name == DEMO:
        if DEMO_ARTIFACT.is_dir():
            return DEMO_ARTIFACT
        return quantized(DEMO_MODEL, "fptq", DEMO)  # a third of the default's time, on first use
    model = find_model(name)
    if Path(model).is_dir():
        return Path(model)
    from fptq_runtime.quantizer.source import resolve_model

    return resolve_model(model).path


def load(name: str | Path, **options: Any) -> LLM:
    """`LLM` of a path, a hub id or `demo`; the options are LLM's own."""
    from fptq_runtime.engine.llm import LLM

    return LLM(find_artifact(str(name)), **options)


def expand(name: str) -> Path:
    """With ~ as the home it stands for, where there is one."""
    try:
        return Path(name).expanduser()
    except RuntimeError:
        return Path(name)


def did_you_mean(path: Path, *others: str, files: str | None = None) -> str:
    """`; did you mean …?` with the similarly named neighbour of a path that does not exist, or nothing. files: of
    files, those that match this pattern, where a file is meant; else of directories. What is missing may be a directory
    on the way there."""
    parent, name = path.parent, path.name
    while not parent.is_dir():
        parent, name, files = parent.parent, parent.name, None
    names = [*others, *(entry.name for entry in parent.iterdir() if (
        entry.is_dir() if files is None else entry.match(files) and not entry.is_dir()))]
    swapped = [each for each in names if sorted(each) == sorted(name)]  # fqtp, to which qat is closer than fptq
    close = swapped or difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {close[0] if close[0] in others else parent / close[0]}?" if close else ""


def quantized(model: Path, recipe: str, name: str) -> Path:
    """The artifact of a float model by a preset or a YAML file, kept in the user's cache under `name`. Keyed by
    version, model, recipe and the quantizer's own code; of the model's large files by size, mtime and beginning, so
    that a start does not read them: weights that change and keep all three are not noticed. One process makes it
    while others wait. Where there is no home to keep it in, it lives as long as this process."""
    from fptq_runtime.artifact.io import ArtifactError, cache_directory, check_writable, hash_file, is_artifact

    key = hashlib.sha256()
    files = [file for file in sorted(model.iterdir()) if file.is_file()]
    for file in (*files, *sorted(Path(__file__).parent.glob("quantizer/**/*.py"))):
        key.update(_identity(file).encode())
    key.update((hash_file(Path(recipe)) if Path(recipe).is_file() else recipe).encode())
    name = f"{name}-{__version__}-{key.hexdigest()[:12]}"
    cache = cache_directory()
    if cache is not None and is_artifact(cache / name):
        return cache / name
    try:
        if cache is not None:
            check_writable(cache)
    except ArtifactError:
        cache = None
    if cache is None:
        cache = Path(tempfile.mkdtemp(prefix="fptq-"))
        atexit.register(shutil.rmtree, cache, ignore_errors=True)
    out = cache / name
    from filelock import FileLock

    from fptq_runtime.quantizer.pipeline import quantize

    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{out}.lock"):
        if not is_artifact(out):
            logger.warning("quantizing %s into %s, once", model, out)
            quantize(model, out, recipe, progress=True)
    return out


def _identity(file: Path) -> str:
    """Of its bytes: all of a small file; of a large one the beginning, which in weights names every tensor."""
    from fptq_runtime.artifact.io import hash_file

    status = file.stat()
    if status.st_size <= HASHED_WHOLE:
        return hash_file(file)
    with file.open("rb") as opened:
        return f"{status.st_size} {status.st_mtime_ns} {hashlib.sha256(opened.read(1 << 20)).hexdigest()}"

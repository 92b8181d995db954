"""From the name a user types to a directory: a path, a Hugging Face hub id, or `demo`, the model in the package."""

from __future__ import annotations

import difflib
import hashlib
import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fptq_runtime import __version__
from fptq_runtime.errors import FptqError

if TYPE_CHECKING:
    from fptq_runtime.engine.llm import LLM

logger = logging.getLogger(__name__)

DEMO = "demo"
DEMO_MODEL = Path(__file__).parent / "demo"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?")


class NotFoundError(FptqError):
    """A name that is no directory, no hub id and not `demo`. One line, for the user."""


def find_model(name: str, revision: str | None = None) -> str:
    """What `quantize` takes. `demo` is the float model in the package; `./demo` is a directory of that name.
    Raises NotFoundError where nothing can be meant."""
    if not name:
        raise NotFoundError("the model's name is empty")
    path = Path(name).expanduser()
    if name == DEMO or path.is_dir():
        if revision is not None:
            raise NotFoundError(f"{name} is not a hub id, so it has no revision {revision!r}")
        return str(DEMO_MODEL if name == DEMO else path)
    if path.exists():
        raise NotFoundError(f"{name} is a file; a model is a directory")
    if not _HUB_ID.fullmatch(name) or path.parent.is_dir():
        raise NotFoundError(f"no model at {name}{did_you_mean(path, DEMO)}")
    return name if revision is None else f"{name.partition('@')[0]}@{revision}"


def find_artifact(name: str) -> Path:
    """The directory of a model that is ready to run. `demo` is quantized into the user's cache when first asked for, a
    hub id fetched into huggingface_hub's. Raises FptqError (NotFoundError, CheckpointError)."""
    if name == DEMO:
        return _quantized_demo()
    model = find_model(name)
    if Path(model).is_dir():
        return Path(model)
    from fptq_runtime.quantizer.source import resolve_model

    return resolve_model(model).path


def load(name: str | Path, **options: Any) -> LLM:
    """`LLM` of a path, a hub id or `demo`; the options are LLM's own."""
    from fptq_runtime.engine.llm import LLM

    return LLM(find_artifact(str(name)), **options)


def did_you_mean(path: Path, *others: str) -> str:
    """`; did you mean …?` with the similarly named neighbour of a path that does not exist, or nothing."""
    parent = path.parent
    while not parent.is_dir():
        path, parent = parent, parent.parent
    names = [*others, *(entry.name for entry in parent.iterdir())]
    swapped = [name for name in names if sorted(name) == sorted(path.name)]  # fqtp, to which qat is closer than fptq
    close = swapped or difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {close[0] if close[0] in others else parent / close[0]}?" if close else ""


def _quantized_demo() -> Path:
    """Keyed by version, model and the quantizer's own code; one process makes it while others wait."""
    from fptq_runtime.artifact.io import cache_directory, hash_file, is_artifact

    key = hashlib.sha256()
    for file in (*sorted(DEMO_MODEL.iterdir()), *sorted(Path(__file__).parent.glob("quantizer/**/*.py"))):
        key.update(hash_file(file).encode())
    out = cache_directory() / f"demo-{__version__}-{key.hexdigest()[:12]}"
    if not is_artifact(out):
        from filelock import FileLock

        from fptq_runtime.quantizer.pipeline import quantize

        out.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{out}.lock"):
            if not is_artifact(out):
                logger.warning("quantizing the demo model into %s, once", out)
                quantize(DEMO_MODEL, out, "fptq", progress=True)  # a third of the default's time, on first use
    return out

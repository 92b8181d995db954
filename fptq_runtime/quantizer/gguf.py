"""A GGUF file as a model directory: config.json, tokenizer and chat template from its metadata beside a link to it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import tempfile
from pathlib import Path

from fptq_runtime import __version__
from fptq_runtime.artifact.io import cache_directory
from fptq_runtime.models.gguf import GgufTensors, config_of
from fptq_runtime.models.tensors import CheckpointError


def gguf_directory(file: Path) -> Path:
    """In the user's cache, made once for each state of the file. Raises CheckpointError and ModelError."""
    file = file.resolve()
    state = file.stat()
    key = hashlib.sha256(f"{__version__} {file} {state.st_size} {state.st_mtime_ns}".encode()).hexdigest()[:16]
    cache = cache_directory() or Path(tempfile.gettempdir())
    out = cache / f"gguf-{key}" / file.stem
    if (out / file.name).exists():
        return out
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="fptq-", dir=out.parent, ignore_cleanup_errors=True) as scratch:
        made = Path(scratch) / file.stem
        made.mkdir()
        (made / "config.json").write_text(json.dumps(config_of(GgufTensors(file)), indent=2) + "\n")
        _write_tokenizer(file, made)
        (made / file.name).symlink_to(file)
        with contextlib.suppress(OSError):  # another process may have been first
            made.rename(out)
    return out


def _write_tokenizer(file: Path, out: Path) -> None:
    from transformers import AutoTokenizer

    try:
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(out)
    except Exception as error:  # whatever a tokenizer that transformers does not know leads to
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{file.name}: transformers cannot make a tokenizer of its metadata: {reason}") from None

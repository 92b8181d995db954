"""Where a float model comes from: a directory, or the Hugging Face hub."""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from fptq_runtime.models.loader import CheckpointError
from fptq_runtime.models.tokenizer import Tokenizer
from fptq_runtime.quantizer.gguf import gguf_directory

logger = logging.getLogger(__name__)

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
SAMPLES = (
    "hello world, this is a test",
    "Once upon a time, 3 \u00e9migr\u00e9s \u6f22\u5b57 \U0001f600:\n\n\tif (x != 42) { return; }  <s>[INST] ",
    "  two spaces   three\nIt's 12345.678, don't \ufb01x e\u0301 \u00bd\r\n\n\n    indented</s> \u2581a",
)
DOWNLOADED = ("*.safetensors", "*.json", "tokenizer.model", "merges.txt", "*.jinja", "LICENSE*", "NOTICE*",
              "README.md")


@dataclass(frozen=True)
class Source:
    """name: the directory's own name, or the hub id. revision: the commit, for a model of the hub."""

    path: Path
    name: str
    revision: str | None = None


def load_tokenizer(path: Path) -> Tokenizer:
    """The source's tokenizer, by the one reading of tokenizer.json that calibration, the artifact and its server share.
    A warning says where the installed transformers reads it otherwise, as it does for classes that it rebuilds by rules
    of their own. Raises CheckpointError."""
    tokenizer = Tokenizer(path)
    if (difference := _difference(tokenizer, path)) is not None:
        logger.warning("%s: %s; the artifact keeps tokenizer.json as it stands, which is what it is calibrated and "
                       "served with", path.name, difference)
    return tokenizer


def _difference(ours: Tokenizer, path: Path) -> str | None:
    """What transformers makes of the tokenizer otherwise, on texts that hold what tokenizers differ in."""
    import transformers

    them = f"transformers {transformers.__version__}"
    try:
        theirs = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        theirs.backend_tokenizer.no_truncation()
        theirs.backend_tokenizer.no_padding()
        added = list(ours.added_tokens.values())
        texts = [*SAMPLES, *(" a ".join(added[i : i + 64]) for i in range(0, len(added), 64))]
        for text, special in itertools.product(texts, (False, True)):
            a, b = (each.encode(text, add_special_tokens=special) for each in (ours, theirs))
            if a != b:
                at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
                return (f"tokenizer.json gives other tokens than {them} ({type(theirs).__name__}): after "
                        f"{ours.decode(a[:at], False)[-24:]!r} {_tokens(ours, a[at:])}, not {_tokens(ours, b[at:])}")
            shown, meant = ours.decode(a, False), theirs.backend_tokenizer.decode(a, skip_special_tokens=False)
            if shown != meant:
                return f"tokenizer.json decodes {text[:40]!r} to {shown[:40]!r}, {them} to {meant[:40]!r}"
    except Exception as error:  # whatever a tokenizer of another class, version or format leads to
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return f"{them} cannot load this tokenizer ({reason})"
    return None


def _tokens(tokenizer: Tokenizer, token_ids: Sequence[int]) -> str:
    shown = token_ids[:3]
    return f"{list(shown)} ({' '.join(map(tokenizer.token, shown))})" if shown else "nothing"


def resolve_model(model: str) -> Source:
    """A directory as it is; a .gguf file as a directory around it; `owner/name` or `owner/name@revision` through the
    hub's cache (HF_HUB_OFFLINE is respected, nothing but safetensors is fetched). Raises CheckpointError."""
    path = Path(model)
    if path.is_dir():
        return Source(path, path.resolve().name)
    if path.is_file() and path.suffix == ".gguf":
        return Source(gguf_directory(path), path.stem)
    if path.exists():
        raise CheckpointError(f"{model} is a file; a model is a directory with config.json and safetensors, or a .gguf")
    if not HUB_ID.fullmatch(model):
        raise CheckpointError(f"{model} is neither a directory nor a hub id (owner/name or owner/name@revision)")
    name, _, revision = model.partition("@")
    try:
        snapshot = Path(snapshot_download(name, revision=revision or None, allow_patterns=list(DOWNLOADED)))
    except (LocalEntryNotFoundError, OfflineModeIsEnabled):
        raise CheckpointError(
            f"{model} is not a directory, and as a hub model it is not in the local cache while the hub is offline or "
            "cannot be reached; download it elsewhere and name its directory") from None
    except GatedRepoError:
        raise CheckpointError(f"{name} is gated: accept its terms on its page at the hub, then give a token of your "
                              "account with `hf auth login` or HF_TOKEN") from None
    except RevisionNotFoundError:
        raise CheckpointError(f"{name} has no revision {revision or 'main'} at the hub") from None
    except RepositoryNotFoundError:
        raise CheckpointError(f"{model} is not a directory, and the hub has no {name}, or it is private: then give a "
                              "token with `hf auth login` or HF_TOKEN") from None
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{model} is not a directory, and the hub cannot give it: {reason}") from None
    return Source(snapshot, name, snapshot.name)

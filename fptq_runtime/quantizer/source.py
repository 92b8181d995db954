"""Where a float model comes from: a directory, or the Hugging Face hub."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

from fptq_runtime.models.loader import CheckpointError
from fptq_runtime.models.tokenizer import Tokenizer

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
SAMPLE = "Once upon a time, 3 \u00e9migr\u00e9s \u6f22\u5b57 \U0001f600:\n\n\tif (x != 42) { return; }  <s>[INST] "
DOWNLOADED = ("*.safetensors", "*.json", "tokenizer.model", "merges.txt", "*.jinja", "LICENSE*", "NOTICE*")


@dataclass(frozen=True)
class Source:
    """name: the directory's own name, or the hub id. revision: the commit, for a model of the hub."""

    path: Path
    name: str
    revision: str | None = None


def load_tokenizer(path: Path) -> Tokenizer:
    """The source's tokenizer as transformers makes it, which for some classes is another than tokenizer.json says.
    Raises CheckpointError."""
    ours = Tokenizer(path)
    from transformers import AutoTokenizer

    try:
        theirs = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        serialized = theirs.backend_tokenizer.to_str()
    except Exception as error:  # whatever a malformed file leads to
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"the tokenizer of {path} cannot be loaded: {reason}") from None
    if serialized != ours.serialized:
        ours = Tokenizer(path, serialized)
    if ours.encode(SAMPLE) != theirs.encode(SAMPLE):
        raise CheckpointError(f"the tokenizer of {path} works in transformers only: its tokenizer.json gives other ids")
    return ours


def resolve_model(model: str) -> Source:
    """A directory as it is; `owner/name` or `owner/name@revision` through the hub's cache (HF_HUB_OFFLINE is
    respected, nothing but safetensors is fetched). Raises CheckpointError."""
    path = Path(model)
    if path.is_dir():
        return Source(path, path.resolve().name)
    if path.exists():
        raise CheckpointError(f"{model} is a file; a model is a directory with config.json and safetensors")
    if not HUB_ID.fullmatch(model):
        raise CheckpointError(f"{model} is neither a directory nor a hub id (owner/name or owner/name@revision)")
    name, _, revision = model.partition("@")
    try:
        snapshot = Path(snapshot_download(name, revision=revision or None, allow_patterns=list(DOWNLOADED)))
    except (LocalEntryNotFoundError, OfflineModeIsEnabled):
        raise CheckpointError(f"{model} is not a directory, and as a hub model it is not in the local cache while the "
                              "hub is offline or cannot be reached") from None
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{model} is not a directory, and the hub cannot give it: {reason}") from None
    return Source(snapshot, name, snapshot.name)

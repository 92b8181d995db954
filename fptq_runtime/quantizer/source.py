"""Where a float model comes from: a directory, or the Hugging Face hub."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

from fptq_runtime.models.loader import CheckpointError

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
DOWNLOADED = ("*.safetensors", "*.json", "tokenizer.model", "merges.txt", "*.jinja", "LICENSE*", "NOTICE*")


@dataclass(frozen=True)
class Source:
    """name: the directory's own name, or the hub id. revision: the commit, for a model of the hub."""

    path: Path
    name: str
    revision: str | None = None


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

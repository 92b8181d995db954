"""What a checkpoint says of its embeddings, in sentence-transformers' files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from fptq_runtime.artifact.files import is_there, read_file
from fptq_runtime.config import Pooling
from fptq_runtime.models.tensors import MAX_JSON_BYTES, CheckpointError, read_json

MODULES: Final = "modules.json"
TRANSFORMER: Final = "sentence_bert_config.json"
POOLINGS: dict[str, Pooling] = {"lasttoken": "last", "mean": "mean", "weightedmean": "weightedmean"}
MODES = {"pooling_mode_cls_token": "cls", "pooling_mode_max_tokens": "max", "pooling_mode_mean_tokens": "mean",
         "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
         "pooling_mode_weightedmean_tokens": "weightedmean", "pooling_mode_lasttoken": "lasttoken"}  # older files


def read_pooling(path: Path) -> Pooling:
    """That of a model directory: the last token's, where it says nothing. Every embedding is normalised, whether it
    lists Normalize or not. Raises CheckpointError where it is made in another way, or the files cannot be read."""
    pooling: Pooling = "last"
    for kind, name in read_modules(path):
        if kind == "Pooling":
            pooling = _mode(path / name / "config.json")
        elif kind == "Transformer" and _renders(path / name):
            raise CheckpointError(f"{TRANSFORMER}: texts that are read through the chat template "
                                  "(modality_config.message) are not supported")
        elif kind not in ("Transformer", "Normalize"):
            raise CheckpointError(f"{MODULES}: embeddings through the module {kind} are not supported")
    return pooling


def read_modules(path: Path) -> list[tuple[str, str]]:
    """(class, folder) of each of the modules; none where there is no such file. Raises CheckpointError."""
    file = path / MODULES
    if not is_there(file):
        return []
    try:
        modules: Any = json.loads(read_file(file, MAX_JSON_BYTES))
        if not isinstance(modules, list):
            raise TypeError(type(modules).__name__)
        found = [(str(module["type"]).rpartition(".")[2], str(module["path"])) for module in modules]
    except (ValueError, RecursionError, TypeError, KeyError) as error:
        raise CheckpointError(f"{MODULES} is no list of modules: {error!r}") from None
    for _, name in found:
        if name and (Path(name).name != name or name == ".."):
            raise CheckpointError(f"{MODULES}: {name!r} is not the name of a folder beside it")
    return found


def _renders(path: Path) -> bool:
    config = read_json(path / TRANSFORMER) if is_there(path / TRANSFORMER) else {}
    return "message" in (config.get("modality_config") or {})


def _mode(file: Path) -> Pooling:
    config = read_json(file)
    modes = config.get("pooling_mode")
    if modes is None:
        modes = [mode for name, mode in MODES.items() if config.get(name)] or ["mean"]
    modes = [modes] if isinstance(modes, str) else modes
    if not isinstance(modes, list) or len(modes) != 1 or modes[0] not in POOLINGS:
        raise CheckpointError(f"{file.parent.name}/{file.name}: the pooling {modes!r} is not supported; one of "
                              f"{', '.join(POOLINGS)} is")
    return POOLINGS[modes[0]]

"""Mutated model directories, for a process of its own to refuse or load:

    python -m tests.fuzz.models SEED CASES DIRECTORY

Every case changes one file of a small model: values, keys or raw bytes of its JSON, or a safetensors header. It loads,
or raises FptqError with one line; anything else, or more than SECONDS, ends the process with the case on stderr.
"""

from __future__ import annotations

import copy
import faulthandler
import json
import logging
import random
import resource
import shutil
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fptq_runtime.artifact.files import MANIFEST
from fptq_runtime.artifact.io import FileRecord, Manifest, hash_file, read_manifest
from fptq_runtime.engine.llm import load_engine
from fptq_runtime.errors import FptqError
from fptq_runtime.kernels.select import select_backend
from fptq_server.defaults import sampling_defaults

SECONDS = 120
MEMORY = 16 << 30  # of addresses
DEEP: Any = []
for _ in range(400):
    DEEP = [DEEP]
VALUES: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2, 3, 7, 255, 1 << 20, 1 << 31, (1 << 31) - 1, 1 << 53, 1 << 63, 1 << 64, 10**30,
    -(1 << 63), 10**400, 0.5, -0.5, 1e-300, 1e308, -1e308, float("inf"), float("-inf"), float("nan"), "", "x",
    "é" * 999, "1", "-1", "inf", "\ud800", [], {}, [[]], [None], [1], [1, 2], [float("inf")], ["x"], {"x": 1},
    {"": None}, DEEP, [0] * 5000, "re:(a+)+$", "re:[", "float32", "default", "yarn", "llama3", "longrope", "linear",
    "dynamic")


class Mutator:
    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def json(self, text: str) -> str:
        if self.random.random() < 0.1:
            return self.raw(text.encode()).decode("utf-8", "surrogateescape")
        document = json.loads(text)
        for _ in range(self.random.choice((1, 1, 1, 2, 3))):
            document = self.value(document)
        return json.dumps(document)

    def value(self, document: Any) -> Any:
        document = copy.copy(document)
        if not document or not isinstance(document, (dict, list)) or self.random.random() < 0.05:
            return self.random.choice(VALUES)
        keys = list(document) if isinstance(document, dict) else list(range(len(document)))
        key = self.random.choice(keys)
        chance = self.random.random()
        if chance < 0.12:
            del document[key]
        elif chance < 0.2:
            document[key] = document[self.random.choice(keys)]
        elif chance < 0.25 and isinstance(document, dict):
            document[self.random.choice(("x", "head_dim", "rope_scaling", "quantization_config", "rope_theta"))] = \
                self.random.choice(VALUES)
        elif isinstance(document[key], (dict, list)) and chance < 0.8:
            document[key] = self.value(document[key])
        else:
            document[key] = self.random.choice(VALUES)
        return document

    def raw(self, data: bytes) -> bytes:
        changed = bytearray(data)
        for _ in range(self.random.choice((1, 2, 8))):
            at = self.random.randrange(len(changed) or 1)
            match self.random.randrange(4):
                case 0:
                    changed[at : at + 1] = bytes([self.random.randrange(256)])
                case 1:
                    del changed[at : at + self.random.choice((1, 2, 9, len(changed)))]
                case 2:
                    changed[at:at] = self.random.choice((b"[", b"{", b'"', b"9" * 5000, b"\0", b"-", b"1e999", b"null"))
                case _:
                    changed[at:at] = changed[at : at + self.random.randrange(64)]
        return bytes(changed)

    def header(self, data: bytes) -> bytes:
        """Of a safetensors file."""
        size = int.from_bytes(data[:8], "little")
        header, rest = data[8 : 8 + size], data[8 + size :]
        if self.random.random() < 0.2:
            return self.random.choice((0, 1, size + 1, 1 << 40, (1 << 64) - 1)).to_bytes(
                8, "little") + header + rest
        changed = self.json(header.decode()).encode("utf-8", "surrogateescape")
        if self.random.random() < 0.1:
            rest = rest[: self.random.randrange(len(rest))]
        return len(changed).to_bytes(8, "little") + changed + rest


def sign(path: Path, name: str) -> None:
    """As somebody would who made the artifact so."""
    manifest = read_manifest(path)
    record = FileRecord(size=(path / name).stat().st_size, sha256=hash_file(path / name))
    text = manifest.model_copy(update={"files": {**manifest.files, name: record}}).to_json()
    (path / MANIFEST).write_text(text)


def change(mutator: Mutator, path: Path, name: str) -> None:
    file = path / name
    data = file.read_bytes()
    if name == MANIFEST:
        document = json.loads(mutator.json(data.decode()))
        try:
            Manifest.model_validate(document)
        except ValueError:
            text = json.dumps(document)
        else:
            text = Manifest.model_validate(document).to_json()  # its digest fits
        file.write_text(text, "utf-8", "surrogatepass")
        return
    if name.endswith((".safetensors", ".golden")):
        file.write_bytes(mutator.header(data))
    else:
        file.write_bytes(mutator.json(data.decode()).encode("utf-8", "surrogateescape"))
    if (path / MANIFEST).exists() and name in read_manifest(path).files:
        sign(path, name)


def attempt(work: Callable[[], object]) -> str:
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    try:
        work()
    except FptqError as error:
        if "\n" in str(error):
            raise AssertionError("more than one line") from error
        return "refused"
    except MemoryError:
        return "refused"
    finally:
        faulthandler.cancel_dump_traceback_later()
    return "loaded"


def main(seed: int, cases: int, source: Path, scratch: Path) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    faulthandler.enable()
    logging.disable()
    outcomes: Counter[str] = Counter()
    models = [path for path in sorted(source.iterdir()) if path.is_dir()]
    backend = select_backend("auto", 1)
    for case in range(cases):
        mutator = Mutator(seed * 1_000_003 + case)
        path = scratch / "case"
        shutil.rmtree(path, ignore_errors=True)
        model = mutator.random.choice(models)
        shutil.copytree(model, path)
        names = [file.name for file in sorted(path.iterdir()) if not file.name.endswith(".jinja")]
        name = mutator.random.choice(names + ["config.json"] * 3)
        try:
            try:
                change(mutator, path, name)
            except (ValueError, UnicodeError, RecursionError):  # nothing that can be written
                continue

            def load(path: Path = path) -> None:
                sampling_defaults(path)
                load_engine(path, backend=backend, kv_cache_memory=8 << 20, max_model_len=64)

            outcomes[f"{name} {attempt(load)}"] += 1
        except BaseException as error:
            if isinstance(error, (KeyboardInterrupt, SystemExit)):
                raise
            traceback.print_exc()
            kept = scratch / f"failed-{seed}-{case}"
            shutil.rmtree(kept, ignore_errors=True)
            shutil.copytree(path, kept)
            print(f"case {seed} {case}: {model.name}/{name}, kept at {kept}", file=sys.stderr)
            outcomes["failed"] += 1
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4]))

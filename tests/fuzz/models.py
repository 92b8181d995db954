"""Mutated model directories, for a process of its own to refuse or load:

    python -m tests.fuzz.models SEED CASES DIRECTORY

Every case changes one file of a small model: values, keys or raw bytes of its JSON, or a safetensors header. It loads,
or raises FptqError with one line; anything else, or more than SECONDS, ends the process with the case on stderr.
"""

from __future__ import annotations

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

from fptq_runtime.artifact.files import MANIFEST
from fptq_runtime.artifact.io import FileRecord, Manifest, hash_file, read_manifest
from fptq_runtime.engine.llm import load_engine
from fptq_runtime.errors import FptqError
from fptq_runtime.kernels.select import select_backend
from fptq_server.defaults import sampling_defaults
from tests.fuzz.mutator import Mutator

SECONDS = 120
MEMORY = 16 << 30  # of addresses


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
        document = json.loads(mutator.json(data))
        try:
            Manifest.model_validate(document)
        except ValueError:
            text = json.dumps(document)
        else:
            text = Manifest.model_validate(document).to_json()  # its digest fits
        file.write_text(text, "utf-8", "surrogatepass")
        return
    if name.endswith((".safetensors", ".golden")):
        file.write_bytes(mutator.safetensors(data))
    else:
        file.write_bytes(mutator.json(data))
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
        mutator = Mutator(random.Random(seed * 1_000_003 + case))
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

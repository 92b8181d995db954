"""Reads a served artifact's files again and again, slowly: a bit that flips on disk or in the page cache changes
neither size nor time, and is served from where the file is mapped."""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

from fptq_runtime.artifact.files import open_file
from fptq_runtime.artifact.io import FileRecord

logger = logging.getLogger(__name__)

CHUNK = 1 << 20  # bytes that are read and hashed at once, in about a millisecond


class Scrub:
    """A thread of the lowest priority that takes `interval` seconds to read all files once: a flipped bit is found
    within twice that. The files are those that were opened here, whatever lies at their paths later, which only the log
    tells. after_pass gets the names of those that are not what the manifest says."""

    def __init__(self, path: Path, files: Mapping[str, FileRecord], interval: float,
                 after_pass: Callable[[list[str]], None]) -> None:
        self._path = path
        self._files = {name: (open_file(path / name), record) for name, record in files.items()}
        self._pace = interval / max(1, sum(record.size for record in files.values()))  # seconds a byte
        self._after_pass = after_pass
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fptq-scrub", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()
        for file, _ in self._files.values():
            file.close()

    def _run(self) -> None:
        if hasattr(os, "setpriority") and hasattr(os, "PRIO_PROCESS"):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)  # on Linux, of this thread alone
        known: set[str] = set()
        gone: set[str] = set()
        while not self._stopping.is_set():
            damaged = {name for name, (file, record) in self._files.items() if not self._matches(file, record)}
            if self._stopping.is_set():
                return
            for name in damaged - known:
                logger.error("%s has changed since it was loaded: what is served from it may be wrong; stop this "
                             "server, check the disk and memory, and restore the artifact", name)
            for name in known - damaged:
                logger.info("%s is what it was again", name)
            elsewhere = {name for name, (file, _) in self._files.items() if not self._lies_there(name, file)}
            for name in elsewhere - gone:
                logger.warning("%s was replaced or removed since it was loaded: this server goes on with what it was, "
                               "the next start finds other bytes, or none", name)
            known, gone = damaged, elsewhere
            self._after_pass(sorted(damaged))

    def _lies_there(self, name: str, file: BinaryIO) -> bool:
        """Its path leads to the open file."""
        try:
            return os.path.samestat((self._path / name).stat(), os.fstat(file.fileno()))
        except OSError:
            return False

    def _matches(self, file: BinaryIO, record: FileRecord) -> bool:
        """True also where it was told to stop."""
        digest, offset, begun = hashlib.sha256(), 0, time.monotonic()
        try:
            while data := os.pread(file.fileno(), CHUNK, offset):
                digest.update(data)
                offset += len(data)
                if self._stopping.wait(max(0.0, begun + offset * self._pace - time.monotonic())):
                    return True
        except OSError:
            return False
        return digest.hexdigest() == record.sha256

"""KV blocks in files, where they outlive the cache and the process.

A file belongs to one block: its name says whose keys and values of which text it holds, and its bytes whether they are
what was written. Whatever is not is no block; what a disk refuses is not kept. Several processes may share a directory.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from fptq_runtime.errors import FptqError
from fptq_runtime.private import private, private_directory

logger = logging.getLogger(__name__)

MAGIC = b"FPTQ-KV1"
OURS, BEGUN = re.compile(r"[0-9a-f]{64}\.kv"), re.compile(r"\.\d+-\d+\.tmp")
DIGEST_BYTES = 32
MAX_PENDING = 64 << 20  # bytes that wait to be written; what comes on top is not kept
PAUSE_SECONDS = 60.0  # after a write that failed
ABANDONED_SECONDS = 600.0  # a file that is still being written after so long is nobody's


@dataclass(frozen=True)
class KVDisk:
    """Where blocks are kept, at most so many bytes of them. fingerprint: of all that decides their bits beside their
    text, such as the weights and the kernels."""

    directory: Path
    size: int
    fingerprint: bytes


class BlockStore(Protocol):
    """What holds blocks beside the cache, each by a digest of its text."""

    def has(self, digest: bytes) -> bool: ...

    def save(self, digest: bytes, block: int) -> None:
        """Take a copy of a block of the cache."""
        ...

    def load(self, digest: bytes, block: int) -> Future[bool]:
        """Fill a block of the cache: whether it could be had."""
        ...


class DiskStore:
    """blocks: the cache, [blocks, bytes]. Raises FptqError where the directory cannot be used."""

    def __init__(self, disk: KVDisk, blocks: npt.NDArray[np.uint8]) -> None:
        self._directory, self._size, self._fingerprint = disk.directory, disk.size, disk.fingerprint
        self._blocks = blocks
        self._file_bytes = len(MAGIC) + DIGEST_BYTES + blocks.shape[1]
        if self._size < 2 * self._file_bytes:
            raise FptqError(f"kv_cache_disk_size is {self._size} bytes; two blocks of keys and values take "
                            f"{2 * self._file_bytes}", "kv_cache_disk_size")
        try:
            private_directory(self._directory)
            (probe := self._temporary()).write_bytes(b"")
            probe.unlink()
        except OSError as error:
            raise FptqError(f"kv_cache_disk {self._directory} cannot be written to: {error.strerror or error}",
                            "kv_cache_disk") from None
        # Its thread ends after what is pending, and the process after its thread.
        self._writer = ThreadPoolExecutor(1, "fptq-kv-write")
        self._readers = ThreadPoolExecutor(4, "fptq-kv-read")
        self._lock = threading.Lock()
        self._pending = 0  # bytes
        self._paused_until = 0.0
        self._unseen = 0  # bytes written since the directory was looked through
        self._writer.submit(self._bound)

    def has(self, digest: bytes) -> bool:
        try:
            return self._path(digest).is_file()
        except OSError:  # is_file forgives a file that is not there, and no disk that fails
            return False

    def save(self, digest: bytes, block: int) -> None:
        path = self._path(digest)
        with self._lock:
            if self._pending + self._file_bytes > MAX_PENDING or time.monotonic() < self._paused_until:
                return
            self._pending += self._file_bytes
        self._writer.submit(self._write, path, self._blocks[block].tobytes())

    def load(self, digest: bytes, block: int) -> Future[bool]:
        return self._readers.submit(self._read, digest, block)

    def flush(self) -> None:
        """Wait until what was saved is on disk."""
        self._writer.submit(lambda: None).result()

    def _path(self, digest: bytes) -> Path:
        return self._directory / f"{hashlib.sha256(self._fingerprint + digest).hexdigest()}.kv"

    def _temporary(self) -> Path:
        return self._directory / f".{os.getpid()}-{threading.get_ident()}.tmp"

    def _checksum(self, path: Path, data: bytes | memoryview) -> bytes:
        digest = hashlib.sha256(path.name.encode())
        digest.update(data)
        return digest.digest()

    def _write(self, path: Path, data: bytes) -> None:
        temporary = self._temporary()
        try:
            if path.exists():
                os.utime(path)
                return
            with open(temporary, "wb", opener=private) as file:
                file.write(MAGIC + self._checksum(path, data))
                file.write(data)
            temporary.rename(path)
            self._unseen += self._file_bytes
            if self._unseen > self._size // 64:
                self._bound()
        except OSError as error:
            logger.warning("kv_cache_disk %s: %s; nothing is kept for %.0f s", self._directory, error, PAUSE_SECONDS)
            self._paused_until = time.monotonic() + PAUSE_SECONDS
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
        finally:
            with self._lock:
                self._pending -= self._file_bytes

    def _read(self, digest: bytes, block: int) -> bool:
        """False where a file is not whole; whatever its block then holds is never read."""
        path, target = self._path(digest), self._blocks[block].data
        try:
            with path.open("rb", buffering=0) as file:
                head = file.read(len(MAGIC) + DIGEST_BYTES)
                whole = os.fstat(file.fileno()).st_size == self._file_bytes \
                    and file.readinto(target) == target.nbytes
            if whole and head == MAGIC + self._checksum(path, target):
                os.utime(path)
                return True
            logger.warning("%s is not what was written; it is removed", path)
            path.unlink()
        except OSError as error:
            logger.debug("%s: %s", path, error)
        return False

    def _bound(self) -> None:
        """Remove what was used longest ago, and what nobody ends, until a margin is free for other processes."""
        self._unseen = 0
        files = []
        with suppress(OSError), os.scandir(self._directory) as entries:
            for entry in entries:
                with suppress(OSError):
                    used = entry.stat()
                    if OURS.fullmatch(entry.name):
                        files.append((used.st_mtime_ns, used.st_size, entry.path))
                    elif BEGUN.fullmatch(entry.name) and time.time() - used.st_mtime > ABANDONED_SECONDS:
                        Path(entry.path).unlink()
        held = sum(size for _, size, _ in files)
        if held <= self._size - self._size // 16:
            return
        for _, size, path in sorted(files):
            with suppress(OSError):
                Path(path).unlink()
            held -= size
            if held <= self._size - self._size // 8:
                break

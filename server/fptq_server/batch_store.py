"""Files and batches in a directory: of each its metadata in JSON, and beside a file's its content."""

from __future__ import annotations

import asyncio
import fcntl
import os
import shutil
import tempfile
import time
import uuid
from pathlib import Path
from typing import IO, BinaryIO, Generic, TypeVar

from pydantic import BaseModel, ValidationError

from fptq_runtime.errors import FptqError
from fptq_runtime.private import private, private_directory
from fptq_server.protocol_batches import Batch, FileObject

MAX_FILES = 10_000
MAX_BATCHES = 1000  # the oldest that have ended make way
ENDED = frozenset({"failed", "completed", "expired", "cancelled"})

T = TypeVar("T", bound=BaseModel)


class StoreFullError(FptqError):
    """The store takes no more. The message is for the client."""


class Stored(BaseModel, Generic[T]):
    """owner: the name of the API key that made it, whose alone it is."""

    owner: str
    object: T


class StoredBatch(Stored[Batch]):
    """priority: of its key. output_id, error_id: of the files that its answers go to. output_seconds: in which those
    expire."""

    priority: int
    output_id: str
    error_id: str
    output_seconds: int | None = None


def _copy(content: BinaryIO, path: Path) -> None:
    content.seek(0)
    with open(path, "xb", opener=private) as copy:
        shutil.copyfileobj(content, copy, 1 << 20)
        copy.flush()
        os.fsync(copy.fileno())


class BatchStore:
    """path: where it outlives the server; a temporary directory where it is None. max_bytes: of all content. One server
    at a time has it. Raises FptqError where it cannot be used."""

    def __init__(self, path: Path | None, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._temporary = path is None
        self._path = path
        self._lock: IO[str] | None = None
        self.files: dict[str, Stored[FileObject]] = {}
        self.batches: dict[str, StoredBatch] = {}
        if path is not None:
            self._open(path)

    def close(self) -> None:
        if self._temporary and self._path is not None:
            shutil.rmtree(self._path, ignore_errors=True)
        if self._lock is not None:
            self._lock.close()

    @property
    def bytes(self) -> int:
        return sum(stored.object.bytes for stored in self.files.values())

    def content(self, file_id: str) -> Path:
        """Where the content is, or will be."""
        return self._directory() / f"{file_id}.jsonl"

    def room(self, more: int) -> None:
        """Raises StoreFullError where there is none for so many bytes."""
        self._expire()
        if self.bytes + more > self._max_bytes:
            raise StoreFullError(f"the files on this server have {self.bytes} bytes, and {more} more are beyond the "
                                 f"{self._max_bytes} that it keeps; delete some")
        if len(self.files) >= MAX_FILES:
            raise StoreFullError(f"this server keeps {MAX_FILES} files at most; delete some")

    async def add_file(self, owner: str, filename: str, content: BinaryIO, seconds: int | None) -> FileObject:
        """Keep a copy of an input, which expires in so many seconds. Raises StoreFullError."""
        size = content.seek(0, os.SEEK_END)
        self.room(size)
        path = self.content(file_id := f"file-{uuid.uuid4().hex}")
        try:
            await asyncio.to_thread(_copy, content, path)
            self.room(size)  # others may have come meanwhile
            return self._put_file(owner, file_id, filename, "batch", seconds)
        finally:
            if file_id not in self.files:
                path.unlink(missing_ok=True)

    def publish(self, batch: StoredBatch, file_id: str, filename: str) -> str | None:
        """Make a file of what a batch wrote, unless that is nothing. Its id."""
        path = self.content(file_id)
        if not path.exists() or path.stat().st_size == 0:
            path.unlink(missing_ok=True)
            return None
        return self._put_file(batch.owner, file_id, filename, "batch_output", batch.output_seconds).id

    def find_file(self, owner: str, file_id: str) -> FileObject | None:
        self._expire()
        stored = self.files.get(file_id)
        return None if stored is None or stored.owner != owner else stored.object

    def files_of(self, owner: str) -> list[FileObject]:
        """The oldest first."""
        self._expire()
        mine = [stored.object for stored in self.files.values() if stored.owner == owner]
        return sorted(mine, key=lambda file: file.created_at)

    def is_read(self, file_id: str) -> bool:
        """By a batch that has not ended."""
        return any(stored.object.input_file_id == file_id and stored.object.status not in ENDED
                   for stored in self.batches.values())

    def delete_file(self, file_id: str) -> None:
        del self.files[file_id]
        self._metadata(file_id).unlink(missing_ok=True)
        self.content(file_id).unlink(missing_ok=True)

    def find_batch(self, owner: str, batch_id: str) -> StoredBatch | None:
        stored = self.batches.get(batch_id)
        return None if stored is None or stored.owner != owner else stored

    def put_batch(self, stored: StoredBatch) -> None:
        """Raises StoreFullError where as many have not ended as it keeps."""
        if stored.object.id not in self.batches and len(self.batches) >= MAX_BATCHES:
            ended = [old for old in self.batches.values() if old.object.status in ENDED]
            if not ended:
                raise StoreFullError(f"{MAX_BATCHES} batches wait on this server; it takes no more")
            oldest = min(ended, key=lambda old: old.object.created_at).object.id
            del self.batches[oldest]
            self._metadata(oldest).unlink(missing_ok=True)
        self.batches[stored.object.id] = stored
        self._save(stored.object.id, stored)

    def _put_file(self, owner: str, file_id: str, filename: str, purpose: str, seconds: int | None) -> FileObject:
        now = int(time.time())
        file = FileObject.model_validate({
            "id": file_id, "bytes": self.content(file_id).stat().st_size, "created_at": now, "filename": filename,
            "expires_at": None if seconds is None else now + seconds, "purpose": purpose})
        self.files[file_id] = Stored[FileObject](owner=owner, object=file)
        self._save(file_id, self.files[file_id])
        return file

    def _expire(self) -> None:
        now = time.time()
        for file in [stored.object for stored in self.files.values()]:
            if file.expires_at is not None and file.expires_at <= now and not self.is_read(file.id):
                self.delete_file(file.id)

    def _directory(self) -> Path:
        if self._path is None:
            self._path = Path(tempfile.mkdtemp(prefix="fptq-batches-"))
        return self._path

    def _metadata(self, name: str) -> Path:
        return self._directory() / f"{name}.json"

    def _save(self, name: str, value: BaseModel) -> None:
        """Whole or not at all."""
        path = self._metadata(name)
        part = path.with_suffix(".part")
        with open(part, "w", opener=private) as file:
            file.write(value.model_dump_json())
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)

    def _open(self, path: Path) -> None:
        try:
            private_directory(path)
            self._lock = (path / "lock").open("a")  # holds nothing
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for file in path.glob("file-*.json"):
                stored = Stored[FileObject].model_validate_json(file.read_bytes())
                self.files[stored.object.id] = stored
            batches = [StoredBatch.model_validate_json(file.read_bytes()) for file in path.glob("batch_*.json")]
        except BlockingIOError:
            raise FptqError(f"{path} is another server's; give each a batch_dir of its own", "batch_dir") from None
        except (OSError, ValidationError) as error:
            raise FptqError(f"batch_dir {path} cannot keep batches: {error}", "batch_dir") from None
        self.batches = {stored.object.id: stored for stored in sorted(batches, key=lambda each: each.object.created_at)}
        kept = self.files.keys() | {name for stored in batches if stored.object.status not in ENDED
                                    for name in (stored.output_id, stored.error_id)}
        for content in path.glob("file-*.jsonl"):
            if content.stem not in kept:  # of an upload, or a deletion, that a crash cut off
                content.unlink()

"""The keys that open the server, of which it holds hashes."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fptq_runtime.artifact.files import read_file
from fptq_runtime.errors import FptqError

MAX_FILE_BYTES = 1 << 20
HASHED = re.compile(r"(?:(?P<name>[\w.-]+)=)?sha256:(?P<digest>[0-9a-f]{64})"
                    r"(?:\s+priority=(?P<priority>-?\d{1,9}))?(?:\s+max_requests=(?P<most>[1-9]\d{0,8}))?")


@dataclass(frozen=True)
class ApiKey:
    """name: in metrics. digest: sha256 of the key, which is kept nowhere. priority: the lower goes first. max_requests:
    at a time."""

    name: str
    digest: bytes
    priority: int = 0
    max_requests: int | None = None


class ApiKeys:
    """`entries`, and the lines of a file, in which # begins a comment. An entry is a key, or
    `NAME=sha256:HEX priority=N max_requests=N`, of which all but the hash is optional. With none the server is open.
    Raises FptqError."""

    def __init__(self, entries: Sequence[str], file: Path | None = None) -> None:
        self._entries = entries
        self._file = file
        self.load()

    def load(self) -> None:
        """Read the file again. Raises FptqError, and then nothing has changed."""
        lines = list(self._entries)
        if self._file is not None:
            try:
                text = read_file(self._file, MAX_FILE_BYTES).decode()
            except FileNotFoundError:
                raise FptqError(f"there is no file {self._file}", "api_keys_file") from None
            except UnicodeDecodeError:
                raise FptqError(f"{self._file} is not UTF-8", "api_keys_file") from None
            lines += [line.strip() for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
            if not lines:
                raise FptqError(f"{self._file} has no key", "api_keys_file")
        self._keys = [_read(line) for line in lines]

    def __bool__(self) -> bool:
        return bool(self._keys)

    @property
    def names(self) -> list[str]:
        return [key.name for key in self._keys]

    def find(self, key: str) -> ApiKey | None:
        digest = hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
        # Every key is compared, so that the time taken tells nothing.
        found = [known for known in self._keys if hmac.compare_digest(digest, known.digest)]
        return found[0] if found else None


def _read(entry: str) -> ApiKey:
    if hashed := HASHED.fullmatch(entry):
        most = hashed["most"]
        digest = bytes.fromhex(hashed["digest"])
        return ApiKey(hashed["name"] or _unnamed(digest), digest, int(hashed["priority"] or 0),
                      None if most is None else int(most))
    check_key(entry)
    digest = hashlib.sha256(entry.encode()).digest()
    return ApiKey(_unnamed(digest), digest)


def _unnamed(digest: bytes) -> str:
    """A key's own, wherever it stands: what was cached under a name is that key's alone."""
    return f"key-{digest.hex()[:8]}"


def check_key(key: str) -> None:
    """Raises FptqError where no client could send it."""
    if not key or not key.isascii() or not key.isprintable() or key != key.strip():
        raise FptqError("an api key must be printable ASCII, not empty, and without spaces around it", "api_keys")

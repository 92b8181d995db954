"""The keys that open the server, of which it holds hashes."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fptq_runtime.artifact.files import read_file
from fptq_runtime.engine.request import Origin
from fptq_runtime.errors import FptqError

MAX_FILE_BYTES = 1 << 20
HASHED = re.compile(r"(?:(?P<name>[\w.-]+)=)?sha256:(?P<digest>[0-9a-f]{64})", re.IGNORECASE)
OPTIONS = {"priority": (r"-?\d{1,9}", "a whole number"), "max_requests": (r"[1-9]\d{0,8}", "a whole number from 1")}


@dataclass(frozen=True)
class ApiKey:
    """name: in metrics. digest: sha256 of the key, which is kept nowhere. priority: the lower goes first. max_requests:
    at a time."""

    name: str
    digest: bytes
    priority: int = 0
    max_requests: int | None = None

    @property
    def origin(self) -> Origin:
        return Origin(self.name, self.priority)


class ApiKeys:
    """`entries`, and the lines of a file, in which # begins a comment. An entry is a key, or
    `NAME=sha256:HEX priority=N max_requests=N`, of which all but the hash is optional. What has a hash and is not that
    is refused: were it taken for a key, whoever reads it could come in, and its owner could not. With none the server
    is open. Raises FptqError."""

    def __init__(self, entries: Sequence[str], file: Path | None = None) -> None:
        self._entries = entries
        self._file = file
        self.load()

    def load(self) -> None:
        """Read the file again. Raises FptqError, and then nothing has changed."""
        keys = [_read(entry) for entry in self._entries]
        if self._file is not None:
            try:
                text = read_file(self._file, MAX_FILE_BYTES).decode()
            except FileNotFoundError:
                raise FptqError(f"there is no file {self._file}", "api_keys_file") from None
            except UnicodeDecodeError:
                raise FptqError(f"{self._file} is not UTF-8", "api_keys_file") from None
            lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1)]
            written = [(number, line) for number, line in lines if line and not line.startswith("#")]
            for number, line in written:
                try:
                    keys.append(_read(line))
                except FptqError as error:
                    raise FptqError(f"{self._file}, line {number}: {error}", "api_keys_file") from None
            if not written:
                raise FptqError(f"{self._file} has no key", "api_keys_file")
        self._keys = keys

    def __bool__(self) -> bool:
        return bool(self._keys)

    @property
    def names(self) -> list[str]:
        return [key.name for key in self._keys]

    def of(self, headers: Mapping[str, str]) -> ApiKey | None:
        """That of a request, whichever of OpenAI's and Anthropic's way it is sent in."""
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        return (self.find(bearer.strip()) if scheme.lower() == "bearer" else None) or \
            self.find(headers.get("x-api-key", ""))

    def find(self, key: str) -> ApiKey | None:
        digest = hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
        # Every key is compared, so that the time taken tells nothing.
        found = [known for known in self._keys if hmac.compare_digest(digest, known.digest)]
        return found[0] if found else None


def _read(entry: str) -> ApiKey:
    if "sha256:" in entry.lower():
        first, *rest = entry.partition(" #")[0].split()
        if (hashed := HASHED.fullmatch(first)) is None:
            raise FptqError("a hashed key is NAME=sha256: and 64 hexadecimal digits, without a space, then priority=N "
                            "and max_requests=N where wanted", "api_keys")
        options = dict(map(_option, rest))
        if len(options) < len(rest):
            raise FptqError("an option of a hashed key is given twice", "api_keys")
        digest = bytes.fromhex(hashed["digest"])
        return ApiKey(hashed["name"] or _unnamed(digest), digest, options.get("priority", 0),
                      options.get("max_requests"))
    check_key(entry)
    digest = hashlib.sha256(entry.encode()).digest()
    return ApiKey(_unnamed(digest), digest)


def _option(word: str) -> tuple[str, int]:
    name, _, value = word.partition("=")
    if name not in OPTIONS:
        raise FptqError(f"{name} is no option of a hashed key; {' and '.join(OPTIONS)} are", "api_keys")
    pattern, kind = OPTIONS[name]
    if not re.fullmatch(pattern, value):
        raise FptqError(f"{name} of a hashed key must be {kind}, not {value!r}", "api_keys")
    return name, int(value)


def _unnamed(digest: bytes) -> str:
    """A key's own, wherever it stands: what was cached under a name is that key's alone."""
    return f"key-{digest.hex()[:8]}"


def check_key(key: str) -> None:
    """Raises FptqError where no client could send it."""
    if not key or not key.isascii() or not key.isprintable() or key != key.strip():
        raise FptqError("an api key must be printable ASCII, not empty, and without spaces around it", "api_keys")

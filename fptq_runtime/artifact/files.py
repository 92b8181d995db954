"""Files of a model directory, which may be a stranger's: each is opened once, found to be a regular file by its
descriptor, and read through that. Links are followed, as the hub's cache is made of them."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO

from fptq_runtime.errors import FptqError

MANIFEST = "fptq.json"  # an artifact has it
_KINDS = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a pipe", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}


class FileError(FptqError):
    """A file that cannot be read, or is none. One line that names it, for the user."""


def is_there(path: Path) -> bool:
    """Something has this name, be it a link to nothing: a file that may be missing is skipped only where not."""
    return os.path.lexists(path)


def open_file(path: Path) -> BinaryIO:
    """Raises FileError, or FileNotFoundError where nothing has this name."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # opening a pipe would wait
    except FileNotFoundError:
        if path.is_symlink():
            raise FileError(f"{path} is a link to {os.readlink(path)}, where there is no file") from None
        raise
    except OSError as error:
        raise FileError(f"{path} cannot be opened: {error.strerror}") from None
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise FileError(f"{path} is {_KINDS.get(stat.S_IFMT(mode), 'something else')}, not a regular file")
    return os.fdopen(descriptor, "rb")


def read_file(path: Path, limit: int) -> bytes:
    """All of a file of at most `limit` bytes. Raises FileError or FileNotFoundError."""
    with open_file(path) as file:
        try:
            content = file.read(limit + 1)
        except OSError as error:
            raise FileError(f"{path} cannot be read: {error.strerror}") from None
    if len(content) > limit:
        raise FileError(f"{path} has more than {limit >> 20} MiB, the most that is read of it")
    return content


def path_of(file: BinaryIO) -> str:
    """A path that leads to the open file itself, for libraries that open by path, whatever its own path leads to by
    now."""
    return f"/dev/fd/{file.fileno()}"

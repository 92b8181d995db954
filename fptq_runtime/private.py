"""Files that prompts can be told from: they are their owner's alone."""

from __future__ import annotations

import logging
import os
import stat
from pathlib import Path

logger = logging.getLogger(__name__)


def private_directory(path: Path) -> None:
    """Make it, with its parents, for its owner alone, unless it is there; one that is there and open to others is said
    in the log. Raises OSError."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        logger.warning("%s is open to other users (mode %o), and prompts can be told from its files: chmod 700 it",
                       path, mode)


def private(path: str, flags: int) -> int:
    """An `opener` of a new file, whoever made its directory."""
    return os.open(path, flags, 0o600)

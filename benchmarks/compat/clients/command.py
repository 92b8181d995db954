"""What the scripts of clients that are commands share."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path


def run(name: str, *arguments: str, written: str = "", read: str | None = None, seconds: float = 300) -> str:
    """What a command of this environment prints, or what it leaves in the file `read`, in a new directory that is also
    its home and holds the file options.yml. Raises RuntimeError."""
    with tempfile.TemporaryDirectory() as directory:
        Path(directory, "options.yml").write_text(written)
        done = subprocess.run([str(Path(sys.executable).parent / name), *arguments], cwd=directory, text=True,
                              stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              timeout=seconds, env={**os.environ, "HOME": directory, "HF_HUB_OFFLINE": "1"})
        if done.returncode:
            raise RuntimeError(f"exit {done.returncode}: {done.stdout[-250:]}")
        return done.stdout if read is None else Path(directory, read).read_text()

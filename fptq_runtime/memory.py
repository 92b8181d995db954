"""What this process may still take of the machine's memory, and what it gives back."""

from __future__ import annotations

import ctypes
import re
from contextlib import suppress
from pathlib import Path


def give_back_freed_memory() -> None:
    """To the system. glibc keeps the holes that freed arrays leave in its heap: up to 360 MB between two blocks of
    SmolLM2 that are quantized."""
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes that this process may still take, swap and what the page cache would give back included: of the machine,
    its cgroup (v1 or v2) and that one's parents the least. None where nobody says."""
    def read(path: Path) -> str:
        try:
            return path.read_text()
        except OSError:
            return ""

    rest = []
    machine = dict(re.findall(r"(\w+): +(\d+) kB", read(root / "proc/meminfo")))
    if "MemAvailable" in machine:
        rest.append((int(machine["MemAvailable"]) + int(machine.get("SwapFree", 0))) << 10)
    for line in read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        base = root / "sys/fs/cgroup" / ("memory" if controllers else "")
        limit, usage = ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else \
            ("memory.max", "memory.current")
        group = base / path.lstrip("/")
        for directory in (group, *group.parents):
            most, now = read(directory / limit).strip(), read(directory / usage).strip()
            if most.isdigit() and now.isdigit():
                reclaimable = re.search(r"^(?:total_)?inactive_file (\d+)", read(directory / "memory.stat"), re.M)
                rest.append(max(0, int(most) - int(now) + (int(reclaimable[1]) if reclaimable else 0)))
            if directory == base:
                break
    return min(rest, default=None)

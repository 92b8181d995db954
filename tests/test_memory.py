"""What is left, by what the kernel says of the machine and of a container."""

from __future__ import annotations

from pathlib import Path

import pytest

from fptq_runtime.memory import available_memory


@pytest.mark.parametrize(("cgroup", "limits", "expected"), [
    ("", {}, (8 << 30) + (1 << 30)),
    ("0::/a/b", {"a/b/memory.max": "max", "a/b/memory.current": "5"}, (8 << 30) + (1 << 30)),
    ("0::/a/b", {"a/memory.max": "2147483648", "a/memory.current": "1073741824"}, 1 << 30),
    ("0::/", {"memory.max": "1000", "memory.current": "900", "memory.stat": "active_file 9\ninactive_file 50\n"}, 150),
    ("3:cpu,memory:/d\n2:cpu:/x", {"memory/d/memory.limit_in_bytes": "1000", "memory/d/memory.usage_in_bytes": "900",
                                   "memory/d/memory.stat": "inactive_file 1\ntotal_inactive_file 20\n"}, 101),
    ("3:memory:/d", {"memory/memory.limit_in_bytes": "500", "memory/memory.usage_in_bytes": "900"}, 0),
])
def test_available_memory(tmp_path: Path, cgroup: str, limits: dict[str, str], expected: int) -> None:
    files = {"proc/meminfo": f"MemTotal: 99 kB\nMemAvailable:  {8 << 20} kB\nSwapFree: {1 << 20} kB\n",
             "proc/self/cgroup": cgroup, **{f"sys/fs/cgroup/{name}": text for name, text in limits.items()}}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert available_memory(tmp_path) == expected


def test_nobody_says_what_is_available(tmp_path: Path) -> None:
    assert available_memory(tmp_path) is None

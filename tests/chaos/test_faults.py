"""The page that lists what is tried lists what is."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).parents[1]


def test_every_fault_has_its_test() -> None:
    page = (TESTS.parent / "docs/operate.md").read_text().partition("## What is tried")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (.+) \| `([\w/.]+)::(\w+)` \|$", page, re.MULTILINE)
    assert len({what for what, _, _ in rows}) == len(rows) >= 40
    for _, file, name in rows:
        assert re.search(rf"def {name}\(", (TESTS / file).read_text()), f"{file}::{name}"

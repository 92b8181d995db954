"""Builds the pages into a site: python docs/build.py DIR. README.md is its first page."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BESIDE = ("benchmarks/results", "docker", "examples", "fptq_runtime/quantizer/steps",
          "CONTRIBUTING.md", "SECURITY.md", "NOTICE")  # what pages link to


def build(site: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        shutil.copytree(ROOT / "docs", work / "docs", ignore=shutil.ignore_patterns("*.py", "*.toml", "__pycache__"))
        shutil.copy(ROOT / "docs" / "zensical.toml", work)
        (work / "docs" / "index.md").write_text((ROOT / "README.md").read_text(encoding="utf-8"), encoding="utf-8")
        for name in ("CHANGELOG.md", "CONTRIBUTING.md", "NOTICE", "SECURITY.md"):
            shutil.copy(ROOT / name, work / "docs")
        for path in BESIDE:
            if (ROOT / path).is_dir():
                shutil.copytree(ROOT / path, work / "docs" / path, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / path, work / "docs")
        for page in (work / "docs" / "benchmarks" / "results").glob("*.md"):
            page.write_text(page.read_text(encoding="utf-8").replace("](../../docs/", "](../../"), encoding="utf-8")
        for page in (work / "docs").glob("*.md"):
            text = re.sub(r"\]\((?:docs|\.\.)/", "](", page.read_text(encoding="utf-8"))
            page.write_text(text.replace("](README.md", "](index.md"), encoding="utf-8")
        subprocess.run([sys.executable, "-m", "zensical", "build", "--strict"], cwd=work, check=True)
        shutil.rmtree(site, ignore_errors=True)
        shutil.copytree(work / "site", site)


if __name__ == "__main__":
    build(Path(sys.argv[1]))

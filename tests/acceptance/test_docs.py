"""What the pages say is so: their commands and programs run one after another, in a directory of a page's own, as a
reader would type them; links lead somewhere; the site builds."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

import httpx
import pytest

from fptq_runtime.analysis import advice
from tests.acceptance.harness import COMMAND, DEMO, HELDOUT, PACKAGE, Fptq, environment, free_port, wait_until

ROOT = PACKAGE.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"(?:<!-- not run: (?P<reason>.+?) -->\n)?^```(?P<language>sh|python)\n(?P<code>.*?)^```$",
                   re.M | re.S)

pytestmark = pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="not in a checkout")


@dataclass
class Reader:
    """Someone who types what a page says. A server goes on until the next one, or the page's end."""

    path: Path
    port: int
    env: dict[str, str]
    server: subprocess.Popen[bytes] | None = None

    def run(self, language: str, code: str) -> None:
        code = code.replace(":8000", f":{self.port}").replace("fptq analyze MODEL", "fptq analyze MODEL --quick")
        if language == "python":
            self._run([sys.executable, "-c", code], code)
            return
        script: list[str] = []
        for command in re.sub(r"\\\n\s*", "", code).splitlines():
            if re.match(r"(fptq serve|make serve)\b", command):
                self._run(["bash", "-euo", "pipefail", "-c", "\n".join(script)], code)
                script = []
                self._serve(re.sub("^make serve", "fptq serve demo", command))
            else:
                script.append(command)
        self._run(["bash", "-euo", "pipefail", "-c", "\n".join(script)], code)

    def _run(self, command: list[str], code: str) -> None:
        done = subprocess.run(command, cwd=self.path, env=self.env, stdin=subprocess.DEVNULL, capture_output=True,
                              text=True, timeout=240)
        assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"

    def _serve(self, command: str) -> None:
        self.stop()
        log = self.path / "serve.log"
        with log.open("wb") as file:
            self.server = subprocess.Popen(["bash", "-c", f"exec {command} --port {self.port}"], cwd=self.path,
                                           env=self.env, stdout=file, stderr=subprocess.STDOUT)
        wait_until(lambda: self._ready(log), command, 240)

    def _ready(self, log: Path) -> bool:
        assert self.server is not None and self.server.poll() is None, log.read_text()
        try:
            return httpx.get(f"http://127.0.0.1:{self.port}/readyz").status_code == 200
        except httpx.TransportError:
            return False

    def stop(self) -> None:
        if self.server is not None:
            self.server.send_signal(signal.SIGTERM)
            self.server.wait(60)
            self.server = None


@pytest.fixture(scope="module")
def chat_model(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("chat") / "model"
    shutil.copytree(small_model, path)
    shutil.copy(DEMO / "chat_template.jinja", path)
    return path


@pytest.fixture(scope="module")
def chat_artifact(fptq: Fptq, chat_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("chat") / "artifact"
    result = fptq("quantize", chat_model, path, "--recipe", "rtn")
    assert result.code == 0, result.stderr
    return path


@contextmanager
def reader(path: Path, cache: Path, model: Path, artifact: Path) -> Iterator[Reader]:
    """In a directory that has the files that pages speak of; a model of the hub is a small one here."""
    for name in ("Qwen/Qwen2.5-0.5B-Instruct", "MODEL"):
        shutil.copytree(model, path / name)
    shutil.copytree(artifact, path / "ARTIFACT")
    (path / ".venv" / "bin").mkdir(parents=True)
    (path / ".venv" / "bin" / "activate").touch()
    (path / "my.txt").write_text(HELDOUT.read_text(encoding="utf-8")[:4_000], encoding="utf-8")
    shutil.copytree(ROOT / "examples", path / "examples")
    tools = path / "bin"
    tools.mkdir()
    for name, command in (("fptq", COMMAND), ("python", [sys.executable])):
        (tools / name).write_text(f'#!/bin/sh\nexec {shlex.join(command)} "$@"\n')
        (tools / name).chmod(0o755)
    port = free_port()
    someone = Reader(path, port, environment(cache, PATH=f"{tools}{os.pathsep}{os.environ['PATH']}",
                                             OPENAI_BASE_URL=f"http://127.0.0.1:{port}/v1"))
    try:
        yield someone
    finally:
        someone.stop()


def blocks(page: Path) -> list[tuple[str, str]]:
    """Language and code of what is to be run."""
    return [(match["language"], match["code"]) for match in BLOCK.finditer(page.read_text(encoding="utf-8"))
            if not match["reason"]]


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.name)
def test_what_a_page_says_to_type_works(page: Path, fptq: Fptq, chat_model: Path, chat_artifact: Path,
                                        tmp_path: Path) -> None:
    """What the README makes is at hand for the pages after it."""
    with reader(tmp_path, fptq.cache, chat_model, chat_artifact) as someone:
        if page.name != "README.md":
            shutil.copytree(chat_artifact, tmp_path / "qwen-w4a8")
        for language, code in blocks(page):
            someone.run(language, code)


def anchors(page: Path) -> set[str]:
    """As GitHub and the site make them of headings."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if re.match("[a-z]+:", link):
            continue
        path, _, anchor = unquote(link).partition("#")
        target = (page.parent / path) if path else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


def test_the_site_builds_and_asks_nobody(tmp_path: Path) -> None:
    pytest.importorskip("zensical")
    site = tmp_path / "site"
    done = subprocess.run([sys.executable, ROOT / "docs" / "build.py", site], cwd=ROOT, capture_output=True, text=True,
                          timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = {page.relative_to(site).as_posix(): page.read_text(encoding="utf-8") for page in site.rglob("*.html")}
    assert {"index.html", *(f"{page.stem}/index.html" for page in PAGES[1:])} <= set(pages)
    for name, page in pages.items():
        asked = re.findall(r"""<(?:script|img|iframe|link)[^>]*?(?:src|href)=["']?(?:https?:)?//[^"'> ]+""", page)
        assert not [tag for tag in asked if 'rel="canonical"' not in tag], name


def test_the_workflow_in_the_docs_is_the_one_that_is_asked() -> None:
    drawn = re.findall(r'<text class="t"[^>]*>([^<]+)</text>', (ROOT / "docs" / "workflow.svg").read_text())
    asked = advice._path(0.5, False, [], [], 1.0, "qat")
    assert drawn == [text for step in asked for text in (step["question"], step["action"]) if text]

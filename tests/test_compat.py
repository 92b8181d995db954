"""The page that `make compat` writes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks.compat import __main__ as compat
from benchmarks.compat.__main__ import CLIENTS, Client, Report, page, try_client


def test_every_script_is_a_client() -> None:
    scripts = {path.name for path in (compat.HERE / "clients").iterdir() if path.suffix in (".py", ".mjs")}
    assert scripts == {client.script for client in CLIENTS} | {"trial.py", "trial.mjs", "command.py", "command.mjs"}


def test_page() -> None:
    trials = ({"tried": "chat", "result": "pass", "why": ""},
              {"tried": "files", "result": "refused", "why": "404 | http://127.0.0.1:8123/v1/<files>"},
              {"tried": "more", "result": "fail", "why": "x"})
    text = page([Report(Client("some_python.py", ("some",)), "1.2", trials)], "demo")
    assert "Of 3 things that were tried 1 work, 1 are refused by name, 1 fail." in text
    assert "## some (Python) 1.2" in text
    assert "| files | refused | 404 \\| http://SERVER/v1/&lt;files> |" in text


def test_a_client_that_breaks_is_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it does: what it printed before counts, and the others go on."""
    client = Client("broken.py", ("broken",))
    script = tmp_path / "broken.py"
    script.write_text('print(\'{"tried": "a", "result": "pass", "why": ""}\')\nraise SystemExit("it broke")')
    monkeypatch.setattr(compat, "install", lambda client, work: ([sys.executable, script], "3"))
    report = try_client(client, "http://127.0.0.1:1", "demo", tmp_path)
    assert [(trial["tried"], trial["result"]) for trial in report.trials] == [("a", "pass"), ("its script", "fail")]
    assert report.trials[1]["why"] == "it broke"


def test_a_client_that_cannot_be_installed_is_a_report(tmp_path: Path) -> None:
    missing = Client("none.py", ("no-such-package-of-fptq",), venv="missing")
    (tmp_path / "missing/bin").mkdir(parents=True)
    (tmp_path / "missing/bin/python").symlink_to("/bin/false")
    [trial] = try_client(missing, "", "demo", tmp_path).trials
    assert trial["result"] == "fail"
    assert trial["why"].startswith("pip:")

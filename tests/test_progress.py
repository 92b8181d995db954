"""A bar in a terminal; in a log, lines that can be read where they stand."""

from __future__ import annotations

import io
import re
import sys

import pytest

from fptq_runtime import progress
from fptq_runtime.progress import progress_bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def drawn(monkeypatch: pytest.MonkeyPatch, stderr: io.StringIO, shown: bool = True) -> str:
    monkeypatch.setattr(sys, "stderr", stderr)
    with progress_bar(total=4, desc="quantizing", unit="block", shown=shown) as outer:
        for step in range(4):
            list(progress_bar(range(2), desc="perplexity", unit="window", shown=shown))
            outer.update()
            outer.set_postfix(kl=step, refresh=False)
    return stderr.getvalue()


def test_a_log_gets_whole_lines_with_what_remains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    text = drawn(monkeypatch, io.StringIO())
    assert "\r" not in text
    assert "\x1b" not in text
    assert all(re.fullmatch(r"\w+: \d+%, \d of [24], \d\d:\d\d so far, about (\d\d:\d\d|\?) left(, kl=\d)?", line)
               for line in text.splitlines()), text
    assert "quantizing: 50%, 2 of 4" in text
    assert "perplexity: 100%, 2 of 2" in text


def test_a_log_gets_nothing_of_what_is_soon_done(monkeypatch: pytest.MonkeyPatch) -> None:
    assert drawn(monkeypatch, io.StringIO()) == ""


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    text = drawn(monkeypatch, Terminal())
    assert "\rquantizing:   0%|" in text
    assert "4/4" in text


def test_numbers_that_say_nothing_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    for stderr in io.StringIO(), Terminal():
        monkeypatch.setattr(sys, "stderr", stderr)
        with progress_bar(total=7.25, desc="analyzing", unit="pass", shown=True, counts=False) as bar:
            bar.n = 4.5
            bar.refresh()
        assert "analyzing: 62%, 00:00 so far, about" in stderr.getvalue() or "analyzing:  62%|" in stderr.getvalue()
        assert "4.5" not in stderr.getvalue()


@pytest.mark.parametrize("stderr", [io.StringIO(), Terminal()])
def test_nobody_asked(monkeypatch: pytest.MonkeyPatch, stderr: io.StringIO) -> None:
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    assert drawn(monkeypatch, stderr, shown=False) == ""


def test_a_new_description_waits_for_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with progress_bar(total=4, unit="model", shown=True) as bar:
        bar.set_description("float")
        assert sys.stderr.getvalue() == ""
        bar.refresh()
    assert sys.stderr.getvalue().startswith("float: 0%, 0 of 4, 00:00 so far, about ? left\n")

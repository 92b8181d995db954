"""How far a long computation is: a bar in a terminal; in a log, where carriage returns cannot be read, whole lines."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterable
from typing import Any, TextIO

from tqdm import tqdm

LINE_SECONDS = 5.0  # between a log's lines, and before the first


class _Lines(io.TextIOBase):
    """What tqdm draws, without what moves a cursor."""

    def __init__(self, log: TextIO) -> None:
        self._log = log
        self._last = ""  # which tqdm draws again where a bar ends

    def write(self, drawn: str) -> int:
        line = drawn.replace("\x1b[A", "").strip()
        if line not in ("", self._last):
            self._log.write(f"{line}\n")
            self._last = line
        return len(drawn)

    def flush(self) -> None:
        self._log.flush()


class _LogBar(tqdm):  # type: ignore[type-arg]  # only its stubs take one
    def set_description(self, desc: str | None = None, refresh: bool | None = True) -> None:
        super().set_description(desc, refresh=False)  # the next line will say it


def duration(seconds: float) -> str:
    """As people say it: "40 seconds", "7 minutes", "2.5 hours"."""
    if seconds < 90:
        return f"{max(1, round(seconds))} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def tell(line: str) -> None:
    """Say something on stderr, above the bars that are drawn there."""
    tqdm.write(line, file=sys.stderr)


def progress_bar(iterable: Iterable[Any] | None = None, *, unit: str, shown: bool, desc: str = "",
                 total: float | None = None, initial: int = 0, counts: bool = True) -> tqdm[Any]:
    """tqdm's, on stderr. counts: whether people can make sense of the numbers done and in total."""
    what: dict[str, Any] = {"iterable": iterable, "unit": unit, "disable": not shown, "total": total,
                            "initial": initial}
    if sys.stderr.isatty():
        left = "{l_bar}{bar}| {elapsed}, about {remaining} left"
        return tqdm(desc=desc, bar_format=None if counts else left, **what)
    done = ", {n_fmt} of {total_fmt}" if counts else ""
    line = f"{{desc}}{{percentage:.0f}}%{done}, {{elapsed}} so far, about {{remaining}} left{{postfix}}"
    return _LogBar(desc=desc and f"{desc}: ", bar_format=line, file=_Lines(sys.stderr), mininterval=LINE_SECONDS,
                   delay=LINE_SECONDS, **what)

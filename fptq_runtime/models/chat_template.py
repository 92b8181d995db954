"""A model's chat template, rendered in processes that end where it takes too much."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import weakref
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

from fptq_runtime.errors import FptqError

RENDERERS = 2  # processes; conversations beyond them wait in order
MAX_BYTES = 512 << 20  # of a process
MAX_CHARACTERS = 16 << 20  # of a rendered conversation
CPU_SECONDS = 0.5  # for a conversation, with one more for each 2^20 characters it has; templates take about 0.001
WALL_SECONDS = 8.0  # in which a busy machine gives a process that much
KEPT_ENVIRONMENT = ("LD_LIBRARY_PATH", "TZ")  # keys and tokens stay here

_SCRIPT = Path(__file__).with_name("render.py")


class ChatTemplateError(FptqError):
    """The model has no chat template, or it cannot render these messages."""


class ChatTemplate:
    """source: Jinja, as transformers reads it. Processes start when first needed, and stay."""

    def __init__(self, source: str) -> None:
        self.source = source
        self._idle: list[_Renderer] = []
        self._threads = ThreadPoolExecutor(RENDERERS, "chat-template")
        weakref.finalize(self, _close, self._idle)

    def render(self, variables: Mapping[str, Any]) -> Future[str]:
        """variables: what JSON can carry. Raises ChatTemplateError, here or in the future, at the latest WALL_SECONDS
        after a process took the conversation up."""
        try:
            line = json.dumps(variables)
        except (TypeError, ValueError, RecursionError) as error:
            raise ChatTemplateError(f"the chat template cannot be given these messages: {error}") from None
        return self._threads.submit(self._render, line)

    @cached_property
    def variables(self) -> frozenset[str]:
        """Names that it reads and does not set. Raises ChatTemplateError."""
        return frozenset(json.loads(self._threads.submit(self._render, "null").result()))

    def _render(self, variables: str) -> str:
        renderer = self._idle.pop() if self._idle else _Renderer(self.source)
        if not renderer.is_alive:
            renderer.close()
            renderer = _Renderer(self.source)
        try:
            answer = renderer.render(variables, CPU_SECONDS + len(variables) / (1 << 20))
        except BaseException:
            renderer.close()
            raise
        if answer["last"]:
            renderer.close()
        else:
            self._idle.append(renderer)
        if "error" in answer:
            raise _refusal(answer["error"])
        text: str = answer["text"]
        return text


class _Renderer:
    """One process of render.py."""

    def __init__(self, template: str) -> None:
        self._socket, theirs = socket.socketpair()
        self._socket.settimeout(WALL_SECONDS)
        self._lines = self._socket.makefile("rb")
        environment = {name: os.environ[name] for name in KEPT_ENVIRONMENT if name in os.environ}
        with theirs:
            self._process = subprocess.Popen([sys.executable, "-I", "-S", str(_SCRIPT)], stdin=theirs.fileno(),
                                             stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
        setup = {"path": sys.path, "template": template, "max_bytes": MAX_BYTES, "max_characters": MAX_CHARACTERS}
        self._setup = f"{json.dumps(setup)}\n"

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def render(self, variables: str, seconds: float) -> dict[str, Any]:
        """What render.py answers. Raises ChatTemplateError where it does not."""
        try:
            self._socket.sendall(f'{self._setup}{{"seconds": {seconds}, "variables": {variables}}}\n'.encode())
            self._setup = ""
            line = self._lines.readline(12 * MAX_CHARACTERS + 8192)  # a character is one or two \uXXXX
            answer: dict[str, Any] = json.loads(line)
        except TimeoutError:
            raise _refusal(f"it has not ended after {WALL_SECONDS:g} s") from None
        except (OSError, ValueError):  # the process has ended
            raise _refusal(self._why_ended(seconds)) from None
        return answer

    def _why_ended(self, seconds: float) -> str:
        with suppress(subprocess.TimeoutExpired):
            if self._process.wait(1) == -signal.SIGPROF:
                return f"it takes more than {seconds:.1f} s of CPU time"
        return f"it ends its process ({self._process.returncode})"

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._lines.close()
        self._socket.close()


def _close(renderers: list[_Renderer]) -> None:
    while renderers:
        renderers.pop().close()


def _refusal(reason: str) -> ChatTemplateError:
    return ChatTemplateError(f"the chat template refuses these messages: {reason}")

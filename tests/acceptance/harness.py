"""Runs fptq as a user does: the command in a process of its own, the server over loopback HTTP."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
from prometheus_client.parser import text_string_to_metric_families

import fptq_runtime

PACKAGE = Path(fptq_runtime.__file__).parent
DEMO = PACKAGE / "demo"
HELDOUT = PACKAGE / "quantizer" / "data" / "heldout.txt"
COMMAND = [sys.executable, "-c", "import sys; from fptq_runtime.cli import main; sys.exit(main())"]


def environment(cache: Path, **changes: str) -> dict[str, str]:
    """The caller's, with a cache of the tests' own and no network."""
    unset = ("FPTQ_ISA", "FPTQ_DEBUG", "HF_TOKEN")
    env = {k: v for k, v in os.environ.items() if k not in unset}
    path = os.pathsep.join(filter(None, (str(PACKAGE.parent), env.get("PYTHONPATH"))))
    return {**env, "XDG_CACHE_HOME": str(cache), "HF_HUB_OFFLINE": "1", "PYTHONPATH": path, **changes}


@dataclass(frozen=True)
class Result:
    code: int
    stdout: str
    stderr: str

    @property
    def json(self) -> dict[str, Any]:
        """Standard output, which must be one JSON object and nothing else."""
        assert self.code == 0, self.stderr
        value = json.loads(self.stdout)
        assert isinstance(value, dict)
        return value

    @property
    def lines(self) -> list[str]:
        """What a terminal shows at the end: progress bars overwrite their line."""
        return [line.rsplit("\r", 1)[-1] for line in self.stderr.split("\n") if line.strip()]

    def assert_error(self, *names: str) -> None:
        """Failed, with one last line that says every one of `names` (a|b: either), and no traceback."""
        shown = f"exit {self.code}\n{self.stdout}\n{self.stderr}"
        assert self.code not in (0, None) and self.code > 0, shown
        assert not re.search("Traceback|internal error", self.stdout + self.stderr), shown
        assert self.lines, shown
        message = self.lines[-1]
        for name in names:
            assert re.search(name, message, re.IGNORECASE), f"{name!r} is not in: {message}"

    def assert_usage_error(self, *names: str) -> None:
        """An error that was seen before any work: that line is all there is."""
        self.assert_error(*names)
        assert len(self.lines) == 1, self.stderr
        assert not self.stdout, self.stdout


class Fptq:
    """The command, with a cache of its own."""

    def __init__(self, cache: Path) -> None:
        self.cache = cache

    def __call__(self, *args: object, env: Mapping[str, str] | None = None, cwd: Path | None = None,
                 timeout: float = 120) -> Result:
        done = subprocess.run([*COMMAND, *map(str, args)], env=environment(self.cache, **(env or {})), cwd=cwd,
                              capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL)
        return Result(done.returncode, done.stdout, done.stderr)

    def start(self, *args: object, output: Any = subprocess.DEVNULL, **env: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([*COMMAND, *map(str, args)], env=environment(self.cache, **env), stdout=output,
                                stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def wait_until(condition: Callable[[], Any], what: str, seconds: float = 60) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.05)
    raise AssertionError(f"after {seconds} s, not yet: {what}")


class Server:
    """`fptq serve ARTIFACT …` on a free loopback port; a context manager that ends the process it started."""

    def __init__(self, fptq: Fptq, log: Path, artifact: object, *args: object, api_key: str | None = None,
                 **env: str) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        key = [] if api_key is None else ["--api-key", api_key]
        with log.open("wb") as file:
            self.process = fptq.start("serve", artifact, "--port", self.port, *args, *key, output=file, **env)
        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        limits = httpx.Limits(max_connections=None)
        self.http = httpx.Client(base_url=self.url, headers=headers, timeout=120, limits=limits)
        self.openai = openai.OpenAI(base_url=self.url + "/v1", api_key=api_key or "none", max_retries=0, timeout=120)
        self.async_openai = lambda: openai.AsyncOpenAI(base_url=self.url + "/v1", api_key=api_key or "none",
                                                       max_retries=0, timeout=240)

    def __enter__(self) -> Server:
        try:
            wait_until(self.is_ready, "the server is ready", 280)
        except BaseException as error:
            self.__exit__()
            raise AssertionError(f"{error}\n{self.log.read_text()[-4000:]}") from error
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(60)
            raise AssertionError("the server did not end within 60 s of SIGTERM") from None

    def is_ready(self) -> bool:
        assert self.process.poll() is None, f"the server ended with {self.process.returncode}"
        try:
            return self.http.get("/readyz").status_code == 200
        except httpx.TransportError:
            return False

    def post(self, path: str, body: Any, **kwargs: Any) -> httpx.Response:
        return self.http.post(path, json=body, **kwargs)

    def complete(self, **body: Any) -> dict[str, Any]:
        """One /v1/completions answer, whole."""
        response = self.post("/v1/completions", body)
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    def serves(self) -> bool:
        return bool(self.complete(prompt="Once upon a time", max_tokens=2, temperature=0)["choices"][0]["text"])

    def tokens(self, text: str) -> list[int]:
        response = self.post("/tokenize", {"prompt": text})
        assert response.status_code == 200, response.text
        tokens: list[int] = response.json()["tokens"]
        return tokens

    def metrics(self) -> Metrics:
        response = self.http.get("/metrics")
        assert response.status_code == 200, response.text
        return Metrics(response.text)


class Metrics:
    """One scrape."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.families = {family.name: family for family in text_string_to_metric_families(text)}

    def find(self, pattern: str, kind: str | None = None) -> str:
        """The one family of that kind whose name matches."""
        names = [name for name, family in self.families.items()
                 if name.startswith("fptq") and re.search(pattern, name) and kind in (None, family.type)]
        assert len(names) == 1, f"{pattern} ({kind}) matches {names} of {sorted(self.families)}"
        return names[0]

    def value(self, pattern: str, kind: str = "gauge", **labels: str) -> float:
        """The sum over the samples that have these labels; of a histogram, how many observations."""
        family = self.families[self.find(pattern, kind)]
        suffix = {"counter": "_total", "histogram": "_count", "gauge": ""}[kind]
        return sum(sample.value for sample in family.samples
                   if sample.name == family.name + suffix and labels.items() <= sample.labels.items())


def events(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """The JSON of a server-sent event stream's data lines, up to [DONE]."""
    for line in lines:
        if line.startswith("data:"):
            data = line.removeprefix("data:").strip()
            if data == "[DONE]":
                return
            yield json.loads(data)


def words(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


def assert_fluent(text: str) -> None:
    """The demo model writes tales: almost all words are ones that its packaged texts use, and not one word over and
    over. Wrong kernels or a wrong tokenizer join pieces of words at random."""
    known = {word for file in HELDOUT.parent.glob("*.txt") for word in words(file.read_text(encoding="utf-8"))}
    written = words(text)[:-1]  # the last may be cut
    assert len(written) >= 20, text
    assert sum(word in known for word in written) >= 0.9 * len(written), text
    assert len(set(written)) >= 0.3 * len(written), text

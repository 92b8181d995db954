"""What a peer is, what a row asks, and how programs are run."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from fptq_runtime.measure.shapes import CONFIGS

STEPS = 24  # of decoding, with every sequence
WORKERS = Path(__file__).parent / "workers"  # programs, some of them for a peer's own environment


@dataclass(frozen=True)
class Row:
    """prefill: prompt tokens per second until all have their first token; decode: tokens per second of all sequences
    together. isa: what the CPU's instructions are held to, where the peer can be."""

    phase: Literal["prefill", "decode"]
    batch: int
    context: int
    isa: Literal["native", "avx2"] = "native"

    @property
    def label(self) -> str:
        what = f"prefill, {self.context} tokens" if self.phase == "prefill" else f"decode, batch {self.batch}"
        if self.phase == "prefill" and self.batch > 1:
            what += f" × {self.batch}"
        return what + (f", context {self.context}" if self.phase == "decode" else "") + \
            (", AVX2" if self.isa == "avx2" else "")


class Peer(Protocol):
    """One engine in a work directory of its own. `commands` is what was run, for the results."""

    name: str
    commands: list[str]

    def prepare(self, shape: str) -> str:
        """Install, build and make the shape where that is not done yet. Returns versions, raises Unavailable."""
        ...

    def measure(self, row: Row) -> float | None:
        """Tokens per second; None where it cannot run this row."""
        ...

    def resident_mib(self) -> float | None:
        """Memory in use after what was measured so far; None where nothing stays loaded."""
        ...

    def close(self) -> None:
        """Give the memory back."""
        ...


class Unavailable(Exception):
    """A peer that this machine cannot run, and why."""


class Worker:
    """A program that loads a model once, says {"ready": …}, and answers a JSON line with a JSON line. Stopped between
    its answers, so that threads which wait by spinning take nothing from the others."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str]) -> None:
        self._command = command
        self._process = subprocess.Popen(command, env=dict(env), stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                         text=True, start_new_session=True)
        self._read()
        self._signal(signal.SIGSTOP)

    def ask(self, question: Mapping[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._signal(signal.SIGCONT)
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        answer = self._read()
        self._signal(signal.SIGSTOP)
        return answer

    def resident_mib(self) -> float:
        """Of the program and what it started; pages they share count for each."""
        return sum(resident_mib(int(path.name)) for path in Path("/proc").iterdir()
                   if path.name.isdigit() and os.getpgid(int(path.name)) == self._process.pid)

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):  # where it ended by itself
            self._signal(signal.SIGKILL)
        self._process.wait()

    def _signal(self, number: int) -> None:
        os.killpg(self._process.pid, number)

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):  # libraries print as they like
                answer: dict[str, Any] = json.loads(line)
                return answer
        raise RuntimeError(f"{' '.join(self._command)} ended with {self._process.wait()}")


class WorkerPeer:
    """A peer that measures with a worker, started when it is first needed."""

    name: str

    def __init__(self) -> None:
        self.commands: list[str] = []
        self._workers: dict[str, Worker] = {}

    def worker_command(self, isa: str) -> tuple[list[str], dict[str, str]]:
        """What to run, and its environment."""
        raise NotImplementedError

    def measure(self, row: Row) -> float | None:
        return self.ask(asdict(row) | {"steps": STEPS}, row.isa)

    def ask(self, question: Mapping[str, Any], isa: str = "native") -> float:
        """Tokens per second, as the worker for that ISA answers."""
        if isa not in self._workers:
            self._workers[isa] = Worker(*self.worker_command(isa))
        return float(self._workers[isa].ask(question)["tokens_per_s"])

    def resident_mib(self) -> float | None:
        """Of the worker for rows of this machine's own ISA."""
        return self._workers["native"].resident_mib() if "native" in self._workers else None

    def close(self) -> None:
        for worker in self._workers.values():
            worker.close()
        self._workers.clear()


def resident_mib(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS:"))) / 1024


DENSE = tuple(name for name, config in CONFIGS.items() if config["model_type"] == "llama")


def sizes(shape: str) -> dict[str, Any]:
    """A shape in the words of transformers' LlamaConfig. The small models tie their embeddings in reality."""
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps")
    return {**{name: CONFIGS[shape][name] for name in names}, "tie_word_embeddings": shape != "llama-2-7b"}


def run(command: Sequence[str | Path], env: Mapping[str, str] | None = None, log: Path | None = None) -> str:
    """stdout. Raises RuntimeError with the end of stderr; log: where both go instead, for what takes minutes."""
    arguments = [str(part) for part in command]
    if log is not None:
        with log.open("a") as file:
            code = subprocess.run(arguments, env=env, stdout=file, stderr=file, check=False).returncode
        if code:
            raise RuntimeError(f"{' '.join(arguments)} failed, see {log}")
        return ""
    done = subprocess.run(arguments, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)} failed: {done.stderr[-800:]}")
    return done.stdout


@contextmanager
def made_once(path: Path) -> Iterator[Path | None]:
    """Where `path` does not exist, a name to make it under; it gets its own once all went well."""
    if path.exists():
        yield None
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    print(f"making {path}", file=sys.stderr, flush=True)
    yield partial
    partial.rename(path)


def make_venv(path: Path, packages: Sequence[str], extra: Sequence[str] = (), python: str = sys.executable) -> Path:
    """An environment with `packages`, and `extra` without what they depend on. Returns its python."""
    stamp = path / "complete"
    if not stamp.exists():
        print(f"installing {' '.join([*packages, *extra])}", file=sys.stderr, flush=True)
        path.mkdir(parents=True, exist_ok=True)
        log = path / "log"
        run([python, "-m", "venv", path], log=log)
        run([path / "bin/python", "-m", "pip", "install", *packages], log=log)
        if extra:
            run([path / "bin/python", "-m", "pip", "install", "--no-deps", *extra], log=log)
        stamp.touch()
    return path / "bin/python"

"""FPTQ Serve, with a 4-bit head, as `fptq bench` measures it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import fptq_runtime
from benchmarks.peers.base import STEPS, Row, WorkerPeer, made_once, run
from fptq_runtime.kernels.cpu import CpuBackend
from fptq_runtime.measure.shapes import SHAPES


class Ours(WorkerPeer):
    name = "FPTQ Serve"

    def __init__(self, work_dir: Path, threads: int) -> None:
        super().__init__()
        self._work_dir = work_dir / "fptq"
        self._threads = threads
        self._shape = ""

    def prepare(self, shape: str) -> str:
        self._shape = shape
        return (f"fptq-serve {fptq_runtime.__version__}, int4 group 128, int8 activations per token, 4-bit head, "
                "int8 KV")

    def worker_command(self, isa: str) -> tuple[list[str], dict[str, str]]:
        command = [sys.executable, "-m", "benchmarks.peers.workers.measure_ours", self._shape, str(self._threads)]
        return command, {**os.environ, **({"FPTQ_ISA": "avx2"} if isa == "avx2" else {})}

    def measure(self, row: Row) -> float | None:
        shown = (f"{'FPTQ_ISA=avx2 ' if row.isa == 'avx2' else ''}fptq bench --shape {self._shape} --phase {row.phase} "
                 f"--batch {row.batch} --context {row.context} --threads {self._threads} --steps {STEPS}")
        if shown not in self.commands:
            self.commands.append(shown)
        return super().measure(row)

    def server(self, port: int, slots: int, tokens: int) -> list[str]:
        """tokens: of context, for each slot, and memory for them."""
        memory = slots * tokens * CpuBackend(1).token_bytes(SHAPES[self._shape].config, "int8")
        return [sys.executable, "-m", "fptq_runtime.cli", "serve", str(make_artifact(self._work_dir, self._shape)),
                "--port", str(port), "--served-model-name", self._shape, "--threads", str(self._threads),
                "--max-num-seqs", str(slots), "--max-model-len", str(tokens), "--kv-cache-memory", str(memory)]

    def without_http(self, clients: int, prompt_tokens: int, output_tokens: int) -> float:
        """Output tokens per second of the engine alone under what the clients send."""
        return self.ask({"clients": clients, "prompt_tokens": prompt_tokens, "output_tokens": output_tokens})


def make_artifact(work_dir: Path, shape: str) -> Path:
    path = work_dir / shape
    with made_once(path) as out:
        if out is not None:
            run([sys.executable, "-c", "import sys; from pathlib import Path; "
                 "from benchmarks.shape_artifact import write_shape_artifact; "
                 "from fptq_runtime.kernels.select import select_backend; "
                 "write_shape_artifact(sys.argv[1], Path(sys.argv[2]), select_backend(), 4)", shape, out])
    return path

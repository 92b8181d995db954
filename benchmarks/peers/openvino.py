"""OpenVINO GenAI: continuous batching over paged attention, int4 symmetric weights in groups of 128 in every layer."""

from __future__ import annotations

import json
import os
from pathlib import Path

from benchmarks.peers.base import WORKERS, Row, Unavailable, WorkerPeer, made_once, make_venv, run, sizes

# torchvision would come for another torch, and nothing here needs it.
PACKAGES = ("openvino-genai==2026.4.1.0", "nncf==3.4.0", "torch==2.13.0", "transformers==5.5.4",
            "huggingface_hub==1.21.0", "requests", "setuptools")
WITHOUT_DEPENDENCIES = ("optimum-intel==2.2.0", "optimum==2.3.0")
EXPORT = ("--task", "text-generation-with-past", "--weight-format", "int4", "--sym", "--group-size", "128", "--ratio",
          "1.0", "--all-layers")


class OpenVino(WorkerPeer):
    name = "OpenVINO"

    def __init__(self, work_dir: Path, threads: int) -> None:
        super().__init__()
        self._work_dir = work_dir / "openvino"
        self._threads = threads
        self._python = Path()
        self._model = Path()

    def prepare(self, shape: str) -> str:
        if shape == "llama-2-7b":
            raise Unavailable("converting the 7B shape needs more memory than this machine has")
        self._python = make_venv(self._work_dir / "venv", PACKAGES, WITHOUT_DEPENDENCIES)
        log = self._work_dir / "log"
        self._model = self._work_dir / shape
        checkpoint = self._work_dir / f"{shape}-bf16"
        with made_once(self._model) as out:
            if out is not None:
                run([self._python, WORKERS / "write_hf.py", checkpoint, json.dumps(sizes(shape))],
                    log=log)
                run([self._python.with_name("optimum-cli"), "export", "openvino", "-m", checkpoint, *EXPORT, out],
                    env={**os.environ, "PATH": f"{self._python.parent}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"},
                    log=log)
        self.commands.append(f"optimum-cli export openvino -m {checkpoint.name} {' '.join(EXPORT)} {shape}")
        self.commands.append(f"workers/measure_openvino.py: ContinuousBatchingPipeline, "
                             f"INFERENCE_NUM_THREADS={self._threads}, "
                             "DYNAMIC_QUANTIZATION_GROUP_SIZE=128, max_num_batched_tokens 512")
        return f"{', '.join(package for package in PACKAGES[:2])}, int4 symmetric group 128, 4-bit head, u8 KV"

    def worker_command(self, isa: str) -> tuple[list[str], dict[str, str]]:
        script = WORKERS / "measure_openvino.py"
        return [str(self._python), str(script), str(self._model), str(self._threads)], dict(os.environ)

    def measure(self, row: Row) -> float | None:
        return super().measure(row) if row.isa == "native" else None

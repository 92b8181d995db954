"""llama.cpp as its Python package vendors it: Q4_0 in every matrix, its own benchmarks and server."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from benchmarks.peers.base import STEPS, WORKERS, Row, made_once, run, sizes

VERSION = "0.3.36"
OPTIONS = ("-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release", "-DBUILD_SHARED_LIBS=ON", "-DLLAMA_OPENSSL=OFF",
           "-DLLAMA_USE_PREBUILT_UI=OFF", "-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_EXAMPLES=OFF",
           "-DLLAMA_BUILD_APP=OFF")
# The CPU kernels without AVX-512, as a library that takes the place of the native one.
AVX2 = ("-DGGML_NATIVE=OFF", "-DGGML_AVX2=ON", "-DGGML_FMA=ON", "-DGGML_F16C=ON", "-DGGML_BMI2=ON")


class LlamaCpp:
    name = "llama.cpp"

    def __init__(self, work_dir: Path, threads: int, kv_type: str = "f16") -> None:
        """kv_type: of the cache, "f16" or "q8_0"."""
        self._work_dir = work_dir / "llama.cpp"
        self._threads = threads
        self._kv_type = kv_type
        if kv_type != "f16":
            self.name += f", {kv_type} KV"
        self.commands: list[str] = []
        self.model = Path()

    def prepare(self, shape: str) -> str:
        source = self._work_dir / "source"
        log = self._work_dir / "log"
        with made_once(source) as out:
            if out is not None:
                run([sys.executable, "-m", "pip", "download", "--no-binary", "llama-cpp-python", "--no-deps", "-d",
                     self._work_dir, f"llama-cpp-python=={VERSION}"], log=log)
                out.mkdir()
                run(["tar", "xzf", *self._work_dir.glob("llama_cpp_python-*.tar.gz"), "-C", out,
                     "--strip-components=1"])
        llama = source / "vendor/llama.cpp"
        for build, options, targets in (
            ("native", (), ("llama-bench", "llama-batched-bench", "llama-server")), ("avx2", AVX2, ("ggml-cpu",)),
        ):
            path = self._work_dir / build
            if not (path / "complete").exists():  # a build directory cannot be renamed
                print(f"building {path}", file=sys.stderr, flush=True)
                run(["cmake", "-S", llama, "-B", path, *OPTIONS, *options], log=log)
                run(["cmake", "--build", path, "--target", *targets], log=log)
                (path / "complete").touch()
        self.model = self._work_dir / f"{shape}.gguf"
        with made_once(self.model) as out:
            if out is not None:
                run([sys.executable, WORKERS / "write_gguf.py", out, json.dumps(sizes(shape))],
                    env={**os.environ, "PYTHONPATH": str(llama / "gguf-py")}, log=log)
        return f"llama-cpp-python {VERSION}'s llama.cpp, Q4_0 in every matrix, {self._kv_type} KV"

    def measure(self, row: Row) -> float:
        threads, kv = str(self._threads), ["-ctk", self._kv_type, "-ctv", self._kv_type]
        if row.phase == "prefill" and row.batch == 1:
            done = self._run(["llama-bench", "-p", str(row.context), "-n", "0", "-r", "2", "-t", threads, "-o", "jsonl",
                              *kv], row)
            return float(json.loads(done.splitlines()[-1])["avg_ts"])
        # -pps computes one prompt and copies its keys and values for the others, which decode as with their own:
        # measured to be as fast, and a fraction of the minutes.
        shared = ["-pps"] if row.phase == "decode" else []
        done = self._run(["llama-batched-bench", "-npp", str(row.context), "-ntg", str(STEPS), "-npl", str(row.batch),
                          "-c", str(row.batch * (row.context + STEPS + 8)), "-b", "2048", "-ub", "512", "-t", threads,
                          "--no-kv-unified", "--output-format", "jsonl", *shared, *kv], row)
        line = next(line for line in reversed(done.splitlines()) if line.startswith("{"))
        return float(json.loads(line)["speed_pp" if row.phase == "prefill" else "speed_tg"])

    def server(self, port: int, slots: int, tokens: int) -> list[str]:
        """tokens: of context, for each slot."""
        return [str(self._work_dir / "native/bin/llama-server"), "-m", str(self.model), "--host", "127.0.0.1", "--port",
                str(port), "-t", str(self._threads), "--parallel", str(slots), "-c", str(slots * tokens),
                "--no-kv-unified", "--cache-ram", "0"]

    def resident_mib(self) -> None:
        return None  # each row is a process of its own

    def close(self) -> None:
        pass

    def _run(self, command: list[str], row: Row) -> str:
        env = dict(os.environ)
        if row.isa == "avx2":
            env["LD_LIBRARY_PATH"] = str(self._work_dir / "avx2/bin")
        shown = " ".join([*(["LD_LIBRARY_PATH=avx2/bin"] if row.isa == "avx2" else []), command[0], "-m",
                          self.model.name, *command[1:]])
        if shown not in self.commands:
            self.commands.append(shown)
        return run([self._work_dir / "native/bin" / command[0], "-m", self.model, *command[1:]], env=env)

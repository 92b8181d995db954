"""Coverage-guided fuzzing of tests/fuzz/targets.py by atheris:

    python -m tests.fuzz.guided [--seconds 300] [--out build/fuzz] [TARGET ...]

Each target has so many seconds in a process of its own, and a new one after each crash, hang or exception, whose input
is kept in `found`, its output beside it. Inputs that led somewhere new are in `corpus`, where the next run goes on.
Prints a row for each target, and ends with 1 where something was found. FPTQ_FUZZ_NATIVE is a directory with an
instrumented _native*.so for the target `native` (the Makefile says how one is built).
"""

from __future__ import annotations

import argparse
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import atheris

CORPUS = Path(__file__).parent / "corpus"
HANG_SECONDS = 60
MAX_BYTES = 1 << 16  # of an input
MEMORY_MB = 6144
MOST_FOUND = 8  # of a target, after which its time is over
INSTRUMENTED = ["fptq_runtime", "fptq_server", "gguf", "jinja2"]


def fuzz(name: str, arguments: list[str]) -> None:
    """Does not return: libFuzzer ends the process."""
    if name == "native" and "FPTQ_FUZZ_NATIVE" in os.environ:
        use_native(next(Path(os.environ["FPTQ_FUZZ_NATIVE"]).glob("_native*.so")))
    with atheris.instrument_imports(include=INSTRUMENTED):
        from tests.fuzz.mutator import Mutator
        from tests.fuzz.targets import TARGETS
    target = TARGETS[name]
    scratch = tempfile.TemporaryDirectory(prefix="fptq-fuzz-")
    run = target.start(Path(scratch.name))

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        place = random.Random(seed)
        if place.random() < 0.7:
            try:
                changed = target.mutate(Mutator(place), data)
            except (ValueError, RecursionError, IndexError):
                pass
            else:
                if len(changed) <= max_size:
                    return changed
        return atheris.Mutate(data, max_size)

    atheris.Setup([sys.argv[0], *arguments], run, custom_mutator=mutate)
    atheris.Fuzz()


def use_native(file: Path) -> None:
    spec = spec_from_file_location("fptq_runtime._native", file)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules["fptq_runtime._native"] = module
    spec.loader.exec_module(module)


def supervise(name: str, seconds: float, out: Path) -> int:
    """Fuzz one target; how many inputs were found."""
    environment = dict(os.environ)
    if name == "native" and "FPTQ_FUZZ_NATIVE" in os.environ:
        runtime = Path(atheris.path()) / "asan_with_fuzzer.so"
        environment |= {"LD_PRELOAD": str(runtime), "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1"}
    inputs, grown = out / "found" / name, out / "corpus" / name
    inputs.mkdir(parents=True, exist_ok=True)
    grown.mkdir(parents=True, exist_ok=True)
    before = len(list(inputs.iterdir()))
    deadline = time.monotonic() + seconds
    executions = 0
    cpu = resource.getrusage(resource.RUSAGE_CHILDREN)
    while (left := int(deadline - time.monotonic())) > 0 and len(list(inputs.iterdir())) - before < MOST_FOUND:
        command = [sys.executable, "-m", "tests.fuzz.guided", "--run", name, f"-max_total_time={left}",
                   f"-timeout={HANG_SECONDS}", f"-rss_limit_mb={MEMORY_MB}", f"-max_len={MAX_BYTES}",
                   f"-artifact_prefix={inputs}/", "-print_final_stats=1", str(grown), str(CORPUS / name)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=environment)
        executions += sum(int(line.split()[-1]) for line in done.stderr.splitlines()
                          if line.startswith("stat::number_of_executed_units"))
        if done.returncode:
            number = len(list(inputs.iterdir()))
            (out / "found" / f"{name}-{number}.log").write_text(done.stdout + done.stderr[-20_000:])
            if number == before:
                print(done.stderr[-4000:], file=sys.stderr)
                raise SystemExit(f"{name} does not start")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - cpu.ru_utime - cpu.ru_stime
    count = len(list(inputs.iterdir())) - before
    print(f"| {name} | {spent / 60:.1f} min | {executions} | {count} |", flush=True)
    return count


def main() -> None:
    from tests.fuzz.targets import TARGETS

    parser = argparse.ArgumentParser(description="Fuzz, by coverage.")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help="all unless given: " + ", ".join(TARGETS))
    parser.add_argument("--seconds", type=float, default=300, help="for each target")
    parser.add_argument("--out", type=Path, default=Path("build/fuzz"), help="where inputs are kept")
    arguments = parser.parse_args()
    print("| target | CPU | inputs | found |\n|---|---|---|---|", flush=True)
    sys.exit(min(1, sum(supervise(name, arguments.seconds, arguments.out) for name in arguments.targets or TARGETS)))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--run"]:
        fuzz(sys.argv[2], sys.argv[3:])
    else:
        main()

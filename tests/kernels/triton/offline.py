"""GPUs that are not here: what host code would launch on one, compiled for it and read back.

Apart from the tests' own process, where kernels are the interpreter's: `in_process` starts one. There tensors are meta,
so that shapes may be those of real models.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

ROOT = Path(__file__).parents[3]
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
HOPPER = 90
REGISTERS, SHARED, WARPS, CTAS = 65536, 228 << 10, 64, 32  # of a multiprocessor of capability 9.0
_TENSOR_CORE = re.compile(r"[IHQ]G?MMA")


def in_process(module: str, *arguments: Any, timeout: float = 900) -> Any:
    """What a module of the tests prints as JSON, run as a program without the interpreter's switch."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [environment.get("PYTHONPATH")])])
    done = subprocess.run([sys.executable, "-m", module, *map(str, arguments)], env=environment, cwd=ROOT,
                          capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@dataclass(frozen=True)
class Launch:
    """A kernel as the host launched it. arguments: by name, without the options."""

    kernel: str
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    binary: Any

    @cached_property
    def registers(self) -> int:
        return int(self._usage[1])

    @cached_property
    def spilled(self) -> int:
        """Bytes of a thread."""
        return int(self._usage[2]) + int(self._usage[3])

    @property
    def warps(self) -> int:
        return int(self.binary.metadata.num_warps)

    @property
    def shared(self) -> int:
        return int(self.binary.metadata.shared)

    @property
    def ctas(self) -> int:
        """Programs that a multiprocessor holds at once."""
        registers = -(-self.registers // 8) * 8 * 32 * self.warps
        return min(REGISTERS // registers, SHARED // (self.shared + 1024), WARPS // self.warps, CTAS)

    @cached_property
    def loop(self) -> list[str]:
        """SASS instructions of the innermost loop with most tensor-core instructions, or where no loop has any the
        longest; none where all were unrolled."""
        return max(_loops(self._run("nvdisasm", "-c")), default=[],
                   key=lambda loop: (sum(map(is_tensor_core, loop)), len(loop)))

    @property
    def slack(self) -> int:
        """Instructions of the loop between a load from memory and the first that reads it, at the least."""
        loop, found = self.loop, len(self.loop)
        for index, instruction in enumerate(loop):
            if instruction.startswith("LDG."):
                register = re.search(r"\bR\d+\b", instruction)
                assert register is not None
                turn = [*loop[index + 1 :], *loop[: index + 1]]
                found = min(found, next(distance for distance, each in enumerate(turn)
                                        if re.search(rf"[ ,].*,.*\b{register[0]}\b", each)))
        return found

    @property
    def duplicated(self) -> int:
        """How many warps compute the same of a tensor-core product: 1, unless a layout is larger than its tile."""
        ir, worst = self.binary.asm["ttgir"], 1
        for layout, warps, shape in re.findall(
                r"(#\w+) = #ttg\.nvidia_mma<\{[^}]*warpsPerCTA = \[([\d, ]+)\][^}]*instrShape = \[([\d, ]+)\]", ir):
            for tile in re.findall(rf"(?:tt\.dot|warp_group_dot) [^\n]*-> tensor<(\d+x\d+)x\w+, {layout}>", ir):
                copies = 1
                for size, count, each in zip(tile.split("x"), warps.split(","), shape.split(","), strict=False):
                    copies *= max(1, int(count) * int(each) // int(size))
                worst = max(worst, copies)
        return worst

    def facts(self) -> dict[str, Any]:
        """What tests look at, as JSON has it."""
        ptx = self.binary.asm["ptx"]
        return {
            "kernel": self.kernel, "grid": self.grid, "warps": self.warps, "registers": self.registers,
            "spilled": self.spilled, "shared": self.shared, "ctas": self.ctas, "duplicated": self.duplicated,
            "loop": len(self.loop), "tensor": sum(map(is_tensor_core, self.loop)), "slack": self.slack,
            "loads": sum(each.startswith("LDG.") for each in self.loop),
            "wgmma": sorted(set(re.findall(r"wgmma\.mma_async[\w.]+", ptx))),
            "mma": sorted(set(re.findall(r"\bmma\.sync[\w.]+", ptx))),
            "wide_loads": len(re.findall(r"cp\.async\.cg\.shared\.global [^;]*, 0x10,", ptx)),
        }

    @cached_property
    def _usage(self) -> re.Match[str]:
        text = self._run("cuobjdump", "--dump-resource-usage")
        found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
        assert found is not None, text
        return found

    def _run(self, tool: str, option: str) -> str:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.binary.asm["cubin"])
            file.flush()
            return subprocess.run([str(TOOLS / tool), option, file.name], capture_output=True, text=True,
                                  check=True).stdout


def is_tensor_core(instruction: str) -> bool:
    return _TENSOR_CORE.match(instruction) is not None


def _loops(sass: str) -> list[list[str]]:
    """Instructions of each loop that holds no other."""
    labels: dict[str, int] = {}
    found: list[str] = []
    spans: list[tuple[int, int]] = []
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L\w+):", line):
            labels[label[1]] = len(found)
        elif code := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\d+ )?([A-Z].*?)\s*;", line):
            found.append(code[1])
            target = re.search(r"`\((\.L\w+)\)", code[1])
            if code[1].startswith("BRA") and target and target[1] in labels:
                spans.append((labels[target[1]], len(found)))
    inner = [span for span in spans if not any(other != span and span[0] <= other[0] and other[1] <= span[1]
                                               for other in spans)]
    return [found[start:end] for start, end in inner if end - start > 1]  # not the trap at the end


class _Driver:
    """As much of a driver as a compilation asks for."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return self._target.arch

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def recorded(capability: int) -> Iterator[list[Launch]]:
    """Collects what is launched inside, compiled and not run."""
    launches: list[Launch] = []
    run = JITFunction.run

    def compile_only(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        binary = run(kernel, *args, grid=grid, warmup=True, **dict(kwargs))
        names = {name: value for name, value in kwargs.items() if name in kernel.arg_names}
        arguments = inspect.signature(kernel.fn).bind(*args, **names).arguments
        launches.append(Launch(kernel.fn.__name__, tuple(grid), dict(arguments), binary))
        return binary

    before, driver._active = driver._active, _Driver(capability)  # type: ignore[assignment]
    JITFunction.run = compile_only  # type: ignore[method-assign]
    try:
        yield launches
    finally:
        JITFunction.run = run  # type: ignore[method-assign]
        driver._active = before

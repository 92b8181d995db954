"""Checks and times the Triton backend on this GPU: python -m benchmarks.gpu_check [--only ops --only decode]

Every op first, then times of the Llama 3 8B shape with random weights against bfloat16 torch under CUDA graphs, then
small models step by step and an artifact made from the demo model. Each part has its share of the budget and stands for
itself; gpu-NAME.json and gpu-NAME.md are written after every row. Exit status 1 where parity fails. Needs torch,
Triton, numpy, ml_dtypes, safetensors and tokenizers; no native extension. `--interpret`: the parity parts on tiny
shapes, without a GPU. docs/gpu.md says what each outcome means.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING
from unittest.mock import MagicMock

if TYPE_CHECKING:  # kernels are defined as the interpreter's or the compiler's once its switch is set
    from benchmarks.gpu_check.check import Check, Row
    from benchmarks.gpu_check.report import Part

BUDGET = 450.0


def all_parts() -> tuple[Part, ...]:
    """What matters most first, in half of the time; `compiled` reads what decode and prefill have launched."""
    from benchmarks.gpu_check.compiled import compiled
    from benchmarks.gpu_check.parity import artifact, models, ops
    from benchmarks.gpu_check.report import Part
    from benchmarks.gpu_check.timing import (
        attend,
        baseline,
        decode,
        kernels,
        others,
        overhead,
        prefill,
        roofs,
        sweep,
        two_level,
    )

    return (
        Part(ops, 75, parity=True), Part(roofs, 5), Part(decode, 65), Part(baseline, 25), Part(prefill, 15),
        Part(compiled, 5, parity=True), Part(kernels, 35), Part(attend, 20), Part(models, 70, parity=True),
        Part(artifact, 50, parity=True), Part(overhead, 20), Part(two_level, 35), Part(others, 10), Part(sweep, 55),
    )


def facts(check: Check) -> Row:
    import torch
    import triton

    from fptq_runtime import __version__

    made: Row = {"fptq": __version__, "torch": str(torch.__version__), "triton": triton.__version__,
                 "date": str(date.today())}
    if check.tiny:
        return {"name": "interpreter", "device": "Triton's interpreter: nothing was timed", **made}
    device = torch.cuda.get_device_name()
    driver = subprocess.run(["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm", "--format=csv,noheader"],
                            capture_output=True, text=True, check=False).stdout.strip()
    return {"name": re.sub(r"[^a-z0-9]+", "-", device.lower().removeprefix("nvidia ")).strip("-"), "device": device,
            **made, "driver and clock": driver}


def stand_in() -> None:
    """For what the engine imports and a stock image lacks: no part asks for a grammar."""
    try:
        import llguidance  # noqa: F401
    except ImportError:
        for name in ("llguidance", "llguidance.gbnf_to_lark", "llguidance.numpy"):
            sys.modules[name] = MagicMock()


def interpret() -> None:
    """Run kernels in Triton's interpreter."""
    os.environ["TRITON_INTERPRET"] = "1"  # read where a kernel is defined
    from fptq_runtime.kernels.triton import interpreter

    interpreter.mend()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds for all parts")
    parser.add_argument("--only", action="append", metavar="PART", help="may be repeated")
    parser.add_argument("--threads", type=int, default=8, help="that compile kernels")
    parser.add_argument("--interpret", action="store_true", help="parity on tiny shapes, without a GPU")
    options = parser.parse_args(arguments)
    stand_in()
    if options.interpret:
        interpret()
    from fptq_runtime.kernels.triton.device import problem

    if why_not := problem():
        print(f"gpu-check: {why_not}", file=sys.stderr)
        return 2
    from benchmarks.gpu_check.check import Check
    from benchmarks.gpu_check.report import Report, run

    known = all_parts()
    if unknown := set(options.only or ()) - {part.name for part in known}:
        parser.error(f"no part is called {', '.join(sorted(unknown))}; "
                     f"there are {', '.join(part.name for part in known)}")
    check = Check(options.interpret, options.threads)
    parts = [part for part in known if (options.only is None or part.name in options.only)
             and (not check.tiny or part.name in ("ops", "models", "artifact"))]
    report = Report(options.out.resolve(), facts(check))
    passed = run(check, report, parts, options.budget / sum(part.seconds for part in parts))
    print(report.markdown())
    print("parity holds" if passed else "parity FAILED")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())

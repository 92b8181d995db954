"""What the kernels compile to, for GPUs that are not here: their instructions, and what keeps a multiprocessor busy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.kernels.triton.offline import TOOLS, in_process

pytestmark = pytest.mark.skipif(not (TOOLS / "cuobjdump").exists(), reason="this Triton has no tools of its own")

# Decode, a middle batch and a prefill of each kind that is to run fast; o and down have a residual.
LINEARS = {
    90: ("int8:int4:128:1:4096:4096:r", "int8:int4:128:1:28672:4096", "int8:int4:128:64:28672:4096",
         "int8:int4:128:128:4096:4096:r", "int8:int4:128:8192:4096:14336:r", "int8:int4:-128:8192:4096:4096:r",
         "int8:int4:-128:128:4096:14336", "int8:int8:0:1:128256:4096", "int8:int8:0:8192:4096:4096:r",
         "fp8:fp4:128:1:4096:4096:r", "fp8:fp4:128:8192:4096:4096:r", "fp8:fp8:0:64:4096:4096",
         "int8:int4:128:8:1152:896"),
    89: ("int8:int4:128:1:4096:4096:r", "int8:int4:128:512:4096:4096:r", "fp8:fp4:128:1:4096:4096"),
    80: ("int8:int4:128:1:4096:4096:r", "int8:int8:0:512:4096:4096:r", "float:int4:128:512:4096:4096:r"),
}
# Bytes, none with Triton 3.6, 8 with 3.7, 128 with 3.9, that cost little beside 1800 instructions: the budget has them.
SPILLS = {"llama attention prefill": 128}

Report = tuple[int, dict[str, dict[str, Any]]]


@pytest.fixture(scope="module", params=LINEARS, ids="sm_{}".format)
def compiled(request: pytest.FixtureRequest) -> Report:
    """The capability, and the facts of each launch by group and name."""
    groups = ("attention", "ops", *(f"linear:{case}" for case in LINEARS[request.param]))
    return request.param, in_process("tests.kernels.triton.launches", request.param, *groups)


def each(report: dict[str, dict[str, Any]]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for group, launches in report.items():
        for name, facts in launches.items():
            yield group, name, facts


def test_registers_memory_and_layouts(compiled: Report) -> None:
    """Nothing spills, a program fits, and no two warps compute the same."""
    capability, report = compiled
    for group, name, facts in each(report):
        assert facts["spilled"] <= SPILLS.get(name, 0), (group, name, facts)
        assert facts["shared"] <= (227 if capability == 90 else 99) * 1024, (group, name, facts)
        assert facts["duplicated"] == 1, (group, name, facts)


def test_products_run_on_tensor_cores_and_are_fed_by_wide_copies(compiled: Report) -> None:
    capability, report = compiled
    for group, name, facts in each(report):
        if "attention " in name:
            wgmma = capability == 90 and "prefill" in name and not name.startswith("gemma 2")
            assert facts["wgmma" if wgmma else "mma"], (group, name, facts)
            assert all(".s8.s8" in each for each in facts["wgmma"] + facts["mma"]), (group, name, facts)
        elif name == "linear_kernel":
            assert facts["wgmma" if capability == 90 else "mma"], (group, name, facts)
        else:
            continue
        assert facts["wide_loads"], (group, name, facts)


# Instructions of the innermost loop times warps: issue slots of a turn on one multiprocessor, whose four schedulers
# share them. And programs that a multiprocessor holds.
BUDGETS = {
    ("attention", "llama attention prefill"): (4 * 1900, 2),
    ("attention", "llama attention decode"): (4 * 730, 3),
    ("linear:int8:int4:128:1:28672:4096", "linear_kernel"): (4 * 220, 5),
    ("linear:int8:int4:128:64:28672:4096", "linear_kernel"): (4 * 285, 2),
    ("linear:int8:int4:128:8192:4096:14336:r", "linear_kernel"): (8 * 250, 1),
    ("linear:int8:int8:0:8192:4096:4096:r", "linear_kernel"): (8 * 140, 1),
    ("linear:int8:int4:-128:128:4096:14336", "linear_kernel"): (8 * 185, 2),
    ("linear:int8:int4:-128:8192:4096:4096:r", "linear_kernel"): (8 * 210, 1),
}


def test_loops_stay_within_their_budget_of_instructions(compiled: Report) -> None:
    capability, report = compiled
    if capability == 90:
        for (group, name), (slots, ctas) in BUDGETS.items():
            facts = report[group][name]
            assert facts["loop"] * facts["warps"] <= slots, (group, name, facts)
            assert facts["ctas"] >= ctas, (group, name, facts)


def test_scales_are_loaded_a_turn_ahead(compiled: Report) -> None:
    """Whoever decodes waits for memory in no turn."""
    capability, report = compiled
    if capability == 90:
        facts = report["linear:int8:int4:128:1:28672:4096"]["linear_kernel"]
        assert facts["loads"] > 0
        assert facts["slack"] > facts["loop"] // 2, facts

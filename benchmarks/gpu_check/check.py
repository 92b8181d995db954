"""What all parts of the check share."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from fptq_runtime.kernels.base import Roofs
from fptq_runtime.kernels.triton.backend import TritonBackend
from fptq_runtime.kernels.triton.device import fastest

Row = dict[str, Any]


@dataclass
class Check:
    """What the parts share. tiny: the interpreter runs them."""

    tiny: bool
    threads: int
    roofs: Roofs | None = None  # once they were measured
    models: dict[str, Any] = field(default_factory=dict)  # large ones, by profile

    @property
    def backend(self) -> TritonBackend:
        return TritonBackend()

    def warm(self, calls: Sequence[Callable[[], Any]]) -> None:
        """Compile what calls launch, several at a time, neighbours best unlike: two of a kind are compiled twice. What
        fails will fail again where it counts."""
        if self.tiny:
            return

        def one(call: Callable[[], Any]) -> None:
            try:
                with torch.inference_mode():
                    call()
            except Exception:
                traceback.print_exc()

        with ThreadPoolExecutor(self.threads) as pool:
            list(pool.map(one, calls))
        torch.cuda.synchronize()


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory that nothing has written holds NaN, or the largest integer, so that whoever reads it is wrong."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*deterministic")
            yield
    finally:
        torch.use_deterministic_algorithms(False)


def graphed(calls: Sequence[Callable[[], Any]], repeats: int = 5) -> float:
    """Seconds of one call, from the fastest of several replays of a graph of all."""

    with torch.inference_mode():
        for call in calls:
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            for call in calls:
                call()
        took = fastest(graph.replay, repeats) / len(calls)
    del graph
    return took

"""A GPU that computes as late as it may, in the interpreter's place: what is queued runs, in order, when somebody waits
for it or computes with tensors. What the host overwrites too early then shows in the results."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fptq_runtime.kernels.base import PendingSample, SampleInput, SampleOutput
from fptq_runtime.kernels.triton import backend
from fptq_runtime.kernels.triton import device as gpu
from fptq_runtime.kernels.triton.sampling import DeviceSample, sample, take_sampled
from fptq_runtime.kernels.triton.values import DeviceBatch

Work = Callable[[], Any]


class LateDevice(TorchDispatchMode):
    """Steps, replays, samples, clones and copies that do not block are queued; all else but a view waits."""

    def __init__(self) -> None:
        super().__init__()
        self.queued = self.done = 0
        self.taken = 0  # steps that read what was drawn for the one before
        self._queue: deque[Work] = deque()
        self._graph: list[Work] | None = None  # that is captured
        self._at_once = False

    def submit(self, work: Work) -> None:
        if self._graph is not None:
            self._graph.append(work)
        else:
            self.queued += 1
            self._queue.append(work)

    def wait(self, until: int | None = None) -> None:
        with self.at_once():
            while self.done < (self.queued if until is None else until):
                self._queue.popleft()()
                self.done += 1

    @contextmanager
    def at_once(self) -> Iterator[None]:
        before, self._at_once = self._at_once, True
        try:
            with torch.inference_mode():
                yield
        finally:
            self._at_once = before

    @contextmanager
    def capture(self, graph: Graph, **_: Any) -> Iterator[None]:
        self._graph = graph.work
        try:
            yield
        finally:
            self._graph = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {name: value for name, value in (kwargs or {}).items() if name != "pin_memory"}
        if not self._at_once and not func.is_view:
            if func is torch.ops.aten.copy_.default and (self._graph is not None or args[2:] == (True,)):
                self.submit(lambda: func(*args))
                return args[0]
            if func is torch.ops.aten.clone.default:
                copy = torch.full_like(args[0], torch.nan)
                self.submit(lambda: copy.copy_(args[0]))
                return copy
            assert self._graph is None, f"{func} while a graph is captured"
            self.wait()
        return func(*args, **kwargs)


class Graph:
    def __init__(self, device: LateDevice) -> None:
        self.work: list[Work] = []
        self._device = device

    def replay(self) -> None:
        for work in self.work:
            self._device.submit(work)


class Event:
    def __init__(self, device: LateDevice) -> None:
        self._device = device
        self._at = 0

    def record(self) -> None:
        self._at = self._device.queued

    def synchronize(self) -> None:
        self._device.wait(self._at)

    def query(self) -> bool:
        return self._device.done >= self._at

    def elapsed_time(self, end: Event) -> float:
        return 0.0


class Stream:
    def __init__(self, device: LateDevice) -> None:
        self.synchronize = device.wait


class LateSample(DeviceSample):
    """token_ids are what no step can compute with until they are drawn."""

    def __init__(self, device: LateDevice, logits: torch.Tensor, batch: SampleInput) -> None:
        with device.at_once():
            self.token_ids = torch.full((batch.rows.size,), 1 << 30)
        self._made: list[SampleOutput] = []
        device.submit(lambda: self._draw(logits, batch))
        self._drawn = Event(device)
        self._drawn.record()

    def _draw(self, logits: torch.Tensor, batch: SampleInput) -> None:
        made = sample(logits, batch)
        assert isinstance(made, DeviceSample)
        self.token_ids.copy_(made.token_ids)
        self._made.append(made.result())

    def result(self) -> SampleOutput:
        self._drawn.synchronize()
        return self._made[0]


@contextmanager
def late_device(monkeypatch: pytest.MonkeyPatch, vocab: int) -> Iterator[LateDevice]:
    """The Triton backend on such a device, for models with that vocabulary."""
    device, run = LateDevice(), backend.TritonExecutor._run

    def late_run(executor: backend.TritonExecutor, inputs: DeviceBatch) -> torch.Tensor:
        with device.at_once():
            logits = torch.full((inputs.logits_rows.shape[0], vocab), torch.nan)
        device.submit(lambda: logits.copy_(run(executor, inputs)))
        return logits

    def late_take(token_ids: torch.Tensor, sampled: torch.Tensor) -> None:
        device.taken += 1
        device.submit(lambda: take_sampled(token_ids, sampled))

    def late_sample(logits: torch.Tensor, batch: SampleInput) -> PendingSample:
        return LateSample(device, logits, batch) if batch.rows.size else SampleOutput.empty(batch)

    for module in (backend, gpu):
        monkeypatch.setattr(module, "is_gpu", lambda _: True)
    monkeypatch.setattr(backend.TritonExecutor, "_run", late_run)
    monkeypatch.setattr(backend, "take_sampled", late_take)
    monkeypatch.setattr(backend, "sample", late_sample)
    for name, fake in {"Event": lambda **_: Event(device), "CUDAGraph": lambda: Graph(device), "graph": device.capture,
                       "graph_pool_handle": lambda: None, "current_stream": lambda _: Stream(device),
                       "synchronize": lambda _: device.wait()}.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    with device:
        yield device

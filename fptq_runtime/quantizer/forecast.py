"""How long quantizing a model will take on this machine and how much memory, told before it begins."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from fptq_runtime.models.block import BlockSpec, LinearSpec
from fptq_runtime.models.loader import Checkpoint
from fptq_runtime.progress import duration
from fptq_runtime.quantizer.calibrate import HiddenStates
from fptq_runtime.quantizer.generate import writing_bytes
from fptq_runtime.quantizer.recipe import Recipe
from fptq_runtime.quantizer.walk import float_part, float_stem

REHEARSED = 512  # tokens
PROCESS_SECONDS = 4.0  # until it begins
PROCESS_BYTES = 700 << 20  # Python, torch and the libraries that they load
COPIES = 3  # float32, of the part in hand: as loaded, as transformed, and as what its codes are read as
TRAINING_PASSES = 4  # the teacher's, the student's, and twice that back


@dataclass(frozen=True)
class Forecast:
    """seconds: of the whole run, where nothing else keeps its `threads` busy. memory: bytes that the process takes at
    most."""

    seconds: float
    threads: int
    memory: int

    def __str__(self) -> str:
        cores = f"{self.threads} cores have" if self.threads > 1 else "a core has"
        return (f"about {duration(self.seconds)} where {cores} nothing else to do, and {self.memory / 1e9:.1f} GB of "
                "memory")


def forecast(checkpoint: Checkpoint, recipe: Recipe, calibrated: int, measured: Sequence[Sequence[int]],
             writes: bool) -> Forecast:
    """For `calibrated` tokens, which the model itself `writes` or not, and the windows that perplexity is measured on.

    The beginning of the first of these runs through the first block; what that takes a multiply-add, every pass does.
    What the steps multiply, what trains and what writes is float32, which is tried too.
    """
    model, steps = checkpoint.model, recipe.steps
    scored, exact = sum(map(len, measured)), any(step.wants_exact for step in steps)
    trained = sum(step.trained_tokens(calibrated) for step in steps)
    passed, products, held = 0.0, 0.0, 0
    for part in model.parts:
        passes = 2 * scored
        linears = [_sizes(part, linear) for linear in part.linears if not linear.kept]
        if part is not model.head:
            passes += calibrated * (2 + exact)
            products += sum(count * step.products(n, k, round(calibrated * share))
                            for n, k, count, share in linears for step in steps)
        passed += passes * _row_products(part)
        products += (calibrated * writes + trained * TRAINING_PASSES) * _row_products(part)
        weights = 4 * COPIES * sum(n * k * count for n, k, count, _ in linears)
        held = max(held, weights + sum(count * step.moments_bytes(k) for _, k, count, _ in linears for step in steps))
    held += 4 * model.config.hidden_size * (calibrated * (1 + exact) + 2 * scored)
    held = max(held, *(step.parameter_bytes * checkpoint.num_parameters for step in steps),
               writing_bytes(checkpoint, calibrated) if writes else 0)
    threads = torch.get_num_threads()
    seconds = (passed / _passed_a_second(checkpoint, measured[0][:REHEARSED])
               + products / _products_a_second(model.config.hidden_size)) / threads
    return Forecast(PROCESS_SECONDS + seconds, threads, PROCESS_BYTES + held)


def _sizes(part: BlockSpec, linear: LinearSpec) -> tuple[int, int, int, float]:
    """Of one expert (or of the linear, which is one): n, k, how many there are, and its share of all rows."""
    experts = linear.experts
    share = 1.0 if experts == 1 or part.routing is None else part.routing.top_k / experts
    return linear.n // experts, linear.k, experts, share


def _row_products(part: BlockSpec) -> float:
    """Multiply-adds of the linears for one row."""
    return sum(n * k * count * share for n, k, count, share in (_sizes(part, linear) for linear in part.linears))


def _passed_a_second(checkpoint: Checkpoint, window: Sequence[int]) -> float:
    """Multiply-adds of the first block's linears, everything counted that it does beside them."""
    states = HiddenStates(checkpoint.model, [window])
    states.run_stem(float_stem(checkpoint))
    block = float_part(checkpoint, 0)
    return len(window) * _row_products(block.spec) / _one_thread_takes(lambda: states.run_block(block))


def _products_a_second(k: int) -> float:
    """Multiply-adds of float32, as a Hessian of k inputs is added up."""
    x, moments = torch.zeros(REHEARSED, k), torch.zeros(k, k)
    return REHEARSED * k * k / _one_thread_takes(lambda: moments.addmm_(x.T, x))


def _one_thread_takes(work: Callable[[], object]) -> float:
    """Seconds of the processor, so that what else runs here changes little."""
    threads, times = torch.get_num_threads(), []
    torch.set_num_threads(1)
    try:
        for _ in range(3):  # what the first pays once is not the work's
            start = time.thread_time()
            work()
            times.append(time.thread_time() - start)
    finally:
        torch.set_num_threads(threads)
    return min(times)

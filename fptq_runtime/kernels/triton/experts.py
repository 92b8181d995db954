"""Mixtures of experts: rows are sorted by expert, and each expert's linear runs over its own.

How many rows an expert has is known on the host before its products are queued, so that a step with experts waits for
its routers and is not replayed from a graph.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from fptq_runtime.kernels.base import Routing
from fptq_runtime.kernels.reference import choose_experts, to_torch
from fptq_runtime.kernels.triton.linear import DeviceLinear, run_linear
from fptq_runtime.kernels.triton.values import Quantized


@dataclass(frozen=True)
class DeviceExperts:
    """Linears of equal size, each of which reads the rows that are dispatched to it."""

    experts: tuple[DeviceLinear, ...]

    @property
    def act(self) -> object:
        return self.experts[0].act


@dataclass(frozen=True)
class Routed:
    """rows: the row that each dispatched one is, those of an expert together. places, weights: of each row and expert,
    where it was dispatched to and what it counts, the experts ascending."""

    rows: torch.Tensor  # [rows · top_k]
    places: torch.Tensor  # [rows, top_k]
    weights: torch.Tensor  # alike
    counts: tuple[int, ...]  # dispatched rows of each expert


def prepare_routing(routing: Routing, device: torch.device) -> Routing:
    bias = None if routing.bias is None else to_torch(routing.bias).to(device, torch.float32)
    return replace(routing, bias=bias)


def route(logits: torch.Tensor, routing: Routing) -> Routed:
    experts, weights = choose_experts(logits, routing)
    flat = experts.flatten()
    order = flat.argsort(stable=True)
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order), device=order.device)
    counts = flat.bincount(minlength=routing.num_experts)
    return Routed(order // routing.top_k, places.view_as(experts), weights, tuple(counts.tolist()))


def run_experts(x: torch.Tensor | Quantized, linear: DeviceExperts, routed: Routed, invariant: bool) -> torch.Tensor:
    """Dispatched rows through their experts. float32 [rows · top_k, N]"""
    made, start = [], 0
    for expert, count in zip(linear.experts, routed.counts, strict=True):
        if count:
            made.append(run_linear(_rows(x, start, start + count), expert, None, invariant))
        start += count
    if not made:
        device = routed.weights.device
        return torch.empty((0, linear.experts[0].n), dtype=torch.float32, device=device)
    return torch.cat(made)


def combine(x: torch.Tensor, routed: Routed, residual: torch.Tensor | None) -> torch.Tensor:
    """Added expert by expert, so that the order is every row's own. [rows, width]"""
    y = x.new_zeros((len(routed.places), x.shape[1]))
    for slot in range(routed.places.shape[1]):
        y = y + x.index_select(0, routed.places[:, slot]) * routed.weights[:, slot, None]
    return y if residual is None else y + residual


def _rows(x: torch.Tensor | Quantized, start: int, end: int) -> torch.Tensor | Quantized:
    if isinstance(x, torch.Tensor):
        return x[start:end]
    return Quantized(x.codes[start:end], x.scale if x.scale.numel() == 1 else x.scale[start:end])

"""Outlier channel splitting (arXiv 1901.09504) of the weights, which needs no data."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from pydantic import Field

from fptq_runtime.models.block import Block, BlockSpec, Edge, Model
from fptq_runtime.quantizer.steps.base import QuantizationError, Step


class ChannelSplitting(Step):
    """Write the MLP's intermediate channel with the largest weight in `down` twice and split that column in two, over
    and over: entries above half the largest are halved, the others stay in the first. It is exact, since gate's and
    up's rows are doubled. The residual's channels are never split.

    ratio: of the intermediate size, by how much it grows at least. group_size: it grows on to a multiple of that, and
    what this gives is split too; None leaves it. The grid-aware variant (halves half a step apart) needs the scale of
    each half beforehand, which groups do not have.
    """

    type: Literal["ocs"] = "ocs"
    ratio: float = Field(default=0.02, gt=0, le=1)
    group_size: Literal[32, 64, 128] | None = 128

    def check(self, model: Model) -> None:
        if model.width_field is None or not all(_gated(block) for block in model.blocks):
            raise QuantizationError(f"ocs: {model.config.architecture} has no gated MLP whose width config.json sets, "
                                    "so that its channels cannot be split; leave the step out")

    def transform_config(self, model: Model, config: dict[str, Any]) -> dict[str, Any]:
        assert model.width_field is not None
        size = math.ceil(model.config.intermediate_size * (1 + self.ratio))
        multiple = self.group_size or 1
        return {**config, model.width_field: math.ceil(size / multiple) * multiple}

    def transform_block(self, model: Model, block: Block) -> None:
        block.bases = None
        for edge in _gated(block.spec):
            [reader] = edge.readers
            down, up = block.linears[reader], block.linears[edge.writer]
            down.weight, source = split_columns(down.weight, block.spec.linear(reader).k)
            rows = torch.cat((source, source + int(source.max()) + 1))  # of gate | up
            up.weight = up.weight[rows]
            if up.bias is not None:
                up.bias = up.bias[rows]


def _gated(block: BlockSpec) -> list[Edge]:
    return [edge for edge in block.edges if edge.through == "gate"]


def split_columns(weight: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """weight [N, K] with columns split until there are `size`, and which of the K each column [size] is a part of."""
    n, k = weight.shape
    split = torch.cat((weight, weight.new_zeros(n, size - k)), 1)
    source = torch.arange(size)
    largest = split.abs().amax(0)  # [size]
    for new in range(k, size):
        column = int(largest[:new].argmax())
        halved = split[:, column].abs() > largest[column] / 2
        split[:, new] = torch.where(halved, split[:, column] / 2, torch.zeros(()))
        split[:, column] -= split[:, new]
        source[new] = source[column]
        for part in (column, new):
            largest[part] = split[:, part].abs().max()
    return split, source

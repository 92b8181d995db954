"""Pieces of mixtures of experts: an MLP of which each token takes a few of many, beside one that all take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fptq_runtime.kernels.base import Ops, Routing
from fptq_runtime.models.block import Block, BlockSpec, Edge, LinearSpec, Model, Stacked
from fptq_runtime.models.fields import Fields, ModelError
from fptq_runtime.models.layers import PRE_NORM_EDGES, attend, mlp, read

READS_NORM = ("router", "experts.up", "shared.up", "shared.gate")


def read_routing(fields: Fields, experts: str | Sequence[str], *, normalise: bool, top_k: str = "num_experts_per_tok",
                 default_experts: int | None = None, default_top_k: int | None = None) -> Routing:
    """Softmax, then the best: everyone's but DeepSeek's. Raises ModelError."""
    count = fields.integer(experts, default_experts, high=1 << 12)
    chosen = fields.integer(top_k, default_top_k, high=1 << 12)
    if chosen > count:
        raise ModelError(f"config.json: {top_k} {chosen} is more than the {count} experts there are")
    return Routing(count, chosen, normalise=normalise)


def read_grouped_routing(fields: Fields, default_experts: int | None = None, default_top_k: int | None = None
                         ) -> Routing:
    """DeepSeek V3's: sigmoid scores with a bias, of the best groups by their two best. Raises ModelError."""
    routing = read_routing(fields, ("n_routed_experts", "num_local_experts"), default_experts=default_experts,
                           default_top_k=default_top_k, normalise=fields.flag("norm_topk_prob", True))
    return replace(read_groups(fields, routing, 2), scoring="sigmoid",
                   scale=fields.number("routed_scaling_factor", 1.0, 1e-9))


def read_groups(fields: Fields, routing: Routing, best: int = 1) -> Routing:
    """best: how many of a group's scores count. Raises ModelError."""
    groups, top = fields.integer("n_group", 1), fields.integer("topk_group", 1)
    size, odd = divmod(routing.num_experts, groups)
    if odd or size < best or top > groups or top * size < routing.top_k:
        raise ModelError(f"config.json: {routing.top_k} of {routing.num_experts} experts cannot be chosen from "
                         f"topk_group {top} of n_group {groups}")
    return replace(routing, groups=groups, top_groups=top, group_best=best)


def sparse_layers(fields: Fields, num_layers: int) -> list[bool]:
    """Which layers have experts, as Qwen's configs say it."""
    step = fields.integer("decoder_sparse_step", 1)
    dense = fields.get("mlp_only_layers", [])
    if not isinstance(dense, list) or not all(isinstance(layer, int) for layer in dense):
        raise ModelError(f"config.json: mlp_only_layers must be a list of layers, not {dense!r}")
    return [layer not in dense and (layer + 1) % step == 0 for layer in range(num_layers)]


def expert_linears(module: str, routing: Routing, hidden: int, width: int, *, router: str = "gate",
                   up: tuple[str, ...] = ("gate_proj", "up_proj"), down: str = "down_proj", bias: bool = False,
                   stacked: tuple[Stacked | None, Stacked | None] = (None, None)) -> tuple[LinearSpec, ...]:
    """The router and the experts of the checkpoint's `module`. stacked: where a float checkpoint has all experts' up
    and down each in one tensor; an artifact has them one by one."""
    count = routing.num_experts
    return (
        LinearSpec("router", (f"{module}.{router}",), (count,), hidden, bias, kept=True),
        LinearSpec("experts.up", tuple(f"{module}.experts.{i}.{name}" for i in range(count) for name in up),
                   (width,) * len(up) * count, hidden, bias, experts=count, stacked=stacked[0]),
        LinearSpec("experts.down", tuple(f"{module}.experts.{i}.{down}" for i in range(count)), (hidden,) * count,
                   width, bias, experts=count, stacked=stacked[1]),
    )


def shared_linears(module: str, hidden: int, width: int) -> tuple[LinearSpec, ...]:
    """What every token takes beside its experts."""
    return (
        LinearSpec("shared.up", (f"{module}.gate_proj", f"{module}.up_proj"), (width, width), hidden),
        LinearSpec("shared.down", (f"{module}.down_proj",), (hidden,), width),
    )


def with_experts(model: Model, routing: Routing, linears: Sequence[LinearSpec], sparse: Sequence[bool] = (),
                 routing_bias: str | None = None) -> Model:
    """`llama_like`'s model with these linears in the MLP's place, in the layers that `sparse` says, or in all."""
    names = {linear.name for linear in linears}
    edges = tuple(edge for edge in PRE_NORM_EDGES if edge.writer != "mlp_norm")
    edges += (Edge("mlp_norm", tuple(name for name in READS_NORM if name in names)),)
    if "shared.up" in names:
        edges += (Edge("shared.up", ("shared.down",), "gate"),)
    residual = ("o", *(name for name in ("experts.down", "shared.down") if name in names))

    def changed(block: BlockSpec) -> BlockSpec:
        attention = tuple(linear for linear in block.linears if linear.name in ("qkv", "o"))
        return replace(block, forward=pre_norm_moe, linears=(*attention, *linears), edges=edges, residual=residual,
                       routing=routing, routing_bias=routing_bias)

    blocks = zip(model.blocks, sparse or (True,) * len(model.blocks), strict=True)
    return replace(model, blocks=tuple(changed(block) if here else block for block, here in blocks), width_field=None)


def pre_norm_moe(ops: Ops[Any], block: Block, x: Any) -> Any:
    """layers.pre_norm with experts in the MLP's place."""
    attended, x = attend(ops, block, read(ops, block, x, "input_norm", "qkv"), x)
    return behind_norm(ops, block, ops.linear(attended, block.linears["o"], x))


def behind_norm(ops: Ops[Any], block: Block, x: Any, added: bool = True) -> Any:
    """What the MLP, or in a block with routing the experts, make of norm(x), and x where it is `added`."""
    residual = x if added else None
    if block.routing is None:
        return mlp(ops, block, read(ops, block, x, "mlp_norm", "up"), residual)
    h = ops.norm(x, block.norms["mlp_norm"], None)
    return experts(ops, block, h, shared_expert(ops, block, h, residual))


def experts(ops: Ops[Any], block: Block, h: Any, residual: Any = None) -> Any:
    """What the experts that each row of h goes to make of it, + residual. The router reads h as it is."""
    assert block.spec.activation is not None
    routed = ops.route(ops.linear(h, block.linears["router"]), block.routing)
    up, down = block.linears["experts.up"], block.linears["experts.down"]
    made = ops.expert_linear(ops.dispatch(ops.quantize(h, up.act), routed), up, routed)
    made = ops.expert_linear(ops.activation(made, block.spec.activation, down.act), down, routed)
    return ops.combine(made, routed, residual)


def shared_expert(ops: Ops[Any], block: Block, h: Any, residual: Any) -> Any:
    """residual + the shared expert of h, times a gate of its own where it has one; residual where there is none."""
    if "shared.up" not in block.linears:
        return residual
    assert block.spec.activation is not None
    up, down = block.linears["shared.up"], block.linears["shared.down"]
    made = ops.activation(ops.linear(ops.quantize(h, up.act), up), block.spec.activation, down.act)
    if "shared.gate" not in block.linears:
        return ops.linear(made, down, residual)
    return ops.add(residual, ops.gate(ops.linear(made, down), ops.linear(h, block.linears["shared.gate"])))

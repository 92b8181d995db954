"""Records what models/gate.py compares with, from an artifact's tensors as written: in double precision where an op is
linear, by the reference backend otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ml_dtypes import bfloat16

from fptq_runtime.artifact.io import GOLDEN, ArtifactError, ArtifactWriter, Manifest, renew
from fptq_runtime.artifact.numerics import token_scale
from fptq_runtime.config import KVCacheDtype
from fptq_runtime.kernels.base import (
    Activation,
    ActivationQuant,
    Array,
    AttentionSpec,
    Embedding,
    Linear,
    Norm,
    Ops,
    QuantizedWeight,
    StepInput,
)
from fptq_runtime.kernels.reference import ReferenceBackend, ReferenceOps, quantize_activations
from fptq_runtime.kernels.select import select_backend, without_kernel
from fptq_runtime.models.block import Block, Stem, prepare_block, prepare_stem
from fptq_runtime.models.gate import (
    ROPE_POSITIONS,
    ROUNDING,
    SCALARS,
    SHORT,
    AttentionFacts,
    Golden,
    LinearFacts,
    attend,
    attention_limits,
    norm_row,
    part_name,
    passed,
    probe,
    probe_limits,
    rotate,
)
from fptq_runtime.models.loader import Checkpoint, load_block, load_head, load_model, load_stem

PROMPT = 32  # tokens kept in the manifest
TOKENS = 6  # of the prompt that blocks are recorded with
STEM_ROWS = 16
TIPPED = 0.02  # of a code's width, added to inputs: a hundredth of the codes tips, many more than rounding tips
RUNS = 4
SAFETY = 4.0  # times the greatest deviation of them
FLOOR = 1e-2  # of what a block adds, since that is recorded in bfloat16; faults in its wiring are of its own size
CHUNK = 1 << 22  # elements of a weight in double precision at a time


def write_golden(writer: ArtifactWriter, prompt_token_ids: Sequence[int]) -> dict[str, Any]:
    """Record what was written, after its tensors and config.json, and let this machine's kernels through the gate.
    Returns what the manifest says of it; raises GateError."""
    writer.add_file(GOLDEN, vouched(writer.directory, prompt_token_ids).to_bytes())
    return golden_facts(prompt_token_ids)


def vouched(path: Path, prompt_token_ids: Sequence[int]) -> Golden:
    """What is recorded of an artifact, with the bits that this machine's kernels compute, once these are found to pass.
    Raises GateError."""
    checkpoint = Checkpoint(path)
    golden, schemes = record(checkpoint, prompt_token_ids), checkpoint.linear_schemes
    backend = None if without_kernel(schemes) else select_backend(schemes=schemes)
    if backend is None or backend.name == "reference":
        return golden
    made, positions = load_model(checkpoint, backend), checkpoint.max_positions
    outcomes = passed((*probe(made, backend, golden, positions), *probe(made, backend, golden, positions, "bf16",
                                                                        ("attention",))), backend)
    bits = {outcome.probe: outcome.bits for outcome in outcomes if outcome.probe}
    return replace(golden, kernels=backend.fingerprint, bits=bits)


def golden_facts(prompt_token_ids: Sequence[int]) -> dict[str, Any]:
    return {"prompt_token_ids": [int(token) for token in prompt_token_ids[:PROMPT]]}


def renew_golden(path: Path, manifest: Manifest) -> Manifest:
    """New golden values for an artifact of format 1 whose files were verified. Raises ArtifactError, and GateError
    where this machine's kernels do not compute them."""
    if manifest.format_version > 1:
        raise ArtifactError(f"{path} has golden values of every block already, which are not replaced; if they are "
                            "refused, quantize the model again")
    prompt = manifest.golden["prompt_token_ids"]
    return renew(path, vouched(path, prompt).to_bytes(), golden_facts(prompt))


@torch.inference_mode()
def record(checkpoint: Checkpoint, prompt_token_ids: Sequence[int]) -> Golden:
    """The probes of a whole checkpoint, read block by block. Of the prompt the first TOKENS tokens are used."""
    backend, model = ReferenceBackend(), checkpoint.model
    longest = model.config.max_position_embeddings
    short = min((rope.original_max_position_embeddings for rope in model.ropes if rope.extends(longest)), default=0)
    prompt = [int(token) for token in prompt_token_ids[:TOKENS]]
    spread = np.linspace(0, model.config.vocab_size - 1, STEM_ROWS).astype(int).tolist()
    golden = Golden(short, stem_ids=tuple(sorted({*prompt, *spread})))
    stem = prepare_stem(load_stem(checkpoint), backend)
    golden.arrays["stem"] = stem.embedding.weight[list(golden.stem_ids)].float().numpy()
    if stem.positions is not None:
        golden.arrays["positions"] = stem.positions.weight[:STEM_ROWS].float().numpy()
    if stem.norm is not None:
        _record_norm(golden, "stem.norm", stem.norm)
    for index in range(len(model.blocks)):
        _record_ops(golden, load_block(checkpoint, index))
    _record_ops(golden, load_head(checkpoint))
    _record_blocks(golden, checkpoint, stem, prompt, "")
    if short:
        served_short = Checkpoint(checkpoint.path)
        served_short.max_positions = short
        _record_blocks(golden, served_short, stem, prompt, SHORT)
    return golden


def _record_ops(golden: Golden, part: Block) -> None:
    """Of a part as it was loaded: what needs none of the others."""
    backend = ReferenceBackend()
    for key, norm in part.norms.items():
        _record_norm(golden, f"{part_name(part)}.{key}", backend.prepare(norm))
    for key, linear in part.linears.items():
        stored, act = linear.weight, linear.act
        exact = isinstance(stored, QuantizedWeight) and stored.type == "int" and act is not None and act.type == "int"
        _record_linear(golden, f"{part_name(part)}.{key}", backend.prepare(linear), stored.group_size if exact else 1)


def _record_blocks(golden: Golden, checkpoint: Checkpoint, stem: Stem, prompt: Sequence[int], suffix: str) -> None:
    """Attention where it is not that of the layer before, and whole blocks, each behind those before it."""
    whole = StepInput.whole([prompt])
    x = stem.forward(ReferenceOps(whole, None))
    previous = ""
    for index in range(len(checkpoint.model.blocks)):
        block = replace(prepare_block(load_block(checkpoint, index), ReferenceBackend()), last=False)
        name = part_name(block)
        if block.attention is not None:
            facts, found = _attention(block.attention, checkpoint)
            same = golden.attention.get(previous) == facts and all(
                np.array_equal(array, golden.arrays[f"{previous}.{key}{suffix}"]) for key, array in found.items())
            if name in golden.attention or not (suffix or same):  # the second time, the same layers as the first
                golden.attention[name], previous = facts, name
                golden.arrays.update({f"{name}.{key}{suffix}": array for key, array in found.items()})
        x = _record_block(golden, name, block, whole, x, suffix)


def _record_norm(golden: Golden, name: str, norm: Norm) -> None:
    exact = replace(norm, weight=norm.weight.double(), bias=None if norm.bias is None else norm.bias.double())
    ops = ReferenceOps(StepInput.whole([[0]]), None)
    y = ops.norm(torch.from_numpy(norm_row(name, norm.weight.numel())).double()[None], exact, None)[0]
    plain = y if norm.bias is None else y - norm.bias
    added = torch.zeros_like(y) if norm.bias is None else norm.bias.abs()
    _keep(golden, name, expected=y, tolerance=SCALARS * (plain.abs() + added))


def _record_linear(golden: Golden, name: str, linear: Linear, group: int) -> None:
    """linear: prepared, so that its weight is float32 [N, K]. Of a group's exact sum at least what independent signs
    would make it is taken for its size, so that sqrt(group) times that is no less than the sum of magnitudes."""
    weight: Any = linear.weight
    facts = golden.linears[name] = LinearFacts(weight.shape[1], linear.act, group, linear.experts)
    x = torch.from_numpy(facts.read_row(name))
    sums, sizes = [], []
    for chunk in weight.split(max(1, CHUNK // facts.k)):
        if group == 1:
            chunk = chunk.double()
            sums.append(chunk @ x)
            sizes.append(chunk.abs_() @ x.abs())
            continue
        products = (chunk.double() * x).unflatten(1, (-1, group))  # [rows, K / group, group]
        of_groups = products.sum(-1)
        sums.append(of_groups.sum(-1))
        sizes.append(of_groups.abs().maximum(torch.linalg.vector_norm(products, dim=-1)).sum(-1))
    y, magnitude = torch.cat(sums), torch.cat(sizes)
    if linear.low_rank is not None:
        down, up = (matrix.double() for matrix in linear.low_rank)
        y += up @ (down @ x)
        magnitude += up.abs() @ (down.abs() @ x.abs())
    _keep(golden, name, expected=y, tolerance=facts.roundings * ROUNDING * magnitude)
    if linear.bias is not None:
        golden.arrays[f"{name}.bias"] = linear.bias.float().numpy()


def _keep(golden: Golden, name: str, expected: torch.Tensor, tolerance: torch.Tensor) -> None:
    golden.arrays[f"{name}.expected"] = expected.float().numpy()
    golden.arrays[f"{name}.tolerance"] = tolerance.float().numpy().astype(bfloat16)


def _attention(spec: AttentionSpec, checkpoint: Checkpoint) -> tuple[AttentionFacts, dict[str, Array]]:
    """What a layer's attention makes of rows that its geometry alone decides, as far as the checkpoint's ropes
    reach."""
    longest = checkpoint.model_config.max_position_embeddings
    facts = AttentionFacts(spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.sliding_window,
                           tuple(p for p in ROPE_POSITIONS if p < longest))
    backend = ReferenceBackend()
    table = backend.prepare(Embedding(facts.rows))
    spec = replace(spec, layer=0)

    def turn(ops: Ops[Any]) -> Any:
        return ops.select_rows(ops.rope_and_cache(ops.embed(table), spec))

    def look(ops: Ops[Any]) -> Any:
        return ops.attention(ops.rope_and_cache(ops.embed(table), spec), spec, None, True)

    positions = [position for position in facts.rope_positions if position < checkpoint.max_positions]
    limits = probe_limits(len(positions), facts, 1, positions[-1] + 1, len(positions))
    found = {"rope": rotate(backend.compile(turn, limits), positions)}
    outputs: dict[KVCacheDtype, Array] = {}
    for dtype in ("float32", "int8"):
        limits = attention_limits(facts, checkpoint.max_positions, 1, dtype)
        _, outputs[dtype] = attend(backend.compile(look, limits), facts, checkpoint.max_positions)
    exact, coarse = outputs["float32"], outputs["int8"]
    found["attention"] = exact
    # kernels also round what they weight values with to 8 bits
    found["attention_tolerance"] = 3 * np.abs(exact - coarse).max(-1) + 0.01 * np.abs(exact).max(-1)
    return facts, found


def _record_block(golden: Golden, name: str, block: Block, whole: StepInput, x: torch.Tensor, suffix: str
                  ) -> torch.Tensor:
    """From its input as bfloat16 holds it. Returns its output for the input as it is."""
    rows = x.bfloat16().float()
    added = block.forward(ReferenceOps(whole, None), rows) - rows
    deviations = []
    for seed in range(RUNS):
        tipped = block.forward(_TippingOps(whole, seed), rows) - rows
        deviations.append((tipped - added).square().mean(-1).sqrt())
    tolerance = (SAFETY * torch.stack(deviations).amax(0)).maximum(FLOOR * _rms(added)) + 1e-6 * _rms(rows)
    golden.arrays[f"{name}.input{suffix}"] = x.numpy().astype(bfloat16)
    golden.arrays[f"{name}.added{suffix}"] = added.numpy().astype(bfloat16)
    golden.arrays[f"{name}.block_tolerance{suffix}"] = tolerance.numpy()
    after: torch.Tensor = block.forward(ReferenceOps(whole, None), x)
    return after


def _rms(x: torch.Tensor) -> torch.Tensor:
    return x.square().mean(-1).sqrt()


class _TippingOps(ReferenceOps):
    """Moves what is quantized by up to TIPPED of a code's width, so that some codes tip."""

    def __init__(self, batch: StepInput, seed: int) -> None:
        super().__init__(batch, None)
        self._generator = torch.Generator().manual_seed(seed)

    def quantize(self, x: torch.Tensor, act: ActivationQuant | None) -> torch.Tensor:
        if act is None:
            return x
        width = x.abs() / 8 if act.type == "float" else token_scale(x) if act.scale is None else act.scale
        noise = torch.rand(x.shape, generator=self._generator) * 2 - 1
        return quantize_activations(x + TIPPED * noise * width, act)

    def norm(self, x: torch.Tensor, norm: Norm, act: ActivationQuant | None) -> torch.Tensor:
        return self.quantize(super().norm(x, norm, None), act)

    def activation(self, x: torch.Tensor, activation: Activation, act: ActivationQuant | None) -> torch.Tensor:
        return self.quantize(super().activation(x, activation, None), act)

    def attention(self, q: torch.Tensor, attention: AttentionSpec, act: ActivationQuant | None,
                  selected: bool = False) -> torch.Tensor:
        return self.quantize(super().attention(q, attention, None, selected), act)

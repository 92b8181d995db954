"""AutoGPTQ's and GPTQModel's checkpoints: `qweight`, `qzeros`, `scales`, `g_idx`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from fptq_runtime.artifact.scheme import LayerScheme, QuantizationArgs, SchemeError
from fptq_runtime.kernels.base import Array, QuantizedWeight
from fptq_runtime.models.formats.facts import refuse_unknown
from fptq_runtime.models.tensors import CheckpointError, Tensors
from fptq_runtime.models.weights import Stored, runnable, unpack

READ = ("quant_method", "bits", "group_size", "sym", "checkpoint_format", "version", "format", "w_bit",
        "q_group_size", "zero_point")
HARMLESS = (  # how the codes were found, not what they mean
    "desc_act", "static_groups", "damp_percent", "damp_auto_increment", "true_sequential", "model_name_or_path",
    "model_file_base_name", "dataset", "batch_size", "block_name_to_quantize", "cache_block_outputs", "exllama_config",
    "max_input_length", "model_seqlen", "module_name_preceding_first_block", "modules_in_block_to_quantize",
    "pad_token_id", "tokenizer", "use_cuda_fp16", "use_exllama", "disable_exllama", "use_exllama_v2", "backend", "meta",
    "is_marlin_format", "pack_dtype", "mse", "dynamic", "lm_head", "quantizer", "act_group_aware", "act_order",
    "act_sort", "method", "offload_to_disk", "offload_to_disk_path", "foem", "gptaq", "hessian", "fallback", "damp",
)


class Gptq:
    """One scheme for every linear that the checkpoint stores quantized. Raises SchemeError."""

    dequantizes = False

    def __init__(self, config: Mapping[str, Any], tensors: Tensors) -> None:
        refuse_unknown(config, "gptq's quantization_config", READ, HARMLESS)
        layout = layout_of(config, "gptq", ("gptq", "gptq_v2"))
        self._tensors = tensors
        self._minus_one = layout == "gptq"
        self._args = uniform_args(config, "gptq", (4, 8), bool(config.get("sym", True)))

    def scheme(self, name: str) -> LayerScheme | None:
        return LayerScheme(self._args, None) if self.has(name) else None

    def has(self, name: str) -> bool:
        return self._tensors.shape(f"{name}.qweight") is not None

    def read(self, name: str, n: int, k: int, notes: Counter[str]) -> QuantizedWeight | Array:
        return runnable(name, self._stored(name, n, k), k, notes)

    def _stored(self, name: str, n: int, k: int) -> Stored:
        """Bits and groups are the tensors' own, since GPTQModel lets them differ by layer."""
        tensors, args = self._tensors, self._args
        rows, groups = ((tensors.shape(f"{name}.{part}") or (0,))[0] for part in ("qweight", "scales"))
        if rows not in (math.ceil(k / 8), math.ceil(k / 4)):
            raise CheckpointError(f"{name}.qweight has {rows} rows, which for {k} input features is neither 4 nor 8 "
                                  "bits")
        bits: Literal[4, 8] = 4 if rows == math.ceil(k / 8) else 8
        group = group_of(name, k, groups, args)
        packed = np.ascontiguousarray(tensors.get(f"{name}.qweight", (rows, n), ("I32",)).T)
        words = tensors.get(f"{name}.qzeros", (groups, math.ceil(n * bits / 32)), ("I32",))
        scale = tensors.get(f"{name}.scales", (groups, n)).T
        half = 2 ** (bits - 1)
        stored = unpack(words, bits, n).T + half  # [N, G]
        g_idx = None
        if tensors.shape(f"{name}.g_idx") is not None:
            g_idx = tensors.get(f"{name}.g_idx", (k,), ("I32", "I64"))
        if args.symmetric:
            if not ((stored == half).all() or (stored == half - 1).all()):
                raise CheckpointError(f"{name}.qzeros holds other zeros than {half}, although the checkpoint is "
                                      "symmetric")
            zero = None
        else:
            zero = stored - half
            if _zeros_minus_one(unpack(packed, bits, k) + half, stored, self._minus_one):
                # One from each was subtracted from the whole word, so that a zero of 0 borrows from the next.
                ones = np.uint32(0x11111111 if bits == 4 else 0x01010101)
                zero = unpack(words.view(np.uint32) + ones, bits, n).T
        return Stored(packed, scale, bits, group, zero, g_idx)


def uniform_args(config: Mapping[str, Any], method: str, widths: tuple[int, ...], symmetric: bool) -> QuantizationArgs:
    """The weights' scheme of a config that has one for all linears. Raises SchemeError."""
    bits, size = config.get("bits", config.get("w_bit")), config.get("group_size", config.get("q_group_size"))
    if isinstance(bits, bool) or bits not in widths:
        raise SchemeError(f"{method} with {bits!r} bits is not supported")
    if isinstance(size, bool) or not isinstance(size, int) or not (size == -1 or size > 0):
        raise SchemeError(f"{method}: group_size must be -1 or a positive integer, not {size!r}")
    return QuantizationArgs(bits, "channel" if size == -1 else "group", None if size == -1 else size,
                            symmetric=symmetric)


def layout_of(config: Mapping[str, Any], method: str, known: tuple[str, ...]) -> str:
    """How the words are packed; the first of `known` unless the config says. Raises SchemeError."""
    layout = str(config.get("checkpoint_format") or config.get("version") or config.get("format") or known[0]).lower()
    if layout not in known:
        raise SchemeError(f"{method} checkpoints in the layout {layout!r} are not supported; convert it to {known[0]}")
    return layout


def group_of(name: str, k: int, groups: int, args: QuantizationArgs) -> int:
    """The config's group size where it makes so many groups, else the one that does (GPTQModel's `dynamic`)."""
    group = min(args.group_size or k, k)
    if groups == -(-k // group):
        return group
    if groups < 1 or k % groups:
        raise CheckpointError(f"{name}.scales has {groups} groups, which do not divide {k} input features")
    return k // groups


def _zeros_minus_one(codes: Array, stored: Array, label: bool) -> bool:
    """Whether the true zeros are one above the stored ones: asymmetric codes average to the true zero, as a layer's
    weights average to about nothing. The label decides where the layer is too small to tell (three standard errors are
    more than a quarter of a code) or its average is not within a quarter of either."""
    above = float(codes.mean() - stored.mean())
    error = float(codes.std()) / math.sqrt(codes.size)
    if 3 * error > 0.25 or min(abs(above), abs(above - 1)) > 0.25:
        return label
    return above > 0.5

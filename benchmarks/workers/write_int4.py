"""Checkpoints by GPTQModel or AutoAWQ, and what the library computes from them, in an environment of its own:
python write_int4.py LIBRARY MODEL JOB_JSON.

The job: windows (token ids, the calibration samples), prompts (token ids), and variants, each with out (a directory to
write), logits (an .npz to write) and settings (QuantizeConfig's, or AutoAWQ's quant_config). In the .npz are, for each
prompt [T, V]: `exact0`, …, by transformers in float32 with the weights that the library dequantizes; `own0`, …, by the
library's own layers in float16.
"""

from __future__ import annotations

import json
import os
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

Tensors = dict[str, torch.Tensor]


def gptqmodel(source: str, windows: list[list[int]], settings: dict[str, Any], out: str) -> tuple[Any, Tensors]:
    """The written checkpoint loaded again, and the weights [N, K] that it stands for."""
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # two load weights, from a pool of half the cores
    from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    model = GPTQModel.load(source, QuantizeConfig(**settings))
    samples = [torch.tensor([window]) for window in windows]
    model.quantize([{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in samples], batch_size=1)
    model.save(out)
    own = GPTQModel.load(out, device="cpu", backend=BACKEND.GPTQ_TORCH, dtype=torch.float16).model
    weights = {}
    for name, module in own.named_modules():
        if isinstance(module, TorchLinear):
            stored, module.scales = module.scales, module.scales.float()
            weights[f"{name}.weight"] = TorchLinear.dequantize_weight(module).T
            module.scales = stored
    return own, weights


def autoawq(source: str, windows: list[list[int]], settings: dict[str, Any], out: str) -> tuple[Any, Tensors]:
    """The written checkpoint loaded again, and the weights [N, K] that it stands for."""
    import awq.models.base as base
    import awq.modules.linear.gemm as gemm
    from awq import AutoAWQForCausalLM
    from awq.utils.packing_utils import dequantize_gemm

    state_dict = torch.nn.Module.state_dict
    gemm.TRITON_AVAILABLE = False  # it can be imported anywhere, but its kernels want a GPU
    model = AutoAWQForCausalLM.from_pretrained(source, device_map="cpu", torch_dtype=torch.float32)
    # Its search puts weights back from what it took to the CPU, which without a GPU is the weights that it changes.
    with patch.object(torch.nn.Module, "state_dict", lambda *args, **kw: deepcopy(state_dict(*args, **kw))):
        model.quantize(None, quant_config=settings, calib_data=windows, max_calib_seq_len=max(map(len, windows)),
                       max_calib_samples=len(windows), apply_clip=False)  # minutes, and nothing that a reader sees
    model.save_quantized(out)
    base.get_best_device = lambda: "a CPU"  # for "cpu" it wants IPEX's kernels
    own = AutoAWQForCausalLM.from_quantized(out, fuse_layers=False, device_map={"": "cpu"},
                                            torch_dtype=torch.float16).model
    return own, {
        f"{name}.weight": dequantize_gemm(module.qweight, module.qzeros, module.scales.float(), module.w_bit,
                                          module.group_size).T
        for name, module in own.named_modules() if isinstance(module, gemm.WQLinear_GEMM)
    }


def main() -> None:
    library, source, job = sys.argv[1], sys.argv[2], json.loads(Path(sys.argv[3]).read_text())
    for variant in job["variants"]:
        write = {"gptqmodel": gptqmodel, "autoawq": autoawq}[library]
        own, weights = write(source, job["windows"], variant["settings"], variant["out"])
        np.savez(variant["logits"], **logits(own, job["prompts"], "own"),
                 **logits(floats(source, variant["out"], weights), job["prompts"], "exact"))


def floats(source: str, written: str, weights: Tensors) -> Any:
    """The float32 model of these weights; what is not quantized is as stored."""
    linears = {name.removesuffix(".weight") for name in weights}
    kept = {name: tensor for name, tensor in load_file(f"{written}/model.safetensors").items()
            if name.rpartition(".")[0] not in linears}
    model: Any = AutoModelForCausalLM.from_pretrained(source, torch_dtype=torch.float32)
    missing, unexpected = model.load_state_dict(weights | kept, strict=False)
    if unexpected or not set(missing) <= {"lm_head.weight"}:  # which may be tied
        raise ValueError(f"missing {missing}, unexpected {unexpected}")
    return model


@torch.inference_mode()
def logits(model: Any, prompts: list[list[int]], name: str) -> dict[str, Any]:
    model.eval()
    return {f"{name}{i}": model(torch.tensor([prompt])).logits[0].float().numpy() for i, prompt in enumerate(prompts)}


if __name__ == "__main__":
    main()

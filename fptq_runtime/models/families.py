"""Every family that runs: an explicit list."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any

from fptq_runtime.models.arcee import arcee
from fptq_runtime.models.block import Model
from fptq_runtime.models.bloom import bloom
from fptq_runtime.models.cohere import cohere, cohere2
from fptq_runtime.models.decilm import decilm
from fptq_runtime.models.deepseek import deepseek_v2, deepseek_v3, glm4_moe_lite
from fptq_runtime.models.ernie4_5 import ernie4_5
from fptq_runtime.models.exaone4 import exaone4
from fptq_runtime.models.falcon import falcon
from fptq_runtime.models.falcon_h1 import falcon_h1
from fptq_runtime.models.fields import Fields, ModelError
from fptq_runtime.models.gemma import gemma1
from fptq_runtime.models.gemma2 import gemma2
from fptq_runtime.models.gemma3 import gemma3
from fptq_runtime.models.glm import glm, glm4
from fptq_runtime.models.glm4_moe import glm4_moe
from fptq_runtime.models.gpt2 import gpt2
from fptq_runtime.models.gpt_bigcode import gpt_bigcode
from fptq_runtime.models.gpt_neo import gpt_neo
from fptq_runtime.models.gpt_neox import gpt_neox
from fptq_runtime.models.gpt_oss import gpt_oss
from fptq_runtime.models.gptj import codegen, gptj
from fptq_runtime.models.granite import granite, granite_hybrid
from fptq_runtime.models.granite_moe import granite_moe
from fptq_runtime.models.helium import helium
from fptq_runtime.models.hunyuan import hunyuan
from fptq_runtime.models.internlm3 import internlm3
from fptq_runtime.models.jais2 import jais2
from fptq_runtime.models.lfm2 import lfm2
from fptq_runtime.models.llama import llama
from fptq_runtime.models.mamba import falcon_mamba, mamba
from fptq_runtime.models.ministral import ministral
from fptq_runtime.models.ministral3 import ministral3
from fptq_runtime.models.mistral import mistral
from fptq_runtime.models.mixtral import mixtral
from fptq_runtime.models.mpt import mpt
from fptq_runtime.models.nemotron import nemotron
from fptq_runtime.models.nemotron_h import nemotron_h
from fptq_runtime.models.olmo import olmo
from fptq_runtime.models.olmo2 import olmo2
from fptq_runtime.models.olmo3 import olmo3
from fptq_runtime.models.olmoe import olmoe
from fptq_runtime.models.opt import opt
from fptq_runtime.models.persimmon import persimmon
from fptq_runtime.models.phi import phi
from fptq_runtime.models.phi3 import phi3
from fptq_runtime.models.phimoe import phimoe
from fptq_runtime.models.qwen2 import qwen2
from fptq_runtime.models.qwen2_moe import qwen2_moe
from fptq_runtime.models.qwen3 import qwen3
from fptq_runtime.models.qwen3_5 import qwen3_5, qwen3_5_moe, qwen3_next
from fptq_runtime.models.qwen3_moe import qwen3_moe
from fptq_runtime.models.renamed import baichuan, chatglm, exaone, internlm2, minicpm, qwen
from fptq_runtime.models.seed_oss import seed_oss
from fptq_runtime.models.smollm3 import smollm3
from fptq_runtime.models.stablelm import stablelm
from fptq_runtime.models.starcoder2 import starcoder2

FAMILIES: Mapping[str, Callable[[Fields], Model]] = {
    "LlamaForCausalLM": llama,
    "MistralForCausalLM": mistral,
    "Qwen2ForCausalLM": qwen2,
    "Qwen3ForCausalLM": qwen3,
    "Gemma2ForCausalLM": gemma2,
    "Gemma3ForCausalLM": gemma3,
    "Phi3ForCausalLM": phi3,
    "Olmo2ForCausalLM": olmo2,
    "GraniteForCausalLM": granite,
    "SmolLM3ForCausalLM": smollm3,
    "StableLmForCausalLM": stablelm,
    "GPTNeoXForCausalLM": gpt_neox,
    "OPTForCausalLM": opt,
    "GPT2LMHeadModel": gpt2,
    "BloomForCausalLM": bloom,
    "ArceeForCausalLM": arcee,
    "BaiChuanForCausalLM": baichuan,
    "BaichuanForCausalLM": baichuan,
    "ChatGLMForConditionalGeneration": chatglm,
    "ChatGLMModel": chatglm,
    "CodeGenForCausalLM": codegen,
    "Cohere2ForCausalLM": cohere2,
    "CohereForCausalLM": cohere,
    "DeciLMForCausalLM": decilm,
    "Ernie4_5ForCausalLM": ernie4_5,
    "ExaoneForCausalLM": exaone,
    "Exaone4ForCausalLM": exaone4,
    "FalconForCausalLM": falcon,
    "FalconH1ForCausalLM": falcon_h1,
    "FalconMambaForCausalLM": falcon_mamba,
    "GemmaForCausalLM": gemma1,
    "Glm4ForCausalLM": glm4,
    "GlmForCausalLM": glm,
    "GPTBigCodeForCausalLM": gpt_bigcode,
    "GPTJForCausalLM": gptj,
    "GPTNeoForCausalLM": gpt_neo,
    "GraniteMoeHybridForCausalLM": granite_hybrid,
    "HeliumForCausalLM": helium,
    "HunYuanDenseV1ForCausalLM": hunyuan,
    "InternLM2ForCausalLM": internlm2,
    "InternLM3ForCausalLM": internlm3,
    "Jais2ForCausalLM": jais2,
    "Lfm2ForCausalLM": lfm2,
    "MambaForCausalLM": mamba,
    "MiniCPMForCausalLM": minicpm,
    "MinistralForCausalLM": ministral,
    "Ministral3ForCausalLM": ministral3,
    "MptForCausalLM": mpt,
    "MPTForCausalLM": mpt,
    "NemotronForCausalLM": nemotron,
    "NemotronHForCausalLM": nemotron_h,
    "Olmo3ForCausalLM": olmo3,
    "OlmoForCausalLM": olmo,
    "PersimmonForCausalLM": persimmon,
    "PhiForCausalLM": phi,
    "Qwen3_5ForCausalLM": qwen3_5,
    "QWenLMHeadModel": qwen,
    "SeedOssForCausalLM": seed_oss,
    "Starcoder2ForCausalLM": starcoder2,
    "MixtralForCausalLM": mixtral,
    "Qwen2MoeForCausalLM": qwen2_moe,
    "Qwen3MoeForCausalLM": qwen3_moe,
    "Qwen3NextForCausalLM": qwen3_next,
    "Qwen3_5MoeForCausalLM": qwen3_5_moe,
    "OlmoeForCausalLM": olmoe,
    "PhimoeForCausalLM": phimoe,
    "PhiMoEForCausalLM": phimoe,
    "Glm4MoeForCausalLM": glm4_moe,
    "DeepseekV2ForCausalLM": deepseek_v2,
    "DeepseekV3ForCausalLM": deepseek_v3,
    "Glm4MoeLiteForCausalLM": glm4_moe_lite,
    "GraniteMoeForCausalLM": granite_moe,
    "GptOssForCausalLM": gpt_oss,
}  # by the architecture that config.json names


def parse_config(config: Mapping[str, Any]) -> Model:
    """The model that a config.json describes. Raises ModelError."""
    names = config.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise ModelError(f"config.json: architectures must name one architecture, not {names!r}")
    if names[0] in FAMILIES:
        return FAMILIES[names[0]](Fields(config))
    close = difflib.get_close_matches(names[0], FAMILIES, 1, 0.8)
    meant = f"; did you mean {close[0]}?" if close else "."
    raise ModelError(f"architecture {names[0]!r} is not supported{meant} Supported: {', '.join(FAMILIES)}")

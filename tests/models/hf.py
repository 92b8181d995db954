"""Random small transformers models of every family, saved as a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

LLAMA = {
    "vocab_size": 211, "hidden_size": 96, "intermediate_size": 136, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2,
}
PLAIN = {key: value for key, value in LLAMA.items() if key not in ("num_key_value_heads", "head_dim")}
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
FALCON = {"vocab_size": 211, "hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 6,
          "max_position_embeddings": 128, "ffn_hidden_size": 136, "bos_token_id": 1, "eos_token_id": 2}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", LLAMA),
    "llama-tied-bias": ("llama", {**LLAMA, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "llama3-rope": ("llama", {**LLAMA, "rope_parameters": LLAMA3_ROPE}),
    "llama-linear-rope": (
        "llama", {**LLAMA, "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "mistral-window": ("mistral", {**LLAMA, "sliding_window": 20}),
    "mistral-full": ("mistral", {**LLAMA, "sliding_window": None}),
    "qwen2": ("qwen2", LLAMA),
    "qwen2-window": ("qwen2", {**LLAMA, "use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1}),
    "qwen3": ("qwen3", {**LLAMA, "tie_word_embeddings": True}),
    "gemma2": ("gemma2", {**LLAMA, "query_pre_attn_scalar": 24, "sliding_window": 20, "attn_logit_softcapping": 3.0,
                          "final_logit_softcapping": 5.0}),
    "gemma3": ("gemma3_text", {**LLAMA, "num_hidden_layers": 4, "query_pre_attn_scalar": 24, "sliding_window": 20,
                               "sliding_window_pattern": 3, "attention_bias": True}),
    "gemma3-scaled": ("gemma3_text", {
        **LLAMA, "sliding_window": 20, "final_logit_softcapping": 4.0,
        "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e5},
                            "sliding_attention": {"rope_type": "default", "rope_theta": 1e3}},
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}),
    "phi3": ("phi3", {**PLAIN, "num_key_value_heads": 2, "pad_token_id": 0, "sliding_window": 20}),
    "phi4-mini": ("phi3", {
        **PLAIN, "num_key_value_heads": 2, "pad_token_id": 0, "tie_word_embeddings": True,
        "original_max_position_embeddings": 32, "rope_parameters": {
            "rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.75,
            "short_factor": [1.0, 1.1, 1.3, 1.6, 2.0, 2.2], "long_factor": [1.0, 2.0, 3.0, 4.0, 6.0, 9.0]}}),
    "olmo2": ("olmo2", LLAMA),
    "granite": ("granite", {**LLAMA, "attention_multiplier": 0.2, "residual_multiplier": 0.3,
                            "embedding_multiplier": 3.0, "logits_scaling": 5.0}),
    "smollm3": ("smollm3", {**LLAMA, "no_rope_layer_interval": 2, "pad_token_id": 0, "use_sliding_window": True,
                            "sliding_window": 20}),
    "gpt-neox": ("gpt_neox", {**PLAIN, "rope_parameters": {
        "rope_type": "default", "rope_theta": 1e3, "partial_rotary_factor": 0.5}}),
    "gpt-neox-serial": ("gpt_neox", {**PLAIN, "use_parallel_residual": False, "rotary_pct": 0.25}),
    "stablelm": ("stablelm", {**PLAIN, "num_key_value_heads": 2, "partial_rotary_factor": 0.5, "use_qkv_bias": True,
                              "qk_layernorm": True}),
    "stablelm-parallel": ("stablelm", {**PLAIN, "num_key_value_heads": 2, "use_parallel_residual": True}),
    "opt": ("opt", {"vocab_size": 211, "hidden_size": 96, "ffn_dim": 136, "num_hidden_layers": 3,
                    "num_attention_heads": 6, "max_position_embeddings": 128, "word_embed_proj_dim": 96,
                    "bos_token_id": 1, "eos_token_id": 2}),
    "gpt2": ("gpt2", {"vocab_size": 211, "n_embd": 96, "n_layer": 3, "n_head": 6, "n_positions": 128, "n_inner": 136,
                      "bos_token_id": 1, "eos_token_id": 2, "scale_attn_by_inverse_layer_idx": True}),
    "bloom": ("bloom", {"vocab_size": 211, "hidden_size": 96, "n_layer": 3, "n_head": 6, "bos_token_id": 1,
                        "eos_token_id": 2}),
    "gemma": ("gemma", {**LLAMA, "attention_bias": True}),
    "olmo": ("olmo", PLAIN),
    "olmo3": ("olmo3", {**LLAMA, "num_hidden_layers": 4, "sliding_window": 20, "rope_parameters": {
        "full_attention": {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0,
                           "original_max_position_embeddings": 32},
        "sliding_attention": {"rope_type": "default", "rope_theta": 500.0}}}),
    "granite-hybrid": ("granitemoehybrid", {
        **PLAIN, "num_key_value_heads": 2, "shared_intermediate_size": 136, "num_local_experts": 0,
        "layer_types": ["full_attention"] * 3, "position_embedding_type": "rope", "attention_multiplier": 0.2,
        "residual_multiplier": 0.3, "embedding_multiplier": 3.0, "logits_scaling": 5.0, "mamba_n_heads": 12}),
    "glm": ("glm", {**LLAMA, "pad_token_id": 0}),
    "glm4": ("glm4", {**LLAMA, "pad_token_id": 0, "rope_parameters": {
        "rope_type": "default", "rope_theta": 1e3, "partial_rotary_factor": 0.25}}),
    "cohere": ("cohere", {**PLAIN, "num_key_value_heads": 2, "use_qk_norm": True, "logit_scale": 0.3}),
    "cohere2": ("cohere2", {**PLAIN, "num_key_value_heads": 2, "sliding_window": 20, "attention_bias": True,
                            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}),
    "starcoder2": ("starcoder2", {**PLAIN, "num_key_value_heads": 2, "sliding_window": 20}),
    "ministral": ("ministral", {**LLAMA, "sliding_window": 20, "layer_types": [
        "sliding_attention", "full_attention", "sliding_attention"]}),
    "ministral3": ("ministral3", {**LLAMA, "max_position_embeddings": 256, "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 1e3, "factor": 2.0, "original_max_position_embeddings": 128,
        "llama_4_scaling_beta": 0.1, "mscale": 1.0, "mscale_all_dim": 1.0}}),
    "seed-oss": ("seed_oss", {**LLAMA, "attention_out_bias": True}),
    "exaone4": ("exaone4", {**LLAMA, "num_hidden_layers": 4, "sliding_window": 20}),
    "exaone4-full": ("exaone4", {**LLAMA, "sliding_window": None, "layer_types": ["full_attention"] * 3}),
    "internlm3": ("internlm3", {**LLAMA, "qkv_bias": True, "bias": True, "rope_parameters": {
        "rope_type": "dynamic", "rope_theta": 500.0, "factor": 6.0}}),
    "arcee": ("arcee", {**LLAMA, "mlp_bias": True}),
    "helium": ("helium", {**LLAMA, "attention_bias": True}),
    "ernie4.5": ("ernie4_5", {**LLAMA, "use_bias": True}),
    "nemotron": ("nemotron", {**LLAMA, "attention_bias": True}),
    "jais2": ("jais2", LLAMA),
    "phi": ("phi", {**PLAIN, "num_key_value_heads": 2, "qk_layernorm": True}),
    "persimmon": ("persimmon", PLAIN),
    "hunyuan": ("hunyuan_v1_dense", {**LLAMA, "attention_bias": True, "rope_parameters": {
        "rope_type": "dynamic", "rope_theta": 500.0, "factor": 1.0, "alpha": 1000.0}}),
    "gptj": ("gptj", {"vocab_size": 211, "n_embd": 96, "n_layer": 3, "n_head": 6, "n_positions": 128, "rotary_dim": 8,
                      "n_inner": 136, "bos_token_id": 1, "eos_token_id": 2}),
    "codegen": ("codegen", {"vocab_size": 211, "n_embd": 96, "n_layer": 3, "n_head": 8, "n_positions": 128,
                            "rotary_dim": 8, "bos_token_id": 1, "eos_token_id": 2}),
    "gpt-bigcode": ("gpt_bigcode", {"vocab_size": 211, "n_embd": 96, "n_layer": 3, "n_head": 6, "n_positions": 128,
                                    "n_inner": 136, "bos_token_id": 1, "eos_token_id": 2}),
    "gpt-bigcode-heads": ("gpt_bigcode", {
        "vocab_size": 211, "n_embd": 96, "n_layer": 3, "n_head": 6, "n_positions": 128, "multi_query": False,
        "scale_attn_weights": False, "bos_token_id": 1, "eos_token_id": 2}),
    "gpt-neo": ("gpt_neo", {"vocab_size": 211, "hidden_size": 96, "num_layers": 3, "num_heads": 6, "window_size": 20,
                            "attention_types": [[["global", "local", "local"], 1]], "max_position_embeddings": 128,
                            "bos_token_id": 1, "eos_token_id": 2}),
    "falcon": ("falcon", {**FALCON, "bias": True}),
    "falcon-grouped": ("falcon", {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-one-norm": ("falcon", {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 3,
                                   "num_ln_in_parallel_attn": 1}),
    "falcon-serial": ("falcon", {**FALCON, "multi_query": False, "parallel_attn": False}),
    "mpt": ("mpt", {"vocab_size": 211, "d_model": 96, "n_layers": 3, "n_heads": 6, "max_seq_len": 128,
                    "attn_config": {"softmax_scale": 0.2}, "bos_token_id": 1, "eos_token_id": 2}),
    "qwen3-moe": ("qwen3_moe", {**LLAMA, "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32,
                                "norm_topk_prob": True, "mlp_only_layers": [1]}),
    "qwen3-moe-window": ("qwen3_moe", {**LLAMA, "num_experts": 5, "num_experts_per_tok": 2, "decoder_sparse_step": 2,
                                       "moe_intermediate_size": 32, "attention_bias": True, "use_sliding_window": True,
                                       "sliding_window": 20}),
    "qwen2-moe": ("qwen2_moe", {**PLAIN, "num_key_value_heads": 2, "num_experts": 6, "num_experts_per_tok": 4,
                                "moe_intermediate_size": 32, "shared_expert_intermediate_size": 56,
                                "use_sliding_window": True, "sliding_window": 20, "max_window_layers": 2}),
    "mixtral": ("mixtral", {**LLAMA, "intermediate_size": 32, "num_local_experts": 4, "num_experts_per_tok": 2,
                            "sliding_window": 20}),
    "phimoe": ("phimoe", {**LLAMA, "intermediate_size": 32, "num_local_experts": 6, "router_jitter_noise": 0.3,
                          "attention_bias": True, "lm_head_bias": True, "sliding_window": 20, "pad_token_id": 0,
                          "rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "short_mscale": 1.2,
                                              "long_mscale": 1.2, "original_max_position_embeddings": 128,
                                              "short_factor": [1.0, 1.1, 1.3, 1.6, 2.0, 2.2, 2.5, 3.0],
                                              "long_factor": [1.0, 2.0, 3.0, 4.0, 6.0, 9.0, 9.0, 9.0]}}),
    "olmoe": ("olmoe", {**PLAIN, "intermediate_size": 32, "num_key_value_heads": 2, "num_experts": 8,
                        "num_experts_per_tok": 3, "norm_topk_prob": True, "pad_token_id": 0}),
    "glm4-moe": ("glm4_moe", {**LLAMA, "num_experts_per_tok": 3, "n_routed_experts": 12, "n_group": 4, "topk_group": 2,
                              "n_shared_experts": 2, "moe_intermediate_size": 32, "routed_scaling_factor": 1.7,
                              "attention_bias": True, "use_qk_norm": True, "first_k_dense_replace": 1,
                              "rope_parameters": {"rope_type": "default", "rope_theta": 1e4,
                                                  "partial_rotary_factor": 0.5}}),
    "granite-moe": ("granitemoe", {**PLAIN, "num_key_value_heads": 2, "num_local_experts": 6, "num_experts_per_tok": 2,
                                   "attention_multiplier": 0.2, "residual_multiplier": 0.3,
                                   "embedding_multiplier": 3.0, "logits_scaling": 5.0, "intermediate_size": 40}),
    "gpt-oss": ("gpt_oss", {**LLAMA, "num_local_experts": 6, "num_experts_per_tok": 2, "intermediate_size": 40,
                            "sliding_window": 20, "swiglu_limit": 1.5, "rope_parameters": {
                                "rope_type": "yarn", "rope_theta": 1e3, "factor": 4.0, "beta_fast": 32.0,
                                "beta_slow": 1.0, "truncate": False, "original_max_position_embeddings": 32}}),
    "lfm2": ("lfm2", {**PLAIN, "num_key_value_heads": 2, "num_hidden_layers": 4, "pad_token_id": 0, "conv_bias": True,
                      "conv_L_cache": 4, "block_multiple_of": 8, "block_ffn_dim_multiplier": 1.3,
                      "layer_types": ["conv", "full_attention", "full_attention", "conv"]}),
    "qwen3.5": ("qwen3_5_text", {
        **LLAMA, "num_hidden_layers": 4, "attention_bias": True, "linear_conv_kernel_dim": 3, "linear_key_head_dim": 24,
        "linear_value_head_dim": 40, "linear_num_key_heads": 2, "linear_num_value_heads": 6, "rms_norm_eps": 1e-2,
        "layer_types": ["linear_attention", "full_attention", "full_attention", "linear_attention"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5,
                            "mrope_section": [2, 1, 1]}}),
}
FAMILIES |= {
    "deepseek-v2": ("deepseek_v2", {
        **PLAIN, "q_lora_rank": None, "kv_lora_rank": 40, "qk_rope_head_dim": 8, "qk_nope_head_dim": 12,
        "v_head_dim": 16, "n_routed_experts": 12, "num_experts_per_tok": 3, "topk_method": "group_limited_greedy",
        "n_group": 4, "topk_group": 2, "n_shared_experts": 2, "moe_intermediate_size": 32, "routed_scaling_factor": 1.7,
        "first_k_dense_replace": 1, "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 1e3, "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 0.9,
            "original_max_position_embeddings": 32}}),
    "deepseek-v3": ("deepseek_v3", {
        **PLAIN, "num_key_value_heads": 6, "q_lora_rank": 48, "kv_lora_rank": 40, "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 12, "v_head_dim": 20, "n_routed_experts": 12, "num_experts_per_tok": 3, "n_group": 4,
        "topk_group": 2, "n_shared_experts": 1, "moe_intermediate_size": 32, "attention_bias": True,
        "first_k_dense_replace": 1, "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 1e3, "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 32}}),
    "glm4-moe-lite": ("glm4_moe_lite", {
        **PLAIN, "num_key_value_heads": 6, "q_lora_rank": 48, "kv_lora_rank": 40, "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 12, "v_head_dim": 20, "n_routed_experts": 6, "num_experts_per_tok": 2,
        "n_shared_experts": 1, "moe_intermediate_size": 32, "rope_interleave": False,
        "mlp_layer_types": ["sparse", "dense", "sparse"]}),
}
DELTA_NET = {
    **LLAMA, "linear_conv_kernel_dim": 3, "linear_key_head_dim": 24, "linear_value_head_dim": 40,
    "linear_num_key_heads": 2, "linear_num_value_heads": 6, "rms_norm_eps": 1e-2, "num_experts": 6,
    "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 40,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"], "rope_parameters": {
        "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}
FAMILIES |= {
    "qwen3-next": ("qwen3_next", {**DELTA_NET, "attention_bias": True, "norm_topk_prob": False,
                                  "mlp_only_layers": [1]}),
    "qwen3.5-moe": ("qwen3_5_moe_text", DELTA_NET),
}
MAMBA = {"vocab_size": 211, "hidden_size": 96, "num_hidden_layers": 3, "state_size": 12, "conv_kernel": 3,
         "time_step_rank": 8, "use_bias": True, "layer_norm_epsilon": 1e-3, "bos_token_id": 1, "eos_token_id": 2}
FAMILIES |= {
    "mamba": ("mamba", MAMBA),
    "falcon-mamba": ("falcon_mamba", {**MAMBA, "use_conv_bias": False, "expand": 1, "mixer_rms_eps": 1e-2,
                                      "tie_word_embeddings": False}),
}
MAMBA2 = {"mamba_n_heads": 6, "mamba_d_state": 12, "mamba_n_groups": 2, "mamba_d_conv": 3, "mamba_chunk_size": 16,
          "rms_norm_eps": 1e-3}
FAMILIES |= {
    "granite-4-h": ("granitemoehybrid", {
        **PLAIN, **MAMBA2, "num_key_value_heads": 2, "shared_intermediate_size": 40, "intermediate_size": 32,
        "num_local_experts": 6, "num_experts_per_tok": 2, "attention_multiplier": 0.2, "residual_multiplier": 0.3,
        "embedding_multiplier": 3.0, "logits_scaling": 5.0, "mamba_proj_bias": True,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"]}),
    "granite-4-h-dense": ("granitemoehybrid", {
        **PLAIN, **MAMBA2, "num_key_value_heads": 2, "shared_intermediate_size": 136, "num_local_experts": 0,
        "mamba_conv_bias": False, "time_step_limit": [0.1, 0.9], "attention_multiplier": 0.2,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"]}),
    "nemotron-h": ("nemotron_h", {
        **{name: value for name, value in LLAMA.items() if name != "num_hidden_layers"}, "ssm_state_size": 12,
        "mamba_num_heads": 6, "mamba_head_dim": 24, "n_groups": 2, "conv_kernel": 3, "n_routed_experts": 6,
        "num_experts_per_tok": 2, "moe_intermediate_size": 32, "moe_shared_expert_intermediate_size": 40,
        "routed_scaling_factor": 1.7, "n_group": 2, "topk_group": 1, "chunk_size": 16, "time_step_min": 0.3,
        "layer_norm_epsilon": 1e-3, "mlp_bias": True, "use_bias": True,
        "layers_block_type": ["linear_attention", "mlp", "full_attention", "moe", "linear_attention"]}),
    "falcon-h1": ("falcon_h1", {
        **LLAMA, **MAMBA2, "mamba_d_ssm": 144, "mamba_rms_norm": True,
        "lm_head_multiplier": 0.7, "embedding_multiplier": 3.0, "mlp_multipliers": [0.6, 1.4], "key_multiplier": 0.8,
        "attention_out_multiplier": 0.9, "attention_in_multiplier": 1.2, "ssm_in_multiplier": 1.3,
        "ssm_out_multiplier": 0.5, "ssm_multipliers": [0.7, 1.1, 0.8, 1.2, 0.9]}),
    "falcon-h1-plain": ("falcon_h1", {**LLAMA, **MAMBA2, "mamba_d_ssm": None}),
}
STACKED = ("granite-moe", "gpt-oss", "granite-4-h")  # with experts in one tensor, which is all that transformers reads
MIXTURES = ("qwen3-moe", "qwen3-moe-window", "qwen2-moe", "mixtral", "olmoe", "phimoe", "glm4-moe", "deepseek-v2",
            "deepseek-v3", "glm4-moe-lite", "qwen3-next", "qwen3.5-moe", "nemotron-h", *STACKED)  # of experts

HYBRIDS = ("lfm2", "qwen3.5", "qwen3-next", "qwen3.5-moe", "mamba", "falcon-mamba", "granite-4-h", "granite-4-h-dense",
           "nemotron-h", "falcon-h1", "falcon-h1-plain")  # with recurrent layers


def save_random(name: str, path: Path, seed: int = 0, shard: str = "5GB", **changes: Any) -> PreTrainedModel:
    """Weights large enough that attention and norms matter; norm gains and biases are random too."""
    torch.manual_seed(seed)
    model_type, fields = FAMILIES[name]
    fields = {**fields, **changes}
    if "layer_types" in fields:
        fields["layer_types"] = fields["layer_types"][: fields["num_hidden_layers"]]
    config = AutoConfig.for_model(model_type, **fields)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager",
                                             experts_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
            else:
                parameter.copy_(torch.randn_like(parameter) * 2 / parameter.shape[1] ** 0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(0.2 * torch.randn_like(buffer))
    model.save_pretrained(path, max_shard_size=shard)
    if model_type == "internlm3":  # transformers runs it as Llama; checkpoints name what they are
        change_config(path, architectures=["InternLM3ForCausalLM"])
    return model


def change_config(path: Path, **changes: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **changes}))

from __future__ import annotations

from dataclasses import replace

import pytest

from fptq_runtime.config import EngineConfig
from fptq_runtime.engine.kv_cache import cache_tokens, device_cache_memory, format_bytes, step_limits, token_bytes
from tests.engine.fake import MODEL, TOKEN_BYTES

LLAMA = replace(MODEL, num_layers=32, num_kv_heads=8, head_dim=128, vocab_size=128256, max_position_embeddings=8192)


def test_bytes_of_a_token() -> None:
    assert token_bytes(LLAMA, "bf16") == 128 << 10  # Llama 3 8B's well-known 128 KiB
    assert token_bytes(LLAMA, "int8") == 2 * 32 * 8 * (128 + 4)
    assert token_bytes(MODEL, "int8") == TOKEN_BYTES
    odd = replace(MODEL, num_layers=1, num_kv_heads=1, head_dim=70)
    assert [token_bytes(odd, dtype) for dtype in ("int8", "bf16", "float32")] == [72 + 80 + 8, 2 * 150, 4 * 150]


def test_the_cache_is_whole_blocks() -> None:
    assert cache_tokens(LLAMA, "bf16", 32, (64 << 20) + 1) == 512
    assert cache_tokens(LLAMA, "bf16", 32, (64 << 20) - 1) == 480
    assert cache_tokens(MODEL, "int8", 32, 1 << 50) * 1 < 1 << 31


def test_limits() -> None:
    limits = step_limits(LLAMA, EngineConfig(max_model_len=4096, kv_cache_memory=1 << 30, max_num_seqs=64))
    assert limits.num_blocks == (1 << 30) // (32 * token_bytes(LLAMA, "int8"))
    assert limits.max_tokens == 512
    assert limits.max_logits_rows == 64 + (64 << 20) // (4 * 128256)
    small = step_limits(MODEL, EngineConfig(max_model_len=32, max_num_seqs=2))
    assert small.max_tokens == 64
    assert small.max_logits_rows == 66


def test_a_cache_too_small_says_what_it_takes() -> None:
    with pytest.raises(ValueError, match=r"64 MiB \(bf16\) holds 512 tokens.*max_model_len 4096.*needs 512 MiB"):
        step_limits(LLAMA, EngineConfig(max_model_len=4096, kv_cache_memory=64 << 20, kv_cache_dtype="bf16"))


def test_a_context_beyond_the_model_is_refused() -> None:
    with pytest.raises(ValueError, match="9000 exceeds the model's 8192"):
        step_limits(LLAMA, EngineConfig(max_model_len=9000, kv_cache_memory=8 << 30))


def test_a_gpus_cache_is_what_weights_and_steps_leave() -> None:
    gpu = replace(LLAMA, hidden_size=4096, intermediate_size=14336, num_heads=32)
    config, gib = EngineConfig(max_model_len=4096), 1 << 30
    memory = device_cache_memory(80 * gib, 75 * gib, 0.9, gpu, config)
    assert 65 * gib < memory < 67 * gib - (768 << 20)
    assert device_cache_memory(80 * gib, 75 * gib, 0.5, gpu, config) == memory - 32 * gib
    wide = replace(config, max_num_batched_tokens=8192)
    assert memory - device_cache_memory(80 * gib, 75 * gib, 0.9, gpu, wide) > 4 * 8192 * 2 * 14336
    with pytest.raises(ValueError, match=r"of 24 GiB that were free, 50% may be used, the weights took 15 GiB"):
        device_cache_memory(24 * gib, 9 * gib, 0.5, gpu, config)


def test_sizes_are_rounded_up() -> None:
    assert [format_bytes(n) for n in (5, 1024, 1025, 1 << 20, 3 << 29)] == [
        "5 bytes", "1 KiB", "1.1 KiB", "1 MiB", "1.5 GiB"]

from __future__ import annotations

from dataclasses import replace

import pytest

from fptq_runtime.config import EngineConfig, KVCacheDtype
from fptq_runtime.engine.sizing import cache_tokens, check_memory, device_cache_memory, format_bytes, step_limits
from fptq_runtime.errors import FptqError
from fptq_runtime.kernels.base import StepLimits
from fptq_runtime.kernels.reference import ReferenceBackend, ReferenceCache
from tests.engine.fake import MODEL

LLAMA = replace(MODEL, num_layers=32, num_kv_heads=8, head_dim=128, vocab_size=128256, max_position_embeddings=8192)
BF16, INT8 = 128 << 10, 2 * 32 * 8 * (128 + 4)  # bytes of a token: Llama 3 8B's well-known 128 KiB


def test_what_a_token_takes_natively() -> None:
    cpu = pytest.importorskip("fptq_runtime.kernels.cpu", reason="the native extension is not built")
    backend = cpu.CpuBackend(1)
    assert [backend.token_bytes(LLAMA, dtype) for dtype in ("bf16", "int8")] == [BF16, INT8]
    # Keys of an int8 cache lie in fours, values of any in sixteens.
    odd = replace(MODEL, num_layers=3, num_kv_heads=2, head_dim=70)
    assert [backend.token_bytes(odd, dtype) for dtype in ("int8", "bf16", "float32")] == [
        6 * (72 + 80 + 8), 6 * 2 * 150, 6 * 4 * 150]


@pytest.mark.parametrize("dtype", ["int8", "bf16", "float32"])
def test_what_a_token_takes_of_the_reference_cache(dtype: KVCacheDtype) -> None:
    model = replace(MODEL, num_layers=3, num_kv_heads=2, head_dim=70)
    cache = ReferenceCache(StepLimits.of(model, max_tokens=8, max_model_len=64, num_blocks=4, kv_dtype=dtype))
    assert cache.keys.nbytes + cache.values.nbytes == 4 * 16 * ReferenceBackend().token_bytes(model, dtype)


def test_the_cache_is_whole_blocks() -> None:
    assert cache_tokens(BF16, 32, (64 << 20) + 1) == 512
    assert cache_tokens(BF16, 32, (64 << 20) - 1) == 480
    assert cache_tokens(28, 32, 1 << 50) < 1 << 31


def test_limits() -> None:
    limits = step_limits(LLAMA, EngineConfig(max_model_len=4096, kv_cache_memory=1 << 30, max_num_seqs=64), INT8)
    assert limits.num_blocks == (1 << 30) // (32 * INT8)
    assert limits.max_tokens == 512
    assert limits.max_logits_rows == 64 + (64 << 20) // (4 * 128256)
    small = step_limits(MODEL, EngineConfig(max_model_len=32, max_num_seqs=2), 28)
    assert small.max_tokens == 64
    assert small.max_logits_rows == 66


def test_a_cache_too_small_says_what_it_takes() -> None:
    config = EngineConfig(max_model_len=4096, kv_cache_memory=64 << 20, kv_cache_dtype="bf16")
    with pytest.raises(ValueError, match=r"64 MiB \(bf16\) holds 512 tokens.*max_model_len 4096.*needs 512 MiB"):
        step_limits(LLAMA, config, BF16)


def test_a_context_beyond_the_model_is_refused() -> None:
    with pytest.raises(ValueError, match="9000 exceeds the model's 8192"):
        step_limits(LLAMA, EngineConfig(max_model_len=9000, kv_cache_memory=8 << 30), INT8)


def test_a_gpus_cache_is_what_weights_and_steps_leave() -> None:
    gib = 1 << 30
    assert device_cache_memory(80 * gib, 75 * gib, 0.9, 2 * gib) == 65 * gib
    assert device_cache_memory(80 * gib, 75 * gib, 0.5, 2 * gib) == 33 * gib
    with pytest.raises(ValueError, match=r"of 24 GiB that were free, 50% may be used, the weights took 15 GiB"):
        device_cache_memory(24 * gib, 9 * gib, 0.5, gib)


def test_sizes_are_rounded_up() -> None:
    assert [format_bytes(n) for n in (5, 1024, 1025, 1 << 20, 3 << 29)] == [
        "5 bytes", "1 KiB", "1.1 KiB", "1 MiB", "1.5 GiB"]


def test_what_fits_into_memory() -> None:
    check_memory(3 << 30, 1 << 30, 0, 4 << 30)
    check_memory(3 << 30, 1 << 30, 0, None)
    with pytest.raises(FptqError, match=r"weights take 3 GiB and the KV cache 1 GiB, but only 3.5 GiB .* below 512MiB"):
        check_memory(3 << 30, 1 << 30, 0, 7 << 29)
    with pytest.raises(FptqError, match="too large for this machine or container"):
        check_memory(3 << 30, 1, 0, 2 << 30)

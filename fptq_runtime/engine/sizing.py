"""How much fits into memory: tokens of the KV cache, and the largest step that an executor must take. What a token and
a step take is the backend's to say."""

from __future__ import annotations

from fptq_runtime.config import EngineConfig, ModelConfig
from fptq_runtime.errors import FptqError
from fptq_runtime.kernels.base import StepLimits

# Rows of logits for echoed prompts are few enough that their buffer stays below this; a vocabulary of 150,000 gets
# 111 rows a step, one of 32,000 all of a default step.
MAX_LOGITS_BYTES = 64 << 20
# States of cached prefixes, for models with recurrent layers: this part of the KV cache's memory, beside it.
KEPT_SHARE = 2
MAX_KEPT = 1024


def cache_tokens(token_bytes: int, block_size: int, memory: int) -> int:
    """Tokens that whole blocks of that much memory hold; slots are numbered in 31 bits."""
    blocks = memory // (token_bytes * block_size)
    return min(blocks, (1 << 31) // block_size - 1) * block_size


def step_limits(model: ModelConfig, config: EngineConfig, token_bytes: int) -> StepLimits:
    """Raises FptqError where the cache cannot hold one sequence of max_model_len tokens, or the model's positions
    end before it."""
    if config.max_model_len > model.max_position_embeddings:
        raise FptqError(f"max_model_len {config.max_model_len} exceeds the model's {model.max_position_embeddings} "
                        "positions; lower max_model_len", "max_model_len")
    tokens = cache_tokens(token_bytes, config.block_size, config.kv_cache_memory)
    if tokens < config.max_model_len:
        needed = -(-config.max_model_len // config.block_size) * config.block_size * token_bytes
        raise FptqError(
            f"a KV cache of {format_bytes(config.kv_cache_memory)} ({config.kv_cache_dtype}) holds {tokens} tokens, "
            f"fewer than max_model_len {config.max_model_len}, which needs {format_bytes(needed)}; raise "
            "kv_cache_memory or lower max_model_len", "max_model_len", "kv_cache_memory",
        )
    # No step is larger than all sequences at their greatest length.
    max_tokens = min(config.max_num_batched_tokens, config.max_num_seqs * config.max_model_len)
    prompt_logits = max(1, min(max_tokens, MAX_LOGITS_BYTES // (4 * model.vocab_size)))
    max_seqs = min(config.max_num_seqs, max_tokens)
    kept = config.kv_cache_memory // KEPT_SHARE // model.state_bytes if model.state_bytes else 0
    return StepLimits.of(
        model, max_tokens=max_tokens, max_seqs=max_seqs, max_logits_rows=max_seqs + prompt_logits,
        max_model_len=config.max_model_len, num_blocks=tokens // config.block_size, block_size=config.block_size,
        kv_dtype=config.kv_cache_dtype, kept_states=min(kept, MAX_KEPT) * config.enable_prefix_caching,
    )


def device_cache_memory(free_before: int, free_now: int, utilization: float, step_bytes: int) -> int:
    """Bytes for the cache of a device that had `free_before` before the weights were loaded and has `free_now`: the
    `utilization` share of what was free, less the weights and what a step needs. Raises FptqError where that is
    nothing."""
    memory = int(free_before * utilization) - (free_before - free_now) - step_bytes
    if memory <= 0:
        raise FptqError(
            f"no GPU memory is left for a KV cache: of {format_bytes(free_before)} that were free, "
            f"{utilization:.0%} may be used, the weights took {format_bytes(free_before - free_now)} and a step needs "
            f"{format_bytes(step_bytes)}; raise gpu_memory_utilization, lower max_num_seqs or "
            "max_num_batched_tokens, or free memory on the GPU",
            "gpu_memory_utilization", "max_num_seqs", "max_num_batched_tokens")
    return memory


def check_memory(weights: int, cache: int, states: int, available: int | None) -> None:
    """Raises FptqError where weights, a cache and states of recurrent layers of so many bytes are more than is
    available: nobody refuses them later, but the system ends the process once it fills them."""
    if available is None or weights + cache + states <= available:
        return
    taken = f"the weights take {format_bytes(weights)}" + \
            f", states of recurrent layers {format_bytes(states)}" * (states > 0) + \
            f" and the KV cache {format_bytes(cache)}, but only {format_bytes(available)} of memory are available " \
            "(/proc/meminfo and the cgroup's limit)"
    if weights >= available:
        raise FptqError(f"{taken}: the model is too large for this machine or container")
    if states:
        raise FptqError(f"{taken}; lower max_num_seqs or kv_cache_memory, or free memory", "max_num_seqs",
                        "kv_cache_memory")
    raise FptqError(f"{taken}; lower kv_cache_memory, below {(available - weights) >> 20}MiB, or free memory",
                    "kv_cache_memory")


def format_bytes(size: int) -> str:
    """1.5 MiB, rounded up so that what is printed as needed is enough."""
    for unit, shift in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if size >= 1 << shift:
            return f"{-(-size * 10 >> shift) / 10:g} {unit}"
    return f"{size} bytes"

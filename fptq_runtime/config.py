"""What a model is and how an engine runs it: frozen, pure data, no torch."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Literal

from fptq_runtime.errors import FptqError

KVCacheDtype = Literal["float32", "bf16", "int8"]
# What an embedding is made of: the last token's hidden state, their mean, or that in which the first counts once, the
# second twice, and so on.
Pooling = Literal["last", "mean", "weightedmean"]
# What linears with quantized weights read: what the checkpoint says, or int8 per token where it says float.
Activations = Literal["checkpoint", "int8"]
MAX_LORAS = 64
MAX_THREADS = os.cpu_count() or 1  # beyond the machine's logical CPUs each step waits for threads that do not run


@dataclass(frozen=True)
class ModelConfig:
    """What an engine and a server need to know of a model, whichever family it comes from; models/block.py has the
    rest, and counts the last two. rope: how queries and keys are turned, for people, with what was chosen by the
    longest sequence. attention_layers: those that cache keys and values, all of them unless given. state_bytes: what
    recurrent layers keep of each running sequence."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    rope: str = "none"
    attention_layers: int | None = None
    state_bytes: int = 0

    @property
    def cached_layers(self) -> int:
        """One at least: kernels have a cache even where nothing is in it."""
        return self.num_layers if self.attention_layers is None else max(self.attention_layers, 1)


@dataclass(frozen=True)
class EngineConfig:
    """Limits of one engine. Sizes are in tokens, memory in bytes.

    block_size: tokens per KV block, 16, 32, 64 or 128 (what the attention kernels accept).
    max_waiting_requests, max_waiting_tokens: bounds of the queue; past them a request is refused.
    speculation: whether a step also checks guesses of the tokens to come, where that pays; answers are the same.
    close_structured: whether an answer that a grammar binds is brought to its end before its length cuts it.
    max_loras: adapters that may be loaded at a time; 0: the linears take none.
    max_wait: seconds in which a request is to have its first token; one that would wait longer is refused.
    itl_target: seconds from one token of an answer to the next: where a step would take longer, it has less of prompts.
    """

    max_model_len: int
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    block_size: int = 32
    kv_cache_dtype: KVCacheDtype = "int8"
    kv_cache_memory: int = 512 << 20
    enable_prefix_caching: bool = True
    speculation: bool = True
    close_structured: bool = True
    max_loras: int = 0
    max_waiting_requests: int = 256
    max_waiting_tokens: int = 1 << 20
    max_wait: float = math.inf
    itl_target: float | None = None

    def __post_init__(self) -> None:
        for name in ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "kv_cache_memory",
                     "max_waiting_requests", "max_waiting_tokens"):
            if getattr(self, name) < 1:
                raise FptqError(f"{name} must be at least 1, not {getattr(self, name)}", name)
        if not 0 <= self.max_loras <= MAX_LORAS:
            raise FptqError(f"max_loras must be between 0 and {MAX_LORAS}, not {self.max_loras}", "max_loras")
        for name in ("max_wait", "itl_target"):
            if (seconds := getattr(self, name)) is not None and not seconds > 0:
                raise FptqError(f"{name} must be more than 0 seconds, not {getattr(self, name)}", name)
        if self.block_size not in (16, 32, 64, 128):
            raise FptqError(f"block_size must be 16, 32, 64 or 128, not {self.block_size}", "block_size")
        if self.kv_cache_dtype not in ("float32", "bf16", "int8"):
            raise FptqError(f"kv_cache_dtype must be bf16 or int8, not {self.kv_cache_dtype!r}", "kv_cache_dtype")

    @property
    def max_unfinished_seqs(self) -> int:
        """Running and waiting together; what comes on top is refused."""
        return self.max_num_seqs + self.max_waiting_requests

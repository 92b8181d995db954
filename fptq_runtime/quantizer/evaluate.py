"""Perplexity: non-overlapping windows of min(context, 2048) tokens, BOS first where the model uses one, the first token
of a window unscored, mean over scored tokens."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from fptq_runtime.artifact.io import check_files, is_artifact
from fptq_runtime.config import Activations, KVCacheDtype
from fptq_runtime.kernels.base import Backend, StepInput, StepLimits, logits_array
from fptq_runtime.models.decoder import Decoder
from fptq_runtime.models.loader import Checkpoint, load_model
from fptq_runtime.models.tokenizer import Tokenizer
from fptq_runtime.progress import progress_bar
from fptq_runtime.quantizer.calibrate import (
    CalibrationError,
    Text,
    bos_prefix,
    check_token_ids,
    next_tokens,
    sum_nll,
)

MAX_WINDOW = 2048
LOGITS_FLOATS = 1 << 25  # of one step, 128 MiB
BLOCK_SIZE = 32


@dataclass(frozen=True)
class Perplexity:
    """tokens: how many were scored, in windows of `window`."""

    perplexity: float
    tokens: int
    window: int
    text: str
    text_sha256: str


def split_windows(token_ids: Sequence[int], bos: Sequence[int], window: int) -> list[list[int]]:
    """Non-overlapping windows of at most `window` tokens, `bos` included; each scores at least one token."""
    body = window - len(bos)
    windows = [[*bos, *token_ids[start : start + body]] for start in range(0, len(token_ids), body)]
    return [w for w in windows if len(w) > 1]


def text_windows(text: Text, tokenizer: Tokenizer, context: int, max_tokens: int | None) -> list[list[int]]:
    """A text's windows for a model of that context; max_tokens bounds how much of the text is read. Raises
    CalibrationError where nothing is left to score."""
    token_ids = tokenizer.encode(text.content, add_special_tokens=False)[:max_tokens]
    windows = split_windows(token_ids, bos_prefix(tokenizer), min(context, MAX_WINDOW))
    if not windows:
        raise CalibrationError(f"{text.name} is too short to measure perplexity on")
    return windows


def wikitext2_windows(text: Text, tokenizer: Tokenizer, context: int, max_tokens: int | None) -> list[list[int]]:
    """The windows that papers measure on: of the text tokenized whole, special tokens at its beginning alone, and
    without what is left at the end. Raises CalibrationError."""
    token_ids = tokenizer.encode(text.content)[:max_tokens]
    window = min(context, MAX_WINDOW)
    windows = [token_ids[start : start + window] for start in range(0, len(token_ids) - window + 1, window)]
    if not windows:
        raise CalibrationError(f"{text.name} has {len(token_ids)} tokens, fewer than one window of {window}")
    return windows


def window_logits(
    decoder: Decoder, backend: Backend, windows: Sequence[Sequence[int]], kv_dtype: KVCacheDtype = "bf16",
    progress: bool = False,
) -> Iterator[tuple[torch.Tensor, np.ndarray]]:
    """Logits [R, V] of all rows that have a next token, and these tokens [R], window by window. Memory is bounded: a
    window runs in chunks, the same ones for every model of one vocabulary."""
    config = decoder.config
    check_token_ids(windows, config.vocab_size)
    longest = max(map(len, windows))
    chunk = max(1, min(longest, LOGITS_FLOATS // config.vocab_size))
    limits = StepLimits.of(
        config, max_tokens=chunk, max_model_len=longest, num_blocks=-(-longest // BLOCK_SIZE), block_size=BLOCK_SIZE,
        kv_dtype=kv_dtype,
    )
    executor = backend.compile(decoder, limits)
    for window in progress_bar(windows, desc="perplexity", unit="window", shown=progress):
        whole = StepInput.whole([window], BLOCK_SIZE)
        rows, targets = next_tokens(whole)
        for start in range(0, len(rows), chunk):
            end = min(start + chunk, len(rows))
            logits = logits_array(executor.step(_chunk(whole, start, end, limits)))
            yield torch.from_numpy(logits), targets[start:end]


def perplexity(
    decoder: Decoder, backend: Backend, windows: Sequence[Sequence[int]], kv_dtype: KVCacheDtype = "bf16",
    progress: bool = False,
) -> tuple[float, int]:
    """exp of the mean negative log likelihood, and how many tokens were scored."""
    total, count = 0.0, 0
    for logits, targets in window_logits(decoder, backend, windows, kv_dtype, progress):
        total += sum_nll(logits, targets)
        count += len(targets)
    return math.exp(total / count), count


def sum_kl(exact: torch.Tensor, logits: torch.Tensor) -> float:
    """Σ over rows of KL(softmax(exact) ‖ softmax(logits)), in nats. Both [R, V]"""
    p, q = exact.log_softmax(-1), logits.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1, dtype=torch.float64).sum())


def evaluate(
    path: Path, text: Text, backend: Backend, *, max_tokens: int | None = None, kv_dtype: KVCacheDtype = "bf16",
    activations: Activations = "checkpoint", progress: bool = False,
) -> Perplexity:
    """Perplexity of a float model directory or an artifact on a text. Raises CheckpointError, ArtifactError or
    CalibrationError."""
    if is_artifact(path):
        check_files(path)
    checkpoint = Checkpoint(path, activations)
    context = checkpoint.model_config.max_position_embeddings
    windows = text_windows(text, Tokenizer(path), context, max_tokens)
    value, tokens = perplexity(load_model(checkpoint, backend), backend, windows, kv_dtype, progress)
    return Perplexity(value, tokens, min(context, MAX_WINDOW), text.name, text.sha256)


def _chunk(whole: StepInput, first: int, last: int, limits: StepLimits) -> StepInput:
    """Rows first..last-1 of a one-sequence step, over a cache that holds the rows before them."""
    rows = np.arange(last - first, dtype=np.int32)
    return replace(
        whole,
        token_ids=whole.token_ids[first:last],
        positions=whole.positions[first:last],
        slot_mapping=whole.positions[first:last],
        query_start_loc=np.array([0, last - first], dtype=np.int32),
        seq_lens=np.array([last], dtype=np.int32),
        block_tables=np.arange(limits.num_blocks, dtype=np.int32)[None],
        logits_rows=rows,
    )

"""Calibration and training text without data: the model writes it. As in LLM-QAT (arXiv 2305.17888): a random first
token, the next three to five greedy, the rest drawn from the model's own distribution. Or a conversation, as in Magpie
(arXiv 2406.08464): what the user says is drawn, too, behind what the chat template writes before it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain

import numpy as np

from fptq_runtime.config import ModelConfig
from fptq_runtime.kernels.base import PARAMETERS, Backend, Executor, Logits, SampleInput, StepInput, StepLimits
from fptq_runtime.models.chat_template import ChatTemplateError
from fptq_runtime.models.decoder import Decoder
from fptq_runtime.models.loader import Checkpoint
from fptq_runtime.models.tokenizer import Tokenizer
from fptq_runtime.quantizer.calibrate import CalibrationError, bos_prefix, check_token_ids

GREEDY_TOKENS = (3, 5)  # fewest and most
BATCH = 32
CACHE_BYTES = 1 << 30
BLOCK_SIZE = 32
QUESTION_TOKENS = 96  # the most of what the user says at a time


class NotFiniteError(CalibrationError):
    """A model that cannot say which token comes next."""


@dataclass(frozen=True)
class Turns:
    """What a chat template writes around what is said, in token ids: before the user's first words, between those and
    the answer, and between an answer and the user's next."""

    opening: tuple[int, ...]
    answer: tuple[int, ...]
    question: tuple[int, ...]


def find_turns(tokenizer: Tokenizer) -> Turns | None:
    """None without a chat template, or where it changes what is said or writes nothing between turns."""
    said = ["question 7319", "answer 7319", "question 7320"]  # nothing that a template says of itself
    roles = ("user", "assistant", "user")
    messages = [{"role": role, "content": text} for role, text in zip(roles, said, strict=True)]
    try:
        left = tokenizer.render_chat(messages, True).result()
    except ChatTemplateError:
        return None
    parts = []
    for text in said:
        before, found, left = left.partition(text)
        if not found:
            return None
        parts.append(tuple(tokenizer.encode(before, add_special_tokens=False)))
    turns = Turns(*parts)
    return turns if len(turns.opening) > len(bos_prefix(tokenizer)) and turns.answer and turns.question else None


def generate_windows(decoder: Decoder, backend: Backend, tokenizer: Tokenizer, lengths: Sequence[int], seed: int,
                     written: Callable[[int], object] = lambda count: None, turns: Turns | None = None,
                     ends: Sequence[int] = ()) -> list[list[int]]:
    """One window of each length, BOS included where the model uses one. The end-of-sequence token is never drawn, but
    in every other window, with `turns`, which are conversations, whose turns end with one of `ends`, too. `written`
    hears of every few tokens.

    A window depends on the seed, its index and its length alone. `decoder` must be loaded for `backend`. Raises
    CalibrationError where a length exceeds the model's context, and NotFiniteError.
    """
    config = decoder.config
    bos = bos_prefix(tokenizer)
    check_token_ids([bos], config.vocab_size)
    longest = max(lengths)
    if longest > config.max_position_embeddings:
        raise CalibrationError(f"a sample of {longest} tokens exceeds the model's context of "
                               f"{config.max_position_embeddings}")
    generators = [np.random.default_rng((seed, index)) for index in range(len(lengths))]
    known = min(config.vocab_size, tokenizer.vocab_size)
    windows = [[*bos, int(g.integers(known))][:length] for g, length in zip(generators, lengths, strict=True)]
    greedy = [int(g.integers(GREEDY_TOKENS[0], GREEDY_TOKENS[1] + 1)) for g in generators]
    seeds = [int(g.integers(1 << 63)) for g in generators]
    talks: dict[int, _Conversation] = {}
    if turns is not None:
        check_token_ids([turns.opening, turns.answer, turns.question], config.vocab_size)
        for i in range(1, len(windows), 2):
            windows[i] = [*turns.opening[: len(bos) + 1]][: lengths[i]]
            talks[i], greedy[i] = _Conversation(turns, len(windows[i]), (*config.eos_token_ids, *ends)), 0

    blocks = -(-longest // BLOCK_SIZE)
    bytes_each = blocks * BLOCK_SIZE * _token_bytes(config)
    batch = max(1, min(BATCH, len(lengths), CACHE_BYTES // bytes_each))
    prompt = len(bos) + 1
    executor = backend.compile(decoder, StepLimits.of(
        config, max_tokens=batch * prompt, max_seqs=batch, max_logits_rows=batch, max_model_len=longest,
        num_blocks=batch * blocks, block_size=BLOCK_SIZE, kv_dtype="bf16",
    ))
    by_length = sorted(range(len(lengths)), key=lambda index: lengths[index])
    for start in range(0, len(by_length), batch):
        computed = 0
        while active := [i for i in by_length[start : start + batch] if len(windows[i]) < lengths[i]]:
            logits = _step(executor, [windows[i] for i in active], computed, blocks)
            computed = len(windows[active[0]])  # all of a batch grow together
            temperatures = [float(computed - prompt >= greedy[i]) for i in active]
            banned = [() if i in talks else config.eos_token_ids for i in active]
            draws = _draws([seeds[i] for i in active], temperatures, computed, banned)
            drawn = backend.sample(logits, draws).result().token_ids
            if drawn.min() < 0:
                raise NotFiniteError("the model's logits are not finite; its weights may be damaged")
            for i, token in zip(active, drawn.tolist(), strict=True):
                windows[i].append(talks[i].next(token) if i in talks else token)
            written(len(active))
    return windows


class _Conversation:
    """Whose turn it is in a window, and what the template writes between turns, in place of what is drawn."""

    def __init__(self, turns: Turns, written: int, ends: Sequence[int]) -> None:
        self._turns = turns
        self._ends = ends
        self._queued = list(turns.opening[written:])
        self._asking = True
        self._said = 0  # tokens of this turn

    def next(self, drawn: int) -> int:
        """What follows where the model would go on with `drawn`."""
        if self._queued:
            return self._queued.pop(0)
        if drawn in self._ends or (self._asking and self._said == QUESTION_TOKENS):
            self._queued = list(self._turns.answer if self._asking else self._turns.question)
            self._asking, self._said = not self._asking, 0
            if self._queued:
                return self._queued.pop(0)
        self._said += 1
        return drawn


def writing_bytes(checkpoint: Checkpoint, tokens: int) -> int:
    """What loading a float model and its cache take at most: float32, where there is no native backend."""
    return 4 * checkpoint.num_parameters + min(CACHE_BYTES, tokens * _token_bytes(checkpoint.model_config))


def _token_bytes(config: ModelConfig) -> int:
    """Of the cache: keys and values in bf16."""
    return 4 * config.cached_layers * config.num_kv_heads * config.head_dim


def _step(executor: Executor, windows: Sequence[Sequence[int]], computed: int, blocks: int) -> Logits:
    """Logits after each window, whose first `computed` tokens are in the cache. Sequences that end are the shortest and
    come first, so the blocks are counted from the end."""
    count, length = len(windows), len(windows[0])
    positions = np.arange(computed, length, dtype=np.int32)
    tables = np.arange(count * blocks, dtype=np.int32).reshape(count, blocks)[::-1].copy()
    slots = tables[:, :1] * BLOCK_SIZE + positions  # each sequence's blocks are neighbours
    return executor.step(StepInput(
        token_ids=np.asarray([window[computed:] for window in windows], dtype=np.int32).ravel(),
        positions=np.tile(positions, count),
        slot_mapping=slots.ravel(),
        query_start_loc=np.arange(count + 1, dtype=np.int32) * len(positions),
        seq_lens=np.full(count, length, dtype=np.int32),
        block_tables=tables,
        logits_rows=np.arange(1, count + 1, dtype=np.int32) * len(positions) - 1,
        state_slots=np.arange(count, dtype=np.int32)[::-1].copy(),
    ))


def _draws(seeds: Sequence[int], temperatures: Sequence[float], position: int, banned: Sequence[Sequence[int]]
           ) -> SampleInput:
    count, none = len(seeds), np.zeros(0, dtype=np.int32)
    parameters = [(seed, t, 1, 0, 1, 0, 0, 0) for seed, t in zip(seeds, temperatures, strict=True)]
    return SampleInput(
        parameters=np.array(parameters, PARAMETERS),
        rows=np.arange(count, dtype=np.int32),
        token_ids=np.full(count, -1, dtype=np.int32),
        positions=np.full(count, position, dtype=np.int64),
        num_logprobs=np.full(count, -1, dtype=np.int32),
        mask_rows=np.full(count, -1, dtype=np.int32),
        masks=np.zeros((0, 0), dtype=np.uint32),
        bias_start=np.array([*accumulate(map(len, banned), initial=0)], dtype=np.int32),
        bias_ids=np.array([*chain.from_iterable(banned)], dtype=np.int32),
        bias_values=np.full(sum(map(len, banned)), -np.inf, dtype=np.float32),
        history_start=np.zeros(count + 1, dtype=np.int32),
        output_start=np.zeros(count, dtype=np.int32),
        history=none,
    )

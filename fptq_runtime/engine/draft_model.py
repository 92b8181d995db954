"""A smaller model that writes what the served one may go on with; a wrong guess costs time and nothing else. Its keys
and values lie in a cache of its own, at the slots that the sequence's own have in theirs."""

from __future__ import annotations

import time
from array import array
from collections import abc
from dataclasses import dataclass, field, replace
from itertools import takewhile

import numpy as np

from fptq_runtime.config import ModelConfig
from fptq_runtime.engine.batch import build_step_input
from fptq_runtime.engine.sampler import NO_MASKS, SampleBatch, SampleResult
from fptq_runtime.engine.scheduler import ScheduledSequence
from fptq_runtime.engine.sequence import Sequence
from fptq_runtime.engine.speculation import Draft, StepCost
from fptq_runtime.errors import FptqError
from fptq_runtime.kernels.base import Backend, Logits, StepLimits
from fptq_runtime.models.decoder import Decoder
from fptq_runtime.models.tokenizer import Tokenizer


@dataclass
class _Known:
    """What the cache has of a sequence: so many of its tokens, and then of guesses."""

    num_tokens: int
    num_preemptions: int
    guessed: array[int] = field(default_factory=lambda: array("i"))


class DraftModel:
    """cost: of its steps by their tokens. seconds: in all of them."""

    def __init__(self, decoder: Decoder, backend: Backend, limits: StepLimits) -> None:
        self.cost = StepCost()
        self.seconds = 0.0
        self._backend = backend
        self._block_size = limits.block_size
        self._max_tokens = limits.max_tokens
        self._max_len = min(limits.max_model_len, decoder.config.max_position_embeddings)
        self._executor = backend.compile(decoder, StepLimits.of(
            decoder.config, max_tokens=limits.max_tokens, max_seqs=limits.max_seqs, max_logits_rows=limits.max_seqs,
            max_model_len=self._max_len, num_blocks=limits.num_blocks, block_size=limits.block_size,
            kv_dtype=limits.kv_dtype))
        self._vocab_size = decoder.config.vocab_size
        self._known: dict[tuple[str, int], _Known] = {}
        self._held: dict[int, bytes] = {}  # by block: the digest of the text whose keys and values it has

    def guess(self, sequences: abc.Sequence[Sequence], depths: abc.Sequence[int], vocab_size: int) -> list[list[int]]:
        """What each of them may go on with, at most depths[i] tokens; their tables must hold all but the last of these.
        Drawn as the sequence would, with the same randomness. Nothing for those whose text it has to read first and
        that finds no place in a step."""
        guesses: list[list[int]] = [[] for _ in sequences]
        active, room = [], self._max_tokens
        for i, (sequence, depth) in enumerate(zip(sequences, depths, strict=True)):
            depth = min(depth, self._max_len - sequence.num_tokens)
            start = self._start(sequence)
            count = min(sequence.num_tokens - start, room) if depth > 0 else 0
            if count > 0:
                whole = start + count == sequence.num_tokens
                active.append((i, depth, ScheduledSequence(sequence, start, count, int(whole), whole)))
                room -= count
        while active:
            drawn = self._step([item for _, _, item in active])
            following = []
            for (i, depth, item), token_id in zip(active, drawn, strict=True):
                if token_id is None or not 0 <= token_id < vocab_size:
                    continue
                guesses[i].append(token_id)
                if len(guesses[i]) < depth:
                    end = item.start + item.num_rows
                    following.append((i, depth, ScheduledSequence(
                        item.sequence, end, 0, 1, True, Draft("draft", (token_id,)))))
            active = following
        return guesses

    def forget(self, sequence: Sequence) -> None:
        self._known.pop(sequence.key, None)

    def _start(self, sequence: Sequence) -> int:
        """How many of its tokens the cache has; the last is computed in any case, to guess what follows."""
        known = self._known.get(sequence.key)
        if known is None or known.num_preemptions != sequence.num_preemptions:
            blocks = zip(sequence.block_table, sequence.block_hashes, strict=False)
            held = sum(1 for _ in takewhile(lambda pair: self._held.get(pair[0]) == pair[1], blocks))
            known = _Known(held * self._block_size, sequence.num_preemptions)
        else:
            follows = sequence.token_ids[known.num_tokens : known.num_tokens + len(known.guessed)]
            pairs = zip(follows, known.guessed, strict=False)
            right = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
            known = _Known(known.num_tokens + right, known.num_preemptions)
        known.num_tokens = min(known.num_tokens, sequence.num_tokens - 1)
        self._known[sequence.key] = known
        return known.num_tokens

    def _step(self, items: list[ScheduledSequence]) -> list[int | None]:
        started = time.monotonic()
        for item in items:
            end = item.start + item.num_rows
            for block in item.sequence.block_table[item.start // self._block_size : -(-end // self._block_size)]:
                self._held.pop(block, None)
        batch = build_step_input(items, self._block_size)
        logits = self._executor.step(replace(batch, adapters=np.zeros_like(batch.adapters)), reuse=True)
        drawn = self._draw(items, logits)
        for item in items:
            self._keep(item)
        seconds = time.monotonic() - started
        self.seconds += seconds
        self.cost.observe(batch.token_ids.size, seconds)
        return drawn

    def _keep(self, item: ScheduledSequence) -> None:
        known, sequence = self._known[item.sequence.key], item.sequence
        first = known.num_tokens // self._block_size
        if item.draft.token_ids:
            known.guessed.extend(item.draft.token_ids)
        else:
            known.num_tokens = item.start + item.num_tokens
        for index in range(first, min(known.num_tokens // self._block_size, len(sequence.block_hashes))):
            self._held[sequence.block_table[index]] = sequence.block_hashes[index]

    def _draw(self, items: list[ScheduledSequence], logits: Logits) -> list[int | None]:
        batch = SampleBatch(NO_MASKS)
        row = 0
        for item in items:
            if item.samples:
                known = self._known[item.sequence.key]
                batch.draw(row, item.sequence, item.sequence.sampling, -1, (*known.guessed, *item.draft.token_ids))
                row += 1
        if not row:
            return [None] * len(items)
        result = SampleResult(self._backend.sample(logits, batch.build()).result(), logits.shape[1])
        draws = iter(range(row))
        return [result.token_id(draw) if item.samples and result.valid(draw := next(draws)) else None for item in items]


def check_draft(tokenizer: Tokenizer, model: ModelConfig, draft_tokenizer: Tokenizer, draft: ModelConfig) -> None:
    """Raises FptqError where the two do not have the same tokens, or one has layers that no guess can be taken back
    from."""
    if model.state_bytes or draft.state_bytes:
        raise FptqError(f"draft: {'the model' if model.state_bytes else 'it'} has recurrent layers, whose state holds "
                        "what was guessed wrongly, too; leave it out", "draft")
    ours, theirs = tokenizer.vocab, draft_tokenizer.vocab
    if ours != theirs:
        different = sorted(token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token))
        raise FptqError(f"draft has another vocabulary than the model: {len(different)} tokens differ, as "
                        f"{different[0]!r}; take a model of the same family", "draft")
    if draft.vocab_size < min(model.vocab_size, 1 + max(ours.values(), default=0)):
        raise FptqError(f"draft has {draft.vocab_size} rows of logits for {len(ours)} tokens", "draft")

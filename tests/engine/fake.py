"""A tiny model whose next token depends on every token it reads *through the cache*: one wrong block, slot or stale
entry changes what comes out. It lets the engine be tested without kernels."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel as PreByteLevel

from fptq_runtime.config import EngineConfig, ModelConfig
from fptq_runtime.engine.engine import Engine
from fptq_runtime.engine.output import RequestOutput
from fptq_runtime.engine.request import SamplingParams
from fptq_runtime.kernels.base import PendingSample, SampleInput, SampleOutput, StepInput, StepLimits
from fptq_runtime.kernels.sampling import sample_reference
from fptq_runtime.models.tokenizer import BYTE_ALPHABET

VOCAB = 97
EOS = 0
MODEL = ModelConfig(
    architecture="FakeForCausalLM", vocab_size=VOCAB, hidden_size=1, intermediate_size=1, num_layers=1, num_heads=1,
    num_kv_heads=1, head_dim=1, max_position_embeddings=1 << 20, eos_token_ids=(EOS,),
)
TOKEN_BYTES = 4  # an id


def logits_after(token_ids: Sequence[int]) -> np.ndarray:
    """The fake model: a row of logits that a whole text determines. [VOCAB]"""
    return (4 * _noise(token_ids)).astype(np.float32)


def habitual(token_ids: Sequence[int]) -> np.ndarray:
    """A model whose answers repeat themselves: the last two tokens say much, and the whole text something."""
    return (4 * _noise(token_ids[-2:]) + _noise(token_ids)).astype(np.float32)


def _noise(token_ids: Sequence[int]) -> np.ndarray:
    digest = hashlib.blake2b(np.asarray(token_ids, dtype=np.int32).tobytes(), digest_size=8).digest()
    return np.random.Generator(np.random.Philox(int.from_bytes(digest, "big"))).normal(size=VOCAB)


class LateSample:
    """A device's draws, which only it reads before somebody waits for them."""

    def __init__(self, output: SampleOutput) -> None:
        self._output = output
        self.waited = False

    def fill(self, token_ids: np.ndarray) -> np.ndarray:
        assert not self.waited, "the host knew them before it asked for this step"
        drawn = self._output.token_ids.clip(min=0)
        return np.where(token_ids < 0, drawn[-1 - token_ids.clip(max=-1)] if drawn.size else 0, token_ids)

    def result(self) -> SampleOutput:
        self.waited = True
        return self._output


class FakeExecutor:
    """`before` may raise, `after` may spoil the logits; every batch is checked against the contract. Where states of
    prefixes are kept, a slot's state is the text that it has seen, and must be what stands in the cache."""

    def __init__(self, limits: StepLimits) -> None:
        self.limits = limits
        self.cache = np.full(limits.num_blocks * limits.block_size, -1, dtype=np.int32)
        self.batches: list[StepInput] = []
        self.fed = 0  # token ids that the host did not know
        self.before: Callable[[StepInput], None] = lambda batch: None
        self.after: Callable[[np.ndarray], np.ndarray] = lambda logits: logits
        self.model = logits_after
        self.states: dict[int, list[int]] = {}

    @property
    def blocks(self) -> np.ndarray:
        return self.cache.reshape(self.limits.num_blocks, -1).view(np.uint8)

    def copy_state(self, source: int, target: int) -> None:
        assert max(source, target) < self.limits.num_states
        self.states[target] = list(self.states[source])

    def _move_states(self, batch: StepInput) -> None:
        size = self.limits.block_size
        for s, (slot, length) in enumerate(zip(batch.state_slots.tolist(), batch.seq_lens.tolist(), strict=True)):
            first, last = batch.query_start_loc[s : s + 2]
            start = length - int(last - first)
            positions = np.arange(start)
            text = self.cache[batch.block_tables[s, positions // size] * size + positions % size].tolist()
            assert slot < self.limits.max_seqs
            assert (self.states[slot] if start else []) == text, "the state has seen another text"
            self.states[slot] = [*text, *batch.token_ids[first:last].tolist()]

    def step(self, batch: StepInput, reuse: bool = False, sampled: LateSample | None = None) -> np.ndarray:
        if sampled is not None:
            self.fed += int((batch.token_ids < 0).sum())
            batch = replace(batch, token_ids=sampled.fill(batch.token_ids))
        assert (batch.token_ids >= 0).all()
        self.before(batch)
        limits, size = self.limits, self.limits.block_size
        assert 0 < len(batch.token_ids) <= limits.max_tokens
        assert 0 < len(batch.seq_lens) <= limits.max_seqs
        assert len(batch.logits_rows) <= limits.max_logits_rows
        assert batch.seq_lens.max() <= limits.max_model_len
        assert len(set(batch.slot_mapping.tolist())) == len(batch.slot_mapping)
        for array in vars(batch).values():
            assert array.dtype == np.int32
            assert array.flags.c_contiguous
        self.batches.append(batch)
        if limits.kept_states:
            self._move_states(batch)
        self.cache[batch.slot_mapping] = batch.token_ids
        rows = []
        for row in batch.logits_rows:
            sequence = int(np.searchsorted(batch.query_start_loc, row, side="right")) - 1
            positions = np.arange(batch.positions[row] + 1)
            slots = batch.block_tables[sequence, positions // size] * size + positions % size
            assert slots[-1] == batch.slot_mapping[row]
            rows.append(self.model(self.cache[slots]))
        return self.after(np.array(rows, dtype=np.float32).reshape(-1, VOCAB))


class FakeBackend:
    name = "fake"
    fingerprint = "fake"

    def __init__(self, asynchronous: bool = False) -> None:
        self.asynchronous = asynchronous

    def prepare(self, parameter: Any) -> Any:
        return parameter

    def token_bytes(self, model: ModelConfig, dtype: str) -> int:
        return TOKEN_BYTES

    def compile(self, forward: Any, limits: StepLimits, sharing: FakeExecutor | None = None) -> FakeExecutor:
        executor = FakeExecutor(limits)
        if sharing is None:
            self.executor = executor
        else:  # hidden states are as wide as logits, and other numbers
            executor.cache, executor.model = sharing.cache, lambda token_ids: -logits_after(token_ids)
        return executor

    def sample(self, logits: np.ndarray, batch: SampleInput) -> PendingSample:
        output = sample_reference(logits, batch)
        return LateSample(output) if self.asynchronous else output

    def describe(self) -> dict[str, str]:
        return {}


class FakeDecoder:
    config = MODEL
    hidden = None
    head = SimpleNamespace(readout=None)


class FakeTokenStream:
    """Token t is the character chr(t); one below 32 stays open until the next."""

    def __init__(self) -> None:
        self.open = ""

    def step(self, token_id: int) -> str | None:
        text = self.open + spelled(token_id)
        self.open = text if token_id < 32 else ""
        return None if self.open else text


class FakeTokenizer:
    def to_json(self) -> str:
        """For grammars: token t is the byte t, and 0 the end."""
        characters = {byte: character for character, byte in BYTE_ALPHABET.items()}
        backend = Tokenizer(BPE(vocab={"</s>": EOS} | {characters[t]: t for t in range(1, VOCAB)}, merges=[]))
        backend.decoder, backend.pre_tokenizer = ByteLevel(), PreByteLevel(add_prefix_space=False)
        backend.add_special_tokens(["</s>"])
        return str(backend.to_str())

    def stream(self, skip_special_tokens: bool = True, prompt_token_ids: Sequence[int] = (),
               shown: Collection[int] = ()) -> FakeTokenStream:
        return FakeTokenStream()


def spelled(token_id: int) -> str:
    return chr(0x100 + token_id) if token_id < 32 else chr(token_id)


def make_engine(*, max_model_len: int = 256, num_blocks: int = 64, asynchronous: bool = False, **options: Any
                ) -> Engine:
    """An engine over the fake model, which guesses nothing unless told to; its executor is engine.backend.executor."""
    options.setdefault("speculation", False)
    kv_disk = options.pop("kv_disk", None)
    block_size = options.setdefault("block_size", 16)
    config = EngineConfig(max_model_len=max_model_len, kv_cache_memory=num_blocks * block_size * TOKEN_BYTES, **options)
    return Engine(FakeDecoder(), FakeBackend(asynchronous), config, FakeTokenizer(),  # type: ignore[arg-type]
                  kv_disk=kv_disk)


def run(engine: Engine, check: bool = True) -> dict[tuple[str, int], list[RequestOutput]]:
    """Step until nothing is left. Events by sequence."""
    events: dict[tuple[str, int], list[RequestOutput]] = {}
    while engine.has_unfinished_requests:
        for output in engine.step()[0]:
            events.setdefault((output.request_id, output.index), []).append(output)
        if check:
            engine.check_integrity()
    return events


def tokens(events: Sequence[RequestOutput]) -> list[int]:
    return [token for event in events for token in event.token_ids]


def text(events: Sequence[RequestOutput]) -> str:
    return "".join(event.text for event in events)


def solo(prompt: Sequence[int], params: SamplingParams, **options: Any) -> dict[int, list[RequestOutput]]:
    """What a request gives alone, in one chunk, on a cold engine. Events by index."""
    engine = make_engine(max_num_batched_tokens=4096, **options)
    engine.add_request("solo", prompt, params)
    return {index: events for (_, index), events in run(engine).items()}


def gist(events: Sequence[RequestOutput]) -> tuple[Any, ...]:
    """All that must not depend on the company a request keeps."""
    last = events[-1]
    return (
        [(event.token_ids, event.text, event.logprobs, event.prompt_logprobs) for event in events],
        last.finish_reason,
        last.stop_reason,
    )

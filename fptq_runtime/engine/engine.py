"""One step after another: take in requests, schedule, execute, sample, say what happened."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import Counter, abc
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import count, takewhile
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

from fptq_runtime.config import EngineConfig
from fptq_runtime.engine.adapters import Adapters
from fptq_runtime.engine.admission import Forecast, Queued, Slots, Work
from fptq_runtime.engine.batch import build_step_input
from fptq_runtime.engine.block_manager import BlockManager
from fptq_runtime.engine.block_store import DiskStore, KVDisk
from fptq_runtime.engine.draft_model import DraftModel
from fptq_runtime.engine.grammar import GrammarError, Grammars
from fptq_runtime.engine.output import Detokenizer, RequestOutput, TextStream, TokenLogprobs
from fptq_runtime.engine.pooling import Pooler
from fptq_runtime.engine.request import ANYONE, NO_ADAPTER, Adapter, FinishReason, Origin, SamplingParams
from fptq_runtime.engine.sampler import NO_MASKS, SampleBatch, SampleResult, Sampling
from fptq_runtime.engine.scheduler import ScheduledSequence, Scheduler, SchedulerOutput
from fptq_runtime.engine.sequence import Sequence, SequenceStatus
from fptq_runtime.engine.sizing import format_bytes, step_limits
from fptq_runtime.engine.speculation import Candidate, Draft, Speculator
from fptq_runtime.engine.state_cache import StateCache
from fptq_runtime.engine.stats import FinishedStats, StepStats
from fptq_runtime.errors import FptqError
from fptq_runtime.kernels.base import (
    Backend,
    DeviceLostError,
    Executor,
    Float32Array,
    Logits,
    PendingSample,
    SampleOutput,
    UInt32Array,
    logits_array,
)
from fptq_runtime.models.decoder import Decoder

logger = logging.getLogger(__name__)

T = TypeVar("T", bound=Detokenizer)

RETRY_AFTER_SECONDS = (1.0, 600.0)
ANSWERED = (FinishReason.STOP, FinishReason.LENGTH)
STORE_SECONDS = 0.05  # that a step waits for blocks which are being read, where nothing else can be done
SLOTS_STEPS = 20  # over which is averaged how many sequences a cache holds that is full
MARGIN = 1.2  # what is accepted at the very limit is to begin in time on a machine that slows down, too
SPREAD = 0.5  # more, over the root of how many answers are waited for: of few the lengths do not even out
RETRY_SPREAD = 0.5  # of Retry-After: those refused together come back over so much more time
GOLDEN = (math.sqrt(5) - 1) / 2  # whose multiples fill an interval evenly, however many there are


class RequestError(FptqError):
    """A prompt or parameter that can never be served. The message is for the client."""


class QueueFullError(Exception):
    """Too much is waiting. retry_after: seconds until a request like this should find a place, at the measured pace.
    reason: queue_full, or draining where the server shuts down."""

    def __init__(self, retry_after: float, reason: str = "queue_full") -> None:
        super().__init__(f"{reason}: retry after {retry_after:.0f} s")
        self.retry_after = retry_after
        self.reason = reason


class _Rows(NamedTuple):
    """What a step's items asked for, in their order; None where none does."""

    logits: Logits | None  # [R, V]
    hidden: Logits | None  # of those that are pooled [R, H]


@dataclass(frozen=True)
class _Batch:
    """What the executor computes, or has computed. rows: None where that failed. masks: of the items that draw a
    token of a structured answer, in their order. failed: whom it cannot compute, taken out of the plan."""

    plan: SchedulerOutput
    rows: _Rows | None
    masks: Future[UInt32Array] | None = None
    failed: tuple[Sequence, ...] = ()


class Place:
    """In the queue, of a request that is on its way to it."""

    def __init__(self, leave: abc.Callable[[], None]) -> None:
        self._leave: abc.Callable[[], None] | None = leave

    def leave(self) -> None:
        """For the request itself, or for another. A second time does nothing."""
        leave, self._leave = self._leave, None
        if leave is not None:
            leave()


@dataclass
class _Draws:
    """What a step's logits give. spans: first and end draw of each scheduled item. ahead: the step after it is launched
    already, and reads them on the device."""

    spans: list[tuple[int, int]]
    sample: PendingSample
    ahead: bool = False


@dataclass(frozen=True)
class _Gain:
    """What a step drew for one sequence, if anything: the tokens of its draft that are right, and one more. logprobs:
    of each, where they are asked for. end: why it ends with the last whatever its text says, and the stop id.
    predicted: the draft's tokens, where the request's prediction gave them."""

    sequence: Sequence
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    end: tuple[FinishReason, int | None] | None = None
    predicted: int = 0


@dataclass
class _Step:
    """What one step has to say."""

    outputs: list[RequestOutput] = field(default_factory=list)
    drafts: list[tuple[Draft, int]] = field(default_factory=list)  # and how many tokens of each were right
    gained: list[int] = field(default_factory=list)  # tokens of each sequence that drew any
    stats: StepStats = field(default_factory=StepStats)


class Engine(Generic[T]):
    """Continuous batching over one model.

    add_request and abort may be called from any thread, also while a step runs; they take effect at the next step.
    step belongs to one thread. Raises FptqError where the configuration does not fit the model.
    eos_token_ids: those of the model's config unless given. probes: small computations whose results are known; each
    gives its deviation, 1 being what is tolerated. They belong between steps. kv_disk: where cached prefixes outlive
    their place in the cache, and the engine. adapters: of this decoder. draft: a smaller
    model of the same tokens, which guesses. identity: what decides which tokens are drawn, beside a request; None where
    it is not known.
    """

    def __init__(self, decoder: Decoder, backend: Backend, config: EngineConfig, tokenizer: T,
                 eos_token_ids: abc.Sequence[int] | None = None,
                 probes: abc.Callable[[], abc.Iterator[float]] | None = None, kv_disk: KVDisk | None = None,
                 adapters: Adapters | None = None, draft: Decoder | None = None,
                 identity: abc.Mapping[str, Any] | None = None) -> None:
        token_bytes = sum(backend.token_bytes(model.config, config.kv_cache_dtype)
                          for model in (decoder, draft) if model is not None)
        limits = step_limits(decoder.config, config, token_bytes)
        states = None
        if decoder.config.state_bytes:
            logger.info("recurrent layers keep %s of each running sequence, and of %d cached prefixes; no token is "
                        "guessed", format_bytes(decoder.config.state_bytes), limits.kept_states)
            states = StateCache(range(limits.max_seqs, limits.num_states))
            config = replace(config, enable_prefix_caching=limits.kept_states > 0, speculation=False)
        self.config = config
        self.probes = probes
        self.model_config = decoder.config
        self._decoder = decoder if adapters is None else adapters.decoder
        self.backend = backend
        self.tokenizer = tokenizer
        self._eos_token_ids = frozenset(decoder.config.eos_token_ids if eos_token_ids is None else eos_token_ids)
        self._limits = limits
        self.num_blocks = limits.num_blocks
        self.adapters = adapters
        self.identity = identity
        self._executor = backend.compile(self._decoder, limits)
        self._draft_model = None if draft is None or not config.speculation else DraftModel(draft, backend, limits)
        self._drafting = 0.0  # seconds, of steps that were accounted for
        self._scheduler = Scheduler(
            BlockManager(limits.num_blocks, config.block_size, config.enable_prefix_caching, self._open(kv_disk),
                         states),
            limits.max_seqs,
            limits.max_tokens,
            limits.max_logits_rows - limits.max_seqs,
        )
        self.grammars = Grammars(tokenizer.to_json, decoder.config.vocab_size, self._eos_token_ids,
                                 config.close_structured)
        self._mask_worker = ThreadPoolExecutor(1, "fptq-masks")
        self._awaits_store = False  # the last step had nothing to do before blocks are read
        self._launched: _Batch | None = None  # between steps, with an asynchronous backend
        self._live: dict[tuple[str, int], Sequence] = {}
        self._held_slots = 0.0  # sequences that run at once, of late
        self._ended: float | None = None  # when the last step did, if there was work left
        self.forget_pace()
        # Shared between threads, under the lock.
        self._lock = threading.Lock()
        self._inbox: list[Sequence] = []
        self._to_abort: list[str] = []
        self._unfinished: dict[str, int] = {}  # sequences by request
        self._num_unfinished = 0
        self._tenants: Counter[str] = Counter()  # unfinished sequences of each
        self._running: list[Work] = []  # after the last step; and those of them that were preempted
        self._preempted: list[Work] = []
        self._slots: Slots | None = None  # that running sequences hold, once somebody asks
        self._queued: dict[tuple[int, str], Queued] = {}  # what never ran, by priority and tenant
        self._entering: Counter[str] = Counter()  # requests that hold a place, of each tenant
        self._left: list[Sequence] = []  # that wait no longer, since the last step; the engine's thread's alone
        self._refusals = count()

    def forget_pace(self) -> None:
        """Unlearn what steps cost and how answers went, where those before were not like those to come."""
        self._forecast = Forecast(self._limits.max_tokens)
        self._speculator = Speculator(self._eos_token_ids) if self.config.speculation else None
        self._ended = None

    @property
    def executor(self) -> Executor:
        """For its measurements; steps are the engine's."""
        return self._executor

    @cached_property
    def _hidden_executor(self) -> Executor:
        """Computes hidden states, over the same cache; made with the first request for some."""
        limits = replace(self._limits, max_logits_rows=self._limits.max_tokens, kept_states=0)
        return self.backend.compile(self._decoder.hidden, limits, self._executor)

    @property
    def has_unfinished_requests(self) -> bool:
        return bool(self._unfinished)

    @property
    def num_running(self) -> int:
        return len(self._scheduler.running)

    @property
    def num_waiting(self) -> int:
        return len(self._scheduler.waiting) + len(self._inbox)

    @property
    def queued_tokens(self) -> float:
        """Of what waits: prompt tokens to compute, and tokens expected of them."""
        with self._lock:
            return sum(line.prompt + line.output for line in self._queued.values())

    def add_request(self, request_id: str, prompt_token_ids: abc.Sequence[int], params: SamplingParams,
                    origin: Origin = ANYONE, adapter: str = "") -> None:
        """Queue a request, for an adapter by its name, if any. Raises RequestError, AdapterError or GrammarError where
        it can never run, QueueFullError where it cannot now. Waits for its grammar where `grammars` has not compiled it
        yet."""
        self.validate(prompt_token_ids, params)
        lent = self._lend(adapter, params.n)
        try:
            self._add(request_id, prompt_token_ids, params, origin, lent)
        except BaseException:
            self._take_back(lent, params.n)
            raise

    def _lend(self, adapter: str, users: int) -> Adapter:
        if not adapter:
            return NO_ADAPTER
        if self.adapters is None:
            raise RequestError(f"there is no adapter {adapter}: max_loras is 0")
        return self.adapters.acquire(adapter, users)

    def _take_back(self, adapter: Adapter, users: int = 1) -> None:
        if self.adapters is not None and adapter is not NO_ADAPTER:
            self.adapters.release(adapter, users)

    def _add(self, request_id: str, prompt_token_ids: abc.Sequence[int], params: SamplingParams, origin: Origin,
             adapter: Adapter) -> None:
        sequences = Sequence.expand(request_id, prompt_token_ids, params, origin, adapter)
        most_tokens = self._most_tokens(len(prompt_token_ids), params)
        matchers = [None] * params.n if params.structured is None else \
            self.grammars.matchers(params.structured, params.n, params.stop_token_ids, most_tokens)
        work = Work(len(prompt_token_ids), 0, most_tokens)
        for sequence, matcher in zip(sequences, matchers, strict=True):
            sequence.matcher = matcher
            stream = self.tokenizer.stream(params.skip_special_tokens, prompt_token_ids, params.shown_special_tokens)
            sequence.text = TextStream(stream, params.stop)
            sequence.sampling = Sampling(sequence, self._eos_token_ids)
            sequence.pooler = None if params.pooling is None else Pooler(params.pooling)
            sequence.cost = work.prompt + self._forecast.output(work)
        with self._lock:
            if request_id in self._unfinished:
                raise RequestError(f"a request with id {request_id!r} is already running")
            self._check_room(origin, work, params.n)
            self._inbox += sequences
            self._unfinished[request_id] = params.n
            self._num_unfinished += params.n
            self._tenants[origin.tenant] += params.n
            self._queue(sequences[0], params.n)

    def enter(self, origin: Origin = ANYONE) -> Place:
        """A place for a request that is not read yet. Raises QueueFullError where even the least one would find none;
        that takes no longer the more there are."""
        with self._lock:
            self._check_room(origin, Work(1, 0, 1), 1)
            self._entering[origin.tenant] += 1
        return Place(lambda: self._leave(origin.tenant))

    def _leave(self, tenant: str) -> None:
        with self._lock:
            self._entering[tenant] -= 1
            if self._entering[tenant] == 0:
                del self._entering[tenant]

    def _queue(self, sequence: Sequence, times: int) -> None:
        """times: how many like it wait, or, below 0, no longer do."""
        line = sequence.origin.priority, sequence.origin.tenant
        prompt = sequence.num_prompt_tokens
        queued = self._queued.get(line, Queued()).plus(Queued(1, prompt, sequence.cost - prompt), times)
        if queued.sequences:
            self._queued[line] = queued
        else:
            del self._queued[line]

    def _check_room(self, origin: Origin, work: Work, n: int) -> None:
        """Raises QueueFullError where the queue holds too much, unless it is others who fill it, or where the wait
        would be too long. A prompt's own computation counts only for half of what it may wait: one that takes longer
        would never be served."""
        if self._slots is None:
            self._slots = self._forecast.slots(self._running, self._places)
        slots, ahead = self._slots, self._ahead(origin)
        begins, first_token = self._forecast.wait(slots, ahead, work.prompt)
        most = min(origin.max_wait, self.config.max_wait)
        margin = MARGIN + SPREAD / math.sqrt(max(1.0, ahead.sequences + len(self._running)))
        wait = begins * margin + min(first_token, most / 2)
        if (ahead.sequences or len(self._running) >= slots.count) and wait > most:
            raise self._refusal((wait - most) / margin)
        entering = self._entering.total()
        tokens = sum(line.prompt for line in self._queued.values())
        own = sum(line.prompt for (_, tenant), line in self._queued.items() if tenant == origin.tenant)
        for held, of_tenant, more, most_held, waiting in (
                (self._num_unfinished + entering, self._tenants[origin.tenant] + self._entering[origin.tenant], n,
                 self.config.max_unfinished_seqs, ahead.sequences),
                (tokens, own, n * work.prompt if tokens else 0, self.config.max_waiting_tokens, ahead.prompt)):
            share = most_held // len({*self._tenants, *self._entering, origin.tenant})
            if held + more > most_held and of_tenant + more > share:
                # Where all slots are taken, what begins after these takes the place of one that ends.
                those = held + more - most_held - 1 + max(0, slots.count - len(self._running))
                before = Queued().plus(ahead, min(1.0, those / max(1, waiting)))
                raise self._refusal(self._forecast.wait(slots, before, 1)[0])

    def _ahead(self, origin: Origin) -> Queued:
        """What goes before a request that comes now; its tenant's that are entering are as those that wait. Of another
        tenant of the same priority it is what has its turn until then, and at least one."""
        scheduler, ahead = self._scheduler, Queued()
        for (priority, tenant), line in self._queued.items():
            if priority <= origin.priority:
                turns = priority == origin.priority and tenant != origin.tenant
                share = scheduler.share_before(origin.tenant, tenant) + 1 / line.sequences if turns else 1.0
                ahead = ahead.plus(line, min(1.0, share))
        if ahead.sequences and (entering := self._entering[origin.tenant]):
            ahead = ahead.plus(ahead, entering / ahead.sequences)
        for work in self._preempted:
            ahead = ahead.plus(Queued(1, work.prompt, self._forecast.output(work)))
        return ahead

    def _refusal(self, seconds: float) -> QueueFullError:
        """seconds: until there should be a place; those who are refused together get more and more different ones."""
        low, high = RETRY_AFTER_SECONDS
        spread = 1 + RETRY_SPREAD * (next(self._refusals) * GOLDEN % 1)
        return QueueFullError(min(max(seconds, low) * spread, high))

    @property
    def _places(self) -> int:
        """Sequences that run at once: fewer than are allowed where the cache holds no more."""
        scheduler = self._scheduler
        return max(1, int(self._held_slots)) if scheduler.lacks_blocks else scheduler.max_num_seqs

    def abort(self, request_id: str) -> None:
        """Finish a request's sequences with FinishReason.ABORT; one that is unknown or finished is left alone."""
        with self._lock:
            if request_id in self._unfinished:
                self._to_abort.append(request_id)

    def step(self) -> tuple[list[RequestOutput], StepStats]:
        """Compute one batch. What one sequence breaks, in company or alone, finishes that sequence with
        FinishReason.ERROR; what no one sequence breaks, those that were in the batch. Raises DeviceLostError, after
        which no step can succeed.

        An asynchronous backend gets the next batch before this one's tokens are known, which it reads on the device,
        and computes it while they are taken in, their text is made and the outputs are delivered. A sequence that its
        tokens end is dropped from that batch. Where the next batch depends on them, by guesses of what comes then, it
        is launched as soon as they are known. Masks of structured answers are made while the batch is computed.
        """
        if self._awaits_store:
            self._scheduler.blocks.end_loads(STORE_SECONDS)
            self._awaits_store, self._ended = False, None
        started = time.monotonic()
        step = _Step()
        self._receive(step)
        batch, self._launched = self._launched or self._launch(), None
        draws, following = self._draw_all(batch), None
        if draws is not None and self._leads_on(batch):
            self._advance(batch.plan, draws)
            following = self._launch(draws.sample)
        gains = self._take_in(step, batch, draws)
        if following is not None:
            following = replace(following, masks=self._ask_masks(following.plan))
        elif self.backend.asynchronous:
            following = self._launch()
        keeps = following is not None and (following.plan.scheduled or following.failed)
        self._launched = following if keeps else None
        self._report(step, gains)
        self._account(step, batch.plan, time.monotonic() - started)
        return step.outputs, step.stats

    def check_integrity(self) -> None:
        """Raise AssertionError where an invariant is broken. For tests, between steps."""
        self._scheduler.check_integrity()
        queued = [*self._scheduler.running, *self._scheduler.waiting]
        assert {sequence.key: sequence for sequence in queued} == self._live
        assert self._num_unfinished == sum(self._unfinished.values()) == len(queued) + len(self._inbox)
        waiting = Counter((sequence.origin.priority, sequence.origin.tenant)
                          for sequence in [*queued, *self._inbox] if sequence.scheduled_time is None)
        assert {line: queued.sequences for line, queued in self._queued.items()} == waiting

    def validate(self, prompt_token_ids: abc.Sequence[int], params: SamplingParams) -> None:
        length, limit = len(prompt_token_ids), self.config.max_model_len
        vocab_size = self.model_config.vocab_size
        if length == 0:
            raise RequestError("the prompt is empty; it needs at least one token", "prompt")
        if length + min(params.max_tokens, 1) > limit:
            raise RequestError(f"the prompt has {length} tokens, but this model's context is {limit} tokens including "
                               "at least one of output; shorten the prompt", "prompt")
        for token_id in (min(prompt_token_ids), max(prompt_token_ids)):
            if not 0 <= token_id < vocab_size:
                raise RequestError(f"prompt: token id {token_id} is not between 0 and {vocab_size - 1}: the model's "
                                   f"vocabulary has {vocab_size} tokens", "prompt")
        for name, ids in (("logit_bias", params.logit_bias), ("stop_token_ids", params.stop_token_ids),
                          ("prediction", params.prediction)):
            for token_id in ids:
                if not 0 <= token_id < vocab_size:
                    raise RequestError(f"{name}: token id {token_id} is not between 0 and {vocab_size - 1}", name)
        if params.n > self.config.max_unfinished_seqs:
            raise RequestError(f"n {params.n} exceeds the {self.config.max_num_seqs} running and "
                               f"{self.config.max_waiting_requests} waiting sequences that this server takes", "n")

    def _receive(self, step: _Step) -> None:
        """Queue what was added since the last step, then drop what was aborted."""
        with self._lock:
            added, self._inbox = self._inbox, []
            aborted, self._to_abort = set(self._to_abort), []
        for sequence in added:
            self._live[sequence.key] = sequence
            self._scheduler.add(sequence)
        if aborted:
            for sequence in [s for s in self._live.values() if s.request_id in aborted]:
                self._emit(step, sequence, finish_reason=FinishReason.ABORT)

    def _open(self, disk: KVDisk | None) -> DiskStore | None:
        if disk is None:
            return None
        if self.model_config.state_bytes:
            raise FptqError("kv_cache_disk keeps keys and values, without the states of recurrent layers that cached "
                            f"prefixes of {self.model_config.architecture} need as well", "kv_cache_disk")
        if not self.config.enable_prefix_caching:
            raise FptqError("kv_cache_disk keeps cached prefixes, and no_prefix_cache says that there are none",
                            "kv_cache_disk")
        if self._executor.blocks is None:
            raise FptqError(f"kv_cache_disk needs the native backend; the {self.backend.name} backend's cache is not "
                            "to be had block by block", "kv_cache_disk")
        return DiskStore(disk, self._executor.blocks)

    def _leads_on(self, batch: _Batch) -> bool:
        """Whether the batch after this one can be planned without the tokens that this one draws."""
        if not self.backend.asynchronous or self._draft_model is not None or batch.failed \
                or any(item.pooled or item.draft.token_ids for item in batch.plan.scheduled):
            return False
        drafts = [] if self._speculator is None else self._drafts(self._speculator, batch.plan)
        return not any(draft.token_ids for draft in drafts)

    def _advance(self, plan: SchedulerOutput, draws: _Draws) -> None:
        """Go on as if each token that is drawn were there; in its place stands the draw, as StepInput has it. What ends
        with it by its length leaves the scheduler."""
        draws.ahead = True
        sampled = [(-end,) if item.samples and first < end else ()
                   for item, (first, end) in zip(plan.scheduled, draws.spans, strict=True)]
        self._scheduler.update(plan, sampled)
        for item, token_ids in zip(plan.scheduled, sampled, strict=True):
            sequence = item.sequence
            if sequence.status is SequenceStatus.RUNNING and self._is_full(sequence, sequence.num_tokens) \
                    and sequence.num_computed_tokens + len(token_ids) == sequence.num_tokens:
                self._scheduler.finish(sequence)

    def _launch(self, sample: PendingSample | None = None) -> _Batch:
        """sample: of the batch before, where its tokens are not known."""
        self._scheduler.restore()
        plan = self._scheduler.schedule(self._scheduler.budget(self._forecast, self.config.itl_target))
        if self._speculator is not None and sample is None:
            self._speculate(self._speculator, plan)
        now = time.monotonic()
        for sequence in plan.admitted:
            sequence.scheduled_time = now
        self._left += plan.admitted
        if not plan.scheduled:
            self._awaits_store = self._scheduler.blocks.num_loading_blocks > 0
            if (self._scheduler.running or self._scheduler.waiting) and not self._awaits_store:
                raise RuntimeError("sequences are left but none can be scheduled")
            return _Batch(plan, None)
        for source, target in plan.state_copies:
            self._executor.copy_state(source, target)
        try:
            return self._compute(plan, sample)
        except DeviceLostError:
            raise
        except Exception:
            logger.exception("a step of %d sequences failed; it is taken apart", len(plan.scheduled))
        failed = self._culprits(plan.scheduled, sample)
        for item in failed:
            logger.error("request %s, sequence %d cannot be computed and ends with an error",
                         item.sequence.request_id, item.sequence.index)
        rest = replace(plan, scheduled=[item for item in plan.scheduled if item not in failed])
        sequences = tuple(item.sequence for item in failed)
        if failed and self.model_config.state_bytes:  # states of some have moved on while that was found out
            preempted = [item.sequence for item in reversed(rest.scheduled)]
            for sequence in preempted:
                self._scheduler.preempt(sequence)
            return _Batch(replace(rest, scheduled=[], preempted=[*rest.preempted, *preempted]), None, None, sequences)
        try:
            computed = self._compute(rest, sample) if failed and rest.scheduled else _Batch(rest, None)
            return replace(computed, failed=sequences)
        except DeviceLostError:
            raise
        except Exception:
            logger.exception("a step failed; its %d sequences end with an error", len(rest.scheduled))
            return _Batch(rest, None, None, sequences)

    def _speculate(self, speculator: Speculator, plan: SchedulerOutput) -> None:
        """Have a step check what its sequences probably go on with, as far as that pays."""
        self._scheduler.extend(plan, self._drafts(speculator, plan))

    def _drafts(self, speculator: Speculator, plan: SchedulerOutput) -> list[Draft]:
        """Of each item what it may go on with, as far as that pays; nothing of any."""
        room = self._scheduler.room_for_drafts(plan)
        candidates: list[Candidate | None] = []
        limits = []
        for item in plan.scheduled:
            sequence = item.sequence
            most = min(room, sequence.params.max_tokens - sequence.num_output_tokens - 1,
                       self.config.max_model_len - sequence.num_tokens - 1)
            limits.append(most if item.samples and not sequence.needs_prompt_logits else 0)
            try:
                candidates.append(speculator.candidate(sequence, most) if limits[-1] > 0 else None)
            except Exception:
                logger.exception("request %s, sequence %d: nothing is guessed", sequence.request_id, sequence.index)
                candidates.append(None)
        if self._draft_model is not None:
            self._ask(self._draft_model, speculator, plan, candidates, limits)
        drawing = sum(item.samples for item in plan.scheduled)
        return speculator.choose(candidates, plan.num_tokens, drawing, room) if any(candidates) else []

    def _ask(self, model: DraftModel, speculator: Speculator, plan: SchedulerOutput,
             candidates: list[Candidate | None], limits: abc.Sequence[int]) -> None:
        """Have a draft model guess for sequences that have begun to answer and nothing better is known of."""
        asked = [i for i, item in enumerate(plan.scheduled) if limits[i] > 0 and item.sequence.num_output_tokens
                 and ((known := candidates[i]) is None or known.chances[0] < speculator.draft_chance(item.sequence))]
        sequences = [plan.scheduled[i].sequence for i in asked]
        drawing = sum(item.samples for item in plan.scheduled)
        depth = speculator.depth(sequences, plan.num_tokens, drawing, model.cost, self._scheduler.room_for_drafts(plan))
        if not depth:
            return
        depths = [self._scheduler.reserve(plan.scheduled[i], min(depth, limits[i])) for i in asked]
        try:
            guesses = model.guess(sequences, depths, self.model_config.vocab_size)
            for i, sequence, token_ids in zip(asked, sequences, guesses, strict=True):
                candidates[i] = speculator.drafted(sequence, token_ids) or candidates[i]
        except DeviceLostError:
            raise
        except Exception:
            logger.exception("the draft model failed; nothing is guessed")

    def _compute(self, plan: SchedulerOutput, sample: PendingSample | None) -> _Batch:
        masks = self._ask_masks(plan) if sample is None else None
        return _Batch(plan, self._execute(plan.scheduled, sample), masks)

    def _ask_masks(self, plan: SchedulerOutput) -> Future[UInt32Array] | None:
        structured = [item for item in plan.scheduled if item.samples and item.sequence.matcher is not None]
        return self._mask_worker.submit(self._masks, structured) if structured else None

    def _execute(self, items: abc.Sequence[ScheduledSequence], sample: PendingSample | None) -> _Rows:
        drawing, pooled = [item for item in items if not item.pooled], [item for item in items if item.pooled]
        size = self.config.block_size
        return _Rows(
            self._executor.step(build_step_input(drawing, size), True, sample) if drawing else None,
            self._hidden_executor.step(build_step_input(pooled, size), reuse=True) if pooled else None)

    def _culprits(self, items: list[ScheduledSequence], sample: PendingSample | None) -> list[ScheduledSequence]:
        """Of items that fail together, those that fail without the others. Keys and values that are computed again
        are the same."""
        if len(items) == 1:
            return items
        culprits = []
        for half in (items[: len(items) // 2], items[len(items) // 2 :]):
            try:
                self._execute(half, sample)
            except DeviceLostError:
                raise
            except Exception:
                culprits += self._culprits(half, sample)
        return culprits

    def _masks(self, items: list[ScheduledSequence]) -> UInt32Array:
        """[tokens that may be drawn, words]; nothing is allowed where that cannot be known."""
        masks = np.zeros((sum(1 + len(item.draft.token_ids) for item in items), self.grammars.words), np.int32)
        end = 0
        for item in items:
            sequence, first, end = item.sequence, end, end + 1 + len(item.draft.token_ids)
            if sequence.status is SequenceStatus.FINISHED:
                continue
            assert sequence.matcher is not None
            try:
                sequence.matcher.fill(sequence.output_token_ids, sequence.params.min_tokens, masks[first:end],
                                      item.draft.token_ids)
            except GrammarError as error:
                sequence.failure = str(error)
                masks[first:end] = 0
        return masks.view(np.uint32)

    def _draw_all(self, batch: _Batch) -> _Draws | None:
        if batch.rows is None:
            return None
        try:
            masks = NO_MASKS if batch.masks is None else batch.masks.result()
            if batch.rows.hidden is not None:
                self._pool(batch.plan, logits_array(batch.rows.hidden))
            return self._sample(batch.plan, batch.rows.logits, masks)
        except DeviceLostError:
            raise
        except Exception:
            logger.exception("a step failed; its %d sequences end with an error", len(batch.plan.scheduled))
            return None

    @staticmethod
    def _pool(plan: SchedulerOutput, hidden: Float32Array) -> None:
        row = 0
        for item in plan.scheduled:
            if item.pooled and item.sequence.status is not SequenceStatus.FINISHED:
                assert item.sequence.pooler is not None
                first = item.start + item.num_tokens - item.num_logits
                item.sequence.pooler.add(first, hidden[row : row + item.num_logits])
            row += item.num_logits if item.pooled else 0

    def _sample(self, plan: SchedulerOutput, logits: Logits | None, masks: UInt32Array) -> _Draws:
        """logits: the rows that the schedule asked for, in its order. [R, V]"""
        batch = SampleBatch(masks)
        spans = []
        row = mask_row = 0
        for item in plan.scheduled:
            first = len(batch)
            sequence = item.sequence
            structured = item.samples and sequence.matcher is not None
            if item.num_logits and not item.pooled and sequence.status is not SequenceStatus.FINISHED:
                for position in sequence.unscored(item.start, item.num_tokens):
                    batch.score(row + position - item.start, sequence.token_ids[position + 1],
                                sequence.params.prompt_logprobs or 0)
                draft = item.draft.token_ids
                for ahead in range(len(draft) + 1) if item.samples else ():
                    batch.draw(row + item.num_logits - 1 - len(draft) + ahead, sequence, sequence.sampling,
                               mask_row + ahead if structured else -1, draft[:ahead])
            row += 0 if item.pooled else item.num_logits
            mask_row += structured and 1 + len(item.draft.token_ids)
            spans.append((first, len(batch)))
        drawn = batch.build()
        return _Draws(spans, SampleOutput.empty(drawn) if logits is None else self.backend.sample(logits, drawn))

    def _result(self, draws: _Draws | None, batch: _Batch) -> SampleResult | None:
        """None where that failed."""
        try:
            return None if draws is None else SampleResult(draws.sample.result(), self.model_config.vocab_size)
        except DeviceLostError:
            raise
        except Exception:
            logger.exception("a step failed; its %d sequences end with an error", len(batch.plan.scheduled))
            return None

    def _is_live(self, sequence: Sequence) -> bool:
        """Not all of it is told."""
        return self._live.get(sequence.key) is sequence

    def _take_in(self, step: _Step, batch: _Batch, draws: _Draws | None) -> list[_Gain]:
        """Give every sequence of a batch what was drawn for it, if it is still there; those that end with it leave the
        scheduler at once."""
        for sequence in batch.failed:
            if sequence.status is not SequenceStatus.FINISHED:
                self._emit(step, sequence, finish_reason=FinishReason.ERROR)
        items, result = batch.plan.scheduled, self._result(draws, batch)
        if draws is None or result is None:
            for item in items:
                if self._is_live(item.sequence):
                    self._emit(step, item.sequence, finish_reason=FinishReason.ERROR)
            return []
        gains = []
        for item, (first, end) in zip(items, draws.spans, strict=True):
            gain = _Gain(item.sequence)
            if first < end:
                try:
                    gain = self._draw(item, result, first, end)
                except Exception:
                    self._fail(step, item.sequence)
            gains.append(gain)
            if gain.token_ids:
                step.gained.append(len(gain.token_ids))
            if item.draft.token_ids:
                accepted = max(0, len(gain.token_ids) - 1)
                step.drafts.append((item.draft, accepted))
                if item.draft.kind == "draft" and self._speculator is not None:
                    self._speculator.judge(item.sequence, len(item.draft.token_ids), accepted)
        if draws.ahead:
            for item, gain in zip(items, gains, strict=True):
                if gain.token_ids:
                    [item.sequence.token_ids[item.start + item.num_tokens]] = gain.token_ids
        else:
            self._scheduler.update(batch.plan, [gain.token_ids for gain in gains])
        gains = [_scored(gain) for gain in gains if self._is_live(gain.sequence)]
        for gain in gains:
            if gain.end is not None:
                self._scheduler.finish(gain.sequence)
        return gains

    def _report(self, step: _Step, gains: abc.Sequence[_Gain]) -> None:
        now = time.monotonic()
        for gain in gains:
            try:
                self._tell(step, gain, now)
            except Exception:
                self._fail(step, gain.sequence)

    def _fail(self, step: _Step, sequence: Sequence) -> None:
        """What went wrong concerns one sequence alone: it ends, and nothing else does."""
        if sequence.failure is None:
            logger.exception("request %s, sequence %d ends with an error", sequence.request_id, sequence.index)
        self._emit(step, sequence, finish_reason=FinishReason.ERROR)

    def _draw(self, item: ScheduledSequence, result: SampleResult, first: int, end: int) -> _Gain:
        """Draws first to end - 1 are the item's: prompt tokens scored, then where it `samples` the next token, and one
        after each token of its draft, which count as long as the draft is right. Raises ValueError where logits were
        not finite."""
        sequence, params, draft = item.sequence, item.sequence.params, item.draft.token_ids
        drawn = end - (1 + len(draft) if item.samples else 0)
        if params.prompt_logprobs is not None and first < drawn:
            sequence.prompt_logprobs += [result.logprobs(draw, params.prompt_logprobs) for draw in range(first, drawn)]
        token_ids: list[int] = []
        logprobs: list[TokenLogprobs] = []
        why: tuple[FinishReason, int | None] | None = None
        for draw in range(drawn, end):
            if token_ids and (why is not None or token_ids[-1] != draft[len(token_ids) - 1] or not result.valid(draw)):
                break
            token_ids.append(result.token_id(draw))
            if params.logprobs is not None:
                logprobs.append(result.logprobs(draw, params.logprobs, params.structured is not None))
            why = self._end(sequence, token_ids[-1], item.start + item.num_tokens + len(token_ids))
        return _Gain(sequence, tuple(token_ids), tuple(logprobs), why,
                     len(draft) if item.draft.kind == "prediction" else 0)

    def _tell(self, step: _Step, gain: _Gain, now: float) -> None:
        sequence, last = gain.sequence, len(gain.token_ids) - 1
        since = sequence.last_token_time
        for place, token_id in enumerate(gain.token_ids):
            # Tokens of one step come together; the time since those before them is shared.
            at = now if since is None else since + (now - since) * (place + 1) / len(gain.token_ids)
            self._note_token(step, sequence, at)
            text, reason, stop_reason = self._read(sequence, token_id, gain.end if place == last else None)
            if gain.predicted and (reason is not None or place == last):
                accepted = min(place + 1, last)  # what is right beyond a stop string was guessed in vain
                sequence.num_accepted_tokens += accepted
                sequence.num_rejected_tokens += gain.predicted - accepted
            self._emit(step, sequence, (token_id,), text, gain.logprobs[place : place + 1], reason, stop_reason)
            if reason is not None:
                return
        if not gain.token_ids and gain.end is not None:
            self._emit(step, sequence, finish_reason=gain.end[0])

    def _end(self, sequence: Sequence, token_id: int, num_tokens: int) -> tuple[FinishReason, int | None] | None:
        """Why a sequence ends with a token that was drawn and makes it so long, whatever the text says; and the stop
        id."""
        params = sequence.params
        if self._is_end(sequence, token_id):
            output = num_tokens - sequence.num_prompt_tokens
            if sequence.matcher is not None and sequence.matcher.closes(output - 1):
                return FinishReason.LENGTH, None
            eos = token_id in self._eos_token_ids and not params.ignore_eos
            return FinishReason.STOP, None if eos else token_id
        return (FinishReason.LENGTH, None) if self._is_full(sequence, num_tokens) else None

    def _is_full(self, sequence: Sequence, num_tokens: int) -> bool:
        return num_tokens - sequence.num_prompt_tokens >= sequence.params.max_tokens \
            or num_tokens >= self.config.max_model_len

    def _is_end(self, sequence: Sequence, token_id: int) -> bool:
        params = sequence.params
        return token_id in params.stop_token_ids or (token_id in self._eos_token_ids and not params.ignore_eos)

    def _read(self, sequence: Sequence, token_id: int, end: tuple[FinishReason, int | None] | None
              ) -> tuple[str, FinishReason | None, str | int | None]:
        """The text that a drawn token makes certain, and whether and why the sequence ends with it; `end`, unless the
        text says otherwise."""
        params = sequence.params
        reason, stop_id = end or (None, None)
        if reason is not None and self._is_end(sequence, token_id):
            return sequence.text.flush(), reason, stop_id
        stoppable = params.min_tokens == 0 or sequence.num_told_tokens > params.min_tokens
        text, stop = sequence.text.step(token_id, stoppable)
        if stop is not None:
            return text, FinishReason.STOP, stop
        return (text if reason is None else text + sequence.text.flush()), reason, None

    def _emit(self, step: _Step, sequence: Sequence, token_ids: tuple[int, ...] = (), text: str = "",
              logprobs: tuple[TokenLogprobs, ...] = (), finish_reason: FinishReason | None = None,
              stop_reason: str | int | None = None) -> None:
        """Report an event and, with a finish_reason, let go of the sequence."""
        prompt_logprobs = None
        if sequence.params.prompt_logprobs is not None and sequence.index == 0 \
                and sequence.num_told_tokens == len(token_ids) \
                and len(sequence.prompt_logprobs) == sequence.num_prompt_tokens:
            prompt_logprobs = tuple(sequence.prompt_logprobs)
        embedding = None
        if sequence.pooler is not None and finish_reason in ANSWERED:
            pooled, basis = sequence.pooler.result(), self._decoder.head.readout
            embedding = (pooled if basis is None else basis.back(pooled)).astype(np.float32)
        step.outputs.append(RequestOutput(
            request_id=sequence.request_id,
            index=sequence.index,
            token_ids=token_ids,
            text=text,
            logprobs=logprobs,
            finish_reason=finish_reason,
            stop_reason=stop_reason,
            num_prompt_tokens=sequence.num_prompt_tokens,
            num_cached_tokens=sequence.num_cached_tokens,
            num_restored_tokens=_restored(sequence),
            num_output_tokens=sequence.num_told_tokens,
            num_accepted_tokens=sequence.num_accepted_tokens,
            num_rejected_tokens=sequence.num_rejected_tokens,
            prompt_logprobs=prompt_logprobs,
            failure=sequence.failure,
            embedding=embedding,
            scheduled_time=sequence.scheduled_time,
        ))
        if finish_reason is None:
            return
        if sequence.scheduled_time is None:
            self._left.append(sequence)
        self._scheduler.finish(sequence)
        self._take_back(sequence.adapter)
        del self._live[sequence.key]
        if finish_reason is FinishReason.ABORT:
            step.stats.saved_tokens += self._forecast.output(self._work(sequence))
        answered = finish_reason in ANSWERED
        if answered and sequence.pooler is None:
            self._forecast.observe_answer(sequence.num_told_tokens, finish_reason is FinishReason.LENGTH)
        if self._speculator is not None:
            self._speculator.forget(sequence, remember=answered)
        if self._draft_model is not None:
            self._draft_model.forget(sequence)
        tenant = sequence.origin.tenant
        with self._lock:
            self._num_unfinished -= 1
            self._tenants[tenant] -= 1
            if self._tenants[tenant] == 0:
                del self._tenants[tenant]
            self._unfinished[sequence.request_id] -= 1
            if self._unfinished[sequence.request_id] == 0:
                del self._unfinished[sequence.request_id]
        scheduled, first, last = sequence.scheduled_time, sequence.first_token_time, sequence.last_token_time
        step.stats.finished.append(FinishedStats(
            finish_reason.value, time.monotonic() - sequence.arrival_time,
            prompt_tokens=sequence.num_prompt_tokens,
            generated_tokens=sequence.num_told_tokens,
            prefill_seconds=None if first is None or scheduled is None else first - scheduled,
            decode_seconds=None if first is None or last is None else last - first,
        ))

    def _note_token(self, step: _Step, sequence: Sequence, now: float) -> None:
        step.stats.generated_tokens += 1
        sequence.num_told_tokens += 1
        if sequence.last_token_time is None:
            sequence.first_token_time = now
            step.stats.time_to_first_token.append(now - sequence.arrival_time)
        else:
            step.stats.inter_token_seconds.append(now - sequence.last_token_time)
        sequence.last_token_time = now

    def _account(self, step: _Step, plan: SchedulerOutput, seconds: float) -> None:
        scheduler, stats = self._scheduler, step.stats
        stats.num_running = len(scheduler.running)
        stats.num_waiting = self.num_waiting
        stats.kv_usage = scheduler.blocks.usage
        stats.batch_tokens = plan.num_tokens
        stats.queue_seconds = [sequence.scheduled_time - sequence.arrival_time for sequence in plan.admitted
                               if sequence.scheduled_time is not None]
        stats.step_seconds = seconds
        for item in plan.scheduled:
            sequence, end = item.sequence, item.start + item.num_tokens
            known = max(sequence.num_accounted_tokens, item.start)
            stats.prompt_tokens += max(0, min(end, sequence.num_prompt_tokens) - known)
            stats.recomputed_tokens += min(end, known) - item.start
            sequence.num_accounted_tokens = max(end, known)
        stats.preemptions = len(plan.preempted)
        if self.config.enable_prefix_caching:
            stats.prefix_query_tokens = sum(sequence.num_prompt_tokens for sequence in plan.admitted)
            stats.prefix_hit_tokens = sum(sequence.num_cached_tokens for sequence in plan.admitted)
            stats.prefix_disk_tokens = sum(_restored(sequence) for sequence in plan.admitted)
        now = time.monotonic()
        if plan.scheduled:  # with what lies between two steps, where there is work
            seconds = seconds if self._ended is None else now - self._ended
            drawing = sum(item.samples for item in plan.scheduled)
            self._forecast.observe_step(plan.num_tokens, seconds, len(step.gained), sum(step.gained),
                                        sum(len(draft.token_ids) for draft, _ in step.drafts))
            so_far = 0.0 if self._draft_model is None else self._draft_model.seconds
            drafting, self._drafting = so_far - self._drafting, so_far
            if self._speculator is not None and drawing:
                stats.drafts = self._speculator.learn(step.drafts, plan.num_tokens, drawing,
                                                      max(0.0, seconds - drafting), drafting)
        self._ended = now if self._unfinished else None
        if scheduler.lacks_blocks:
            self._held_slots += (len(scheduler.running) - self._held_slots) / SLOTS_STEPS
        else:
            self._held_slots = float(len(scheduler.running))
        running = [self._work(sequence) for sequence in scheduler.running]
        preempted = [self._work(sequence) for sequence in
                     takewhile(lambda sequence: sequence.num_preemptions > 0, scheduler.waiting)]
        with self._lock:
            self._running, self._preempted, self._slots = running, preempted, None
            for sequence in self._left:
                self._queue(sequence, -1)
        self._left = []

    def _work(self, sequence: Sequence) -> Work:
        return Work(sequence.num_tokens - sequence.num_computed_tokens, sequence.num_output_tokens,
                    self._most_tokens(sequence.num_prompt_tokens, sequence.params))

    def _most_tokens(self, prompt: int, params: SamplingParams) -> int:
        return min(params.max_tokens, self.config.max_model_len - prompt)


def _restored(sequence: Sequence) -> int:
    """Cached tokens of its prompt that came from disk."""
    return min(sequence.num_restored_tokens or 0, sequence.num_cached_tokens)


def _scored(gain: _Gain) -> _Gain:
    """A sequence of which no token was asked for ends with its last prompt token."""
    sequence = gain.sequence
    through = sequence.params.max_tokens == 0 and sequence.num_computed_tokens == sequence.num_tokens
    if not through:
        return gain
    return replace(gain, end=(FinishReason.LENGTH if sequence.pooler is None else FinishReason.STOP, None))

"""From an HTTP request to the engine and back: one place that submits, gathers, counts and gives up."""

from __future__ import annotations

import asyncio
import itertools
import secrets
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Literal, TypeVar

from pydantic import BaseModel

from fptq_runtime.engine import receipt
from fptq_runtime.engine.adapters import AdapterError
from fptq_runtime.engine.async_engine import AsyncEngine, EngineDeadError, RequestStream
from fptq_runtime.engine.engine import QueueFullError, RequestError
from fptq_runtime.engine.grammar import GrammarError
from fptq_runtime.engine.output import RequestOutput, TokenLogprobs
from fptq_runtime.engine.request import FinishReason, SamplingParams
from fptq_server.errors import APIError, bad_parameter
from fptq_server.protocol import CompletionTokensDetails, PromptTokensDetails, Usage
from fptq_server.record import RequestRecord
from fptq_server.sse import TextTemplate

SERIAL = itertools.count()  # the engine's ids are unique; those of clients need not be

T = TypeVar("T")


def openai_reason(reason: FinishReason | None) -> Literal["stop", "length"] | None:
    """Of a sequence that was not given up; None while it runs."""
    if reason is None:
        return None
    return "length" if reason is FinishReason.LENGTH else "stop"


@dataclass
class Choice:
    """What one sequence has produced. texts: what became certain with each token."""

    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None

    @property
    def mean_logprob(self) -> float:
        return sum(entry.logprob for entry in self.logprobs) / max(1, len(self.logprobs))


class Generation:
    """The sequences behind one HTTP request: sequence j of prompt i is choice i · n + j. Leaving `with` aborts
    what has not finished."""

    def __init__(self, engine: AsyncEngine, record: RequestRecord, kind: str, prompts: list[list[int]],
                 params: SamplingParams, adapter: str = "", with_receipt: bool = False) -> None:
        """kind: what the id begins with. adapter: by its name, if any. with_receipt: there will be one. Raises APIError
        where there cannot, or the engine refuses a prompt; then none of them runs."""
        capacity = engine.engine.config.max_unfinished_seqs
        if len(prompts) * params.n > capacity:  # no later try would do better, as 429 says
            raise APIError(400, f"{len(prompts)} prompts with n {params.n} are {len(prompts) * params.n} sequences; "
                                f"this server takes at most {capacity} at a time", param="prompt")
        self._made_by = engine.engine.identity if with_receipt else None
        if with_receipt:
            if self._made_by is None or adapter:
                raise APIError(400, "return_receipt is for answers of an artifact on its own, without an adapter",
                               param="return_receipt", code="not_supported")
            params = replace(params, seed=secrets.randbits(63) if params.seed is None else params.seed)
        self._params = params
        self.id = f"{kind}-{record.id}"
        self._record = record
        self.prompts = prompts
        self.n = params.n
        self.prompt_logprobs: list[tuple[TokenLogprobs | None, ...] | None] = [None] * len(prompts)
        self._cached_tokens = [(0, 0)] * len(prompts)  # and how many of them from disk
        self._predicted: dict[int, tuple[int, int]] = {}  # by choice: accepted and rejected tokens
        self._streams: list[RequestStream] = []
        if record.place is not None:
            record.place.leave()
        try:
            for prompt in prompts:
                request_id = f"{self.id}-{next(SERIAL)}"
                self._streams.append(engine.add_request(request_id, prompt, params, record.origin, adapter))
        except Exception as error:
            self.abort()
            raise _refusal(error) from None
        record.prompt_tokens = sum(map(len, prompts))
        record.params, record.submitted = params, time.monotonic()

    def __enter__(self) -> Generation:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 traceback: TracebackType | None) -> None:
        self.abort()

    def abort(self) -> None:
        for stream in self._streams:
            stream.abort()

    def usage(self) -> Usage:
        """So far. A prompt counts once, however many sequences it has."""
        prompt_tokens = sum(map(len, self.prompts))
        return Usage(
            prompt_tokens=prompt_tokens,
            completion_tokens=self._record.completion_tokens,
            total_tokens=prompt_tokens + self._record.completion_tokens,
            prompt_tokens_details=PromptTokensDetails(
                cached_tokens=sum(cached for cached, _ in self._cached_tokens),
                disk_cached_tokens=sum(restored for _, restored in self._cached_tokens)),
            completion_tokens_details=CompletionTokensDetails(
                accepted_prediction_tokens=sum(accepted for accepted, _ in self._predicted.values()),
                rejected_prediction_tokens=sum(rejected for _, rejected in self._predicted.values())),
        )

    def receipt(self, choices: list[Choice]) -> dict[str, Any] | None:
        """Of all that were drawn, where there will be one."""
        return None if self._made_by is None else receipt.receipt(
            self._made_by, self.prompts, self._params, [choice.token_ids for choice in choices])

    async def outputs(self) -> AsyncGenerator[tuple[int, RequestOutput], None]:
        """(choice, output) in the order of arrival. Raises APIError where the engine gives a sequence up."""
        if len(self._streams) == 1:
            async for output in self._streams[0]:
                yield self._account(0, output)
            return
        arrived: asyncio.Queue[tuple[int, RequestOutput] | int | Exception] = asyncio.Queue()

        async def forward(i: int, stream: RequestStream) -> None:
            try:
                async for output in stream:
                    arrived.put_nowait((i, output))
                arrived.put_nowait(i)
            except Exception as error:
                arrived.put_nowait(error)

        tasks = [asyncio.create_task(forward(i, stream)) for i, stream in enumerate(self._streams)]
        try:
            unfinished = len(tasks)
            while unfinished:
                event = await arrived.get()
                if isinstance(event, Exception):
                    raise event
                if isinstance(event, int):
                    unfinished -= 1
                else:
                    yield self._account(*event)
        finally:
            for task in tasks:
                task.cancel()

    async def collect(self) -> list[Choice]:
        """Every choice, complete."""
        choices = [Choice() for _ in range(len(self.prompts) * self.n)]
        async for index, output in self.outputs():
            choice = choices[index]
            choice.texts.append(output.text)
            choice.token_ids += output.token_ids
            choice.logprobs += output.logprobs
            choice.finish_reason = output.finish_reason
            choice.stop_reason = output.stop_reason
        return choices

    async def chunks(self, first: Callable[[int], T | None], part: Callable[[int, RequestOutput], T],
                     chunk: Callable[[list[T], Usage | None], BaseModel], *, only_text: bool, include_usage: bool,
                     continuous_usage: bool) -> AsyncGenerator[str, None]:
        """A stream's chunks as JSON: of each choice what `first` has, if anything, then the `part` of every output; at
        the end the usage. only_text: parts of a choice that goes on differ in their text alone."""
        begun: set[int] = set()
        templates: dict[int, TextTemplate] = {}
        async for index, output in self.outputs():
            usage = self.usage() if continuous_usage else None
            if index not in begun:
                begun.add(index)
                if (opening := first(index)) is not None:
                    yield chunk([opening], usage).model_dump_json()
            if not only_text or continuous_usage or output.finish_reason is not None:
                yield chunk([part(index, output)], usage).model_dump_json()
                continue
            if index not in templates:
                blank = part(index, replace(output, text=TextTemplate.placeholder))
                templates[index] = TextTemplate(chunk([blank], None).model_dump_json())
            yield templates[index](output.text)
        if include_usage:
            yield chunk([], self.usage()).model_dump_json()

    def _account(self, i: int, output: RequestOutput) -> tuple[int, RequestOutput]:
        if output.finish_reason is not None:
            self._record.finish_reasons.add(output.finish_reason.value)
        if output.failure is not None:
            raise APIError(400, output.failure, code="invalid_grammar")
        if output.finish_reason is FinishReason.ERROR:
            raise APIError(500, "the engine failed on this request", reason="failed", code="engine_error")
        if output.finish_reason is FinishReason.ABORT:
            raise APIError(503, "the server stopped this request before its end", reason="aborted", code="aborted",
                           retry_after=1)
        if output.prompt_logprobs is not None:
            self.prompt_logprobs[i] = output.prompt_logprobs
        record = self._record
        record.last_token = time.monotonic()
        if record.first_token is None:
            record.scheduled, record.first_token = output.scheduled_time, record.last_token
        if output.index == 0:
            self._cached_tokens[i] = output.num_cached_tokens, output.num_restored_tokens
        self._record.completion_tokens += len(output.token_ids)
        choice = i * self.n + output.index
        self._predicted[choice] = output.num_accepted_tokens, output.num_rejected_tokens
        return choice, output


def _refusal(error: Exception) -> Exception:
    """What the client is told where the engine does not take a request; anything else stays as it is."""
    match error:
        case RequestError() | GrammarError():
            return bad_parameter(error)
        case AdapterError():
            return APIError(404, str(error), param="model", code="model_not_found")
        case QueueFullError():
            return no_place(error)
        case EngineDeadError():
            return APIError(503, "the engine has stopped", reason="engine_stopped", code="engine_stopped")
    return error


def no_place(error: QueueFullError) -> APIError:
    if error.reason == "draining":
        return APIError(503, "the server is shutting down", reason="draining", code="draining",
                        retry_after=error.retry_after)
    return APIError(429, "the server is busy, and this request would wait too long; try again later",
                    reason="queue_full", code="queue_full", retry_after=error.retry_after)

"""/v1/completions"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from fptq_runtime.engine.async_engine import AsyncEngine
from fptq_runtime.engine.output import RequestOutput
from fptq_runtime.engine.request import MAX_N
from fptq_runtime.models.tokenizer import Tokenizer
from fptq_server.config import ModelCard, ServerConfig
from fptq_server.errors import ERROR_RESPONSES, APIError
from fptq_server.generation import Choice, Generation, openai_reason
from fptq_server.logprobs import LogprobsRenderer, TextPosition, TokenTexts
from fptq_server.protocol import CompletionChoice, CompletionLogprobs, CompletionRequest, CompletionResponse, Usage
from fptq_server.record import record_of
from fptq_server.sse import STREAM_RESPONSE, EventStream, run_while_connected
from fptq_server.structured import openai_grammar
from fptq_server.validation import (
    check_length,
    check_model,
    check_prompt_logprobs,
    check_receipt,
    completion_prompts,
    max_tokens_of,
    sampling_params,
    stream_usage,
    truncated,
)

DEFAULT_MAX_TOKENS = 16  # OpenAI's


@dataclass
class Reply:
    """Writes one request's choices, whole or chunk by chunk. n: how many of each prompt's sequences, the likeliest by
    token, where more were drawn than asked for. echoes: the text of each prompt, where it is echoed. logprobs and
    prompt_logprobs: how many alternatives each has, where it was asked for."""

    id: str
    model: str
    generation: Generation
    renderer: LogprobsRenderer
    n: int
    logprobs: int | None
    prompt_logprobs: int | None
    echoes: list[str] | None
    created: int = field(default_factory=lambda: int(time.time()))
    _positions: dict[int, TextPosition] = field(default_factory=dict)  # where logprobs' next token begins, by choice

    async def whole(self) -> CompletionResponse:
        choices: list[CompletionChoice] = []
        drawn = await self.generation.collect()
        for index, choice in self._best(drawn):
            echo = self._echo(index)
            text, logprobs = "".join(choice.texts), self._logprobs(index, [(e.token_id, e) for e in choice.logprobs])
            if echo is not None:
                text = echo.text + text
                if logprobs is not None and echo.logprobs is not None:
                    logprobs = CompletionLogprobs(**{
                        name: getattr(echo.logprobs, name) + getattr(logprobs, name)
                        for name in CompletionLogprobs.model_fields
                    })
            known = self.generation.prompt_logprobs[index // self.generation.n] or ()
            choices.append(CompletionChoice(
                index=len(choices), text=text, logprobs=logprobs, finish_reason=openai_reason(choice.finish_reason),
                prompt_logprobs=None if self.prompt_logprobs is None
                else self.renderer.prompt(known, self.prompt_logprobs)))
        return self._response(choices, self.generation.usage()).model_copy(
            update={"receipt": self.generation.receipt(drawn)})

    def events(self, include_usage: bool, continuous_usage: bool) -> AsyncGenerator[str, None]:
        def part(index: int, output: RequestOutput) -> CompletionChoice:
            return CompletionChoice(index=index, text=output.text,
                                    logprobs=self._logprobs(index, [(e.token_id, e) for e in output.logprobs]),
                                    finish_reason=openai_reason(output.finish_reason))

        return self.generation.chunks(self._echo, part, self._response, only_text=self.logprobs is None,
                                      include_usage=include_usage, continuous_usage=continuous_usage)

    def _best(self, drawn: list[Choice]) -> Iterator[tuple[int, Choice]]:
        """The choices that are sent, with the place at which each was drawn."""
        for start in range(0, len(drawn), self.generation.n):
            indices = list(range(start, start + self.generation.n))
            if self.n < self.generation.n:
                indices.sort(key=lambda index: drawn[index].mean_logprob, reverse=True)
            yield from ((index, drawn[index]) for index in indices[:self.n])

    def _echo(self, index: int) -> CompletionChoice | None:
        """The prompt as a choice. The engine has said its log-probabilities by the time a choice has an output."""
        if self.echoes is None:
            return None
        i = index // self.generation.n
        known = self.generation.prompt_logprobs[i] or ()
        logprobs = self._logprobs(index, list(zip(self.generation.prompts[i], known, strict=False)))
        return CompletionChoice(index=index, text=self.echoes[i], logprobs=logprobs, finish_reason=None)

    def _logprobs(self, index: int, entries: list[tuple[int, Any]]) -> CompletionLogprobs | None:
        if self.logprobs is None:
            return None
        if index not in self._positions:
            context = self.generation.prompts[index // self.generation.n] if self.echoes is None else ()
            self._positions[index] = self.renderer.position(context)
        return self.renderer.completion(entries, self.logprobs, self._positions[index])

    def _response(self, choices: list[CompletionChoice], usage: Usage | None) -> CompletionResponse:
        return CompletionResponse(id=self.id, created=self.created, model=self.model, choices=choices, usage=usage)


def completions_router(engine: AsyncEngine, tokenizer: Tokenizer, texts: TokenTexts, model: ModelCard,
                       config: ServerConfig) -> APIRouter:
    router = APIRouter(tags=["OpenAI"], responses=ERROR_RESPONSES)

    @router.post("/v1/completions", response_model=CompletionResponse, responses=STREAM_RESPONSE)
    async def create_completion(body: CompletionRequest, request: Request) -> Response:
        """Continue a prompt. With `stream`, chunks of the same shape as server-sent events, one a token."""
        adapter = check_model(body.model, model)
        n = body.n or 1
        best_of = n if body.best_of is None else body.best_of
        if body.best_of is not None and not n <= best_of <= MAX_N:
            raise APIError(400, f"best_of must be between n, which is {n}, and {MAX_N}, not {best_of}", param="best_of")
        if body.stream and best_of != n:
            raise APIError(400, "best_of above n cannot be streamed: which are best is known at the end",
                           param="best_of", code="not_supported")
        if body.stream and body.echo and body.logprobs is not None and n > 1:
            raise APIError(400, "echo with logprobs cannot be streamed for n above 1", param="echo",
                           code="not_supported")
        prompts, echoes = await completion_prompts(body, tokenizer, model, config.max_prompts)
        max_tokens = max_tokens_of(body, DEFAULT_MAX_TOKENS, model)
        prompts = [truncated(prompt, body.truncate_prompt_tokens, max_tokens, model) for prompt in prompts]
        for prompt in prompts:
            check_length(prompt, max_tokens, "prompt", model)
        check_prompt_logprobs(body)
        wanted = [count for count in (body.prompt_logprobs, body.logprobs if body.echo else None) if count is not None]
        params = sampling_params(body, model, max_tokens=max_tokens, prompt_logprobs=max(wanted, default=None),
                                 logprobs=0 if body.logprobs is None and best_of > n else body.logprobs,
                                 structured=await openai_grammar(body, engine))
        params = replace(params, n=best_of)
        include_usage, continuous_usage = stream_usage(body)
        check_receipt(body)
        generation = Generation(engine, record_of(request.scope), "cmpl", prompts, params, adapter,
                                bool(body.return_receipt))
        reply = Reply(
            id=generation.id,
            model=adapter or model.id,
            generation=generation,
            renderer=LogprobsRenderer(texts, bool(body.return_tokens_as_token_ids), params.skip_special_tokens),
            n=n,
            logprobs=body.logprobs,
            prompt_logprobs=body.prompt_logprobs,
            echoes=echoes if body.echo else None,
        )
        if body.stream:
            return EventStream(reply.events(include_usage, continuous_usage), generation.abort,
                               config.keep_alive_interval, done="[DONE]")
        with generation:
            whole = await run_while_connected(request.receive, reply.whole())
        return Response(whole.model_dump_json(), media_type="application/json")

    return router

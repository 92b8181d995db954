"""/v1/completions"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from fptq_runtime.engine.async_engine import AsyncEngine
from fptq_runtime.engine.output import RequestOutput
from fptq_runtime.models.tokenizer import Tokenizer
from fptq_server.config import ModelCard, ServerConfig
from fptq_server.errors import ERROR_RESPONSES, APIError
from fptq_server.generation import Generation, openai_reason
from fptq_server.logprobs import LogprobsRenderer, TextPosition, TokenTexts
from fptq_server.protocol import CompletionChoice, CompletionLogprobs, CompletionRequest, CompletionResponse, Usage
from fptq_server.record import record_of
from fptq_server.sse import STREAM_RESPONSE, EventStream, run_while_connected
from fptq_server.validation import (
    check_length,
    check_model,
    completion_prompts,
    max_tokens_of,
    sampling_params,
    stream_usage,
)

DEFAULT_MAX_TOKENS = 16  # OpenAI's


@dataclass
class Reply:
    """Writes one request's choices, whole or chunk by chunk. echoes: the text of each prompt, where it is echoed."""

    id: str
    model: str
    generation: Generation
    renderer: LogprobsRenderer
    with_logprobs: bool
    echoes: list[str] | None
    created: int = field(default_factory=lambda: int(time.time()))
    _positions: dict[int, TextPosition] = field(default_factory=dict)  # where logprobs' next token begins, by choice

    async def whole(self) -> CompletionResponse:
        choices = []
        for index, choice in enumerate(await self.generation.collect()):
            echo = self._echo(index)
            text, logprobs = "".join(choice.texts), self._logprobs(index, [(e.token_id, e) for e in choice.logprobs])
            if echo is not None:
                text = echo.text + text
                if logprobs is not None and echo.logprobs is not None:
                    logprobs = CompletionLogprobs(**{
                        name: getattr(echo.logprobs, name) + getattr(logprobs, name)
                        for name in CompletionLogprobs.model_fields
                    })
            choices.append(CompletionChoice(index=index, text=text, logprobs=logprobs,
                                            finish_reason=openai_reason(choice.finish_reason)))
        return self._response(choices, self.generation.usage())

    def events(self, include_usage: bool, continuous_usage: bool) -> AsyncGenerator[str, None]:
        def part(index: int, output: RequestOutput) -> CompletionChoice:
            return CompletionChoice(index=index, text=output.text,
                                    logprobs=self._logprobs(index, [(e.token_id, e) for e in output.logprobs]),
                                    finish_reason=openai_reason(output.finish_reason))

        return self.generation.chunks(self._echo, part, self._response, only_text=not self.with_logprobs,
                                      include_usage=include_usage, continuous_usage=continuous_usage)

    def _echo(self, index: int) -> CompletionChoice | None:
        """The prompt as a choice. The engine has said its log-probabilities by the time a choice has an output."""
        if self.echoes is None:
            return None
        i = index // self.generation.n
        known = self.generation.prompt_logprobs[i] or ()
        logprobs = self._logprobs(index, list(zip(self.generation.prompts[i], known, strict=False)))
        return CompletionChoice(index=index, text=self.echoes[i], logprobs=logprobs, finish_reason=None)

    def _logprobs(self, index: int, entries: list[tuple[int, Any]]) -> CompletionLogprobs | None:
        if not self.with_logprobs:
            return None
        if index not in self._positions:
            context = self.generation.prompts[index // self.generation.n] if self.echoes is None else ()
            self._positions[index] = self.renderer.position(context)
        return self.renderer.completion(entries, self._positions[index])

    def _response(self, choices: list[CompletionChoice], usage: Usage | None) -> CompletionResponse:
        return CompletionResponse(id=self.id, created=self.created, model=self.model, choices=choices, usage=usage)


def completions_router(engine: AsyncEngine, tokenizer: Tokenizer, texts: TokenTexts, model: ModelCard,
                       config: ServerConfig) -> APIRouter:
    router = APIRouter(tags=["OpenAI"], responses=ERROR_RESPONSES)

    @router.post("/v1/completions", response_model=CompletionResponse, responses=STREAM_RESPONSE)
    async def create_completion(body: CompletionRequest, request: Request) -> Response:
        """Continue a prompt. With `stream`, chunks of the same shape as server-sent events, one a token."""
        check_model(body.model, model)
        if body.best_of is not None and body.best_of != (body.n or 1):
            raise APIError(400, "best_of is not supported unless it equals n", param="best_of", code="not_supported")
        if body.stream and body.echo and body.logprobs is not None and (body.n or 1) > 1:
            raise APIError(400, "echo with logprobs cannot be streamed for n above 1", param="echo",
                           code="not_supported")
        prompts, echoes = await completion_prompts(body, tokenizer, model, config.max_prompts)
        max_tokens = max_tokens_of(body, DEFAULT_MAX_TOKENS, model)
        for prompt in prompts:
            check_length(prompt, max_tokens, "prompt", model)
        params = sampling_params(body, model, max_tokens=max_tokens, logprobs=body.logprobs,
                                 prompt_logprobs=body.logprobs if body.echo else None)
        include_usage, continuous_usage = stream_usage(body)
        generation = Generation(engine, record_of(request.scope), "cmpl", prompts, params)
        reply = Reply(
            id=generation.id,
            model=model.id,
            generation=generation,
            renderer=LogprobsRenderer(texts, bool(body.return_tokens_as_token_ids), params.skip_special_tokens),
            with_logprobs=body.logprobs is not None,
            echoes=echoes if body.echo else None,
        )
        if body.stream:
            return EventStream(reply.events(include_usage, continuous_usage), generation.abort,
                               config.keep_alive_interval, done="[DONE]")
        with generation:
            whole = await run_while_connected(request.receive, reply.whole())
        return Response(whole.model_dump_json(), media_type="application/json")

    return router

"""/v1/chat/completions"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field

from fastapi import APIRouter, Request
from starlette.responses import Response

from fptq_runtime.engine.async_engine import AsyncEngine
from fptq_runtime.engine.output import RequestOutput, TokenLogprobs
from fptq_runtime.models.tokenizer import Tokenizer
from fptq_server.config import ModelCard, ServerConfig
from fptq_server.errors import ERROR_RESPONSES, APIError
from fptq_server.generation import Generation, openai_reason
from fptq_server.logprobs import LogprobsRenderer, TokenTexts
from fptq_server.protocol import (
    AssistantMessage,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletionChunk,
    ChatCompletionRequest,
    ChatCompletionResponse,
    ChatLogprobs,
    ContentDelta,
    Usage,
)
from fptq_server.record import record_of
from fptq_server.sse import STREAM_RESPONSE, EventStream, run_while_connected
from fptq_server.structured import openai_grammar
from fptq_server.validation import (
    chat_prompt,
    check_length,
    check_model,
    check_prompt_logprobs,
    max_tokens_of,
    sampling_params,
    stream_usage,
    truncated,
)


@dataclass
class Reply:
    """Writes one request's choices, whole or chunk by chunk."""

    id: str
    model: str
    generation: Generation
    renderer: LogprobsRenderer
    with_logprobs: bool
    prompt_logprobs: int | None
    created: int = field(default_factory=lambda: int(time.time()))

    async def whole(self) -> ChatCompletionResponse:
        choices = [
            ChatChoice(index=index, message=AssistantMessage(content="".join(choice.texts)),
                       logprobs=self._logprobs(choice.logprobs), finish_reason=openai_reason(choice.finish_reason))
            for index, choice in enumerate(await self.generation.collect())
        ]
        return ChatCompletionResponse(
            id=self.id, created=self.created, model=self.model, choices=choices, usage=self.generation.usage(),
            prompt_logprobs=None if self.prompt_logprobs is None else self.renderer.prompt(
                self.generation.prompt_logprobs[0] or (), self.prompt_logprobs))

    def events(self, include_usage: bool, continuous_usage: bool) -> AsyncGenerator[str, None]:
        def role(index: int) -> ChatChunkChoice:
            return ChatChunkChoice(index=index, delta=AssistantMessage(content=""), logprobs=None, finish_reason=None)

        def part(index: int, output: RequestOutput) -> ChatChunkChoice:
            return ChatChunkChoice(index=index, delta=ContentDelta(content=output.text),
                                   logprobs=self._logprobs(output.logprobs),
                                   finish_reason=openai_reason(output.finish_reason))

        def chunk(choices: list[ChatChunkChoice], usage: Usage | None) -> ChatCompletionChunk:
            return ChatCompletionChunk(id=self.id, created=self.created, model=self.model, choices=choices, usage=usage)

        return self.generation.chunks(role, part, chunk, only_text=not self.with_logprobs, include_usage=include_usage,
                                      continuous_usage=continuous_usage)

    def _logprobs(self, entries: tuple[TokenLogprobs, ...] | list[TokenLogprobs]) -> ChatLogprobs | None:
        return self.renderer.chat(entries) if self.with_logprobs else None


def chat_router(engine: AsyncEngine, tokenizer: Tokenizer, texts: TokenTexts, model: ModelCard,
                config: ServerConfig) -> APIRouter:
    router = APIRouter(tags=["OpenAI"], responses=ERROR_RESPONSES)

    @router.post("/v1/chat/completions", response_model=ChatCompletionResponse, responses=STREAM_RESPONSE)
    async def create_chat_completion(body: ChatCompletionRequest, request: Request) -> Response:
        """Answer a conversation, rendered with the model's own chat template. With `stream`, server-sent events: the
        role first, then one chunk a token, the last with the finish_reason."""
        check_model(body.model, model)
        if body.top_logprobs and not body.logprobs:
            raise APIError(400, "top_logprobs needs logprobs to be true", param="top_logprobs")
        if body.add_special_tokens:
            raise APIError(400, "add_special_tokens is not supported here; the chat template writes the special tokens",
                           param="add_special_tokens", code="not_supported")
        variables = {} if body.chat_template_kwargs is None else body.chat_template_kwargs.model_dump(exclude_none=True)
        prompt = await chat_prompt(body.messages, tokenizer, model, variables=variables)
        max_tokens = max_tokens_of(body, model.max_model_len, model)
        prompt = truncated(prompt, body, max_tokens, model)
        check_length(prompt, max_tokens, "messages", model)
        check_prompt_logprobs(body)
        params = sampling_params(body, model, max_tokens=max_tokens, prompt_logprobs=body.prompt_logprobs,
                                 structured=await openai_grammar(body, engine),
                                 logprobs=(body.top_logprobs or 0) if body.logprobs else None)
        include_usage, continuous_usage = stream_usage(body)
        generation = Generation(engine, record_of(request.scope), "chatcmpl", [prompt], params)
        reply = Reply(
            id=generation.id,
            model=model.id,
            generation=generation,
            renderer=LogprobsRenderer(texts, bool(body.return_tokens_as_token_ids), params.skip_special_tokens),
            with_logprobs=bool(body.logprobs),
            prompt_logprobs=body.prompt_logprobs,
        )
        if body.stream:
            return EventStream(reply.events(include_usage, continuous_usage), generation.abort,
                               config.keep_alive_interval, done="[DONE]")
        with generation:
            whole = await run_while_connected(request.receive, reply.whole())
        return Response(whole.model_dump_json(), media_type="application/json")

    return router

"""/v1/chat/completions"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field

from fastapi import APIRouter, Request
from starlette.responses import Response

from fptq_runtime.engine.async_engine import AsyncEngine
from fptq_runtime.engine.output import TokenLogprobs
from fptq_runtime.models.tokenizer import Tokenizer
from fptq_server.chat_format import ChatFormat, Reading
from fptq_server.config import ModelCard, ServerConfig
from fptq_server.errors import ERROR_RESPONSES, APIError
from fptq_server.generation import Generation
from fptq_server.logprobs import LogprobsRenderer, TokenTexts
from fptq_server.parsers.frame import Answer, Arguments, CallStart, Content, Delta, Reasoning
from fptq_server.protocol import (
    AssistantMessage,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletionChunk,
    ChatCompletionRequest,
    ChatCompletionResponse,
    ChatLogprobs,
    FunctionCallDelta,
    FunctionCallOut,
    MessageDelta,
    ToolCallDelta,
    ToolCallOut,
    Usage,
)
from fptq_server.record import record_of
from fptq_server.sse import STREAM_RESPONSE, EventStream, TextTemplate, run_while_connected
from fptq_server.structured import openai_grammar
from fptq_server.tools import chosen_tools, template_messages
from fptq_server.validation import (
    chat_prompt,
    check_length,
    check_model,
    check_prompt_logprobs,
    check_receipt,
    continues,
    max_tokens_of,
    prediction_tokens,
    sampling_params,
    stream_usage,
    template_variables,
    truncated,
)


@dataclass
class Reply:
    """Writes one request's choices, whole or chunk by chunk."""

    id: str
    model: str
    generation: Generation
    renderer: LogprobsRenderer
    reading: Reading
    with_logprobs: bool
    prompt_logprobs: int | None
    created: int = field(default_factory=lambda: int(time.time()))

    async def whole(self) -> ChatCompletionResponse:
        drawn = await self.generation.collect()
        choices = [
            ChatChoice(index=index, message=_message(self.reading.answer(index, choice.texts)),
                       logprobs=self._logprobs(choice.logprobs),
                       finish_reason=self.reading.reason(index, choice.finish_reason))
            for index, choice in enumerate(drawn)
        ]
        return ChatCompletionResponse(
            id=self.id, created=self.created, model=self.model, choices=choices, usage=self.generation.usage(),
            prompt_logprobs=None if self.prompt_logprobs is None else self.renderer.prompt(
                self.generation.prompt_logprobs[0] or (), self.prompt_logprobs),
            receipt=self.generation.receipt(drawn))

    async def events(self, include_usage: bool, continuous_usage: bool) -> AsyncGenerator[str, None]:
        """Chunks as JSON: of each choice its role, then what every output says, if anything; at the end the usage."""
        begun: set[int] = set()
        templates: dict[tuple[int, type[Delta]], TextTemplate] = {}
        async for index, output in self.generation.outputs():
            usage = self.generation.usage() if continuous_usage else None
            if index not in begun:
                begun.add(index)
                yield self._chunk([_choice(index, MessageDelta(role="assistant", content=""))], usage)
            deltas = self.reading.deltas(index, output.text, output.finish_reason is not None)
            if output.finish_reason is None and not self.with_logprobs and not continuous_usage:
                match deltas:
                    case []:
                        continue
                    case [Content(text) | Reasoning(text) as delta]:
                        kind = type(delta)
                        if (index, kind) not in templates:
                            blank = _choice(index, _delta([kind(TextTemplate.placeholder)]))
                            templates[index, kind] = TextTemplate(self._chunk([blank], None))
                        yield templates[index, kind](text)
                        continue
            choice = _choice(index, _delta(deltas))
            choice.logprobs = self._logprobs(output.logprobs)
            choice.finish_reason = self.reading.reason(index, output.finish_reason)
            yield self._chunk([choice], usage)
        if include_usage:
            yield self._chunk([], self.generation.usage())

    def _chunk(self, choices: list[ChatChunkChoice], usage: Usage | None) -> str:
        return ChatCompletionChunk(id=self.id, created=self.created, model=self.model, choices=choices,
                                   usage=usage).model_dump_json()

    def _logprobs(self, entries: tuple[TokenLogprobs, ...] | list[TokenLogprobs]) -> ChatLogprobs | None:
        return self.renderer.chat(entries) if self.with_logprobs else None


def _message(answer: Answer) -> AssistantMessage:
    calls = [ToolCallOut(id=call.id, function=FunctionCallOut(name=call.name, arguments=call.arguments))
             for call in answer.calls]
    return AssistantMessage(content=None if calls and not answer.content else answer.content,
                            reasoning_content=answer.reasoning or None, tool_calls=calls or None)


def _delta(deltas: list[Delta]) -> MessageDelta:
    """One output's deltas together."""
    content: str | None = None
    reasoning: str | None = None
    calls: dict[int, ToolCallDelta] = {}
    for delta in deltas:
        match delta:
            case Content(text):
                content = (content or "") + text
            case Reasoning(text):
                reasoning = (reasoning or "") + text
            case CallStart(call, call_id, name):
                calls[call] = ToolCallDelta(index=call, id=call_id, type="function",
                                            function=FunctionCallDelta(name=name, arguments=""))
            case Arguments(call, text):
                if call not in calls:
                    calls[call] = ToolCallDelta(index=call, function=FunctionCallDelta(arguments=""))
                calls[call].function.arguments += text
    return MessageDelta(content=content, reasoning_content=reasoning, tool_calls=list(calls.values()) or None)


def _choice(index: int, delta: MessageDelta) -> ChatChunkChoice:
    return ChatChunkChoice(index=index, delta=delta, logprobs=None, finish_reason=None)


def chat_router(engine: AsyncEngine, tokenizer: Tokenizer, texts: TokenTexts, chat: ChatFormat, model: ModelCard,
                config: ServerConfig) -> APIRouter:
    router = APIRouter(tags=["OpenAI"], responses=ERROR_RESPONSES)

    @router.post("/v1/chat/completions", response_model=ChatCompletionResponse, responses=STREAM_RESPONSE)
    async def create_chat_completion(body: ChatCompletionRequest, request: Request) -> Response:
        """Answer a conversation, rendered with the model's own chat template. With `stream`, server-sent events: the
        role first, then a chunk for every token that says something, the last with the finish_reason."""
        adapter = check_model(body.model, model)
        if body.top_logprobs and not body.logprobs:
            raise APIError(400, "top_logprobs needs logprobs to be true", param="top_logprobs")
        if body.add_special_tokens:
            raise APIError(400, "add_special_tokens is not supported here; the chat template writes the special tokens",
                           param="add_special_tokens", code="not_supported")
        tools = chosen_tools([tool.given for tool in body.tools or ()], body.tool_choice, body.parallel_tool_calls)
        begin, continue_final = continues(body)
        variables = {**chat.variables(tools, body.reasoning_effort),
                     **await template_variables(body, tokenizer, config)}
        messages = chat.messages(template_messages(body.messages), tools)
        prompt = await chat_prompt(messages, tokenizer, model, begin, variables, continue_final)
        max_tokens = max_tokens_of(body, model.max_model_len, model)
        prompt = truncated(prompt, body.truncate_prompt_tokens, max_tokens, model)
        check_length(prompt, max_tokens, "messages", model)
        check_prompt_logprobs(body)
        structured = await chat.grammar(prompt, tools, await openai_grammar(body, engine), engine)
        params = sampling_params(body, model, max_tokens=max_tokens, prompt_logprobs=body.prompt_logprobs,
                                 structured=structured, prediction=await prediction_tokens(body, tokenizer, model),
                                 shown_special_tokens=chat.shown_special_tokens(tools),
                                 logprobs=(body.top_logprobs or 0) if body.logprobs else None)
        include_usage, continuous_usage = stream_usage(body)
        check_receipt(body)
        generation = Generation(engine, record_of(request.scope), "chatcmpl", [prompt], params, adapter,
                                bool(body.return_receipt))
        reply = Reply(
            id=generation.id,
            model=adapter or model.id,
            generation=generation,
            renderer=LogprobsRenderer(texts, bool(body.return_tokens_as_token_ids), params.skip_special_tokens),
            reading=chat.reading(prompt, tools, body.include_reasoning is not False),
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

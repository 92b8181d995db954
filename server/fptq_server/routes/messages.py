"""/v1/messages, as Anthropic has it."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from fptq_runtime.engine.grammar import Grammar
from fptq_runtime.engine.output import RequestOutput
from fptq_runtime.engine.request import FinishReason
from fptq_server.assistant import Assistant
from fptq_server.chat_format import Reading
from fptq_server.config import ServerConfig
from fptq_server.errors import APIError
from fptq_server.generation import Generation
from fptq_server.parsers.frame import Answer, Arguments, CallStart, Content, Delta, Reasoning
from fptq_server.protocol_messages import (
    AnthropicError,
    Conversation,
    CountTokensRequest,
    InputMessage,
    MessageResponse,
    MessagesRequest,
    MessageUsage,
    OutputBlock,
    OutputText,
    OutputThinking,
    OutputToolUse,
    StopReason,
    TextBlock,
    ThinkingBlock,
    TokenCount,
    ToolResultBlock,
    ToolUseBlock,
)
from fptq_server.record import record_of
from fptq_server.sse import STREAM_RESPONSE, EventStream, named_frame, run_while_connected
from fptq_server.tools import Tools, function_tool, make_tools, template_arguments, template_call
from fptq_server.validation import check_model

ERRORS: dict[int | str, dict[str, Any]] = {"4XX": {"model": AnthropicError}, "5XX": {"model": AnthropicError}}


@dataclass
class Reply:
    """Writes one answer, whole or event by event."""

    id: str
    model: str
    generation: Generation
    reading: Reading

    async def whole(self) -> MessageResponse:
        [choice] = await self.generation.collect()
        answer = self.reading.answer(0, choice.texts)
        return self._message(_blocks(answer), choice.finish_reason, choice.stop_reason)

    async def events(self) -> AsyncGenerator[str, None]:
        """One block after the other: its start, its deltas, its end."""
        yield _event("message_start", message=self._message([], None, None).model_dump())
        index, kind = -1, ""
        last: RequestOutput | None = None
        async for _, output in self.generation.outputs():
            last = output
            for delta in self.reading.deltas(0, output.text, output.finish_reason is not None):
                new_kind, started, changed = _block_event(delta)
                if delta == Content(""):  # plain text has one even where a token adds nothing
                    continue
                if new_kind != kind:
                    if index >= 0:
                        yield _event("content_block_stop", index=index)
                    index, kind = index + 1, new_kind
                    yield _event("content_block_start", index=index, content_block=started)
                if changed is not None:
                    yield _event("content_block_delta", index=index, delta=changed)
        if index >= 0:
            yield _event("content_block_stop", index=index)
        assert last is not None
        end = self._message([], last.finish_reason, last.stop_reason)
        yield _event("message_delta", delta={"stop_reason": end.stop_reason, "stop_sequence": end.stop_sequence},
                     usage=end.usage.model_dump())
        yield _event("message_stop")

    def _message(self, content: list[OutputBlock], reason: FinishReason | None, stop: str | int | None
                 ) -> MessageResponse:
        usage = self.generation.usage()
        cached = usage.prompt_tokens_details.cached_tokens
        sequence = stop if isinstance(stop, str) else None
        return MessageResponse(
            id=self.id, model=self.model, content=content, stop_reason=self._stop_reason(reason, sequence),
            stop_sequence=sequence,
            usage=MessageUsage(input_tokens=usage.prompt_tokens - cached, cache_read_input_tokens=cached,
                               output_tokens=usage.completion_tokens))

    def _stop_reason(self, reason: FinishReason | None, sequence: str | None) -> StopReason | None:
        if sequence is not None:
            return "stop_sequence"
        named: dict[str | None, StopReason] = {"length": "max_tokens", "tool_calls": "tool_use", "stop": "end_turn"}
        return named.get(self.reading.reason(0, reason))


def messages_router(assistant: Assistant, config: ServerConfig) -> APIRouter:
    router = APIRouter(tags=["Anthropic"], responses=ERRORS)

    async def prompt_of(body: Conversation, tools: Tools) -> list[int]:
        check_model(body.model, assistant.model)
        return await assistant.prompt(_messages(body), tools, _thinking(body, assistant))

    @router.post("/v1/messages", response_model=MessageResponse, responses=STREAM_RESPONSE)
    async def create_message(body: MessagesRequest, request: Request) -> Response:
        """Answer a conversation. With `stream`, Anthropic's events: each block of the answer begins, grows and ends."""
        tools = _tools(body)
        prompt, adapter = await prompt_of(body, tools), check_model(body.model, assistant.model)
        form = None if body.output_config is None else body.output_config.format
        generation, reading = await assistant.answer(
            record_of(request.scope), "msg", prompt, tools, body.max_tokens, adapter=adapter,
            structured=None if form is None else Grammar.json_schema(form.schema_),
            structured_param="output_config.format.schema",
            include_reasoning=body.thinking is not None and body.thinking.type != "disabled",
            temperature=body.temperature, top_p=body.top_p, top_k=body.top_k, stop=tuple(body.stop_sequences or ()))
        reply = Reply(generation.id, adapter or assistant.model.id, generation, reading)
        if body.stream:
            return EventStream(reply.events(), generation.abort, config.keep_alive_interval, frame=named_frame,
                               fail=APIError.anthropic_body)
        with generation:
            whole = await run_while_connected(request.receive, reply.whole())
        return Response(whole.model_dump_json(), media_type="application/json")

    @router.post("/v1/messages/count_tokens")
    async def count_tokens(body: CountTokensRequest) -> TokenCount:
        """How many tokens a conversation has, with its tools and what begins the answer."""
        return TokenCount(input_tokens=len(await prompt_of(body, _tools(body))))

    return router


def _messages(body: Conversation) -> list[dict[str, Any]]:
    """As ChatFormat takes them: a result of a tool is a message of its own."""
    system = body.system if isinstance(body.system, str) else "\n".join(block.text for block in body.system)
    result: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    for message in body.messages:
        result += _turn(message)
    return result


def _turn(message: InputMessage) -> list[dict[str, Any]]:
    blocks = [TextBlock(type="text", text=message.content)] if isinstance(message.content, str) else message.content
    results: list[dict[str, Any]] = []
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[dict[str, Any]] = []
    for block in blocks:
        match block:
            case TextBlock():
                texts.append(block.text)
            case ThinkingBlock():
                thoughts.append(block.thinking)
            case ToolUseBlock():
                calls.append(template_call(block.id, block.name, block.input))
            case ToolResultBlock():
                content = block.content if isinstance(block.content, str) else "\n".join(
                    part.text for part in block.content if isinstance(part, TextBlock))
                results.append({"role": "tool", "tool_call_id": block.tool_use_id, "content": content})
    turn: dict[str, Any] = {"role": message.role, "content": "\n".join(texts)}
    if thoughts:
        turn["reasoning_content"] = "\n".join(thoughts)
    if calls:
        turn["tool_calls"] = calls
    return [*results, turn] if texts or thoughts or calls or not results else results


def _tools(body: Conversation) -> Tools:
    functions = [function_tool(tool.name, tool.description, tool.input_schema, tool.strict)
                 for tool in body.tools or ()]
    given = body.tool_choice
    if given is None:
        return make_tools(functions, None, None, None)
    if (given.type == "tool") != (given.name is not None):
        raise APIError(400, "tool_choice.name is for a tool_choice of type tool, which needs it",
                       param="tool_choice.name")
    choice = {"any": "required", "tool": "required"}.get(given.type, given.type)
    return make_tools(functions, choice, given.name, not given.disable_parallel_tool_use)


def _thinking(body: Conversation, assistant: Assistant) -> dict[str, Any]:
    """What the template is told of thinking: Anthropic's models do not unless they are asked to."""
    thinking = body.thinking
    effort = None if body.output_config is None else body.output_config.effort
    asked = thinking is not None and thinking.type != "disabled"
    insists = thinking is not None and thinking.type == "enabled"  # the others leave it to the model
    if insists and assistant.chat.reasoning is None and not assistant.chat.parser.always:
        raise APIError(400, "thinking is not supported by this model, whose chat template knows none", param="thinking",
                       code="not_supported")
    variables: dict[str, Any] = {"enable_thinking": asked}
    if thinking is not None and thinking.budget_tokens is not None:
        variables["thinking_budget"] = thinking.budget_tokens
    if effort is not None:
        variables["reasoning_effort"] = effort
    return variables


def _blocks(answer: Answer) -> list[OutputBlock]:
    """Without a call that max_tokens cut: half of its input is none, and another one would be wrong."""
    blocks: list[OutputBlock] = []
    if answer.reasoning:
        blocks.append(OutputThinking(thinking=answer.reasoning))
    if answer.content:
        blocks.append(OutputText(text=answer.content))
    for call in answer.calls:
        value = template_arguments(call.arguments)
        if isinstance(value, dict):
            blocks.append(OutputToolUse(id=call.id, name=call.name, input=value))
    return blocks


def _block_event(delta: Delta) -> tuple[str, dict[str, Any] | None, dict[str, Any] | None]:
    """The block that a delta belongs to, what begins it, and what it adds."""
    match delta:
        case Content(text):
            return "text", {"type": "text", "text": ""}, {"type": "text_delta", "text": text}
        case Reasoning(text):
            return "thinking", {"type": "thinking", "thinking": "", "signature": ""}, \
                {"type": "thinking_delta", "thinking": text}
        case CallStart(index, call_id, name):
            return f"call {index}", {"type": "tool_use", "id": call_id, "name": name, "input": {}}, None
        case Arguments(index, text):
            return f"call {index}", None, {"type": "input_json_delta", "partial_json": text}


def _event(kind: str, **fields: Any) -> str:
    return json.dumps({"type": kind, **fields}, ensure_ascii=False)

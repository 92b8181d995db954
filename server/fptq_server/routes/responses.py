"""/v1/responses, as OpenAI has it."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncGenerator, Iterator
from typing import Any, Literal

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from fptq_runtime.engine.grammar import Grammar
from fptq_runtime.engine.output import RequestOutput
from fptq_runtime.engine.request import FinishReason
from fptq_server.assistant import Assistant
from fptq_server.chat_format import Reading
from fptq_server.config import ServerConfig
from fptq_server.errors import ERROR_RESPONSES, APIError
from fptq_server.generation import Generation
from fptq_server.parsers.frame import Arguments, CallStart, Content, Delta, Reasoning
from fptq_server.protocol_responses import (
    CachedTokens,
    CallItem,
    DeletedResponse,
    FunctionTool,
    ItemList,
    ItemReference,
    MessageItem,
    ReasoningTokens,
    ResponseObject,
    ResponsesRequest,
    ResponseUsage,
)
from fptq_server.record import record_of
from fptq_server.response_store import ResponseStore, StoredResponse
from fptq_server.sse import STREAM_RESPONSE, EventStream, named_frame, run_while_connected
from fptq_server.tools import Tools, chosen_tools, function_tool, template_call
from fptq_server.validation import check_model, sampling_fields


class Reply:
    """Writes one response, event by event; `response` is what it has come to."""

    def __init__(self, response: ResponseObject, generation: Generation, reading: Reading) -> None:
        self.response = response
        self._generation = generation
        self._reading = reading
        self._events = 0
        self._open: object = None  # what the last item is of
        self._reasoning_tokens = 0

    async def events(self) -> AsyncGenerator[str, None]:
        yield self._event("response.created", response=self.response.model_dump())
        yield self._event("response.in_progress", response=self.response.model_dump())
        last: RequestOutput | None = None
        async for _, output in self._generation.outputs():
            last = output
            for delta in self._reading.deltas(0, output.text, output.finish_reason is not None):
                if isinstance(delta, Reasoning):
                    self._reasoning_tokens += len(output.token_ids)
                for event in self._apply(delta):
                    yield event
        assert last is not None
        cut = last.finish_reason is FinishReason.LENGTH
        for event in self._close("incomplete" if cut else "completed"):
            yield event
        self.response.status = "incomplete" if cut else "completed"
        if cut:
            self.response.incomplete_details = {"reason": "max_output_tokens"}
        self.response.usage = self._usage()
        yield self._event(f"response.{self.response.status}", response=self.response.model_dump())

    async def whole(self) -> ResponseObject:
        async for _ in self.events():
            pass
        return self.response

    def fail(self, error: APIError) -> str:
        """The event of a failure."""
        self.response.status = "failed"
        self.response.error = {"code": "server_error", "message": error.message}
        return self._event("response.failed", response=self.response.model_dump())

    def _apply(self, delta: Delta) -> Iterator[str]:
        if delta == Content(""):  # plain text has one even where a token adds nothing
            return
        match delta:
            case Content(text):
                yield from self._begin("message", "msg", role="assistant", content=[])
                yield from self._extend("output_text", text)
            case Reasoning(text):
                yield from self._begin("reasoning", "rs", summary=[], content=[])
                yield from self._extend("reasoning_text", text)
            case CallStart(index, call_id, name):
                yield from self._begin("function_call", "fc", index, call_id=call_id, name=name, arguments="")
            case Arguments(_, text):
                item = self.response.output[-1]
                item["arguments"] += text
                yield self._event("response.function_call_arguments.delta", **self._where(), delta=text)

    def _begin(self, kind: str, prefix: str, index: int = 0, **fields: Any) -> Iterator[str]:
        """An item of this kind, unless the last one is it."""
        if self._open == (kind, index):
            return
        yield from self._close("completed")
        self._open = (kind, index)
        item = {"id": f"{prefix}_{uuid.uuid4().hex}", "type": kind, "status": "in_progress", **fields}
        self.response.output.append(item)
        yield self._event("response.output_item.added", output_index=len(self.response.output) - 1, item=item)

    def _extend(self, kind: str, text: str) -> Iterator[str]:
        item = self.response.output[-1]
        if not item["content"]:
            empty: dict[str, Any] = {"annotations": [], "logprobs": []} if kind == "output_text" else {}
            item["content"].append({"type": kind, "text": "", **empty})
            yield self._event("response.content_part.added", **self._where(), content_index=0, part=item["content"][0])
        item["content"][0]["text"] += text
        more: dict[str, Any] = {"logprobs": []} if kind == "output_text" else {}
        yield self._event(f"response.{kind}.delta", **self._where(), content_index=0, delta=text, **more)

    def _close(self, status: str) -> Iterator[str]:
        """The end of the last item."""
        if self._open is None:
            return
        self._open = None
        item = self.response.output[-1]
        item["status"] = status
        if item["type"] == "function_call":
            yield self._event("response.function_call_arguments.done", **self._where(), name=item["name"],
                              arguments=item["arguments"])
        else:
            [part] = item["content"]
            more: dict[str, Any] = {"logprobs": []} if part["type"] == "output_text" else {}
            yield self._event(f"response.{part['type']}.done", **self._where(), content_index=0, text=part["text"],
                              **more)
            yield self._event("response.content_part.done", **self._where(), content_index=0, part=part)
        yield self._event("response.output_item.done", output_index=len(self.response.output) - 1, item=item)

    def _where(self) -> dict[str, Any]:
        return {"item_id": self.response.output[-1]["id"], "output_index": len(self.response.output) - 1}

    def _event(self, kind: str, **fields: Any) -> str:
        self._events += 1
        return json.dumps({"type": kind, "sequence_number": self._events - 1, **fields}, ensure_ascii=False)

    def _usage(self) -> ResponseUsage:
        usage = self._generation.usage()
        return ResponseUsage(
            input_tokens=usage.prompt_tokens,
            input_tokens_details=CachedTokens(cached_tokens=usage.prompt_tokens_details.cached_tokens),
            output_tokens=usage.completion_tokens,
            output_tokens_details=ReasoningTokens(reasoning_tokens=self._reasoning_tokens),
            total_tokens=usage.total_tokens)


def responses_router(assistant: Assistant, store: ResponseStore, config: ServerConfig) -> APIRouter:
    router = APIRouter(tags=["OpenAI"], responses=ERROR_RESPONSES)
    running: dict[str, tuple[Generation, asyncio.Task[None]]] = {}  # in the background

    def stored(response_id: str, param: str = "response_id", status: int = 404) -> StoredResponse:
        found = store.get(response_id)
        if found is None:
            raise APIError(status, f"{param}: there is no response {response_id}; it was never stored, was deleted, or "
                                   "made way for later ones", param=param,
                           code=f"{param.removesuffix('_id')}_not_found")
        if found.response["status"] == "in_progress" and response_id not in running:
            found.response.update(status="failed", error={"code": "server_error", "message": "the server has stopped"})
        return found

    def keep(reply: Reply, history: list[dict[str, Any]], given: list[dict[str, Any]]) -> None:
        if reply.response.store:
            store.put(StoredResponse(reply.response.model_dump(), history, given))

    @router.post("/v1/responses", response_model=ResponseObject, responses=STREAM_RESPONSE)
    async def create_response(body: ResponsesRequest, request: Request) -> Response:
        """Answer a conversation, which can go on from a stored response. With `stream`, OpenAI's typed events; with
        `background`, the answer is written while the client is away."""
        adapter = check_model(body.model, assistant.model)
        if body.background and (body.stream or body.store is False):
            raise APIError(400, "background needs a response that is stored and not streamed", param="background",
                           code="not_supported")
        history = stored(body.previous_response_id, "previous_response_id", 400).items \
            if body.previous_response_id is not None else []
        given = _items(body, store)
        tools = _tools(body)
        messages = _messages(body.instructions, [*history, *given])
        effort = None if body.reasoning is None else body.reasoning.effort
        prompt = await assistant.prompt(messages, tools, assistant.chat.variables(tools, effort))
        generation, reading = await assistant.answer(
            record_of(request.scope), "resp", prompt, tools, body.max_output_tokens, adapter=adapter,
            structured=_form(body), structured_param="text.format.schema", **sampling_fields(body))
        reply = Reply(_blank(body, adapter or assistant.model.id), generation, reading)
        if body.stream:
            async def events() -> AsyncGenerator[str, None]:
                async for event in reply.events():
                    if reply.response.usage is not None:  # the last one; whoever reads it can go on from it
                        keep(reply, history, given)
                    yield event

            return EventStream(events(), generation.abort, config.keep_alive_interval, frame=named_frame,
                               fail=reply.fail)
        if body.background:
            async def write() -> None:
                try:
                    await reply.whole()
                except APIError as error:
                    reply.fail(error)
                    if error.code == "aborted":
                        reply.response.status, reply.response.error = "cancelled", None
                finally:
                    keep(reply, history, given)
                    del running[reply.response.id]

            answer = reply.response.model_dump_json()
            keep(reply, history, given)
            running[reply.response.id] = generation, asyncio.create_task(write())
            return Response(answer, media_type="application/json")
        with generation:
            whole = await run_while_connected(request.receive, reply.whole())
        keep(reply, history, given)
        return Response(whole.model_dump_json(), media_type="application/json")

    @router.get("/v1/responses/{response_id}", response_model=ResponseObject)
    async def retrieve_response(response_id: str) -> dict[str, Any]:
        return stored(response_id).response

    @router.delete("/v1/responses/{response_id}")
    async def delete_response(response_id: str) -> DeletedResponse:
        stored(response_id)
        if response_id in running:
            running[response_id][0].abort()
            await running[response_id][1]
        store.delete(response_id)
        return DeletedResponse(id=response_id)

    @router.post("/v1/responses/{response_id}/cancel", response_model=ResponseObject)
    async def cancel_response(response_id: str) -> dict[str, Any]:
        """End a background response that is still written."""
        if not stored(response_id).response["background"]:
            raise APIError(400, "only a response with background true can be cancelled", param="response_id")
        if response_id in running:
            generation, task = running[response_id]
            generation.abort()
            await asyncio.shield(task)
        return stored(response_id).response

    @router.get("/v1/responses/{response_id}/input_items")
    async def list_input_items(response_id: str, limit: int = Query(20, ge=1, le=100),
                               order: Literal["asc", "desc"] = "desc", after: str | None = None) -> ItemList:
        """What the response answered: the items of its own request and of those that it went on from."""
        found = stored(response_id)
        items = [*found.history, *found.input]
        if order == "desc":
            items.reverse()
        if after is not None:
            ids = [item["id"] for item in items]
            if after not in ids:
                raise APIError(400, f"after: there is no item {after}", param="after")
            items = items[ids.index(after) + 1 :]
        page = items[:limit]
        return ItemList(data=page, first_id=page[0]["id"] if page else None, last_id=page[-1]["id"] if page else None,
                        has_more=len(items) > limit)

    return router


def _blank(body: ResponsesRequest, model: str) -> ResponseObject:
    """The response before anything is written."""
    form = {"type": "text"} if body.text is None or body.text.format is None else body.text.format.model_dump(
        by_alias=True, exclude_none=True)
    return ResponseObject(
        id=f"resp_{uuid.uuid4().hex}", created_at=int(time.time()), status="in_progress",
        background=bool(body.background), instructions=body.instructions, max_output_tokens=body.max_output_tokens,
        metadata=body.metadata or {}, model=model, output=[], parallel_tool_calls=body.parallel_tool_calls is not False,
        previous_response_id=body.previous_response_id,
        reasoning={"effort": None if body.reasoning is None else body.reasoning.effort, "summary": None},
        store=body.store is not False, temperature=body.temperature, text={"format": form},
        tool_choice="auto" if body.tool_choice is None else body.tool_choice if isinstance(body.tool_choice, str) else
        body.tool_choice.model_dump(exclude_none=True),
        tools=[tool.model_dump(exclude_none=True, by_alias=True) for tool in body.tools or ()], top_p=body.top_p)


def _items(body: ResponsesRequest, store: ResponseStore) -> list[dict[str, Any]]:
    """A request's input as items, each with an id; references are what they refer to."""
    if isinstance(body.input, str):
        given: list[Any] = [MessageItem(role="user", content=body.input)] if body.input else []
    else:
        given = list(body.input)
    if not given and body.previous_response_id is None:
        raise APIError(400, "input is required", param="input", code="missing_field")
    items = []
    for i, item in enumerate(given):
        if isinstance(item, ItemReference):
            found = store.find_item(item.id)
            if found is None:
                raise APIError(400, f"input.{i}: there is no item {item.id}", param=f"input.{i}.id",
                               code="item_not_found")
            items.append(found)
            continue
        dumped = item.model_dump(exclude_none=True, by_alias=True, warnings=False)
        if isinstance(item, CallItem) and not isinstance(item.arguments, str):
            dumped["arguments"] = json.dumps(item.arguments, ensure_ascii=False)
        if isinstance(item, MessageItem) and isinstance(item.content, str):
            kind = "output_text" if item.role == "assistant" else "input_text"
            dumped["content"] = [{"type": kind, "text": item.content}]
        items.append({"id": f"item_{uuid.uuid4().hex}", "status": "completed", **dumped})
    return items


def _messages(instructions: str | None, items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """As ChatFormat takes them: reasoning, text and calls that follow each other are one turn of the assistant's."""
    messages: list[dict[str, Any]] = [] if instructions is None else [{"role": "system", "content": instructions}]
    turn: dict[str, Any] | None = None

    def assistants() -> dict[str, Any]:
        nonlocal turn
        if turn is None:
            turn = {"role": "assistant", "content": ""}
            messages.append(turn)
        return turn

    for item in items:
        kind = item["type"]
        if kind == "reasoning":
            text = "\n".join(part["text"] for part in item.get("content") or item.get("summary") or ())
            if text:
                assistants()["reasoning_content"] = text
        elif kind == "function_call":
            call = template_call(item["call_id"], item["name"], item["arguments"])
            assistants().setdefault("tool_calls", []).append(call)
        elif kind == "message" and item["role"] == "assistant":
            assistants()["content"] += _text(item["content"])
        else:
            turn = None
            messages.append({"role": item["role"], "content": _text(item["content"])} if kind == "message" else
                            {"role": "tool", "tool_call_id": item["call_id"], "content": _text(item["output"])})
    return messages


def _text(content: str | list[dict[str, Any]]) -> str:
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)


def _tools(body: ResponsesRequest) -> Tools:
    functions = [function_tool(tool.name, tool.description, tool.parameters, tool.strict)
                 for tool in body.tools or () if isinstance(tool, FunctionTool)]
    return chosen_tools(functions, body.tool_choice, body.parallel_tool_calls)


def _form(body: ResponsesRequest) -> Grammar | None:
    form = None if body.text is None else body.text.format
    if form is None or form.type == "text":
        return None
    if form.type == "json_object":
        return Grammar.json_object()
    if form.schema_ is None:
        raise APIError(400, "text.format.schema is required", param="text.format.schema", code="missing_field")
    return Grammar.json_schema(form.schema_)

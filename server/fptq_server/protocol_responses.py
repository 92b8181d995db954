"""Bodies of /v1/responses, as OpenAI has them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag

from fptq_server.protocol import (
    Arguments,
    Body,
    Content,
    ForeignBody,
    ListPage,
    LogitBias,
    NotEmpty,
    NotFalse,
    NotTrue,
    OtherPart,
    ReasoningEffort,
    Seed,
    Stop,
    StreamOptions,
    Text,
    ToolChoice,
    Unsupported,
    Unused,
    refuse_kind,
    unsupported,
    variant,
)


class ReasoningText(Body):
    type: Literal["reasoning_text", "summary_text"]
    text: Text


class MessageItem(Body):
    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Content
    id: Text | None = None
    status: Unused = None
    phase: Unused = None


class CallItem(Body):
    type: Literal["function_call"]
    call_id: Text
    name: Text
    arguments: Arguments = ""
    id: Text | None = None
    status: Unused = None
    async_: Annotated[NotTrue, Field(alias="async")] = None
    namespace: NotEmpty = None
    caller: Unused = None


class CallOutputItem(Body):
    type: Literal["function_call_output"]
    call_id: Text
    output: Content = ""
    name: Unused = None
    id: Text | None = None
    status: Unused = None


class ReasoningItem(Body):
    type: Literal["reasoning"]
    id: Text | None = None
    summary: list[ReasoningText] | None = None
    content: list[ReasoningText] | None = None
    encrypted_content: Unused = None
    status: Unused = None


class ItemReference(Body):
    """An item of a stored response."""

    type: Literal["item_reference"] = "item_reference"
    id: Text


KINDS = ("message", "function_call", "function_call_output", "reasoning", "item_reference")


def _item_kind(item: Any) -> str:
    if not isinstance(item, dict):
        return "<message>"
    kind = item.get("type", "item_reference" if set(item) == {"id"} else "message")
    return f"<{kind}>" if kind in KINDS else "<other>"


InputItem = Annotated[
    Annotated[MessageItem, Tag("<message>")] | Annotated[CallItem, Tag("<function_call>")]
    | Annotated[CallOutputItem, Tag("<function_call_output>")] | Annotated[ReasoningItem, Tag("<reasoning>")]
    | Annotated[ItemReference, Tag("<item_reference>")] | Annotated[OtherPart, Tag("<other>")],
    Discriminator(_item_kind),
]


def _function_kind(kind: str) -> str:
    return kind if kind == "function" else refuse_kind(kind)


class FunctionTool(Body):
    type: Annotated[Text, AfterValidator(_function_kind)]
    name: Text
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    defer_loading: Annotated[Any, unsupported(False)] = None
    allowed_callers: Annotated[Any, unsupported([], ["direct"])] = None
    output_schema: Unused = None
    async_: Annotated[NotTrue, Field(alias="async")] = None


class OtherTool(Body):
    """One that runs at OpenAI."""

    model_config = ConfigDict(extra="ignore")
    type: Annotated[str, AfterValidator(refuse_kind)]


Tool = Annotated[Annotated[FunctionTool, Tag("<function>")] | Annotated[OtherTool, Tag("<other>")], Discriminator(
    lambda tool: "<other>" if isinstance(tool, dict) and tool.get("type", "function") != "function" else "<function>")]


class TextFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    name: Text | None = None
    description: Text | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class TextOptions(Body):
    format: TextFormat | None = None
    verbosity: Annotated[Any, unsupported("medium")] = None


def _included(name: str) -> str:
    """What tools of OpenAI's would add is not there, and reasoning comes as text."""
    return refuse_kind(name) if name == "message.output_text.logprobs" else name


class ReasoningOptions(Body):
    effort: ReasoningEffort | None = None
    summary: Unused = None
    generate_summary: Unused = None
    context: Annotated[Any, unsupported("auto")] = None
    mode: Annotated[Any, unsupported("standard")] = None


class ResponsesRequest(ForeignBody):
    """top_k to stop are vLLM's and llama.cpp's."""

    model: Text | None = None
    input: Annotated[
        Annotated[Text, Tag("<a string>")] | Annotated[list[InputItem], Tag("<a list of items>")],
        variant(str="<a string>", list="<a list of items>", list_dict="<a list of items>"),
    ] = ""
    instructions: Text | None = None
    previous_response_id: Text | None = None
    store: bool | None = None
    stream: bool | None = None
    background: bool | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: LogitBias | None = None
    seed: Seed | None = None
    stop: Stop | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: NotFalse = None
    enable_response_messages: NotTrue = None
    metadata: dict[Text, Text] | None = None
    stream_options: StreamOptions | None = None
    include: list[Annotated[Text, AfterValidator(_included)]] | None = None
    truncation: Annotated[Any, unsupported("disabled")] = None
    top_logprobs: Annotated[Any, unsupported(0)] = None
    max_tool_calls: Unused = None
    user: Unused = None
    safety_identifier: Unused = None
    prompt_cache_key: Unused = None
    context_management: NotEmpty = None
    conversation: Unsupported = None
    prompt: Unsupported = None
    image: NotEmpty = None
    access_programs: NotEmpty = None


class CachedTokens(BaseModel):
    cached_tokens: int


class ReasoningTokens(BaseModel):
    reasoning_tokens: int


class ResponseUsage(BaseModel):
    input_tokens: int
    input_tokens_details: CachedTokens
    output_tokens: int
    output_tokens_details: ReasoningTokens
    total_tokens: int


class ResponseObject(BaseModel):
    """status: queued and in_progress are of a background response, which is not written yet."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    status: Literal["in_progress", "completed", "incomplete", "failed", "cancelled"]
    background: bool
    error: dict[str, Any] | None = None
    incomplete_details: dict[str, Any] | None = None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str]
    model: str
    output: list[dict[str, Any]]
    parallel_tool_calls: bool
    previous_response_id: str | None
    reasoning: dict[str, Any]
    store: bool
    temperature: float | None
    text: dict[str, Any]
    tool_choice: Any
    tools: list[dict[str, Any]]
    top_p: float | None
    truncation: Literal["disabled"] = "disabled"
    usage: ResponseUsage | None = None


class ItemList(ListPage[dict[str, Any]]):
    pass


class DeletedResponse(BaseModel):
    id: str
    object: Literal["response"] = "response"
    deleted: Literal[True] = True

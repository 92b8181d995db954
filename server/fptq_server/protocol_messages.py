"""Bodies of /v1/messages, as Anthropic has them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag

from fptq_runtime.engine.request import MAX_STOP_STRINGS
from fptq_server.protocol import Body, NotEmpty, Text, Unsupported, Unused, refuse_kind, unsupported, variant


class OtherBlock(Body):
    """An image, a document, a tool of the server's own: named, so that it can be refused by its name."""

    model_config = ConfigDict(extra="ignore")
    type: Annotated[str, AfterValidator(refuse_kind)]

StopSequences = Annotated[list[Annotated[Text, Field(min_length=1)]], Field(max_length=MAX_STOP_STRINGS)]
NOTHING_CLEARED = {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}


class TextBlock(Body):
    type: Literal["text"]
    text: Text
    cache_control: Unused = None
    citations: NotEmpty = None


class ThinkingBlock(Body):
    type: Literal["thinking"]
    thinking: Text
    signature: Unused = None


class ToolUseBlock(Body):
    type: Literal["tool_use"]
    id: Text
    name: Text
    input: dict[str, Any] = Field(default_factory=dict)
    toolset_name: Unsupported = None
    cache_control: Unused = None
    caller: Unused = None


def _by_type(*types: str) -> Discriminator:
    """Of blocks: the variant is named by the type, and what is none of the types is `other`."""
    return Discriminator(lambda block: f"<{block['type']}>" if isinstance(block, dict) and block.get("type") in types
                         else "<other>" if isinstance(block, dict) and "type" in block else f"<{types[0]}>")


ResultBlock = Annotated[Annotated[TextBlock, Tag("<text>")] | Annotated[OtherBlock, Tag("<other>")], _by_type("text")]
Blocks = "<a list of blocks>"


class ToolResultBlock(Body):
    type: Literal["tool_result"]
    tool_use_id: Text
    content: Annotated[
        Annotated[Text, Tag("<a string>")] | Annotated[list[ResultBlock], Tag(Blocks)],
        variant(str="<a string>", list=Blocks, list_dict=Blocks),
    ] = ""
    is_error: bool | None = None
    cache_control: Unused = None


Block = Annotated[
    Annotated[TextBlock, Tag("<text>")] | Annotated[ThinkingBlock, Tag("<thinking>")]
    | Annotated[ToolUseBlock, Tag("<tool_use>")] | Annotated[ToolResultBlock, Tag("<tool_result>")]
    | Annotated[OtherBlock, Tag("<other>")],
    _by_type("text", "thinking", "tool_use", "tool_result"),
]


class InputMessage(Body):
    role: Literal["user", "assistant"]
    content: Annotated[
        Annotated[Text, Tag("<a string>")] | Annotated[list[Block], Tag(Blocks)],
        variant(str="<a string>", list=Blocks, list_dict=Blocks),
    ]


def _custom_kind(kind: str) -> str:
    return kind if kind == "custom" else refuse_kind(kind)


class InputTool(Body):
    type: Annotated[Text, AfterValidator(_custom_kind)] = "custom"
    name: Text
    description: Text | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None
    cache_control: Unused = None
    eager_input_streaming: Unused = None
    input_examples: NotEmpty = None
    defer_loading: Annotated[Any, unsupported(False)] = None
    allowed_callers: Annotated[Any, unsupported([], ["direct"])] = None


class InputToolChoice(Body):
    type: Literal["auto", "any", "tool", "none"]
    name: Text | None = None
    disable_parallel_tool_use: bool | None = None


class ThinkingConfig(Body):
    type: Literal["enabled", "disabled", "adaptive", "between_tools"]
    budget_tokens: int | None = None
    display: Literal["summarized", "omitted"] | None = None


class OutputFormat(Body):
    type: Literal["json_schema"]
    schema_: Annotated[dict[str, Any], Field(alias="schema")]


class OutputConfig(Body):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


class Conversation(Body):
    """What a prompt is made of."""

    model: Text
    messages: Annotated[list[InputMessage], Field(min_length=1, fail_fast=True)]
    system: Annotated[
        Annotated[Text, Tag("<a string>")] | Annotated[list[TextBlock], Tag(Blocks)],
        variant(str="<a string>", list=Blocks, list_dict=Blocks),
    ] = ""
    tools: list[InputTool] | None = None
    tool_choice: InputToolChoice | None = None
    thinking: ThinkingConfig | None = None
    output_config: OutputConfig | None = None
    cache_control: Unused = None
    context_management: Annotated[Any, unsupported({}, {"edits": []}, NOTHING_CLEARED)] = None
    mcp_servers: NotEmpty = None
    speed: Annotated[Any, unsupported("standard")] = None
    user_profile_id: Unused = None
    workspace_id: Unused = None
    diagnostics: Unused = None


class MessagesRequest(Conversation):
    max_tokens: Annotated[int, Field(ge=1)]
    stream: bool | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    stop_sequences: StopSequences | None = None
    metadata: Unused = None
    service_tier: Annotated[Any, unsupported("auto", "standard_only")] = None
    inference_geo: Unsupported = None
    container: Unsupported = None


class CountTokensRequest(Conversation):
    pass


class TokenCount(BaseModel):
    input_tokens: int


class MessageUsage(BaseModel):
    """input_tokens: those that were not cached."""

    input_tokens: int
    cache_read_input_tokens: int
    cache_creation_input_tokens: int = 0
    output_tokens: int


class OutputText(BaseModel):
    type: Literal["text"] = "text"
    text: str


class OutputThinking(BaseModel):
    type: Literal["thinking"] = "thinking"
    thinking: str
    signature: str = ""


class OutputToolUse(BaseModel):
    type: Literal["tool_use"] = "tool_use"
    id: str
    name: str
    input: dict[str, Any]


OutputBlock = OutputThinking | OutputText | OutputToolUse
StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]


class MessageResponse(BaseModel):
    id: str
    type: Literal["message"] = "message"
    role: Literal["assistant"] = "assistant"
    model: str
    content: list[OutputBlock]
    stop_reason: StopReason | None
    stop_sequence: str | None
    usage: MessageUsage


class AnthropicErrorInfo(BaseModel):
    type: str
    message: str


class AnthropicError(BaseModel):
    type: Literal["error"] = "error"
    error: AnthropicErrorInfo

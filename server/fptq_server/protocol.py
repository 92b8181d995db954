"""Request and response bodies. A field we do not know is refused by name, and so is one that we cannot honour."""

from __future__ import annotations

from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ModelWrapValidatorHandler,
    PrivateAttr,
    Tag,
    model_validator,
)
from pydantic_core import CoreSchema, PydanticCustomError
from pydantic_core.core_schema import no_info_after_validator_function

from fptq_runtime import __version__
from fptq_runtime.engine.json_schema import VALUES
from fptq_runtime.engine.request import MAX_N


def _well_formed(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise PydanticCustomError("unicode", "must be valid Unicode, without lone surrogates") from None
    return text


def variant(**types: str) -> Discriminator:
    """Chooses a union's variant by the JSON type of the value, or of its first element, so that an error names the
    client's field and one cause instead of every variant that did not match."""

    def tag(value: Any) -> str | None:
        kind = type(value).__name__
        if kind == "list" and value:
            kind += "_" + type(value[0]).__name__
        return types.get(kind)

    allowed = " or ".join(name.strip("<>") for name in dict.fromkeys(types.values()))
    return Discriminator(tag, custom_error_type="variant", custom_error_message=f"must be {allowed}")


class _OnlyAt:
    """Accepts the values that change nothing; clients send those by default. 1 and 1.0 are one number, true is none."""

    def __init__(self, *taken: Any) -> None:
        self._taken = taken

    def _check(self, value: Any) -> Any:
        if any(value == taken and isinstance(value, bool) == isinstance(taken, bool) for taken in self._taken):
            return value
        raise PydanticCustomError("not_supported", "is not supported by this server")

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(self, _: CoreSchema, __: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"enum": list(self._taken)}


def unsupported(*harmless: Any) -> _OnlyAt:
    return _OnlyAt(None, *harmless)


def _prompt_length(length: int) -> int:
    if length >= 1 or length == -1:
        return length
    raise PydanticCustomError("prompt_length", "must be at least 1, or -1 for what fits")


def _token_id_key(key: str) -> str:
    if key.isascii() and key.isdigit() and len(key) <= 10:
        return key
    raise PydanticCustomError("token_id", "must have token ids for keys")


Text = Annotated[str, AfterValidator(_well_formed)]
TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
Prompt = Annotated[
    Annotated[Text, Tag("<a string>")]
    | Annotated[list[Text], Field(min_length=1, fail_fast=True), Tag("<a list of strings>")]
    | Annotated[TokenIds, Tag("<a list of token ids>")]
    | Annotated[list[TokenIds], Field(min_length=1, fail_fast=True), Tag("<a list of lists of token ids>")],
    variant(str="<a string>", list_str="<a list of strings>", list_int="<a list of token ids>",
             list_list="<a list of lists of token ids>"),
]
Stop = Annotated[
    Annotated[Text, Tag("<a string>")] | Annotated[list[Text], Field(fail_fast=True), Tag("<a list of strings>")],
    variant(str="<a string>", list="<a list of strings>", list_str="<a list of strings>"),
]
Seed = Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)]
FINGERPRINT = f"fptq-{__version__}"  # of what computes an answer; clients of text-generation-inference insist on one
LLAMA_CPP_SAMPLERS = ["penalties", "dry", "top_n_sigma", "top_k", "typ_p", "top_p", "min_p", "xtc", "temperature"]
TopLogprobs = Annotated[int, Field(ge=0, le=20)]
Absent = Field(default=None, exclude_if=lambda value: value is None)
LogitBias = dict[Annotated[str, AfterValidator(_token_id_key)], Annotated[float, Field(ge=-100, le=100)]]
Unsupported = Annotated[Any, unsupported()]
NotTrue = Annotated[Any, unsupported(False)]
NotFalse = Annotated[Any, unsupported(True)]
NotEmpty = Annotated[Any, unsupported([], {}, "")]
Off = Annotated[Any, unsupported(0, False)]
NotMinusOne = Annotated[Any, unsupported(-1)]
NotOne = Annotated[Any, unsupported(1)]
Unused = Any  # whatever it says changes nothing that we do
Schema = Annotated[
    Annotated[dict[str, Any], Tag("<a JSON schema>")] | Annotated[Text, Tag("<the text of one>")],
    variant(dict="<a JSON schema>", str="<the text of one>"),
]
Choices = Annotated[list[Text], Field(min_length=1, fail_fast=True)]


Listed = TypeVar("Listed")


def without_nulls(value: Any) -> Any:
    """Of a function or a schema: null says nothing where a keyword stands, and is a value within those of VALUES."""
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {key: item if key in VALUES else without_nulls(item) for key, item in value.items()
            if item is not None or key in VALUES}


class ListPage(BaseModel, Generic[Listed]):
    """Some of a list, as OpenAI pages through one: `after` the last_id come the next."""

    object: Literal["list"] = "list"
    data: list[Listed]
    first_id: str | None
    last_id: str | None
    has_more: bool


class Body(BaseModel):
    """null means "not given", of a field that we do not know too: clients send back what they were sent."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: Any) -> Any:
        return {name: value for name, value in data.items() if value is not None} if isinstance(data, dict) else data


class StreamOptions(Body):
    """continuous_usage_stats: usage so far in every chunk. include_obfuscation: no chunk is padded."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None


class JSONSchema(Body):
    """Of a response_format. It holds whether it is strict or not."""

    name: Text | None = None
    description: Text | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class Structure(Body):
    begin: Text
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    end: Text


class ResponseFormat(Body):
    """structural_tag is vLLM's: text in which what begins with a trigger is one of the structures. llama.cpp's clients
    give a schema as `schema`, text-generation-inference's as `value`, and theirs know the types json and regex."""

    type: Literal["text", "json_object", "json_schema", "structural_tag", "json", "regex"]
    json_schema: JSONSchema | None = None
    schema_: Annotated[Schema | None, Field(alias="schema")] = None
    value: Schema | None = None
    structures: Annotated[list[Structure], Field(min_length=1)] | None = None
    triggers: Choices | None = None


class StructuredOutputs(Body):
    """vLLM's: one of the first six. structural_tag: a response_format of that type, or the JSON text of one."""

    json_: Annotated[Schema | None, Field(alias="json")] = None
    regex: Text | None = None
    choice: Choices | None = None
    grammar: Text | None = None
    json_object: bool | None = None
    structural_tag: Schema | None = None
    disable_fallback: Annotated[Any, unsupported(True, False)] = None
    disable_any_whitespace: Annotated[Any, unsupported(False)] = None
    disable_additional_properties: Annotated[Any, unsupported(False)] = None
    whitespace_pattern: Unsupported = None


class ForeignBody(Body):
    """Fields of OpenAI, vLLM and llama.cpp that are taken where they ask for what happens anyway. Those of a sampler
    that is off say nothing, and whether a prompt is cached never changes an answer."""

    store: NotTrue = None
    service_tier: Annotated[Any, unsupported("auto", "default")] = None
    verbosity: Annotated[Any, unsupported("medium")] = None
    prompt_cache_retention: Unused = None
    prompt_cache_options: Unused = None
    moderation: Unsupported = None

    use_beam_search: NotTrue = None
    length_penalty: NotOne = None
    early_stopping: NotTrue = None
    include_stop_str_in_output: NotTrue = None
    spaces_between_special_tokens: bool | None = None  # only tokenizers without a tokenizer.json have them
    allowed_token_ids: Unsupported = None
    bad_words: NotEmpty = None
    logits_processors: NotEmpty = None
    priority: Off = None
    cache_salt: Unsupported = None
    kv_transfer_params: NotEmpty = None
    vllm_xargs: NotEmpty = None
    mm_processor_kwargs: NotEmpty = None
    media_io_kwargs: NotEmpty = None
    return_token_ids: NotTrue = None
    return_token_offsets: NotTrue = None
    return_prompt_text: NotTrue = None
    include_reasoning: NotFalse = None
    thinking_token_budget: Unsupported = None
    truncation_side: Annotated[Any, unsupported("left")] = None
    logprob_token_ids: Unsupported = None
    repetition_detection: Unsupported = None
    watermarking: NotTrue = None
    ec_transfer_params: NotEmpty = None
    stream_interval: NotOne = None
    routed_experts_prompt_start: Off = None
    request_id: Unused = None
    session_id: Unused = None

    cache_prompt: bool | None = None
    samplers: Annotated[Any, unsupported(LLAMA_CPP_SAMPLERS)] = None
    repeat_last_n: Annotated[Any, unsupported(64, -1)] = None
    typical_p: NotOne = None
    typ_p: NotOne = None
    tfs_z: NotOne = None
    top_n_sigma: Annotated[Any, unsupported(-1, 0)] = None
    mirostat: Off = None
    mirostat_tau: Unused = None
    mirostat_eta: Unused = None
    adaptive_target: Annotated[Any, unsupported(-1)] = None
    adaptive_decay: Unused = None
    dynatemp_range: Off = None
    dynatemp_exponent: Unused = None
    dry_multiplier: Off = None
    dry_base: Unused = None
    dry_allowed_length: Unused = None
    dry_penalty_last_n: Unused = None
    dry_sequence_breakers: Unused = None
    xtc_probability: Off = None
    xtc_threshold: Unused = None
    min_keep: Annotated[Any, unsupported(0, 1)] = None
    n_probs: Off = None
    n_cmpl: NotOne = None
    n_cache_reuse: Unused = None
    n_keep: Unused = None  # of a prompt that is shifted out of the context; none is
    n_discard: Unused = None
    n_indent: Off = None
    t_max_predict_ms: Annotated[Any, unsupported(0, -1)] = None
    id_slot: NotMinusOne = None
    slot_id: NotMinusOne = None
    lora: NotEmpty = None
    image_data: NotEmpty = None
    response_fields: NotEmpty = None
    return_tokens: NotTrue = None
    return_progress: NotTrue = None
    post_sampling_probs: NotTrue = None
    timings_per_token: NotTrue = None
    backend_sampling: Unused = None  # where tokens are drawn
    grammar_lazy: NotTrue = None
    grammar_triggers: NotEmpty = None
    preserved_tokens: NotEmpty = None
    reasoning_format: Annotated[Any, unsupported("auto", "deepseek")] = None
    reasoning_in_content: NotTrue = None
    reasoning_budget_tokens: NotMinusOne = None
    thinking_forced_open: NotTrue = None
    parse_tool_calls: NotFalse = None

    @model_validator(mode="before")
    @classmethod
    def _without_speculation(cls, data: Any) -> Any:
        """llama.cpp's speculative.n_max and the like: how tokens are guessed changes none."""
        return {name: value for name, value in data.items() if not name.startswith("speculative.")} \
            if isinstance(data, dict) else data


class SamplingBody(ForeignBody):
    """What both OpenAI endpoints share. `user`, `metadata` and the other labels that OpenAI keeps with a request are
    accepted and not used. top_k -1 is off, as in vLLM; max_tokens and n_predict -1 are as many as fit, as in llama.cpp,
    whose names grammar and json_schema are."""

    model: Text | None = None
    n: int | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    max_new_tokens: Annotated[int, Field(ge=0)] | None = None
    n_predict: Annotated[int, Field(ge=-2)] | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    repeat_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: LogitBias | None = None
    seed: Seed | None = None
    stop: Stop | None = None
    stop_token_ids: Annotated[list[TokenId], Field(fail_fast=True)] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    return_tokens_as_token_ids: bool | None = None
    return_receipt: bool | None = None
    prompt_logprobs: TopLogprobs | None = None
    truncate_prompt_tokens: Annotated[int, AfterValidator(_prompt_length)] | None = None
    user: Text | None = None
    metadata: dict[Text, Text] | None = None
    safety_identifier: Text | None = None
    prompt_cache_key: Text | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | None = None
    guided_regex: Text | None = None
    guided_choice: Choices | None = None
    guided_grammar: Text | None = None
    grammar: Text | None = None
    json_schema: Schema | None = None
    guided_decoding_backend: Unused = None  # every grammar is enforced
    guided_whitespace_pattern: Unsupported = None


class CompletionRequest(SamplingBody):
    prompt: Prompt
    echo: bool | None = None
    logprobs: TopLogprobs | None = None
    best_of: int | None = None
    suffix: Text | None = None
    prompt_embeds: NotEmpty = None


class TextPart(Body):
    """In the words of /v1/responses too. cache_control, prompt_cache_breakpoint: every prompt is cached."""

    type: Literal["text", "input_text", "output_text"]
    text: Text
    annotations: Unused = None
    logprobs: Unused = None
    cache_control: Unused = None
    prompt_cache_breakpoint: Unused = None

    @model_validator(mode="before")
    @classmethod
    def _named(cls, data: Any) -> Any:
        return {"type": "text", "text": data} if isinstance(data, str) else data


def refuse_kind(kind: str) -> str:
    shown = kind.encode("utf-8", "backslashreplace").decode()  # an error with a lone surrogate has no text
    raise PydanticCustomError("not_supported", "{kind} is not supported by this server", {"kind": shown})


def _function_kind(kind: str) -> str:
    return kind if kind == "function" else refuse_kind(kind)


class OtherPart(Body):
    """An image, a sound, a file, a call of a tool that runs elsewhere: named, so that it can be refused by its name."""

    model_config = ConfigDict(extra="ignore")
    type: Annotated[str, AfterValidator(refuse_kind)]


def _part_kind(part: Any) -> str:
    other = isinstance(part, dict) and "type" in part and part["type"] not in ("text", "input_text", "output_text")
    return "<other>" if other else "<text>"


ContentPart = Annotated[Annotated[TextPart, Tag("<text>")] | Annotated[OtherPart, Tag("<other>")],
                        Discriminator(_part_kind)]
Parts = "<a list of text parts>"
Content = Annotated[
    Annotated[Text, Tag("<a string>")] | Annotated[list[ContentPart], Field(fail_fast=True), Tag(Parts)],
    variant(str="<a string>", list=Parts, list_dict=Parts, list_str=Parts),
]


Arguments = Annotated[  # JSON, or what it says
    Annotated[Text, Tag("<a string>")] | Annotated[dict[str, Any], Tag("<an object>")],
    variant(str="<a string>", dict="<an object>"),
]


class FunctionCall(Body):
    name: Text
    arguments: Arguments = ""
    parsed_arguments: Unused = None


class ToolCall(Body):
    id: Text = ""
    type: Annotated[Text, AfterValidator(_function_kind)] = "function"
    function: FunctionCall
    index: Unused = None
    provider_specific_fields: Unused = None
    extra_content: Unused = None


class Turn(Body):
    """What messages of all roles may have. An earlier answer can be sent back as clients keep it: annotations say where
    a text comes from, parsed and reasoning_details have once more what stands beside them."""

    name: Text | None = None
    type: Annotated[Any, unsupported("message", "text")] = None
    id: Unused = None
    status: Annotated[Any, unsupported("completed")] = None
    annotations: Unused = None
    cache_control: Unused = None
    provider_specific_fields: Unused = None
    extra_content: Unused = None
    parsed: Unused = None
    reasoning_details: Unused = None
    thinking_blocks: Unused = None
    finish_reason: Unused = None
    prefix: NotTrue = None
    refusal: NotEmpty = None
    audio: Unsupported = None
    images: NotEmpty = None
    function_call: Unsupported = None


class ChatMessage(Turn):
    role: Literal["system", "developer", "user"]
    content: Content
    tool_call_id: NotEmpty = None
    tool_calls: NotEmpty = None


class ToolTurn(Turn):
    """What a call returned, which may be nothing."""

    role: Literal["tool"]
    content: Content = ""
    tool_call_id: Text = ""
    tool_calls: NotEmpty = None
    is_error: Unused = None


class AssistantTurn(Turn):
    """An earlier answer. reasoning: vLLM's name for reasoning_content."""

    role: Literal["assistant"]
    content: Content | None = None
    reasoning_content: Text | None = None
    reasoning: Text | None = None
    tool_calls: list[ToolCall] | None = None


def _role_kind(message: Any) -> str:
    role = message.get("role") if isinstance(message, dict) else None
    return f"<{role}>" if role in ("assistant", "tool") else "<message>"


Message = Annotated[
    Annotated[ChatMessage, Tag("<message>")] | Annotated[AssistantTurn, Tag("<assistant>")]
    | Annotated[ToolTurn, Tag("<tool>")],
    Discriminator(_role_kind),
]
Messages = Annotated[list[Message], Field(min_length=1, fail_fast=True)]


class Function(Body):
    """strict: a call's arguments match the schema. returns: as transformers describes a Python function."""

    name: Text
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    returns: Annotated[Unused, Field(alias="return")] = None


class Tool(Body):
    """given: as the client wrote it, which is how chat templates show it to the model."""

    type: Annotated[Text, AfterValidator(_function_kind)] = "function"
    function: Function
    cache_control: Unused = None
    _given: dict[str, Any] = PrivateAttr(default_factory=dict)

    @model_validator(mode="wrap")
    @classmethod
    def _keep(cls, data: Any, handler: ModelWrapValidatorHandler[Tool]) -> Tool:
        tool = handler(data)
        tool._given = {"type": "function", **without_nulls(data)}
        return tool

    @property
    def given(self) -> dict[str, Any]:
        return self._given


class FunctionName(Body):
    name: Text


class AllowedTools(Body):
    """The functions that may be called, each by its name alone or as an object that has it."""

    mode: Literal["auto", "required"]
    tools: list[dict[str, Any]]


CHOICE_WORDS = ("none", "auto", "required", "any")


def _choice_kind(kind: str) -> str:
    return kind if kind in (*CHOICE_WORDS, "function", "allowed_tools") else refuse_kind(kind)


class ToolChoiceObject(Body):
    """One function, or some: in the shape of chat completions, or in that of /v1/responses. Or a word."""

    type: Annotated[Text, AfterValidator(_choice_kind)]
    function: FunctionName | None = None
    name: Text | None = None
    allowed_tools: AllowedTools | None = None
    mode: Literal["auto", "required"] | None = None
    tools: list[dict[str, Any]] | None = None


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required", "any"], Tag("<none, auto, required>")]
    | Annotated[ToolChoiceObject, Tag("<an object that names a function>")],
    variant(str="<none, auto, required>", dict="<an object that names a function>"),
]
ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class Prediction(Body):
    """What the answer may resemble."""

    type: Literal["content"]
    content: Text | Annotated[list[TextPart], Field(fail_fast=True)]

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatCompletionRequest(SamplingBody):
    messages: Messages
    logprobs: bool | None = None
    top_logprobs: TopLogprobs | None = None
    chat_template_kwargs: dict[Text, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    functions: NotEmpty = None
    function_call: Annotated[Any, unsupported("none")] = None
    modalities: Annotated[Any, unsupported(["text"])] = None
    audio: Unsupported = None
    prediction: Prediction | None = None
    reasoning_effort: ReasoningEffort | None = None
    include_reasoning: bool | None = None
    web_search_options: Unsupported = None
    best_of: NotOne = None
    echo: NotTrue = None
    documents: NotEmpty = None
    chat_template: Unsupported = None


class GenerateGrammar(Body):
    type: Literal["json", "regex"]
    value: Schema


class GenerateParameters(Body):
    """TGI's names. Greedy unless do_sample, temperature, top_k, top_p or min_p is given."""

    do_sample: bool | None = None
    max_new_tokens: Annotated[int, Field(ge=0)] | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: Seed | None = None
    stop: Annotated[list[Text], Field(fail_fast=True)] | None = None
    truncate: Annotated[int, Field(ge=1)] | None = None
    return_full_text: bool | None = None
    details: bool | None = None
    decoder_input_details: bool | None = None
    top_n_tokens: TopLogprobs | None = None
    best_of: Annotated[int, Field(ge=1, le=MAX_N)] | None = None
    typical_p: NotOne = None
    watermark: NotTrue = None
    grammar: GenerateGrammar | None = None
    adapter_id: Text | None = None


class GenerateRequest(Body):
    inputs: Text
    stream: bool | None = None
    parameters: GenerateParameters | None = None


class TokenizeRequest(Body):
    """Either a prompt or, for a model with a chat template, messages."""

    model: Text | None = None
    prompt: Text | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[Text, Any] | None = None
    return_token_strs: bool | None = None


class EmbeddingRequest(Body):
    """truncate_prompt_tokens, add_special_tokens, priority, normalize: vLLM's."""

    model: Text | None = None
    input: Prompt
    dimensions: int | None = None
    encoding_format: Literal["float", "base64"] | None = None
    truncate_prompt_tokens: Annotated[int, AfterValidator(_prompt_length)] | None = None
    add_special_tokens: bool | None = None
    normalize: NotFalse = None
    use_activation: NotFalse = None
    embed_dtype: Annotated[Any, unsupported("float32")] = None
    endianness: Annotated[Any, unsupported("native", "little")] = None
    mm_processor_kwargs: NotEmpty = None
    priority: Off = None
    cache_salt: Unsupported = None
    user: Text | None = None
    metadata: dict[Text, Text] | None = None
    safety_identifier: Text | None = None


class ScoreBody(Body):
    """vLLM's fields beside the texts. activation is a classifier's."""

    model: Text | None = None
    truncate_prompt_tokens: Annotated[int, AfterValidator(_prompt_length)] | None = None
    add_special_tokens: bool | None = None
    activation: NotFalse = None
    use_activation: NotFalse = None
    mm_processor_kwargs: NotEmpty = None
    priority: Off = None
    cache_salt: Unsupported = None
    user: Text | None = None
    request_id: Unused = None


Texts = Annotated[
    Annotated[Text, Tag("<a string>")]
    | Annotated[list[Text], Field(min_length=1, fail_fast=True), Tag("<a list of strings>")],
    variant(str="<a string>", list="<a list of strings>", list_str="<a list of strings>"),
]


class ScoreRequest(ScoreBody):
    """queries and documents are other names for text_1 and text_2."""

    text_1: Texts | None = None
    text_2: Texts | None = None
    queries: Texts | None = None
    documents: Texts | None = None


class RerankDocument(Body):
    text: Text


class RerankRequest(ScoreBody):
    """top_n 0: all of them."""

    query: Text
    documents: Annotated[list[Annotated[
        Annotated[Text, Tag("<a string>")] | Annotated[RerankDocument, Tag("<an object with a text>")],
        variant(str="<a string>", dict="<an object with a text>"),
    ]], Field(min_length=1, fail_fast=True)]
    top_n: Annotated[int, Field(ge=0)] | None = None
    return_documents: bool | None = None
    max_tokens_per_doc: Unsupported = None
    max_chunks_per_doc: Unsupported = None


class DetokenizeRequest(Body):
    model: Text | None = None
    tokens: Annotated[list[TokenId], Field(fail_fast=True)]
    skip_special_tokens: bool | None = None


Absent = Field(default=None, exclude_if=lambda value: value is None)


class ErrorInfo(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    error: ErrorInfo


class PromptTokensDetails(BaseModel):
    """disk_cached_tokens: of those cached, how many came from disk."""

    cached_tokens: int
    disk_cached_tokens: int


class CompletionTokensDetails(BaseModel):
    """Tokens of the request's prediction that were tried: those that the answer has, and the others, which are no part
    of completion_tokens."""

    accepted_prediction_tokens: int
    rejected_prediction_tokens: int


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails


class Embedding(BaseModel):
    """embedding: numbers, or in base64 the bytes of little-endian float32."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingUsage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class EmbeddingResponse(BaseModel):
    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


class Score(BaseModel):
    index: int
    object: Literal["score"] = "score"
    score: float


class ScoreResponse(BaseModel):
    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[Score]
    usage: EmbeddingUsage


class RankedDocument(BaseModel):
    """index: among the documents of the request."""

    index: int
    relevance_score: float
    document: RerankDocument | None = Absent


class RerankResponse(BaseModel):
    id: str
    model: str
    results: list[RankedDocument]
    usage: EmbeddingUsage


class CompletionLogprobs(BaseModel):
    """Parallel lists, an entry a token. The first prompt token has no probability."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class PromptLogprob(BaseModel):
    """rank: 1 for the likeliest; null where it is not among those asked for."""

    logprob: float
    rank: int | None
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]  # by token id; null for the first token, which follows nothing


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None
    prompt_logprobs: PromptLogprobs | None = None


class CompletionResponse(BaseModel):
    """A whole completion, or one chunk of a stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str = FINGERPRINT
    choices: list[CompletionChoice]
    usage: Usage | None
    receipt: dict[str, Any] | None = Absent


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[TokenLogprob]


ChatFinishReason = Literal["stop", "length", "tool_calls"]


class FunctionCallOut(BaseModel):
    name: str
    arguments: str


class ToolCallOut(BaseModel):
    id: str
    type: Literal["function"] = "function"
    function: FunctionCallOut


class AssistantMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str | None
    reasoning_content: str | None = Absent
    tool_calls: list[ToolCallOut] | None = Absent


class ChatChoice(BaseModel):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinishReason | None


class ChatCompletionResponse(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str = FINGERPRINT
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: PromptLogprobs | None
    receipt: dict[str, Any] | None = Absent


class FunctionCallDelta(BaseModel):
    name: str | None = Absent
    arguments: str


class ToolCallDelta(BaseModel):
    """id, type and name come with a call's first delta."""

    index: int
    id: str | None = Absent
    type: Literal["function"] | None = Absent
    function: FunctionCallDelta


class MessageDelta(BaseModel):
    role: Literal["assistant"] | None = Absent
    content: str | None = Absent
    reasoning_content: str | None = Absent
    tool_calls: list[ToolCallDelta] | None = Absent


class ChatChunkChoice(BaseModel):
    index: int
    delta: MessageDelta
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinishReason | None


class ChatCompletionChunk(BaseModel):
    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    system_fingerprint: str = FINGERPRINT
    choices: list[ChatChunkChoice]
    usage: Usage | None


class GenerateToken(BaseModel):
    id: int
    text: str
    logprob: float | None
    special: bool


class PrefillToken(BaseModel):
    id: int
    text: str
    logprob: float | None


class SequenceDetails(BaseModel):
    finish_reason: Literal["length", "eos_token", "stop_sequence"]
    generated_tokens: int
    seed: int | None
    prefill: list[PrefillToken]
    tokens: list[GenerateToken]
    top_tokens: list[list[GenerateToken]] | None


class BestOfSequence(SequenceDetails):
    generated_text: str


class GenerateDetails(SequenceDetails):
    """best_of_sequences: those that are not the best."""

    best_of_sequences: list[BestOfSequence] | None


class GenerateResponse(BaseModel):
    generated_text: str
    details: GenerateDetails | None


class StreamDetails(BaseModel):
    finish_reason: Literal["length", "eos_token", "stop_sequence"]
    generated_tokens: int
    input_length: int
    seed: int | None


class GenerateEvent(BaseModel):
    """One token; the last one carries the whole text and the details."""

    index: int
    token: GenerateToken
    top_tokens: list[GenerateToken]
    generated_text: str | None
    details: StreamDetails | None


class LoadAdapterRequest(Body):
    lora_name: Annotated[Text, Field(min_length=1, max_length=256)]
    lora_path: Annotated[Text, Field(min_length=1)]
    load_inplace: NotTrue = None
    is_3d_lora_weight: NotTrue = None


class UnloadAdapterRequest(Body):
    lora_name: Text
    lora_int_id: Unused = None


class ModelInfo(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    max_model_len: int
    parent: str | None = None  # of an adapter


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelInfo]


class TokenizeResponse(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeResponse(BaseModel):
    prompt: str


class Status(BaseModel):
    status: str


class Version(BaseModel):
    version: str


class Info(BaseModel):
    """Ours, and under model_id to max_client_batch_size what clients of text-generation-inference look for."""

    version: str
    model: dict[str, Any]
    engine: dict[str, Any]
    kernels: dict[str, str]
    layers: list[dict[str, Any]]
    model_id: str
    model_sha: str | None
    model_dtype: str | None
    model_device_type: str
    model_pipeline_tag: str
    max_concurrent_requests: int
    max_best_of: int
    max_stop_sequences: int
    max_input_length: int
    max_input_tokens: int
    max_total_tokens: int
    max_batch_total_tokens: int
    max_batch_prefill_tokens: int
    max_client_batch_size: int

"""From a request body to token ids and SamplingParams, for what needs the model to decide."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from itertools import takewhile
from typing import Any, TypeVar

from fptq_runtime.engine.request import SamplingParams
from fptq_runtime.errors import FptqError
from fptq_runtime.models.chat_template import ChatTemplateError
from fptq_runtime.models.tokenizer import Tokenizer
from fptq_server.config import ModelCard, ServerConfig
from fptq_server.errors import APIError, bad_parameter
from fptq_server.protocol import ChatCompletionRequest, CompletionRequest, SamplingBody, TokenizeRequest
from fptq_server.protocol_responses import ResponsesRequest

MAX_CHARACTERS_PER_TOKEN = 64  # of a prompt: far above what text needs, and tokenizing stays quick
RENDER_SECONDS = 9.0  # for a conversation's place among those that wait for the template, and its rendering
FINAL_TAG = "CONTINUE_FINAL_MESSAGE_TAG "  # marks the end of the last message; as in transformers
INLINE_SIZE = 4096  # characters or tokens that the tokenizer has done in about a millisecond

TGI_NAMES = ("tgi", "dummy")  # what clients of text-generation-inference send, whose servers have one model
T = TypeVar("T")

SAME_NAME = ("n", "min_tokens", "temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty",
             "frequency_penalty", "ignore_eos", "skip_special_tokens")


def check_model(name: str | None, model: ModelCard) -> str:
    """The adapter that a request's model names; "" is none."""
    if name in model.adapters:
        return name or ""
    if name is not None and name not in (model.id, *model.aliases, *TGI_NAMES):
        raise APIError(404, f"the model {name} does not exist; this server has "
                            f"{', '.join((model.id, *model.adapters))}", param="model", code="model_not_found")
    return ""


def check_text(text: str, param: str, model: ModelCard) -> str:
    """Refuses, before it is tokenized, text that cannot fit the context."""
    if len(text) > MAX_CHARACTERS_PER_TOKEN * model.max_model_len:
        raise too_long(f"your {param} resulted in {len(text)} characters, more than those tokens hold", param, model)
    return text


def too_long(why: str, param: str, model: ModelCard) -> APIError:
    """In the words by which clients know that a conversation must be cut."""
    return APIError(400, f"This model's maximum context length is {model.max_model_len} tokens. However, {why}.",
                    param=param, code="context_length_exceeded")


async def tokenizing(size: int, work: Callable[[], T]) -> T:
    """Run the tokenizer, on a thread where there is much to do: it lets go of the GIL, and others' tokens flow."""
    return work() if size <= INLINE_SIZE else await asyncio.to_thread(work)


async def completion_prompts(body: CompletionRequest, tokenizer: Tokenizer, model: ModelCard,
                             max_prompts: int) -> tuple[list[list[int]], list[str]]:
    """Token ids of every prompt of the request, and what `echo` puts before each completion: the client's own text, or
    what its token ids say."""
    given: list[Any] = [body.prompt] if isinstance(body.prompt, str) or isinstance(body.prompt[0], int) \
        else list(body.prompt)
    if len(given) > max_prompts:
        raise APIError(400, f"prompt has {len(given)} prompts; at most {max_prompts} are taken", param="prompt")
    special = body.add_special_tokens is not False
    if body.suffix:
        given = [_infill(prompt, body, tokenizer) for prompt in given]
    size = sum(len(check_text(prompt, "prompt", model)) for prompt in given if isinstance(prompt, str))
    prompts = await tokenizing(size, lambda: [tokenizer.encode(prompt, special) if isinstance(prompt, str) else prompt
                                              for prompt in given])
    if not body.echo:
        return prompts, []
    skip = body.skip_special_tokens is not False
    return prompts, [prompt if isinstance(prompt, str) else tokenizer.decode(prompt, skip) for prompt in given]


def _infill(prompt: Any, body: CompletionRequest, tokenizer: Tokenizer) -> str:
    if not isinstance(prompt, str) or body.echo:
        raise APIError(400, "suffix needs a prompt of text, and no echo", param="suffix")
    text = tokenizer.infill(prompt, body.suffix or "")
    if text is None:
        raise APIError(400, "suffix is not supported by this model, whose tokenizer has no fill-in-the-middle tokens",
                       param="suffix", code="not_supported")
    return text


async def chat_prompt(messages: list[dict[str, Any]], tokenizer: Tokenizer, model: ModelCard,
                      add_generation_prompt: bool = True, variables: Mapping[str, Any] | None = None,
                      continue_final: bool = False) -> list[int]:
    """Token ids of a conversation, whose messages are as the chat template takes them. Raises APIError where the model
    has no chat template or it refuses the messages.

    continue_final: they end where the last message does, for the answer to go on with it."""
    check_text("".join(message["content"] for message in messages), "messages", model)
    if continue_final:
        messages = [*messages[:-1], {**messages[-1], "content": messages[-1]["content"] + FINAL_TAG}]
    try:
        text = await asyncio.wait_for(asyncio.wrap_future(
            tokenizer.render_chat(messages, add_generation_prompt, **(variables or {}))), RENDER_SECONDS)
    except ChatTemplateError as error:
        raise APIError(400, str(error), param="messages", code="chat_template") from None
    except asyncio.TimeoutError:
        raise APIError(429, f"the chat template had no time for these messages within {RENDER_SECONDS:g} s; try again "
                            "later", reason="queue_full", param="messages", code="chat_template",
                       retry_after=RENDER_SECONDS) from None
    if continue_final:
        text, found, rest = text.rpartition(FINAL_TAG.rstrip())
        if not found:
            raise APIError(400, "continue_final_message: the chat template leaves the final message out",
                           param="continue_final_message", code="chat_template")
        text = text if rest.startswith(" ") else text.rstrip()  # the template trims what a message ends with
    if len(text) > MAX_CHARACTERS_PER_TOKEN * model.max_model_len:
        raise too_long(f"the chat template makes {len(text)} characters of your messages, more than those tokens hold",
                       "messages", model)
    try:
        return await tokenizing(len(text), lambda: tokenizer.encode(text, add_special_tokens=False))
    except FptqError as error:  # lone surrogates in a variable
        raise APIError(400, f"chat_template_kwargs: {error}", param="chat_template_kwargs") from None


async def prediction_tokens(body: ChatCompletionRequest, tokenizer: Tokenizer, model: ModelCard) -> tuple[int, ...]:
    """As many as the context holds, up to the first that the model lacks."""
    if body.prediction is None:
        return ()
    text = body.prediction.text[: MAX_CHARACTERS_PER_TOKEN * model.max_model_len]
    tokens = await tokenizing(len(text), lambda: tokenizer.encode(text, add_special_tokens=False))
    return tuple(takewhile(lambda token_id: token_id < model.vocab_size, tokens[: model.max_model_len]))


def continues(body: ChatCompletionRequest | TokenizeRequest) -> tuple[bool, bool]:
    """Whether the prompt ends with what begins an answer, and whether it ends within the last message."""
    if body.add_generation_prompt and body.continue_final_message:
        raise APIError(400, "add_generation_prompt and continue_final_message exclude each other",
                       param="continue_final_message")
    within = bool(body.continue_final_message)
    return body.add_generation_prompt is not False and not within, within


async def template_variables(body: ChatCompletionRequest | TokenizeRequest, tokenizer: Tokenizer, config: ServerConfig
                             ) -> dict[str, Any]:
    """What the request, and otherwise the server, tells the chat template beside the messages. What it does not read is
    refused, unless it asks for nothing: false, or empty."""
    given = {name: value for name, value in (body.chat_template_kwargs or {}).items() if value is not None}
    if not given:
        return dict(config.chat_template_kwargs)
    try:
        read = await asyncio.to_thread(lambda: tokenizer.template_variables)
    except ChatTemplateError as error:
        raise APIError(400, str(error), param="messages", code="chat_template") from None
    for name, value in given.items():
        if value and name not in read:
            raise APIError(400, f"chat_template_kwargs.{name} is nothing that this model's chat template reads; it "
                                f"reads {', '.join(sorted(read)) or 'no such variables'}",
                           param=f"chat_template_kwargs.{name}", code="not_supported")
    return {**config.chat_template_kwargs, **{name: value for name, value in given.items() if name in read}}


def check_length(prompt: list[int], max_tokens: int, param: str, model: ModelCard) -> None:
    """A prompt must leave room for a token, where one is to be generated; max_tokens beyond the context is an upper
    bound that is not reached."""
    if not prompt:
        raise APIError(400, f"{param} is empty", param=param)
    if len(prompt) + min(max_tokens, 1) > model.max_model_len:
        cut = "truncate" if param == "inputs" else "truncate_prompt_tokens"
        raise too_long(f"your {param} resulted in {len(prompt)} tokens, and the context must hold the answer too; "
                       f"shorten the {param}, or have {cut} leave their end", param, model)


def one_of(**names: T | None) -> T | None:
    """What was given under one of several names for one thing; load generators send some under two."""
    given = [(name, value) for name, value in names.items() if value is not None]
    for name, value in given:
        if value != given[0][1]:
            raise APIError(400, f"{given[0][0]} is {given[0][1]} and {name} is {value}; give one of them", param=name)
    return given[0][1] if given else None


def truncated(prompt: list[int], length: int | None, max_tokens: int, model: ModelCard) -> list[int]:
    """The end of a prompt, as many tokens as truncate_prompt_tokens says; -1: what leaves room for max_tokens, or for a
    token where so many never fit."""
    if length is None:
        return prompt
    if length == -1:
        length = model.max_model_len - (max_tokens if max_tokens < model.max_model_len else 1)
    return prompt[-length:]


def max_tokens_of(body: SamplingBody, default: int, model: ModelCard) -> int:
    """OpenAI renamed max_tokens, others have their own name for it. -1: as many as fit. default: where the model has
    none of its own."""
    default = model.sampling.get("max_tokens", default)
    n_predict = model.max_model_len if (body.n_predict or 0) < 0 else body.n_predict
    max_tokens = model.max_model_len if body.max_tokens == -1 else body.max_tokens
    asked = one_of(max_tokens=max_tokens, max_completion_tokens=body.max_completion_tokens,
                   max_new_tokens=body.max_new_tokens, n_predict=n_predict)
    if asked is None and (body.min_tokens or 0) > default:
        raise APIError(400, f"min_tokens is {body.min_tokens}; max_tokens, which was not given, is {default}",
                       param="min_tokens")
    return default if asked is None else asked


def sampling_params(body: SamplingBody, model: ModelCard, max_tokens: int, **fields: Any) -> SamplingParams:
    """The engine's parameters; `fields` are those that each endpoint reads in its own way."""
    fields = {**model.sampling, **fields, "max_tokens": max_tokens, **sampling_fields(body)}
    penalty = one_of(repetition_penalty=body.repetition_penalty, repeat_penalty=body.repeat_penalty)
    if penalty is not None:
        fields["repetition_penalty"] = penalty
    if body.stop_token_ids is not None:
        fields["stop_token_ids"] = tuple(body.stop_token_ids)
    return make_params(**fields)


def sampling_fields(body: SamplingBody | ResponsesRequest) -> dict[str, Any]:
    """What a body says of sampling under names that all of them have, in the engine's words."""
    fields = {name: value for name in SAME_NAME if (value := getattr(body, name, None)) is not None}
    if body.top_k is not None:
        fields["top_k"] = 0 if body.top_k == -1 else body.top_k
    if body.stop is not None:
        fields["stop"] = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop)
    if body.logit_bias is not None:
        fields["logit_bias"] = {int(token): bias for token, bias in body.logit_bias.items()}
    return {**fields, "seed": fold_seed(body.seed)}


def fold_seed(seed: int | None) -> int | None:
    """OpenAI's seeds are signed, the engine's are not."""
    return None if seed is None else seed % (1 << 63)


def make_params(**fields: Any) -> SamplingParams:
    try:
        return SamplingParams(**fields)
    except FptqError as error:
        raise bad_parameter(error) from None


def check_prompt_logprobs(body: SamplingBody) -> None:
    if body.stream and body.prompt_logprobs is not None:
        raise APIError(400, "prompt_logprobs are not supported in a stream", param="prompt_logprobs",
                       code="not_supported")


def check_receipt(body: SamplingBody) -> None:
    if body.stream and body.return_receipt:
        raise APIError(400, "return_receipt is not supported in a stream", param="return_receipt", code="not_supported")


def stream_usage(body: SamplingBody) -> tuple[bool, bool]:
    """Whether a stream ends with its usage, and whether every chunk has it so far."""
    options = body.stream_options
    if options is None:
        return False, False
    asked = bool(options.include_usage), bool(options.continuous_usage_stats)
    if any(asked) and not body.stream:
        raise APIError(400, "stream_options needs stream to be true", param="stream_options")
    return asked

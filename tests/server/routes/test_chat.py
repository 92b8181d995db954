"""/v1/chat/completions through the openai SDK."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, get_args, get_type_hints

import httpx
import openai
import pytest
from anthropic.types import message_count_tokens_params, message_create_params
from openai.types import completion_create_params as text_create_params
from openai.types import embedding_create_params
from openai.types.chat import (
    ChatCompletionAssistantMessageParam,
    ChatCompletionMessage,
    ChatCompletionToolMessageParam,
    completion_create_params,
)
from openai.types.responses import response_create_params

import fptq_runtime
from fptq_runtime.models.chat_template import ChatTemplateError
from fptq_runtime.models.tokenizer import Tokenizer
from fptq_server.protocol import (
    AssistantTurn,
    Body,
    ChatCompletionRequest,
    CompletionRequest,
    EmbeddingRequest,
    ToolTurn,
)
from fptq_server.protocol_messages import CountTokensRequest, MessagesRequest
from fptq_server.protocol_responses import ResponsesRequest
from tests.server.conftest import EOS, Served

MESSAGES: list[Any] = [{"role": "system", "content": "You tell tales."}, {"role": "user", "content": "Of a king."}]
OPTIONS: dict[str, Any] = {"model": "demo", "messages": MESSAGES, "max_tokens": 10, "temperature": 0}


def test_sdk(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    answer = client.chat.completions.create(**OPTIONS)
    assert answer.object == "chat.completion"
    assert answer.system_fingerprint == f"fptq-{fptq_runtime.__version__}"
    [choice] = answer.choices
    assert choice.message.role == "assistant"
    assert choice.finish_reason == "length"
    assert answer.usage is not None
    # The demo's template writes BOS itself; were it added again, the prompt would have a token more.
    rendered = "You tell tales.\n\nOf a king.\n\n"
    assert answer.usage.prompt_tokens == len(tokenizer.encode(rendered))
    plain = client.completions.create(model="demo", prompt=rendered, max_tokens=10, temperature=0)
    assert plain.choices[0].text == choice.message.content


@pytest.mark.parametrize("options", [{}, {"temperature": 1, "seed": 4, "n": 2}, {"logprobs": True, "top_logprobs": 2},
                                     {"logprobs": True}], ids=str)
def test_streaming(client: openai.OpenAI, options: dict[str, Any]) -> None:
    body: Any = OPTIONS | options
    whole = client.chat.completions.create(**body)
    chunks = list(client.chat.completions.create(**body, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    for expected in whole.choices:
        pieces = [chunk.choices[0] for chunk in chunks[:-1] if chunk.choices[0].index == expected.index]
        assert pieces[0].delta.role == "assistant"
        assert pieces[0].delta.content == ""
        assert len(pieces) == 1 + 10, "the role, then one chunk a token"
        assert "".join(piece.delta.content or "" for piece in pieces) == expected.message.content
        assert [piece.finish_reason for piece in pieces] == [None] * 10 + ["length"]
        streamed = [entry.token for piece in pieces if piece.logprobs for entry in piece.logprobs.content or []]
        assert streamed == [entry.token for entry in (expected.logprobs.content or [] if expected.logprobs else [])]


@pytest.mark.parametrize("parts", [False, True])
def test_a_prediction_changes_nothing_but_what_usage_says_of_it(client: openai.OpenAI, parts: bool) -> None:
    options: Any = OPTIONS | {"max_tokens": 60, "logprobs": True}
    plain = client.chat.completions.create(**options)
    text = plain.choices[0].message.content or ""
    content: Any = [{"type": "text", "text": text[:10]}, {"type": "text", "text": text[10:]}] if parts else text
    predicted = client.chat.completions.create(**options, prediction={"type": "content", "content": content})
    assert predicted.choices == plain.choices
    assert plain.usage is not None
    assert predicted.usage is not None
    before, details = plain.usage.completion_tokens_details, predicted.usage.completion_tokens_details
    assert before is not None
    assert details is not None
    assert (before.accepted_prediction_tokens, before.rejected_prediction_tokens) == (0, 0)
    assert details.accepted_prediction_tokens is not None
    assert 0 <= details.accepted_prediction_tokens < predicted.usage.completion_tokens


def test_async_sdk(served: Served) -> None:
    async def run() -> tuple[str | None, str]:
        async with openai.AsyncOpenAI(base_url=served.url + "/v1", api_key="none") as client:
            whole = await client.chat.completions.create(**OPTIONS)
            stream = await client.chat.completions.create(**OPTIONS, stream=True)
            return whole.choices[0].message.content, "".join([c.choices[0].delta.content or "" async for c in stream])

    whole, streamed = asyncio.run(run())
    assert whole == streamed


def test_logprobs(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(**OPTIONS, logprobs=True, top_logprobs=3)
    assert answer.choices[0].logprobs is not None
    entries = answer.choices[0].logprobs.content or []
    assert len(entries) == 10
    for entry in entries:
        assert entry.bytes == list(entry.token.encode())
        values = [top.logprob for top in entry.top_logprobs]
        assert values == sorted(values, reverse=True)
        assert (entry.top_logprobs[0].token, entry.top_logprobs[0].logprob) == (entry.token, entry.logprob)


def test_logprobs_have_the_bytes_of_every_token(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    """Of a part of a character and of a special token too."""
    part = tokenizer.encode("🙂")[1]
    for token_id, name, raw in ((part, "bytes:\\xf0", b"\xf0"), (EOS, "</s>", b"</s>")):
        answer = client.chat.completions.create(**OPTIONS | {"max_tokens": 1, "logit_bias": {str(token_id): 100}},
                                                logprobs=True)
        [entry] = answer.choices[0].logprobs.content or [] if answer.choices[0].logprobs else []
        assert entry.bytes == list(tokenizer.token_bytes(token_id))
        assert (entry.token, bytes(entry.bytes or [])) == (name, raw)


def test_text_parts(client: openai.OpenAI) -> None:
    parts = [{"type": "text", "text": "You tell"}, {"type": "text", "text": "tales."}]
    whole = client.chat.completions.create(**OPTIONS | {"messages": [{"role": "user", "content": "You tell\ntales."}]})
    answer = client.chat.completions.create(**OPTIONS | {"messages": [{"role": "user", "content": parts}]})
    assert answer.choices[0].message.content == whole.choices[0].message.content


def test_max_completion_tokens_and_the_default(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="demo", messages=MESSAGES, max_completion_tokens=4)
    assert answer.usage is not None
    assert answer.usage.completion_tokens <= 4
    long = [{"role": "user", "content": "a king " * 500}]
    answer = client.chat.completions.create(model="demo", messages=long, extra_body={"ignore_eos": True})  # type: ignore[arg-type]
    assert answer.usage is not None
    assert answer.usage.total_tokens == 1024


@pytest.mark.parametrize(("extra", "param"), [
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"reasoning_effort": "high"}, "reasoning_effort"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"echo": True}, "echo"),
    ({"chat_template_kwargs": {"chat_template": "x"}}, "chat_template_kwargs.chat_template"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x/"}}]}]},
     "messages.0.content.0.type"),
    ({"messages": [{"role": "function", "content": "x"}]}, "messages.0.role"),
    ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]}, "messages.0.tool_calls.0.function"),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "user", "content": "king " * 2000}]}, "messages"),
], ids=str)
def test_refusals(served: Served, extra: dict[str, Any], param: str) -> None:
    response = served.http.post("/v1/chat/completions", json={"messages": MESSAGES} | extra)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
    assert param in response.json()["error"]["message"]


def test_prompt_logprobs_and_truncation(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    rendered = tokenizer.apply_chat_template(MESSAGES)
    extra = {"prompt_logprobs": 1, "truncate_prompt_tokens": 6}
    answer = client.chat.completions.create(**OPTIONS, extra_body=extra)
    plain = client.completions.create(model="demo", prompt=rendered[-6:], max_tokens=10, temperature=0,
                                      extra_body={"prompt_logprobs": 1})
    assert answer.choices[0].message.content == plain.choices[0].text
    known: Any = answer.prompt_logprobs  # type: ignore[attr-defined]
    assert known == plain.choices[0].prompt_logprobs  # type: ignore[attr-defined]
    assert [str(token_id) in (entry or {}) for token_id, entry in zip(rendered[-6:], known, strict=True)] == [
        False, *[True] * 5]


def test_a_conversation_that_is_too_long(client: openai.OpenAI) -> None:
    """In the words by which litellm, langchain and agents know that they must cut it."""
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(**OPTIONS | {"messages": [{"role": "user", "content": "king " * 2000}]})
    assert error.value.code == "context_length_exceeded"
    assert "This model's maximum context length is 1024 tokens. However, your messages resulted in " in str(error.value)


def test_harmless_fields(served: Served) -> None:
    fields = {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "modalities": ["text"],
              "parallel_tool_calls": True, "metadata": {}, "store": False, "functions": None, "logprobs": False,
              "top_logprobs": 0, "verbosity": "medium", "echo": False, "add_special_tokens": False, "documents": [],
              "reasoning_effort": "medium", "prompt_cache_options": {"mode": "implicit"}, "max_tokens": -1,
              # llama.cpp's
              "grammar": "", "grammar_lazy": False, "reasoning_format": "auto", "speculative.n_max": 16, "n_cmpl": 1,
              "backend_sampling": False, "parse_tool_calls": True, "adaptive_target": -1.0,
              # vLLM's
              "truncation_side": "left", "request_id": "x", "session_id": "x", "watermarking": False}
    response = served.http.post("/v1/chat/completions", json=OPTIONS | fields)
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(("fields", "body"), [
    ((completion_create_params.CompletionCreateParams,), ChatCompletionRequest),
    ((text_create_params.CompletionCreateParams,), CompletionRequest),
    ((embedding_create_params.EmbeddingCreateParams,), EmbeddingRequest),
    ((response_create_params.ResponseCreateParams,), ResponsesRequest),
    ((message_create_params.MessageCreateParams,), MessagesRequest),
    ((message_count_tokens_params.MessageCountTokensParams,), CountTokensRequest),
    ((ChatCompletionAssistantMessageParam, ChatCompletionMessage), AssistantTurn),
    ((ChatCompletionToolMessageParam,), ToolTurn),
], ids=lambda value: value.__name__ if isinstance(value, type) else "")
def test_every_field_that_the_sdks_have_is_known(fields: tuple[Any, ...], body: type[Body]) -> None:
    """Taken, or refused as what it is and not as a mistake of the client's."""
    known = {name for key, field in body.model_fields.items() for name in (key, field.alias)}
    theirs = {name for kind in fields for each in get_args(kind) or (kind,)
              for name in getattr(each, "model_fields", None) or get_type_hints(each)}
    assert theirs <= known


@pytest.mark.parametrize("form", [{"json_schema": {"enum": ["yes"]}}, {"grammar": 'root ::= "yes"'},
    {"response_format": {"type": "json", "value": {"enum": ["yes"]}}},
    {"response_format": {"type": "json_schema", "schema": {"enum": ["yes"]}}},
    {"response_format": {"type": "regex", "value": "yes"}},
], ids=str)
def test_forms_as_other_servers_name_them(served: Served, form: dict[str, Any]) -> None:
    response = served.http.post("/v1/chat/completions", json={"messages": MESSAGES, "max_tokens": 50} | form)
    assert response.json()["choices"][0]["message"]["content"].strip('"') == "yes"


def test_an_answer_is_sent_back_as_it_came(client: openai.OpenAI) -> None:
    """With every field that the SDK knows of a message, most of them null."""
    message = client.chat.completions.create(**OPTIONS).choices[0].message
    history = [*MESSAGES, message.model_dump(), {"role": "user", "content": "Go on."}]
    assert client.chat.completions.create(**OPTIONS | {"messages": history}).choices[0].message.content


@pytest.mark.parametrize("extra", [
    {"annotations": [], "refusal": None, "audio": None, "function_call": None, "tool_calls": []},
    {"type": "text"}, {"type": "message", "id": "msg_1", "status": "completed"}, {"nothing_we_know": None},
    {"cache_control": {"type": "ephemeral"}}, {"provider_specific_fields": {"refusal": None}, "images": []},
    {"content": [{"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}, "image_url": None}]},
    {"prefix": False, "name": None}, {"content": []}, {"content": ["x", "y"]}, {"parsed": {"a": 1}},
    {"content": [{"type": "output_text", "text": "x", "annotations": [], "logprobs": []}]},
    {"reasoning": "x", "reasoning_details": [{"type": "reasoning.text", "text": "x"}], "finish_reason": "stop"},
    {"reasoning_content": "x", "thinking_blocks": [{"type": "thinking", "thinking": "x"}], "extra_content": {"a": {}}},
], ids=str)
def test_messages_as_other_servers_and_clients_write_them(served: Served, extra: dict[str, Any]) -> None:
    messages = [*MESSAGES, {"role": "assistant", "content": "x"} | extra, MESSAGES[1]]
    response = served.http.post("/v1/chat/completions", json=OPTIONS | {"messages": messages})
    assert response.status_code == 200, response.text


def test_no_chat_template(run_server: Callable[..., Any], tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
                          ) -> None:
    monkeypatch.setattr(tokenizer, "_chat_template", None)
    with pytest.raises(ChatTemplateError):
        tokenizer.apply_chat_template(MESSAGES)
    with run_server() as served:
        response = served.http.post("/v1/chat/completions", json={"messages": MESSAGES})
        assert response.status_code == 400
        assert "no chat template" in response.json()["error"]["message"]


@pytest.mark.parametrize(("template", "said"), [
    ("{{ messages[0].content }}{% if messages[0].content == 'boom' %}{{ 'a' * 10 ** 9 }}{% endif %}", "needs more"),
    ("{{ messages[0].content }}{% if messages[0].content == 'boom' %}{{ 'a' * 10 ** 6 }}{% endif %}", "characters"),
])
def test_a_hostile_chat_template(run_server: Callable[..., Any], model_path: Path, tmp_path: Path, template: str,
                                 said: str) -> None:
    """One conversation sets it off; the others are answered."""
    path = Path(shutil.copytree(model_path, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors")))
    (path / "chat_template.jinja").write_text(template)

    def post(content: str) -> httpx.Response:
        return served.http.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": content}],
                                                              "max_tokens": 1})

    with run_server(tokenizer=Tokenizer(path)) as served, ThreadPoolExecutor(9) as pool:
        booms = [pool.submit(post, "boom") for _ in range(6)]
        assert [post("a king").status_code for _ in range(3)] == [200] * 3
        for boom in booms:
            error = boom.result().json()["error"]
            assert boom.result().status_code == 400
            assert error["param"] == "messages"
            assert "chat template" in error["message"]
            assert said in error["message"]

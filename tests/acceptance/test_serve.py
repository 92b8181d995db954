"""The HTTP API as its clients see it: the openai SDK, and plain requests, good and bad."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from typing import Any

import httpx
import openai
import pytest

import fptq_runtime
from tests.acceptance.conftest import API_KEY
from tests.acceptance.harness import Server, assert_fluent, events, wait_until

PROMPT = "Once upon a time there was a king who"
MESSAGES = [{"role": "user", "content": PROMPT}]
EOS = 1


@pytest.fixture(autouse=True)
def still_serving(server: Server) -> Any:
    """Whatever a test sent, the server answers the next client."""
    yield
    assert server.serves()


def test_completion(server: Server) -> None:
    answer = server.openai.completions.create(model="demo", prompt=PROMPT, max_tokens=60, temperature=0.7, seed=3,
                                              extra_body={"ignore_eos": True})
    assert answer.object == "text_completion"
    assert answer.model == "demo"
    [choice] = answer.choices
    assert_fluent(choice.text)
    assert choice.finish_reason == "length"
    assert choice.logprobs is None
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(server.tokens(PROMPT))
    assert answer.usage.completion_tokens == 60
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 60


def test_chat(server: Server) -> None:
    """The demo's template is BOS, then each message and a blank line. Were special tokens added twice, the prompt would
    be one token longer than the same text as a completion and the answer another."""
    options: dict[str, Any] = {"max_tokens": 40, "temperature": 0}
    chat = server.openai.chat.completions.create(model="demo", messages=MESSAGES, **options)  # type: ignore[call-overload]
    plain = server.openai.completions.create(model="demo", prompt=PROMPT + "\n\n", **options)
    assert chat.object == "chat.completion"
    assert chat.choices[0].message.role == "assistant"
    assert chat.usage.prompt_tokens == plain.usage.prompt_tokens  # type: ignore[union-attr]
    assert chat.choices[0].message.content == plain.choices[0].text
    assert chat.choices[0].finish_reason == plain.choices[0].finish_reason


def test_streaming_is_the_answer_in_pieces(server: Server) -> None:
    options: dict[str, Any] = {"model": "demo", "prompt": PROMPT, "max_tokens": 40, "temperature": 0.8, "seed": 1,
                               "extra_body": {"ignore_eos": True}}
    whole = server.openai.completions.create(**options)
    chunks = list(server.openai.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].usage == whole.usage.model_copy(update={  # type: ignore[union-attr]
        "prompt_tokens_details": chunks[-1].usage.prompt_tokens_details})
    assert chunks[-1].choices == []
    assert all(chunk.usage is None for chunk in chunks[:-1])
    choices = [chunk.choices[0] for chunk in chunks[:-1]]
    assert "".join(choice.text for choice in choices) == whole.choices[0].text
    assert [choice.finish_reason for choice in choices] == [None] * (len(choices) - 1) + ["length"]
    assert len(choices) in (40, 41), "one token, one chunk"
    assert len({chunk.id for chunk in chunks}) == 1

    without = list(server.openai.completions.create(**options, stream=True))
    assert all(chunk.usage is None and chunk.choices for chunk in without)


def test_chat_streaming(server: Server) -> None:
    options: dict[str, Any] = {"model": "demo", "messages": MESSAGES, "max_tokens": 30, "temperature": 0.9, "seed": 5,
                               "logprobs": True, "top_logprobs": 2}
    whole = server.openai.chat.completions.create(**options)
    chunks = list(server.openai.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].object == "chat.completion.chunk"
    assert chunks[0].choices[0].delta.role == "assistant"
    deltas = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert "".join(choice.delta.content or "" for choice in deltas) == whole.choices[0].message.content
    assert deltas[-1].finish_reason == whole.choices[0].finish_reason
    streamed = [entry for choice in deltas if choice.logprobs for entry in choice.logprobs.content or []]
    assert streamed == whole.choices[0].logprobs.content
    assert len(streamed) == whole.usage.completion_tokens == chunks[-1].usage.completion_tokens


def test_events_on_the_wire(server: Server) -> None:
    with server.http.stream("POST", "/v1/completions", json={"prompt": PROMPT, "max_tokens": 3, "stream": True}) as r:
        assert r.status_code == 200
        assert r.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in r.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    assert all(line.startswith((":", "data: ")) for line in lines)


def test_curl(server: Server) -> None:
    """As the README has it."""
    if (curl := shutil.which("curl")) is None:
        pytest.skip("curl is not installed")
    body = '{"model": "demo", "prompt": "Once upon a time", "max_tokens": 48}'
    done = subprocess.run([curl, "-sS", f"{server.url}/v1/completions", "-H", "content-type: application/json",
                           "-d", body], capture_output=True, text=True, check=True, timeout=120)
    assert json.loads(done.stdout)["choices"][0]["text"]


def test_many_prompts_and_choices(server: Server) -> None:
    prompts = [PROMPT, "The old woman", "A fox"]
    answer = server.complete(prompt=prompts, n=2, max_tokens=8, seed=11, ignore_eos=True)
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))
    assert answer["usage"]["completion_tokens"] == 48
    for i, prompt in enumerate(prompts):
        alone = server.complete(prompt=prompt, n=2, max_tokens=8, seed=11, ignore_eos=True)
        assert [choice["text"] for choice in alone["choices"]] == [
            choice["text"] for choice in answer["choices"][2 * i:2 * i + 2]]


def test_token_prompts(server: Server) -> None:
    ids = server.tokens(PROMPT)
    expected = server.complete(prompt=PROMPT, max_tokens=12, temperature=0)
    for prompt in (ids, [ids]):
        answer = server.complete(prompt=prompt, max_tokens=12, temperature=0)
        assert answer["choices"][0]["text"] == expected["choices"][0]["text"]
        assert answer["usage"]["prompt_tokens"] == len(ids)


def test_n(server: Server) -> None:
    """Sequence i of a seeded request is what seed + i gives alone."""
    answer = server.complete(prompt=PROMPT, n=4, max_tokens=12, seed=40, temperature=1)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    texts = [choice["text"] for choice in answer["choices"]]
    assert len(set(texts)) > 1
    assert texts == [server.complete(prompt=PROMPT, max_tokens=12, seed=40 + i, temperature=1)["choices"][0]["text"]
                     for i in range(4)]


def test_stop_strings(server: Server) -> None:
    whole = server.complete(prompt=PROMPT, max_tokens=40, temperature=0)["choices"][0]["text"]
    for start, end in [(10, 17), (25, 26), (3, 30)]:  # across tokens, a part of one, most of it
        stop = whole[start:end]
        body = {"prompt": PROMPT, "max_tokens": 40, "temperature": 0, "stop": ["never this", stop]}
        answer = server.complete(**body)
        assert answer["choices"][0]["text"] == whole[:whole.index(stop)]
        assert answer["choices"][0]["finish_reason"] == "stop"
        with server.http.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
            text = "".join(event["choices"][0]["text"] for event in events(response.iter_lines()))
        assert text == whole[:whole.index(stop)], "nothing of the stop string was sent before it was known"


def test_logit_bias(server: Server) -> None:
    [wanted] = server.tokens("king")[-1:]
    word = server.post("/detokenize", {"tokens": [wanted]}).json()["prompt"]
    forced = server.complete(prompt=PROMPT, max_tokens=5, temperature=0, logit_bias={str(wanted): 100})
    assert forced["choices"][0]["text"] == word * 5
    greedy = server.complete(prompt=PROMPT, max_tokens=1, temperature=0)["choices"][0]["text"]
    [first] = server.tokens(PROMPT + greedy)[len(server.tokens(PROMPT)):]
    banned = server.complete(prompt=PROMPT, max_tokens=1, temperature=0, logit_bias={str(first): -100})
    assert banned["choices"][0]["text"] != greedy


def test_end_of_sequence_min_tokens_and_ignore_eos(server: Server) -> None:
    body: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 9, "temperature": 0, "logit_bias": {str(EOS): 100}}
    answer = server.complete(**body)
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["choices"][0]["text"] == ""
    answer = server.complete(**body, min_tokens=6)
    assert answer["usage"]["completion_tokens"] == 7
    assert answer["choices"][0]["finish_reason"] == "stop"
    answer = server.complete(**body, ignore_eos=True)
    assert answer["usage"]["completion_tokens"] == 9
    assert answer["choices"][0]["finish_reason"] == "length"


def test_stop_token_ids(server: Server) -> None:
    ids = server.tokens(" the")
    answer = server.complete(prompt=PROMPT, max_tokens=9, logit_bias={str(ids[-1]): 100}, stop_token_ids=ids[-1:])
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == 1


@pytest.mark.parametrize(("options", "changes"), [
    ({"top_k": 1}, False), ({"top_p": 1e-6}, False), ({"min_p": 1.0}, False), ({"temperature": 1e-3}, False),
    ({"repetition_penalty": 1.8}, True), ({"frequency_penalty": 2.0}, True), ({"presence_penalty": 2.0}, True),
])
def test_sampling_parameters_do_something(server: Server, options: dict[str, Any], changes: bool) -> None:
    """Those that leave one candidate give the greedy answer, whatever the seed; penalties change a greedy one."""
    body: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 60, "ignore_eos": True}
    greedy = server.complete(**body, temperature=0)["choices"][0]["text"]
    extra = {"temperature": 0} if changes else {"seed": 8}
    assert (server.complete(**{**body, **extra, **options})["choices"][0]["text"] != greedy) is changes


def test_seed(server: Server) -> None:
    def text(seed: int | None) -> str:
        result: str = server.complete(prompt=PROMPT, max_tokens=20, seed=seed, temperature=1)["choices"][0]["text"]
        return result

    assert text(1) == text(1)
    assert len({text(1), text(2), text(None), text(None)}) > 2


def test_echo_with_logprobs(server: Server) -> None:
    """lm-eval's request. Every list has an entry a token, the generated one's too; the greedy token's entry among the
    top ones is its own to the last bit; a second run, whose prompt is cached, gives the same numbers."""
    prompt = PROMPT + " lived in a castle by the sea. " * 20
    body: dict[str, Any] = {"prompt": prompt, "max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 1}
    answer = server.complete(**body)
    choice = answer["choices"][0]
    logprobs = choice["logprobs"]
    count = len(server.tokens(prompt)) + 1
    assert choice["text"].startswith(prompt)
    assert [len(logprobs[key]) for key in ("tokens", "token_logprobs", "top_logprobs", "text_offset")] == [count] * 4
    assert logprobs["token_logprobs"][0] is None
    assert all(value <= 0 for value in logprobs["token_logprobs"][1:])
    assert logprobs["token_logprobs"][-1] == max(logprobs["top_logprobs"][-1].values())
    for token, value, top in list(zip(logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"],
                                      strict=True))[1:]:
        assert top[token] == value or value < max(top.values())

    server.complete(prompt=prompt, max_tokens=1, temperature=0)
    assert server.complete(**body)["choices"][0]["logprobs"] == logprobs
    ids = server.tokens(prompt)
    assert server.complete(**{**body, "prompt": ids})["choices"][0]["logprobs"]["token_logprobs"] == (
        logprobs["token_logprobs"])


def test_logprobs_are_a_distribution(server: Server) -> None:
    choice = server.complete(prompt=PROMPT, max_tokens=10, temperature=1, seed=2, logprobs=20)["choices"][0]
    for value, top in zip(choice["logprobs"]["token_logprobs"], choice["logprobs"]["top_logprobs"], strict=True):
        assert len(top) in (20, 21)
        assert sum(map(math.exp, top.values())) < 1 + 1e-4
        assert value in top.values()


def test_generate(server: Server) -> None:
    """TGI's words; the same answer as OpenAI's endpoint gives."""
    expected = server.complete(prompt=PROMPT, max_tokens=20, temperature=0)["choices"][0]["text"]
    body = {"inputs": PROMPT, "parameters": {"max_new_tokens": 20, "details": True}}
    response = server.post("/generate", body)
    assert response.status_code == 200, response.text
    answer = response.json()
    assert answer["generated_text"] == expected
    assert answer["details"]["generated_tokens"] == len(answer["details"]["tokens"])

    with server.http.stream("POST", "/generate_stream", json=body) as response:
        assert response.status_code == 200
        chunks = list(events(response.iter_lines()))
    assert [chunk["token"]["id"] for chunk in chunks] == [token["id"] for token in answer["details"]["tokens"]]
    assert all(chunk["generated_text"] is None for chunk in chunks[:-1])
    assert chunks[-1]["generated_text"] == expected


@pytest.mark.parametrize("text", [PROMPT, "", "  two  spaces\n\n", "naïve café — “quoted” ☃ 漢字 🦊"])
def test_tokenize_and_back(server: Server, text: str) -> None:
    response = server.post("/tokenize", {"prompt": text, "add_special_tokens": False})
    assert response.status_code == 200, response.text
    tokens = response.json()["tokens"]
    assert response.json()["count"] == len(tokens)
    back = server.post("/detokenize", {"tokens": tokens})
    assert back.status_code == 200, back.text
    assert back.json()["prompt"] == text
    assert server.tokens(text) == [0, *tokens]


def test_models(server: Server) -> None:
    [model] = server.openai.models.list().data
    assert model.id == "demo"
    assert server.openai.models.retrieve("demo").id == "demo"
    with pytest.raises(openai.NotFoundError, match="gpt-4"):
        server.openai.completions.create(model="gpt-4", prompt=PROMPT)


def test_probes_and_version(server: Server) -> None:
    for path in ("/livez", "/readyz", "/health"):
        assert server.http.get(path).status_code == 200
    assert server.http.get("/version").json()["version"] == fptq_runtime.__version__
    info = json.dumps(server.http.get("/info").json()).lower()
    for word in ("llama", "demo", "int8", fptq_runtime.__version__):
        assert word in info
    assert re.search("native|reference", info)


def test_metrics(server: Server) -> None:
    wait_until(lambda: server.metrics().value("running") == 0, "earlier requests are through")
    before = server.metrics()
    prompt = "A prompt that no other test has sent, long enough for some blocks of the cache. " * 12
    first = server.complete(prompt=prompt, max_tokens=10, temperature=0, ignore_eos=True)["usage"]
    server.complete(prompt=prompt, max_tokens=10, temperature=0, ignore_eos=True)
    server.complete(prompt=PROMPT, max_tokens=10, logit_bias={str(EOS): 100})
    after = server.metrics()

    def gained(pattern: str, kind: str = "counter", **labels: str) -> float:
        return after.value(pattern, kind, **labels) - before.value(pattern, kind, **labels)

    short = len(server.tokens(PROMPT))
    assert gained("prompt_tokens") == 2 * first["prompt_tokens"] + short
    assert gained("generat|generated|completion.*tokens") in (20, 21)
    assert gained("finished|requests_total|request_success") == 3
    for pattern in ("first_token", "e2e|end_to_end", "queue.*seconds|queue_time"):
        assert gained(pattern, "histogram") == 3
        assert min(float(sample.labels["le"]) for sample in after.families[after.find(pattern, "histogram")].samples
                   if sample.name.endswith("_bucket")) <= 0.001
    assert gained("inter_token|between_token|per_output_token", "histogram") in (18, 19)
    assert gained("prefix.*hit") > 0
    for pattern in ("running", "waiting", "kv.*us"):
        assert after.value(pattern) == 0 or pattern.startswith("kv")
    assert after.value("preempt", "counter") == 0
    assert re.search(r"^fptq\w*_info\{.*version=", after.text, re.MULTILINE)
    assert re.search(r'^fptq\w*_info\{.*"demo"', after.text, re.MULTILINE)
    assert fptq_runtime.__version__ in after.text


def test_promtool(server: Server) -> None:
    if (promtool := shutil.which("promtool")) is None:
        pytest.skip("promtool is not installed")
    done = subprocess.run([promtool, "check", "metrics"], input=server.metrics().text, capture_output=True, text=True,
                          timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not done.stdout + done.stderr


def refused(response: httpx.Response, name: str) -> None:
    """A 4xx that names the field in one line, in the form in which OpenAI's clients read it."""
    assert 400 <= response.status_code < 500, f"{response.status_code}: {response.text}"
    error = response.json()["error"]
    message = error["message"] if isinstance(error, dict) else error
    assert name in message or (isinstance(error, dict) and name in (error.get("param") or "")), message
    assert message.strip()
    assert "\n" not in message.strip()
    assert not re.search(r"Traceback|pydantic|\.py\b", response.text)


NOT_TEXT = [5, True, ["x"], {"a": 1}]
NOT_A_NUMBER = ["x", "0.5", True, [1], {"a": 1}]
NOT_AN_INTEGER = [*NOT_A_NUMBER, 1.5]
NOT_A_FLAG = ["true", 1, [], {}]
NOT_TOKENS = ["x", 5, [[1]], ["a"], [1.5], [-1], [True], {"a": 1}]
SAMPLING: dict[str, list[Any]] = {
    "model": NOT_TEXT,
    "n": [*NOT_AN_INTEGER, 0, -1, 10**9],
    "max_tokens": [*NOT_AN_INTEGER, -2],
    "min_tokens": [*NOT_AN_INTEGER, -1, 10**9],
    "temperature": [*NOT_A_NUMBER, -0.1],
    "top_p": [*NOT_A_NUMBER, -0.1, 1.1],
    "top_k": [*NOT_AN_INTEGER, -7],
    "min_p": [*NOT_A_NUMBER, -0.1, 1.1],
    "repetition_penalty": [*NOT_A_NUMBER, 0, -1],
    "presence_penalty": [*NOT_A_NUMBER, -2.1, 2.1],
    "frequency_penalty": [*NOT_A_NUMBER, -2.1, 2.1],
    "logit_bias": ["x", 5, [1], True, {"king": 1}, {"1": "x"}, {"1": 101}, {"-1": 1}, {"99999": 1}],
    "seed": [*NOT_AN_INTEGER, 1 << 70],
    "stop": [5, True, [5], {"a": 1}, [""], ["x"] * 1000],
    "stop_token_ids": [*NOT_TOKENS],
    "ignore_eos": NOT_A_FLAG,
    "stream": NOT_A_FLAG,
    "user": NOT_TEXT,
}
COMPLETION: dict[str, list[Any]] = {
    **SAMPLING,
    "prompt": [5, True, {"a": 1}, [], [[]], [1, "a"], ["a", 1], [1.5], [-1], [99999], [[[1]]], None],
    "echo": NOT_A_FLAG,
    "logprobs": [*NOT_AN_INTEGER, -1, 1000],
    "stream_options": [5, "x", [1], {"include_usage": "yes"}],
}
CHAT: dict[str, list[Any]] = {
    **SAMPLING,
    "messages": [5, "x", True, {"a": 1}, [], [5], ["x"], [{}], [{"role": "user"}], [{"content": "x"}], None,
                 [{"role": "wizard", "content": "x"}], [{"role": "user", "content": 5}],
                 [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}]],
    "logprobs": [5, "x", []],
    "top_logprobs": [*NOT_AN_INTEGER, -1, 1000],
}


@pytest.mark.parametrize("field", COMPLETION)
def test_completion_field_of_a_wrong_type(server: Server, field: str) -> None:
    for value in COMPLETION[field]:
        refused(server.post("/v1/completions", {"prompt": PROMPT, "max_tokens": 2, field: value}), field)


@pytest.mark.parametrize("field", CHAT)
def test_chat_field_of_a_wrong_type(server: Server, field: str) -> None:
    for value in CHAT[field]:
        body = {"messages": MESSAGES, "max_tokens": 2, field: value}
        if field == "top_logprobs":
            body["logprobs"] = True
        refused(server.post("/v1/chat/completions", body), field)


@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
def test_generate_field_of_a_wrong_type(server: Server, path: str) -> None:
    for inputs in (5, ["x"], None, {"a": 1}):
        refused(server.post(path, {"inputs": inputs}), "inputs")
    for field, values in {"max_new_tokens": [*NOT_AN_INTEGER, -1], "temperature": [*NOT_A_NUMBER, -1],
                          "top_p": [*NOT_A_NUMBER, 1.5], "top_k": NOT_AN_INTEGER, "seed": NOT_AN_INTEGER,
                          "stop": [5, [5], {"a": 1}], "do_sample": NOT_A_FLAG, "frobnicate": [1]}.items():
        for value in values:
            refused(server.post(path, {"inputs": PROMPT, "parameters": {field: value}}), field)
    refused(server.post(path, {"inputs": PROMPT, "parameters": [1]}), "parameters")


def test_tokenize_fields_of_a_wrong_type(server: Server) -> None:
    for prompt in (5, ["x"], {"a": 1}):
        refused(server.post("/tokenize", {"prompt": prompt}), "prompt")
    for tokens in (5, "x", ["x"], [1.5], [-1], [99999], [True], None, {"a": 1}):
        refused(server.post("/detokenize", {"tokens": tokens}), "tokens")


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/generate", "/generate_stream",
                                  "/tokenize", "/detokenize"])
def test_unknown_fields_and_broken_bodies(server: Server, path: str) -> None:
    body: dict[str, Any] = {"/v1/completions": {"prompt": "x"}, "/v1/chat/completions": {"messages": MESSAGES},
                            "/tokenize": {"prompt": "x"}, "/detokenize": {"tokens": [5]}}.get(path, {"inputs": "x"})
    refused(server.post(path, {**body, "frobnicate": 1}), "frobnicate")
    for content in (b"", b"{", b"[]", b"5", b"null", b'"x"', b"\xff\xfe", b'{"prompt": "\xff"}', b"[" * 100_000,
                    b'{"prompt": NaN}', b'{"a":' * 5000):
        response = server.http.post(path, content=content, headers={"content-type": "application/json"})
        refused(response, "")


def test_nested_unknown_fields(server: Server) -> None:
    refused(server.post("/v1/completions", {"prompt": "x", "stream": True, "stream_options": {"frobnicate": True}}),
            "frobnicate")
    refused(server.post("/v1/chat/completions", {"messages": [{**MESSAGES[0], "frobnicate": 1}]}), "frobnicate")


@pytest.mark.parametrize("extra", [
    {"tools": [{"type": "web_search"}]}, {"response_format": {"type": "xml"}},
    {"functions": [{"name": "f"}]}, {"modalities": ["audio"]}, {"reasoning_effort": "high"},
], ids=lambda extra: next(iter(extra)))
def test_what_chat_cannot_do_is_refused_by_name(server: Server, extra: dict[str, Any]) -> None:
    refused(server.post("/v1/chat/completions", {"messages": MESSAGES, **extra}), next(iter(extra)))


def test_null_is_the_default(server: Server) -> None:
    """Clients send null for what they do not set."""
    for path, body, fields in (("/v1/completions", {"prompt": PROMPT}, COMPLETION),
                               ("/v1/chat/completions", {"messages": MESSAGES}, CHAT)):
        response = server.post(path, {**dict.fromkeys(fields), **body, "max_tokens": 2})
        assert response.status_code == 200, response.text


def test_lone_surrogate(server: Server) -> None:
    for path, content in (("/v1/completions", b'{"prompt": "\\ud800"}'), ("/tokenize", b'{"prompt": "\\ud800"}'),
                          ("/v1/completions", b'{"prompt": "x", "stop": "\\ud800"}')):
        response = server.http.post(path, content=content, headers={"content-type": "application/json"})
        assert response.status_code < 500, response.text


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/generate", "/generate_stream"])
@pytest.mark.parametrize("stream", [False, True])
def test_prompt_longer_than_the_context(server: Server, path: str, stream: bool) -> None:
    long = "once upon a time " * 1000
    body: dict[str, Any] = {"/v1/completions": {"prompt": long, "stream": stream},
                            "/v1/chat/completions": {"messages": [{"role": "user", "content": long}],
                                                     "stream": stream}}.get(path, {"inputs": long})
    refused(server.post(path, body), "1024")


def test_the_context_can_be_filled(server: Server) -> None:
    """Prompt and answer together, to the last token."""
    ids = (server.tokens("once upon a time ") * 300)[:1000]
    answer = server.complete(prompt=ids, max_tokens=24, ignore_eos=True, temperature=0)
    assert answer["usage"]["completion_tokens"] == 24
    refused(server.post("/v1/completions", {"prompt": ids + ids, "max_tokens": 1}), "1024")


def test_huge_body(server: Server) -> None:
    response = server.post("/v1/completions", {"prompt": "x" * 100_000_000})
    assert 400 <= response.status_code < 500


def test_paths_and_methods(server: Server) -> None:
    assert server.http.get("/v1/nothing").status_code == 404
    assert server.http.get("/v1/completions").status_code == 405


def test_api_key(tight_server: Server) -> None:
    paths = {"/v1/models": None, "/v1/completions": {"prompt": "x", "max_tokens": 1},
             "/v1/chat/completions": {"messages": MESSAGES, "max_tokens": 1}, "/generate": {"inputs": "x"},
             "/generate_stream": {"inputs": "x"}, "/tokenize": {"prompt": "x"}, "/detokenize": {"tokens": [5]}}
    for path, body in paths.items():
        method = "GET" if body is None else "POST"
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {API_KEY}"},
                        {"Authorization": "Bearer \u00e9".encode()}, {"Authorization": f"Bearer {API_KEY}x"}):
            response = httpx.request(method, tight_server.url + path, json=body, headers=headers, timeout=60)
            assert response.status_code == 401, (path, headers)
            assert API_KEY not in response.text
        ok = httpx.request(method, tight_server.url + path, json=body, timeout=60,
                           headers={"Authorization": f"Bearer {API_KEY}"})
        assert ok.status_code == 200, ok.text
    for path in ("/livez", "/readyz", "/health"):
        assert httpx.get(tight_server.url + path, timeout=60).status_code == 200
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=tight_server.url + "/v1", api_key="wrong").models.list()


def test_served_model_name(tight_server: Server) -> None:
    assert [model.id for model in tight_server.openai.models.list().data] == ["tales"]
    with pytest.raises(openai.NotFoundError, match="demo"):
        tight_server.openai.completions.create(model="demo", prompt="x")

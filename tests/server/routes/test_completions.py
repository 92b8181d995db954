"""/v1/completions through the openai SDK, and what load generators and lm-eval send."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest

from fptq_runtime.models.tokenizer import Tokenizer
from fptq_server.protocol import CompletionRequest
from tests.server.conftest import EOS, Served, events

PROMPT = "Once upon a time there was a king who"


def complete(served: Served, **body: Any) -> dict[str, Any]:
    response = served.http.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 8, "temperature": 0} | body)
    assert response.status_code == 200, response.text
    result: dict[str, Any] = response.json()
    return result


def test_sdk(served: Served, client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    answer = client.completions.create(model="demo", prompt=PROMPT, max_tokens=12, temperature=0, user="someone")
    assert answer.object == "text_completion"
    assert answer.id.startswith("cmpl-")
    [choice] = answer.choices
    assert choice.finish_reason == "length"
    assert choice.logprobs is None
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(tokenizer.encode(PROMPT))
    assert answer.usage.completion_tokens == 12
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 12
    ids = client.completions.create(model="demo", prompt=tokenizer.encode(PROMPT), max_tokens=12, temperature=0)
    assert ids.choices[0].text == choice.text


@pytest.mark.parametrize("options", [
    {"temperature": 0}, {"temperature": 1.2, "seed": 7, "top_p": 0.9},
    {"temperature": 1, "seed": 3, "stop": ["e", "the"]},
    {"temperature": 1, "seed": 5, "n": 3, "logprobs": 2}, {"temperature": 0, "echo": True, "logprobs": 1},
    {"temperature": 0, "echo": True, "n": 2}, {"temperature": 0, "echo": True, "max_tokens": 0, "logprobs": 0},
], ids=str)
def test_a_stream_is_the_whole_in_pieces(client: openai.OpenAI, options: dict[str, Any]) -> None:
    body: Any = {"model": "demo", "prompt": [PROMPT, "The old woman"], "max_tokens": 10} | options
    whole = client.completions.create(**body)
    chunks = list(client.completions.create(**body, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1
    for expected in whole.choices:
        pieces = [chunk.choices[0] for chunk in chunks[:-1] if chunk.choices[0].index == expected.index]
        assert "".join(piece.text for piece in pieces) == expected.text
        assert [piece.finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + [expected.finish_reason]
        if expected.logprobs is None:
            assert all(piece.logprobs is None for piece in pieces)
            continue
        for name in ("tokens", "text_offset"):
            streamed = [value for piece in pieces for value in getattr(piece.logprobs, name)]
            assert streamed == getattr(expected.logprobs, name)


def test_async_sdk(served: Served) -> None:
    async def run() -> tuple[str, str]:
        async with openai.AsyncOpenAI(base_url=served.url + "/v1", api_key="none") as client:
            body: Any = {"model": "demo", "prompt": PROMPT, "max_tokens": 8, "temperature": 0}
            whole = await client.completions.create(**body)
            pieces = [chunk.choices[0].text async for chunk in await client.completions.create(**body, stream=True)]
            return whole.choices[0].text, "".join(pieces)

    whole, streamed = asyncio.run(run())
    assert whole == streamed


def test_one_token_one_chunk(served: Served) -> None:
    """Also where a token completes no text: load generators count chunks."""
    body = {"prompt": PROMPT, "max_tokens": 40, "temperature": 2, "seed": 1, "ignore_eos": True, "stream": True,
            "stop": None, "min_tokens": 40, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    chunks = events(served.http.post("/v1/completions", json=body).text)
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [*range(1, 41), 40]
    without = events(served.http.post("/v1/completions", json=body | {"stream_options": None}).text)
    assert len(without) == 40
    assert all(chunk["usage"] is None for chunk in without)


def test_lm_eval_scoring_request(served: Served, tokenizer: Tokenizer) -> None:
    """Every list has an entry for each prompt token and one for the generated token, EOS too; the best of the top ones
    is the token's own value to the last bit where it is the greedy one."""
    prompts = [tokenizer.encode("Once upon a time"), tokenizer.encode("The fox and the crow")]
    answer = complete(served, model="demo", prompt=prompts, max_tokens=1, logprobs=1, echo=True, seed=1234,
                      logit_bias={str(EOS): 100})
    for prompt, choice in zip(prompts, answer["choices"], strict=True):
        logprobs = choice["logprobs"]
        assert {len(values) for values in logprobs.values()} == {len(prompt) + 1}
        assert logprobs["tokens"][-1] == "</s>"
        assert logprobs["token_logprobs"][0] is None
        assert all(isinstance(value, float) for value in logprobs["token_logprobs"][1:])
        for token, value, top in list(zip(logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"],
                                          strict=True))[1:]:
            assert top[token] == value
            assert len(top) == (1 if value == max(top.values()) else 2)
        assert "".join(logprobs["tokens"][1:-1]) == choice["text"]
        for token, start in list(zip(logprobs["tokens"], logprobs["text_offset"], strict=True))[1:-1]:
            assert choice["text"].startswith(token, start)


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_of_characters_in_parts(served: Served, tokenizer: Tokenizer, stream: bool) -> None:
    """A token that is not whole UTF-8 is named by its bytes; offsets are those of the text."""
    prompt = "é🙂 a漢"
    ids = tokenizer.encode(prompt)
    raw = [tokenizer.token_bytes(token_id) for token_id in ids]
    parts = [part for part in raw if part.decode(errors="replace").encode() != part]
    assert len(parts) >= 4, "the text is meant to be cut within its characters"
    body = {"prompt": prompt, "max_tokens": 1, "echo": True, "logprobs": 0, "stream": stream}
    response = served.http.post("/v1/completions", json=body)
    choices = [chunk["choices"][0] for chunk in (events(response.text) if stream else [response.json()])]
    logprobs = [entry for choice in choices for entry in zip(choice["logprobs"]["tokens"],
                                                             choice["logprobs"]["text_offset"], strict=True)]
    written = b""
    for (name, offset), part in zip(logprobs, raw, strict=False):
        assert offset == len(written.decode(errors="ignore"))
        assert name == (part.decode() if part not in parts else "bytes:" + "".join(f"\\x{b:02x}" for b in part))
        written += b"" if name == "<s>" else part
    assert logprobs[len(ids)][1] == len(prompt)


def test_text_offsets_where_the_prompt_ends_within_a_character(served: Served, tokenizer: Tokenizer) -> None:
    *cut, last = tokenizer.encode("a🙂")
    choice = complete(served, prompt=cut, max_tokens=2, logit_bias={str(last): 100}, logprobs=0)["choices"][0]
    assert choice["text"].startswith("🙂")
    assert choice["logprobs"]["text_offset"] == [0, 1]


@pytest.mark.parametrize("end", ["🙂", "\ufffd"])
def test_what_a_prompt_ends_with_is_no_part_of_the_answer(served: Served, tokenizer: Tokenizer, end: str) -> None:
    """Half a character, or U+FFFD; nor do offsets count it."""
    [king] = tokenizer.encode(" king", add_special_tokens=False)
    prompt = tokenizer.encode("a" + end)[: -1 if end == "🙂" else None]
    choice = complete(served, prompt=prompt, max_tokens=3, logit_bias={str(king): 100}, logprobs=0)["choices"][0]
    assert choice["text"] == " king king king"
    assert choice["logprobs"]["text_offset"] == [0, 5, 10]


def test_generated_logprobs_do_not_depend_on_echo(served: Served) -> None:
    plain = complete(served, logprobs=3)["choices"][0]["logprobs"]
    echoed = complete(served, logprobs=3, echo=True)["choices"][0]["logprobs"]
    assert echoed["tokens"][-8:] == plain["tokens"]
    assert echoed["token_logprobs"][-8:] == pytest.approx(plain["token_logprobs"], abs=1e-3)


def test_tokens_as_ids_are_unique(served: Served) -> None:
    logprobs = complete(served, logprobs=20, return_tokens_as_token_ids=True)["choices"][0]["logprobs"]
    assert all(token.startswith("token_id:") for token in logprobs["tokens"])
    assert all(len(top) in (20, 21) for top in logprobs["top_logprobs"])


@pytest.mark.parametrize(("body", "param", "named"), [
    ({"best_of": 2, "n": 3}, "best_of", "between n, which is 3, and 64, not 2"),
    ({"best_of": 65}, "best_of", "not 65"),
    ({"best_of": 2, "stream": True}, "best_of", "cannot be streamed"),
    ({"n": 65, "best_of": None}, "n", "65"),
    ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs", "stream"),
    ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "at least 1, or -1"),
    ({"suffix": "x"}, "suffix", "suffix"),
    ({"model": "gpt-4"}, "model", "gpt-4"),
    ({"prompt": [5] * 2000}, "prompt", "This model's maximum context length is 1024 tokens. However, your prompt "
                                        "resulted in 2000 tokens"),
    ({"prompt": [5] * 1024}, "prompt", "1024"),
    ({"prompt": "x" * 100_000}, "prompt", "This model's maximum context length is 1024 tokens. However, your "
                                             "prompt resulted in 100000 characters"),
    ({"prompt": ["x"] * 1025}, "prompt", "1025"),
    ({"prompt": "", "add_special_tokens": False}, "prompt", "empty"),
    ({"max_tokens": 3, "max_completion_tokens": 4}, "max_completion_tokens", "3"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "stream"),
    ({"stream": True, "echo": True, "logprobs": 1, "n": 2}, "echo", "n above 1"),
    ({"logit_bias": {"99999": 1}}, "logit_bias", "99999"),
    ({"include_stop_str_in_output": True}, "include_stop_str_in_output", "not supported"),
    ({"min_tokens": 17}, "min_tokens", "max_tokens, which was not given, is 16"),
    ({"frobnicate": 1}, "frobnicate", "unknown field frobnicate"),
], ids=str)
def test_refusals(served: Served, body: dict[str, Any], param: str, named: str) -> None:
    response = served.http.post("/v1/completions", json={"prompt": "x"} | body)
    assert response.status_code == (404 if param == "model" else 400)
    error = response.json()["error"]
    assert error["param"] == param
    assert named in error["message"]
    assert error["code"] == "model_not_found" or param != "model"


def test_harmless_fields(served: Served) -> None:
    """What clients send by default, and bounds beyond what is reached."""
    fields: dict[str, Any] = {
        "best_of": 1, "suffix": None, "store": False, "service_tier": "auto", "metadata": {"a": "b"}, "top_k": -1,
        "include_stop_str_in_output": False, "max_completion_tokens": 3, "logit_bias": {}, "stop": [],
    }
    assert complete(served, max_tokens=3, **fields)["usage"]["completion_tokens"] == 3
    beyond = complete(served, prompt=[5] * 1020, max_tokens=10_000, ignore_eos=True)
    assert beyond["usage"]["completion_tokens"] == 4
    assert beyond["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(("length", "kept"), [(3, 3), (2000, 1100), (-1, 1016)])
def test_truncate_prompt_tokens(served: Served, length: int, kept: int) -> None:
    """The end of the prompt stays; -1 leaves room for max_tokens."""
    prompt = [i % 1000 + 5 for i in range(1100)]
    body = {"prompt": prompt, "max_tokens": 8, "temperature": 0, "truncate_prompt_tokens": length}
    response = served.http.post("/v1/completions", json=body)
    if kept + 8 > 1024:
        assert "1100 tokens" in response.json()["error"]["message"]
        return
    assert response.json()["usage"]["prompt_tokens"] == kept
    assert response.json()["choices"] == complete(served, prompt=prompt[-kept:])["choices"]


def test_best_of(served: Served) -> None:
    """Those with the highest mean log-probability, the best first, of each prompt; all that was drawn is counted."""
    body = {"prompt": [PROMPT, "The old woman"], "seed": 5, "temperature": 1.5, "ignore_eos": True, "max_tokens": 6}
    drawn = complete(served, **body, n=5, logprobs=0)["choices"]
    expected = []
    for of_prompt in (drawn[:5], drawn[5:]):
        best = sorted(of_prompt, key=lambda c: sum(c["logprobs"]["token_logprobs"]), reverse=True)
        expected += [choice["text"] for choice in best[:2]]
    for extra in ({}, {"logprobs": 3}):
        answer = complete(served, **body, n=2, best_of=5, **extra)
        assert [choice["text"] for choice in answer["choices"]] == expected
        assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
        assert answer["usage"]["completion_tokens"] == 60
        for choice in answer["choices"]:
            assert (choice["logprobs"] is None) is (not extra)
            assert not extra or "".join(choice["logprobs"]["tokens"]) == choice["text"]


@pytest.mark.parametrize("count", [0, 2])
def test_prompt_logprobs(served: Served, tokenizer: Tokenizer, count: int) -> None:
    """vLLM's form of what echo with logprobs tells; beside it each has its own number of alternatives."""
    ids = tokenizer.encode(PROMPT)
    echoed = complete(served, echo=True, logprobs=3)["choices"][0]["logprobs"]
    both = complete(served, echo=True, logprobs=3, prompt_logprobs=count)["choices"][0]
    assert both["logprobs"] == echoed
    answer = complete(served, prompt=[PROMPT, PROMPT], n=2, prompt_logprobs=count)
    for choice in answer["choices"]:
        known = choice["prompt_logprobs"]
        assert known == both["prompt_logprobs"]
        assert known[0] is None
        assert len(known) == len(ids)
        for token_id, entry, value, top in zip(ids, known, echoed["token_logprobs"], echoed["top_logprobs"],
                                               strict=False):
            if entry is None:
                continue
            assert entry[str(token_id)]["logprob"] == value
            assert entry[str(token_id)]["decoded_token"] == tokenizer.token_bytes(token_id).decode()
            ranked = {alternative["rank"]: alternative["logprob"] for alternative in entry.values()}
            best = sorted(top.values(), reverse=True)
            assert [ranked[rank] for rank in range(1, count + 1)] == best[:count]
    assert complete(served)["choices"][0]["prompt_logprobs"] is None


INFILL = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")


def test_suffix(run_server: Callable[..., Any], model_path: Path, tmp_path: Path) -> None:
    """The last three tokens of the demo's vocabulary play the fill-in-the-middle tokens."""
    for name in ("tokenizer_config.json", "tokenizer.json"):
        shutil.copy(model_path / name, tmp_path)
    model = json.loads((tmp_path / "tokenizer.json").read_text())
    names = {token_id: token for token, token_id in model["model"]["vocab"].items()}
    for token_id, token in enumerate(INFILL, len(names) - 3):
        del model["model"]["vocab"][names[token_id]]
        model["model"]["vocab"][token] = token_id
        model["added_tokens"].append({"id": token_id, "content": token, "single_word": False, "lstrip": False,
                                      "rstrip": False, "normalized": False, "special": True})
    del model["model"]["merges"][-3:]
    (tmp_path / "tokenizer.json").write_text(json.dumps(model))
    tokenizer = Tokenizer(tmp_path)
    start, middle, end = (tokenizer.encode(token, False) for token in INFILL)
    def plain(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    with run_server(tokenizer=tokenizer) as served:
        answer = complete(served, prompt="Once upon", suffix=" a king")
        expected = complete(served, prompt=[0, *start, *plain("Once upon"), *middle, *plain(" a king"), *end])
        assert answer["choices"] == expected["choices"]
        assert answer["usage"] == expected["usage"] | {
            "prompt_tokens_details": answer["usage"]["prompt_tokens_details"]}
        for wrong in ({"prompt": [5]}, {"echo": True}):
            response = served.http.post("/v1/completions", json={"prompt": "x", "suffix": "y"} | wrong)
            assert response.json()["error"]["param"] == "suffix"


DEFAULTS: dict[str, dict[str, Any]] = {
    "vLLM": {"n": 1, "echo": False, "use_beam_search": False, "length_penalty": 1.0, "early_stopping": False,
             "stop_token_ids": [], "include_stop_str_in_output": False, "ignore_eos": False, "min_tokens": 0,
             "skip_special_tokens": True, "spaces_between_special_tokens": True, "truncate_prompt_tokens": None,
             "allowed_token_ids": None, "bad_words": [], "priority": 0, "logits_processors": None, "cache_salt": None,
             "kv_transfer_params": None, "mm_processor_kwargs": None, "return_token_ids": False, "vllm_xargs": None,
             "include_reasoning": True, "prompt_embeds": None, "request_id": None, "top_k": 0, "min_p": 0.0,
             "repetition_penalty": 1.0},
    "llama.cpp": {"cache_prompt": True, "repeat_last_n": 64, "repeat_penalty": 1.0, "typical_p": 1, "typ_p": 1.0,
                  "tfs_z": 1.0, "top_n_sigma": -1.0, "mirostat": 0, "mirostat_tau": 5.0, "mirostat_eta": 0.1,
                  "dynatemp_range": 0.0, "dynatemp_exponent": 1.0, "dry_multiplier": 0.0, "dry_base": 1.75,
                  "dry_allowed_length": 2, "dry_penalty_last_n": -1, "dry_sequence_breakers": ["\n", ":", "\"", "*"],
                  "xtc_probability": 0.0, "xtc_threshold": 0.1, "min_keep": 0, "n_probs": 0, "n_keep": 0,
                  "n_indent": 0, "t_max_predict_ms": 0, "id_slot": -1, "lora": [], "response_fields": [],
                  "return_tokens": False, "post_sampling_probs": False, "timings_per_token": False,
                  "samplers": ["penalties", "dry", "top_n_sigma", "top_k", "typ_p", "top_p", "min_p", "xtc",
                               "temperature"]},
    "OpenAI": {"best_of": 1, "suffix": "", "logit_bias": {}, "stream": False, "stream_options": {}, "store": False,
               "service_tier": "auto", "prompt_cache_retention": "in-memory", "user": "", "safety_identifier": "x"},
}


@pytest.mark.parametrize("server", DEFAULTS)
def test_other_servers_defaults(served: Served, server: str) -> None:
    """Which say what happens anyway; the answer is the one without them."""
    assert complete(served, **DEFAULTS[server])["choices"] == complete(served)["choices"]


@pytest.mark.parametrize("field", ["length_penalty", "bad_words", "priority", "cache_salt", "samplers", "mirostat",
                                   "dry_multiplier", "xtc_probability", "typical_p", "repeat_last_n", "lora", "tfs_z",
                                   "allowed_token_ids", "return_token_ids", "n_probs"])
def test_what_would_change_the_answer_is_refused(served: Served, field: str) -> None:
    response = served.http.post("/v1/completions", json={"prompt": "x", field: ["top_k"] if field == "samplers" else 7})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == field
    assert response.json()["error"]["code"] == "not_supported"


def test_other_names(served: Served) -> None:
    def texts(**body: Any) -> list[str]:
        response = served.http.post("/v1/completions", json={"prompt": PROMPT, "temperature": 0} | body)
        assert response.status_code == 200, response.text
        return [choice["text"] for choice in response.json()["choices"]]

    assert texts(n_predict=5) == texts(max_new_tokens=5) == texts(max_tokens=5)
    assert texts(repeat_penalty=1.8) == texts(repetition_penalty=1.8) != texts()
    whole = {"n_predict": -1, "ignore_eos": True, "prompt": [5] * 1000}
    assert texts(**whole) == texts(max_tokens=24, ignore_eos=True, prompt=[5] * 1000)
    response = served.http.post("/v1/completions", json={"prompt": "x", "max_tokens": 3, "n_predict": 4})
    assert response.json()["error"]["message"] == "max_tokens is 3 and n_predict is 4; give one of them"


def test_null_is_not_given(served: Served) -> None:
    """Of any field, known or not, down to the options of the stream."""
    nulls = dict.fromkeys([*CompletionRequest.model_fields, "frobnicate"])
    assert complete(served, **nulls | {"prompt": PROMPT, "max_tokens": 8, "temperature": 0}) \
        ["choices"] == complete(served)["choices"]
    body = {"prompt": PROMPT, "max_tokens": 2, "stream": True, "stream_options": {"frobnicate": None}}
    assert len(events(served.http.post("/v1/completions", json=body).text)) == 2
    response = served.http.post("/v1/completions", json={"prompt": None})
    assert response.json()["error"]["message"] == "prompt is required"


@pytest.mark.parametrize(("stop", "named"), [("", "an empty string"), (["x", ""], "an empty string"),
                                             (["x"] * 17, "17 strings; at most 16")], ids=str)
def test_stop_strings_are_refused_in_words(served: Served, stop: Any, named: str) -> None:
    message = served.http.post("/v1/completions", json={"prompt": "x", "stop": stop}).json()["error"]["message"]
    assert message.startswith("stop has ")
    assert named in message


@pytest.mark.parametrize("content", [
    b'{"prompt": "\\ud800"}', b'{"prompt": "x", "\\ud800": 1}', b'{"prompt": "x", "stop": "\\ud800"}',
    b'{"prompt": NaN}', b'{"prompt": "x", "temperature": NaN}', b'{"prompt": "x", "temperature": 1e999}',
    b'{"prompt": "\xff"}', b"", b"{", b"[]",
    b"[" * 100_000, b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}", b'{"prompt": "x", "logit_bias": {"\\ud800": 1}}',
    b'{"prompt": "x", "logit_bias": {"1": Infinity}}', b'{"prompt": "x", "model": "\\u0000\\ud800"}',
], ids=repr)
def test_bodies_that_are_no_request(served: Served, content: bytes) -> None:
    response = served.http.post("/v1/completions", content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == 400, response.text
    assert set(json.loads(response.content)["error"]) == {"message", "type", "param", "code"}


def test_nul_in_a_prompt(served: Served) -> None:
    complete(served, prompt="a\0b", stop="\0", max_tokens=2)


def test_signed_seeds(served: Served) -> None:
    texts = [complete(served, temperature=1, seed=seed, n=2)["choices"][0]["text"]
             for seed in (-(1 << 63), -1, 0, (1 << 63) - 1, -1)]
    assert texts[1] == texts[4]


def test_32_streams_equal_their_solo_runs(served: Served) -> None:
    if served.engine.engine.backend.name == "reference":
        pytest.skip("only the native backend's arithmetic does not depend on the batch")
    bodies: list[Any] = [{"model": "demo", "prompt": f"{PROMPT} had {i} sons", "max_tokens": 12, "temperature": 0.8,
                          "seed": i, "stream": True, "extra_body": {"ignore_eos": True}} for i in range(32)]

    async def text(client: openai.AsyncOpenAI, body: Any) -> str:
        return "".join([chunk.choices[0].text async for chunk in await client.completions.create(**body)])

    async def run() -> None:
        async with openai.AsyncOpenAI(base_url=served.url + "/v1", api_key="none", max_retries=0) as client:
            together = await asyncio.gather(*(text(client, body) for body in bodies))
            for body, expected in zip(bodies, together, strict=True):
                assert await text(client, body) == expected

    asyncio.run(run())

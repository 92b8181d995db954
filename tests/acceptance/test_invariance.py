"""The same request gives the same tokens and log-probabilities, bit for bit, whatever else the server does."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import openai
import pytest

from fptq_runtime import LLM, SamplingParams
from tests.acceptance.harness import HELDOUT, Server

Answer = dict[str, Any]


def requests(count: int, seed: int, longest: int) -> list[dict[str, Any]]:
    """Mixed: greedy and sampled, short and long prompts, shared prefixes, every sampling parameter now and then."""
    rng = random.Random(seed)
    text = HELDOUT.read_text(encoding="utf-8")
    shared = text[20_000:21_500]
    made = []
    for i in range(count):
        start = rng.randrange(len(text) - 4000)
        prompt = rng.choice([text[start:start + rng.randint(5, 200)], text[start:start + rng.randint(800, 2500)],
                             shared + text[start:start + rng.randint(0, 40)]])
        extra: dict[str, Any] = {}
        for name, value in {"top_k": rng.randint(1, 50), "min_p": rng.random() / 10, "ignore_eos": True,
                            "repetition_penalty": 0.8 + rng.random() / 2, "min_tokens": rng.randint(0, 8)}.items():
            if rng.random() < 0.3:
                extra[name] = value
        body: dict[str, Any] = {"prompt": prompt, "max_tokens": rng.randint(8, longest), "seed": i, "logprobs": 3,
                                "temperature": rng.choice([0.0, 0.7, 1.0, 1.3]), "extra_body": extra}
        for name, value in {"top_p": 0.5 + rng.random() / 2, "presence_penalty": rng.uniform(-1, 1),
                            "frequency_penalty": rng.uniform(-1, 1), "stop": [" the ", ".", "ing"],
                            "logit_bias": {str(rng.randrange(2, 4000)): rng.uniform(-5, 5) for _ in range(5)}}.items():
            if rng.random() < 0.3:
                body[name] = value
        made.append(body)
    return made


async def stream(client: openai.AsyncOpenAI, body: dict[str, Any]) -> Answer:
    """A streamed completion put together."""
    answer: Answer = {"text": "", "finish_reason": None, "tokens": [], "token_logprobs": [], "top_logprobs": []}
    async for chunk in await client.completions.create(**body, stream=True):
        for choice in chunk.choices:
            answer["text"] += choice.text
            answer["finish_reason"] = choice.finish_reason or answer["finish_reason"]
            if choice.logprobs is not None:
                for key in ("tokens", "token_logprobs", "top_logprobs"):
                    answer[key] += getattr(choice.logprobs, key)
    return answer


def at_once(server: Server, model: str, bodies: list[dict[str, Any]]) -> list[Answer]:
    async def run() -> list[Answer]:
        async with server.async_openai() as client:
            return await asyncio.gather(*(stream(client, {"model": model, **body}) for body in bodies))

    return asyncio.run(run())


def alone(server: Server, model: str, body: dict[str, Any]) -> Answer:
    """Not streamed, and nothing beside it."""
    choice = server.openai.completions.create(model=model, **body).choices[0]
    logprobs = choice.logprobs
    assert logprobs is not None
    return {"text": choice.text, "finish_reason": choice.finish_reason, "tokens": logprobs.tokens,
            "token_logprobs": logprobs.token_logprobs, "top_logprobs": logprobs.top_logprobs}


@pytest.fixture(scope="module")
def bodies() -> list[dict[str, Any]]:
    return requests(32, seed=0, longest=64)


@pytest.fixture(scope="module")
def solo(server: Server, bodies: list[dict[str, Any]]) -> list[Answer]:
    return [alone(server, "demo", body) for body in bodies]


def test_requests_differ(solo: list[Answer]) -> None:
    assert {answer["finish_reason"] for answer in solo} == {"stop", "length"}
    assert len({answer["text"] for answer in solo}) > 28
    assert all(len(answer["tokens"]) == len(answer["token_logprobs"]) > 0 for answer in solo)


def test_32_concurrent_streams_equal_their_solo_runs(server: Server, bodies: list[dict[str, Any]],
                                                     solo: list[Answer]) -> None:
    for answer, expected, body in zip(at_once(server, "demo", bodies), solo, bodies, strict=True):
        assert answer == expected, body


def test_without_prefix_cache_in_small_chunks(tight_server: Server, bodies: list[dict[str, Any]], solo: list[Answer],
                                              ) -> None:
    order = random.Random(1).sample(range(32), 32)
    for i, answer in zip(order, at_once(tight_server, "tales", [bodies[i] for i in order]), strict=True):
        assert answer == solo[i], bodies[i]
    for body, expected in zip(bodies[::4], solo[::4], strict=True):
        assert alone(tight_server, "tales", body) == expected, body


def test_after_preemption(server: Server, tight_server: Server) -> None:
    """The KV cache of this server holds half of them to their end: some are preempted and computed anew."""
    prompts = [f"The {i} brothers of the king came to" for i in range(2, 18)]
    bodies = [{"prompt": prompt, "max_tokens": 200, "seed": 3, "temperature": 0.8, "logprobs": 2,
               "extra_body": {"ignore_eos": True}} for prompt in prompts]
    before = tight_server.metrics().value("preempt", "counter")
    answers = at_once(tight_server, "tales", bodies)
    assert tight_server.metrics().value("preempt", "counter") > before
    for body, answer in zip(bodies, answers, strict=True):
        assert answer == alone(server, "demo", body)


def test_greedy_text_with_and_without_prefix_cache(server: Server, tight_server: Server) -> None:
    prompt = HELDOUT.read_text(encoding="utf-8")[40_000:41_200]
    texts = [which.complete(prompt=prompt + tail, max_tokens=48, temperature=0)["choices"][0]["text"]
             for tail in ("", " And then") for which in (server, server, tight_server)]
    assert texts[0] == texts[1] == texts[2]
    assert texts[3] == texts[4] == texts[5]


def test_echo_logprobs_are_those_of_a_cached_prefix(server: Server, tight_server: Server) -> None:
    """The generated token's, after a prompt found in the cache, and every prompt token's, from either server."""
    prompt = HELDOUT.read_text(encoding="utf-8")[60_000:61_500]
    body: dict[str, Any] = {"prompt": prompt, "max_tokens": 4, "temperature": 0, "logprobs": 5}
    cached = [server.complete(**body)["choices"][0]["logprobs"] for _ in range(2)]
    echo = server.complete(**body, echo=True)["choices"][0]["logprobs"]
    assert echo == tight_server.complete(**body, echo=True)["choices"][0]["logprobs"]
    for key in ("tokens", "token_logprobs", "top_logprobs"):
        assert echo[key][-4:] == cached[0][key] == cached[1][key]


def test_offline_api_equals_the_server(server: Server, demo_artifact: Path, bodies: list[dict[str, Any]],
                                       solo: list[Answer]) -> None:
    """LLM(artifact).generate, all at once, against the server's answers one by one."""
    chosen = list(range(0, 32, 2))
    params = []
    for body in (bodies[i] for i in chosen):
        options = {**body, **body["extra_body"]}
        del options["prompt"], options["extra_body"]
        if "logit_bias" in options:
            options["logit_bias"] = {int(key): value for key, value in options["logit_bias"].items()}
        if "stop" in options:
            options["stop"] = tuple(options["stop"])
        params.append(SamplingParams(**options))
    llm = LLM(demo_artifact)
    for i, param in zip(chosen, params, strict=True):
        [[completion]] = llm.generate([bodies[i]["prompt"]], param)
        assert completion.text == solo[i]["text"]
        assert completion.finish_reason == solo[i]["finish_reason"]
        assert [entry.logprob for entry in completion.logprobs] == solo[i]["token_logprobs"]
    greedy = SamplingParams(max_tokens=16, temperature=0)
    prompts = [bodies[i]["prompt"] for i in chosen]
    together = llm.generate(prompts, greedy)
    for prompt, [completion] in zip(prompts, together, strict=True):
        answer = server.complete(prompt=prompt, max_tokens=16, temperature=0)
        assert completion.text == answer["choices"][0]["text"]
        assert len(completion.token_ids) == answer["usage"]["completion_tokens"]

"""/generate and /generate_stream."""

from __future__ import annotations

from typing import Any

import pytest
from huggingface_hub import InferenceClient

from fptq_runtime.models.tokenizer import Tokenizer
from tests.server.conftest import EOS, Served, events

PROMPT = "Once upon a time there was"


def generate(served: Served, **parameters: Any) -> dict[str, Any]:
    response = served.http.post("/generate", json={"inputs": PROMPT, "parameters": {"max_new_tokens": 8} | parameters})
    assert response.status_code == 200, response.text
    result: dict[str, Any] = response.json()
    return result


def test_greedy_by_default(served: Served) -> None:
    expected = served.http.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 8, "temperature": 0}).json()
    assert generate(served) == {"generated_text": expected["choices"][0]["text"], "details": None}
    assert generate(served, return_full_text=True)["generated_text"] == PROMPT + expected["choices"][0]["text"]
    sampled = {generate(served, do_sample=True, temperature=2.0, seed=seed)["generated_text"] for seed in range(4)}
    assert len(sampled) > 1


def test_details(served: Served, tokenizer: Tokenizer) -> None:
    answer = generate(served, details=True, decoder_input_details=True, top_n_tokens=2, seed=3)
    details = answer["details"]
    assert details["finish_reason"] == "length"
    assert details["generated_tokens"] == len(details["tokens"]) == len(details["top_tokens"]) == 8
    assert details["seed"] == 3
    assert "".join(token["text"] for token in details["tokens"]) == answer["generated_text"]
    assert [token["id"] for token in details["prefill"]] == tokenizer.encode(PROMPT)
    assert details["prefill"][0]["logprob"] is None
    assert all(token["logprob"] < 0 for token in details["prefill"][1:])
    assert all(top[0]["logprob"] == token["logprob"]
               for top, token in zip(details["top_tokens"], details["tokens"], strict=True))


@pytest.mark.parametrize("parameters", [{}, {"temperature": 1.5, "seed": 9}, {"return_full_text": True},
                                        {"stop": ["e"]}], ids=str)
def test_stream(served: Served, parameters: dict[str, Any]) -> None:
    expected = generate(served, details=True, **parameters)
    body = {"inputs": PROMPT, "parameters": {"max_new_tokens": 8} | parameters}
    chunks = events(served.http.post("/generate_stream", json=body).text)
    assert [chunk["token"]["id"] for chunk in chunks] == [token["id"] for token in expected["details"]["tokens"]]
    assert [chunk["index"] for chunk in chunks] == list(range(1, len(chunks) + 1))
    assert all(chunk["generated_text"] is None and chunk["details"] is None for chunk in chunks[:-1])
    assert chunks[-1]["generated_text"] == expected["generated_text"]
    assert chunks[-1]["details"]["finish_reason"] == expected["details"]["finish_reason"]
    assert chunks[-1]["details"]["generated_tokens"] == len(chunks)


def test_truncate(served: Served, tokenizer: Tokenizer) -> None:
    details = generate(served, decoder_input_details=True, truncate=3)["details"]
    assert [token["id"] for token in details["prefill"]] == tokenizer.encode(PROMPT)[-3:]


def test_eos_is_special(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served.engine.engine, "_eos_token_ids", frozenset(range(4096)))
    details = generate(served, details=True)["details"]
    assert details["finish_reason"] == "eos_token"
    token = served.http.post("/v1/completions", json={"prompt": "x", "max_tokens": 1, "logit_bias": {str(EOS): 100},
                                                      "logprobs": 0}).json()["choices"][0]["logprobs"]["tokens"]
    assert token == ["</s>"]


@pytest.mark.parametrize(("parameters", "named"), [
    ({"watermark": True}, "watermark"), ({"typical_p": 0.5}, "typical_p"), ({"best_of": 0}, "best_of"),
    ({"grammar": {}}, "grammar"), ({"frobnicate": 1}, "frobnicate"), ({"max_new_tokens": "8"}, "max_new_tokens"),
    ({"max_new_tokens": -1}, "max_new_tokens"),
], ids=str)
def test_refusals(served: Served, parameters: dict[str, Any], named: str) -> None:
    for path in ("/generate", "/generate_stream"):
        response = served.http.post(path, json={"inputs": PROMPT, "parameters": parameters})
        assert response.status_code == 400
        assert named in response.json()["error"]["message"]


@pytest.mark.parametrize("parameters", [{"max_new_tokens": 0}, {"decoder_input_details": True}, {"best_of": 2}],
                         ids=str)
def test_what_a_stream_cannot_tell(served: Served, parameters: dict[str, Any]) -> None:
    """/generate takes these; a stream, whose events are tokens, refuses them by name."""
    generate(served, **parameters)
    body = {"inputs": PROMPT, "parameters": parameters, "stream": True}
    for response in (served.http.post("/generate_stream", json=body), served.http.post("/", json=body)):
        assert response.status_code == 400
        assert response.json()["error"]["param"] == f"parameters.{next(iter(parameters))}"


def test_best_of(served: Served) -> None:
    options = {"best_of": 4, "do_sample": True, "temperature": 1.5, "seed": 5, "details": True}
    answer = generate(served, **options)
    others = answer["details"]["best_of_sequences"]
    means = [sum(token["logprob"] for token in details["tokens"]) / details["generated_tokens"]
             for details in (answer["details"], *others)]
    assert len(means) == 4
    assert means == sorted(means, reverse=True)
    alone = [generate(served, **options | {"best_of": 1, "seed": 5 + i})["generated_text"] for i in range(4)]
    assert {answer["generated_text"], *(other["generated_text"] for other in others)} == set(alone)
    assert generate(served, **options | {"best_of": 1})["details"]["best_of_sequences"] is None


def test_stream_within_the_request(served: Served) -> None:
    """As its clients write it, to / and to /generate."""
    body = {"inputs": PROMPT, "parameters": {"max_new_tokens": 4}}
    streamed = events(served.http.post("/generate_stream", json=body).text)
    for path in ("/", "/generate"):
        assert events(served.http.post(path, json=body | {"stream": True}).text) == streamed
    whole = served.http.post("/generate", json=body).json()
    assert served.http.post("/", json=body | {"stream": False}).json() == [whole]


def test_huggingface_hub(served: Served) -> None:
    """Its client speaks to a model's URL as to a text-generation-inference server."""
    client = InferenceClient(model=served.url, provider="hf-inference")
    expected = generate(served, details=True)
    text = client.text_generation(PROMPT, max_new_tokens=8)
    assert text == expected["generated_text"]
    details = client.text_generation(PROMPT, max_new_tokens=8, details=True, decoder_input_details=True, top_k=1)
    assert details.generated_text == text
    assert details.details.finish_reason == "length"
    assert len(details.details.tokens) == 8
    assert "".join(client.text_generation(PROMPT, max_new_tokens=8, stream=True)) == text
    last = list(client.text_generation(PROMPT, max_new_tokens=8, stream=True, details=True))[-1]
    assert last.generated_text == text
    assert last.details is not None
    assert last.details.generated_tokens == 8
    info = client.get_endpoint_info()
    assert (info["model_id"], info["max_total_tokens"]) == ("demo", 1024)
    assert client.health_check()
    messages = [{"role": "user", "content": "Of a king."}]
    whole = client.chat_completion(messages, max_tokens=6, temperature=0)
    chunks = list(client.chat_completion(messages, max_tokens=6, temperature=0, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content


@pytest.mark.parametrize("name", ["tgi", "dummy"])
def test_names_that_stand_for_the_one_model(served: Served, name: str) -> None:
    body = {"model": name, "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
    assert served.http.post("/v1/chat/completions", json=body).json()["model"] == "demo"

"""/v1/embeddings, against transformers' hidden states under sentence-transformers' formulas, through OpenAI's SDK."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import torch
from transformers import AutoModel

import fptq_runtime
from fptq_runtime.config import Pooling
from fptq_runtime.kernels.base import Backend
from fptq_runtime.kernels.select import select_backend
from fptq_runtime.models.decoder import Decoder
from fptq_runtime.models.loader import Checkpoint, load_model
from fptq_runtime.models.tokenizer import Tokenizer
from fptq_server import app
from tests.server.conftest import Served

FLOAT = Path(fptq_runtime.__file__).parent / "demo"
TEXTS = ["Once upon a time there was a king.", "The cat sat on the mat and looked at the moon. " * 5, "x"]


@pytest.fixture(scope="module")
def hidden() -> Callable[[list[int]], np.ndarray]:
    model = AutoModel.from_pretrained(FLOAT, dtype=torch.float32).eval()

    @torch.inference_mode()
    def states(token_ids: list[int]) -> np.ndarray:
        return np.asarray(model(torch.tensor([token_ids])).last_hidden_state[0])

    return states


@pytest.fixture(scope="module")
def exact_decoder() -> tuple[Decoder, Backend]:
    backend = select_backend()
    return load_model(Checkpoint(FLOAT), backend), backend


@pytest.fixture(params=["last", "mean", "weightedmean"])
def exact(request: pytest.FixtureRequest, run_server: Callable[..., Any], exact_decoder: tuple[Decoder, Backend]
          ) -> Iterator[tuple[Served, Pooling]]:
    """Weights, keys and values as transformers has them; prompts in chunks."""
    with pytest.MonkeyPatch.context() as patch:
        build = app.embeddings_router
        patch.setattr(app, "embeddings_router", lambda engine, tokenizer, model: build(
            engine, tokenizer, replace(model, pooling=request.param)))
        with run_server(decoder=exact_decoder, kv_cache_dtype="float32", max_num_batched_tokens=32) as served:
            yield served, request.param


def pooled(states: np.ndarray, pooling: Pooling) -> np.ndarray:
    weights = np.arange(1, len(states) + 1) if pooling == "weightedmean" else np.ones(len(states))
    vector = states[-1] if pooling == "last" else np.average(states, 0, weights)
    return vector / np.linalg.norm(vector)


def create(served: Served, **body: Any) -> np.ndarray:
    with openai.OpenAI(base_url=served.url + "/v1", api_key="none", max_retries=0) as client:
        answer = client.embeddings.create(model="demo", **body)
    assert [each.index for each in answer.data] == list(range(len(answer.data)))
    return np.array([each.embedding for each in answer.data], np.float32)


def test_as_sentence_transformers(exact: tuple[Served, Pooling], tokenizer: Tokenizer,
                                  hidden: Callable[[list[int]], np.ndarray]) -> None:
    served, pooling = exact
    prompts = [tokenizer.encode(text) for text in TEXTS]
    expected = np.array([pooled(hidden(prompt), pooling) for prompt in prompts])
    given = create(served, input=TEXTS)
    np.testing.assert_allclose(given, expected, atol=2e-6)
    np.testing.assert_allclose(np.linalg.norm(given, axis=1), 1, rtol=1e-6)
    for form in ({"input": prompts}, {"input": TEXTS, "encoding_format": "float"}):
        assert np.array_equal(create(served, **form), given)
    for text, own in zip(TEXTS, given, strict=True):  # whatever company it keeps
        assert np.array_equal(create(served, input=text)[0], own)
    cut = create(served, input=TEXTS, dimensions=40)
    np.testing.assert_allclose(cut, expected[:, :40] / np.linalg.norm(expected[:, :40], axis=1)[:, None], atol=2e-6)
    short = create(served, input=TEXTS[1], extra_body={"truncate_prompt_tokens": 9})
    np.testing.assert_allclose(short[0], pooled(hidden(prompts[1][:9]), pooling), atol=2e-6)


def test_usage_and_base64(served: Served, tokenizer: Tokenizer) -> None:
    answer = served.http.post("/v1/embeddings", json={"input": TEXTS, "encoding_format": "base64"}).json()
    tokens = sum(len(tokenizer.encode(text)) for text in TEXTS)
    assert answer["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}
    numbers = served.http.post("/v1/embeddings", json={"input": TEXTS}).json()["data"]
    for encoded, each in zip(answer["data"], numbers, strict=True):
        assert np.array_equal(np.frombuffer(base64.b64decode(encoded["embedding"]), "<f4"),
                              np.array(each["embedding"], np.float32))


def test_more_than_run_at_once(served: Served) -> None:
    """And in the order in which they were sent."""
    texts = [f"number {i}" for i in range(70)]
    given = create(served, input=texts)
    assert np.array_equal(given[63], create(served, input=texts[63])[0])


@pytest.mark.parametrize(("body", "named"), [
    ({}, "input"), ({"input": ""}, None), ({"input": []}, "input"), ({"input": [[]]}, "input"),
    ({"input": [4096]}, "4096"),
    ({"input": "x", "dimensions": 0}, "dimensions"), ({"input": "x", "dimensions": 257}, "256"),
    ({"input": "x", "encoding_format": "binary"}, "encoding_format"), ({"input": "x", "model": "ada"}, "ada"),
    ({"input": ["x"] * 2049}, "2048"), ({"input": "a cat " * 1000}, "maximum context length is 1024"),
    ({"input": "x", "normalize": False}, "normalize"),
], ids=str)
def test_refusals(served: Served, body: dict[str, Any], named: str | None) -> None:
    response = served.http.post("/v1/embeddings", json=body)
    if named is None:
        assert response.status_code == 200  # the beginning of sequence alone
        return
    assert response.status_code in (400, 404)
    assert named in response.json()["error"]["message"]


def test_a_model_without(served: Served, run_server: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    build = app.embeddings_router
    monkeypatch.setattr(app, "embeddings_router", lambda engine, tokenizer, model: build(
        engine, tokenizer, replace(model, no_embeddings="there are none")))
    with run_server() as served:
        error = served.http.post("/v1/embeddings", json={"input": "x"}).json()["error"]
    assert (error["message"], error["code"]) == ("there are none", "not_supported")

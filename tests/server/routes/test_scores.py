"""/v1/score and /v1/rerank, against transformers' hidden states."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel

import fptq_runtime
from fptq_runtime.kernels.select import select_backend
from fptq_runtime.models.loader import Checkpoint, load_model
from fptq_runtime.models.tokenizer import Tokenizer
from fptq_server import app
from tests.server.conftest import Served

FLOAT = Path(fptq_runtime.__file__).parent / "demo"
QUERY = "A king had a cat."
DOCUMENTS = ["Once upon a time there was a king.", "The cat sat on the mat. " * 9, "x", "A king had a cat."]


@torch.inference_mode()
def cosines(tokenizer: Tokenizer) -> list[float]:
    """Of the last tokens' hidden states."""
    model = AutoModel.from_pretrained(FLOAT, dtype=torch.float32).eval()
    query, *documents = [np.asarray(model(torch.tensor([tokenizer.encode(text)])).last_hidden_state[0, -1], np.float64)
                         for text in [QUERY, *DOCUMENTS]]
    return [query @ each / np.sqrt((query @ query) * (each @ each)) for each in documents]


def test_as_transformers(run_server: Callable[..., Any], tokenizer: Tokenizer) -> None:
    backend = select_backend()
    expected = cosines(tokenizer)
    with run_server(decoder=(load_model(Checkpoint(FLOAT), backend), backend), kv_cache_dtype="float32") as served:
        for body in ({"text_1": QUERY, "text_2": DOCUMENTS}, {"queries": [QUERY] * 4, "documents": DOCUMENTS}):
            answer = served.http.post("/v1/score", json=body).json()
            assert [each["score"] for each in answer["data"]] == pytest.approx(expected, abs=2e-6)
            assert [each["index"] for each in answer["data"]] == [0, 1, 2, 3]
        for path in ("/v1/rerank", "/rerank", "/v2/rerank"):
            body: dict[str, Any] = {"query": QUERY, "documents": [*DOCUMENTS[:3], {"text": QUERY}]}
            ranked = served.http.post(path, json=body).json()
            order = sorted(range(4), key=lambda i: -expected[i])
            assert [each["index"] for each in ranked["results"]] == order
            assert [each["relevance_score"] for each in ranked["results"]] == pytest.approx(
                [expected[i] for i in order], abs=2e-6)
            assert [each["document"]["text"] for each in ranked["results"]] == [DOCUMENTS[i] for i in order]
        assert ranked["usage"]["prompt_tokens"] == sum(len(tokenizer.encode(text)) for text in [QUERY, *DOCUMENTS])
        body |= {"top_n": 1, "return_documents": False}
        [best] = served.http.post("/v1/rerank", json=body).json()["results"]
        assert (best["index"], set(best)) == (3, {"index", "relevance_score"})


@pytest.mark.parametrize(("path", "body", "param"), [
    ("/v1/score", {"text_1": "x"}, "text_2"), ("/v1/score", {"text_1": ["x", "y"], "text_2": ["x"]}, "text_1"),
    ("/v1/score", {"text_1": "x", "queries": "y", "text_2": "z"}, "queries"),
    ("/v1/score", {"text_1": "x", "text_2": []}, "text_2"),
    ("/v1/rerank", {"query": "x", "documents": []}, "documents"),
    ("/v1/rerank", {"query": "x", "documents": ["a cat " * 1000]}, "documents"),
    ("/v1/rerank", {"query": "x", "documents": [{"text": "x", "image": "y"}]}, "documents.0.image"),
    ("/v1/score", {"text_1": "x", "text_2": "y", "use_activation": False}, "use_activation"),
], ids=str)
def test_refusals(served: Served, path: str, body: dict[str, Any], param: str) -> None:
    response = served.http.post(path, json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


def test_a_model_that_was_not_made_for_it(run_server: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    build = app.scores_router
    monkeypatch.setattr(app, "scores_router", lambda embedder, model: build(
        embedder, replace(model, no_scores="not this one")))
    with run_server() as served:
        error = served.http.post("/v1/score", json={"text_1": "x", "text_2": "y"}).json()["error"]
    assert (error["message"], error["code"]) == ("not this one", "not_supported")

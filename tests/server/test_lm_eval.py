"""lm-eval's own client against the server, which it was not written for."""

from __future__ import annotations

from typing import Any

import pytest

from fptq_runtime.models.tokenizer import Tokenizer
from tests.server.conftest import Served

pytest.importorskip("tenacity")
api = pytest.importorskip("lm_eval.models.openai_completions")
instance = pytest.importorskip("lm_eval.api.instance")


@pytest.fixture(scope="module")
def lm(served: Served) -> Any:
    return api.LocalCompletionsAPI(base_url=served.url + "/v1/completions", model="demo", tokenizer_backend="remote",
                                   max_length=1024, batch_size=3, tokenized_requests=True)


def request(kind: str, *arguments: Any) -> Any:
    return instance.Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


def test_loglikelihood(lm: Any, served: Served, tokenizer: Tokenizer) -> None:
    """The sum over the continuation's own tokens, as echo gives them."""
    pairs = [("Once upon a", " time there was"), ("The king was", " the king"), ("I", " said"), ("A b", " zq zq")]
    scores = lm.loglikelihood([request("loglikelihood", *pair) for pair in pairs], disable_tqdm=True)
    for (context, continuation), (logprob, greedy) in zip(pairs, scores, strict=True):
        start = len(tokenizer.encode(context, add_special_tokens=False))
        ids = tokenizer.encode(context + continuation, add_special_tokens=False)
        logprobs = served.http.post("/v1/completions", json={
            "prompt": ids, "max_tokens": 0, "echo": True, "logprobs": 1}).json()["choices"][0]["logprobs"]
        assert logprob == pytest.approx(sum(logprobs["token_logprobs"][start:]), rel=1e-6)
        assert greedy == all(value == max(top.values()) for value, top in zip(
            logprobs["token_logprobs"][start:], logprobs["top_logprobs"][start:], strict=True))


def test_generate_until(lm: Any, served: Served) -> None:
    [text] = lm.generate_until([request("generate_until", "Once upon a time", {"until": ["."], "max_gen_toks": 24})],
                               disable_tqdm=True)
    body = {"prompt": "Once upon a time", "max_tokens": 24, "temperature": 0, "stop": ".", "add_special_tokens": False}
    assert text == served.http.post("/v1/completions", json=body).json()["choices"][0]["text"]

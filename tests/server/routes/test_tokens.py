"""/tokenize, /detokenize and /tokenizer_info."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import models

from fptq_runtime.models.tokenizer import Tokenizer
from tests.server.conftest import Served


@settings(max_examples=30)
@given(text=st.text(max_size=40))
def test_there_and_back(served: Served, text: str) -> None:
    tokens = served.http.post("/tokenize", json={"prompt": text, "add_special_tokens": False}).json()["tokens"]
    assert served.http.post("/detokenize", json={"tokens": tokens}).json()["prompt"] == text


def test_tokenize(served: Served, tokenizer: Tokenizer) -> None:
    answer = served.http.post("/tokenize", json={"prompt": "a king", "return_token_strs": True}).json()
    tokens = tokenizer.encode("a king")
    assert answer == {"tokens": tokens, "count": len(tokens), "max_model_len": 1024,
                      "token_strs": [tokenizer.token(token) for token in tokens]}
    messages = [{"role": "user", "content": "a king"}]
    chat = served.http.post("/tokenize", json={"messages": messages}).json()
    assert chat["tokens"] == tokenizer.apply_chat_template(messages)


@pytest.mark.parametrize(("path", "body", "named"), [
    ("/tokenize", {}, "prompt"),
    ("/tokenize", {"prompt": "x", "messages": [{"role": "user", "content": "x"}]}, "prompt"),
    ("/tokenize", {"prompt": "x", "add_generation_prompt": True}, "add_generation_prompt"),
    ("/tokenize", {"messages": [{"role": "user", "content": "x"}], "add_special_tokens": True}, "add_special_tokens"),
    ("/tokenize", {"prompt": "x" * 100_000}, "100000"),
    ("/tokenize", {"prompt": "x", "model": "gpt-4"}, "gpt-4"),
    ("/detokenize", {"tokens": [5, 99999]}, "99999"),
    ("/detokenize", {"tokens": [-1]}, "tokens"),
    ("/detokenize", {"tokens": [True]}, "tokens"),
], ids=str)
def test_refusals(served: Served, path: str, body: dict[str, object], named: str) -> None:
    response = served.http.post(path, json=body)
    assert response.status_code in (400, 404)
    assert named in response.json()["error"]["message"]


def test_tokenizer_info(served: Served) -> None:
    info = served.http.get("/tokenizer_info").json()
    assert (info["bos_token"], info["eos_token"]) == ("<s>", "</s>")
    assert "messages" in info["chat_template"]


def test_a_text_that_the_tokenizer_cannot_read_is_refused(run_server: Callable[..., Any], tmp_path: Path) -> None:
    """A unigram model without a token for what it does not know: the library raises a bare Exception."""
    (tmp_path / "tokenizer.json").write_text(Backend(models.Unigram([("a", -1.0), ("b", -2.0)], None, False)).to_str())
    with run_server(tokenizer=Tokenizer(tmp_path)) as served:
        for path, body in (("/tokenize", {"prompt": "abz"}), ("/v1/completions", {"prompt": "abz"}),
                           ("/v1/embeddings", {"input": "abz"}), ("/generate", {"inputs": "abz"})):
            response = served.http.post(path, json=body)
            assert response.status_code == 400
            assert "cannot read this text" in response.json()["error"]["message"]
        assert served.http.post("/tokenize", json={"prompt": "ab"}).json()["count"] == 2

"""Where the tokens of SentencePiece vocabularies lie in their text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend

from fptq_runtime.models.tokenizer import Tokenizer
from fptq_server.logprobs import TextPosition, TokenTexts
from tests.models.test_tokenizer import sentencepiece_bpe, unigram, write


@pytest.mark.parametrize("skip_special", [True, False])
@pytest.mark.parametrize("backend", [sentencepiece_bpe, unigram])
def test_offsets(tmp_path: Path, backend: Callable[[], Backend], skip_special: bool) -> None:
    tokenizer = Tokenizer(write(tmp_path / "model", backend(), {"bos_token": "<s>"}))
    ids = tokenizer.encode("the é🙂 a")
    position = TextPosition(TokenTexts(tokenizer), skip_special)
    for i, token_id in enumerate(ids):
        text = tokenizer.decode(ids[:i], skip_special)
        assert position.offset == len(text) or "\ufffd" in text
        position.advance(token_id)
    assert position.offset == len(tokenizer.decode(ids, skip_special))
    continued = TextPosition(TokenTexts(tokenizer), skip_special, ids)
    continued.advance(tokenizer.encode("the", add_special_tokens=False)[0])
    assert continued.offset == len(" the"), "a space is stripped at the beginning of a text alone"

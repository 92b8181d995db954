"""Incremental detokenization against decoding the whole at once."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

import fptq_runtime
from fptq_runtime.models.tokenizer import Tokenizer, TokenStream

DEMO = Tokenizer(Path(fptq_runtime.__file__).parent / "demo")

# Not U+FFFD: text that ends in it cannot be told from a character still open, and is held back.
texts = st.text(st.sampled_from("aB é—„ß漢😀\n1 .") | st.characters(codec="utf-8", exclude_characters="\ufffd"),
                max_size=30)


@pytest.fixture(scope="session")
def sentencepiece() -> Backend:
    """Llama 2's decoder over a small vocabulary: ▁ for a space, a leading one dropped, bytes as <0xE4>."""
    words = ["<s>", "▁", "▁a", "▁the", "b", "c", *(f"<0x{byte:02X}>" for byte in range(256))]
    backend = Backend(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[], byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                         decoders.Strip(" ", 1, 0)])
    backend.add_special_tokens(["<s>"])
    return backend


def streamed(tokenizer: Backend, prompt: list[int], ids: list[int]) -> str:
    stream = TokenStream(tokenizer, True, prompt[-8:])
    return "".join(stream.step(token_id) or "" for token_id in ids)


@given(prompt=texts, text=texts)
def test_text_arrives_whole(prompt: str, text: str) -> None:
    ids = DEMO.encode(prompt + text, add_special_tokens=False)
    split = len(DEMO.encode(prompt, add_special_tokens=False))
    assert DEMO.decode(ids) == prompt + text
    whole, before = prompt + text, DEMO.decode(ids[:split]).rstrip("\ufffd")
    if whole.startswith(before):  # also where the prompt's tokens end within a character
        stream = DEMO.stream(True, ids[:split])
        assert "".join(stream.step(token_id) or "" for token_id in ids[split:]) == whole[len(before) :]


ANY_TOKENS = st.lists(st.integers(2, 4095), max_size=12)
HALVES = [DEMO.encode("\ufffd", False), *([DEMO.encode("é漢😀", False)[:end] for end in range(1, 9)])]


@given(prompt=ANY_TOKENS, end=st.sampled_from([*HALVES, HALVES[0] * 9]), answer=ANY_TOKENS)
def test_an_answers_text_is_its_own_tokens_text(prompt: list[int], end: list[int], answer: list[int]) -> None:
    """Whatever half character or U+FFFD the prompt ends with, where the answer does not complete it."""
    answer = [*DEMO.encode(" king", False), *answer, *DEMO.encode(" a", False)]
    stream = DEMO.stream(True, prompt + end)
    assert "".join(stream.step(token_id) or "" for token_id in answer) == DEMO.decode(answer)


@given(prompt=st.lists(st.sampled_from([2, 3, 4, 6 + 0xE2, 6 + 0x98, 6 + 0x83, 6 + 0xF0, 6 + 0x9F]), max_size=9))
def test_the_same_of_sentencepiece(sentencepiece: Backend, prompt: list[int]) -> None:
    assert streamed(sentencepiece, [3, *prompt], [2, 4, 3]) == " ab the"


@given(prompt=texts, text=texts)
def test_special_tokens_that_are_shown(prompt: str, text: str) -> None:
    """One of two special tokens is a part of the text, wherever it stands; the other one is not."""
    bos, eos = DEMO.bos_token_id, DEMO.eos_token_id
    assert bos is not None and eos is not None
    ids = DEMO.encode(text, add_special_tokens=False)
    stream = DEMO.stream(True, [bos, *DEMO.encode(prompt, add_special_tokens=False)], shown={eos})
    got = "".join(stream.step(token_id) or "" for token_id in [eos, *ids, bos, eos, *ids, eos])
    end = DEMO.token(eos)
    assert got == f"{end}{text}{end}{text}{end}"


@given(prompt=texts, text=texts)
def test_spaces_and_bytes_of_sentencepiece(sentencepiece: Backend, prompt: str, text: str) -> None:
    def encoded(value: str) -> list[int]:
        return [6 + byte for byte in value.encode()]

    prompt_ids = [0, 3, *encoded(prompt)]
    assert streamed(sentencepiece, prompt_ids, [2, *encoded(text), 3]) == f" a{text} the"
    assert streamed(sentencepiece, prompt_ids, [0, 2, 0, 0, 3]) == " a the"


@given(ids=st.lists(st.integers(0, 261), max_size=40), prompt=st.lists(st.integers(0, 261), max_size=10))
def test_bytes_that_make_no_character_are_no_error(sentencepiece: Backend, ids: list[int],
                                                   prompt: list[int]) -> None:
    """And what follows them comes out."""
    assert streamed(sentencepiece, prompt, [*ids, 5, 5]).endswith("cc")


def test_a_lone_surrogate_is_refused() -> None:
    with pytest.raises(ValueError, match="not valid Unicode"):
        DEMO.encode("a\udcff")


def test_nothing_is_held_back_for_long(sentencepiece: Backend) -> None:
    stream = TokenStream(sentencepiece, True, [])
    out = [stream.step(6 + 0xE4) for _ in range(12)]
    assert sum(text is not None for text in out) == 3
    assert set("".join(text or "" for text in out)) == {"\ufffd"}

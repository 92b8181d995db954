from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fptq_runtime.engine.output import TextStream


class Pieces:
    """A detokenizer whose token i spells pieces[i]; an empty piece is a character still open."""

    def __init__(self, pieces: list[str]) -> None:
        self.pieces = pieces

    def step(self, token_id: int) -> str | None:
        return self.pieces[token_id] or None


def feed(pieces: list[str], stop: list[str], min_tokens: int = 0) -> tuple[list[str], str | None]:
    """What comes out token by token, the flush included, and the stop string."""
    stream = TextStream(Pieces(pieces), stop)  # type: ignore[arg-type]
    out = []
    for i in range(len(pieces)):
        text, match = stream.step(i, stoppable=i >= min_tokens)
        out.append(text)
        if match is not None:
            return out, match
    return [*out, stream.flush()], None


letters = st.text("abc", max_size=4)


@given(pieces=st.lists(letters, max_size=12), stop=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3))
def test_text_ends_before_the_first_stop_string_to_complete(pieces: list[str], stop: list[str]) -> None:
    out, match = feed(pieces, stop)
    text = ""
    for piece in pieces:  # the same, said without holding anything back
        text += piece
        found = [text.find(s) for s in stop if s in text]
        if found:
            assert "".join(out) == text[: min(found)]
            assert match is not None
            assert text.startswith(match, min(found))
            return
    assert match is None
    assert "".join(out) == text


@given(pieces=st.lists(letters, min_size=1, max_size=12), stop=st.lists(st.text("abc", min_size=1, max_size=4),
                                                                        min_size=1, max_size=3))
def test_no_more_is_held_back_than_a_stop_string_may_claim(pieces: list[str], stop: list[str]) -> None:
    out, match = feed(pieces, stop)
    if match is None:
        for count in range(1, len(pieces) + 1):
            text, certain = "".join(pieces[:count]), "".join(out[:count])
            held = text[len(certain) :]
            assert text.startswith(certain)
            assert held == "" or any(s.startswith(held) for s in stop)


def test_before_min_tokens_stop_strings_pass() -> None:
    assert feed(["a", "b", "a", "x"], ["a"], min_tokens=2) == (["a", "b", ""], "a")
    assert feed(["a", "b", "c"], ["bc"], min_tokens=2) == (["a", "b", "c", ""], None)

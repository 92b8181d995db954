"""Everyday answers. Oracle: transformers' greedy ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from fptq_runtime.engine.llm import LLM
from fptq_runtime.measure import chat
from fptq_runtime.measure.chat import answer, describe, loops
from tests.quantizer.models import save_model


@pytest.mark.parametrize(("items", "circles"), [
    ("one two three four five six seven eight " * 4, True),
    ("one two three four five six seven eight " * 3, False),
    ("again " * 11, True), ("again " * 10, False), ("few words", False), ("", False),
    ("".join(f"{i} a b c d e f g {i} " for i in range(9)), False),
    ("".join(f"{i} a b c d e f g h " for i in range(4)), True),
])
def test_loops(items: str, circles: bool) -> None:
    assert loops(items.split()) is circles


def test_answers_are_greedy_and_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model has no chat template: the prompt stands for itself."""
    save_model("llama", tmp_path)
    monkeypatch.setattr(chat, "MAX_TOKENS", 12)
    llm = LLM(tmp_path, backend="reference", kv_cache_dtype="float32")
    given = answer(llm, ["Once upon a time", "The end"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    for completion, prompt in zip(given, ("Once upon a time", "The end"), strict=True):
        ids = torch.tensor([llm.engine.tokenizer.encode(prompt)])
        expected = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)[0, ids.shape[1]:].tolist()
        assert list(completion.token_ids) == expected[: len(completion.token_ids)]
    first, second = given
    other = replace(first, token_ids=(*first.token_ids[:3], -1), text=" \n")
    assert describe(given, given).common_prefix == sum(len(each.token_ids) for each in given) / 2
    assert describe([other, second], given).common_prefix == (3 + len(second.token_ids)) / 2
    assert describe([other, other]).empty == 2
    assert describe(given).common_prefix is None
    assert describe([replace(first, text="ha " * 11)]).looping == 1

"""A draft model changes how many steps an answer takes and not one bit of it."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fptq_runtime.config import EngineConfig
from fptq_runtime.engine.draft_model import check_draft
from fptq_runtime.engine.engine import Engine
from fptq_runtime.engine.grammar import Grammar
from fptq_runtime.engine.request import SamplingParams
from fptq_runtime.engine.speculation import StepCost
from fptq_runtime.errors import FptqError
from fptq_runtime.kernels.base import Backend, Linear
from fptq_runtime.models.block import Block, prepare_block, prepare_stem
from fptq_runtime.models.decoder import Decoder
from fptq_runtime.models.loader import Checkpoint, load_block, load_head, load_stem
from fptq_runtime.models.tokenizer import Tokenizer
from tests.engine.fake import gist, run
from tests.engine.test_batch_invariance import DEMO, VOCAB, requests

FORMS = [None, None, Grammar.regex("[a-z ,.]{20,40}")]


class Free(StepCost):
    """Of a draft model whose steps cost nothing, so that it is always asked."""

    def observe(self, tokens: int, seconds: float) -> None:
        super().observe(tokens, 1e-9)


@pytest.fixture(scope="module")
def perturbed(native: tuple[Decoder, Backend]) -> Decoder:
    """The float demo with noise on its linears: often right, and often not."""
    checkpoint, random = Checkpoint(DEMO), np.random.default_rng(0)

    def noisy(_: str, linear: Linear) -> Linear:
        weight = linear.weight.astype(np.float32)
        return replace(linear, weight=weight + random.normal(scale=0.2 * weight.std(), size=weight.shape)
                       .astype(np.float32))

    def block(loaded: Block) -> Block:
        return prepare_block(loaded.with_linears(noisy), native[1])

    return Decoder(checkpoint.model_config, prepare_stem(load_stem(checkpoint), native[1]),
                   [block(load_block(checkpoint, i)) for i in range(checkpoint.model_config.num_layers)],
                   prepare_block(load_head(checkpoint), native[1]))


def engine_for(native: tuple[Decoder, Backend], draft: Decoder | None, memory: int = 64 << 20, **options: Any
               ) -> Engine[Any]:
    config = EngineConfig(max_model_len=192, kv_cache_memory=memory, **options)
    engine = Engine(*native, config, Tokenizer(DEMO), draft=draft)
    if engine._draft_model is not None:
        engine._draft_model.cost = Free()
        for size in (1, 8, 64):
            engine._speculator.cost.observe(size, 1 + size / 1000)  # type: ignore[union-attr]
    return engine


def drafts(engine: Engine[Any]) -> Iterator[tuple[int, int]]:
    while engine.has_unfinished_requests:
        _, stats = engine.step()
        if "draft" in stats.drafts:
            yield stats.drafts["draft"].drafted, stats.drafts["draft"].accepted


@pytest.mark.parametrize(("options", "memory"), [
    ({}, 64 << 20), ({"max_num_batched_tokens": 24}, 64 << 20), ({"enable_prefix_caching": False}, 64 << 20),
    ({"max_num_seqs": 6, "kv_cache_dtype": "bf16"}, 6 << 20),  # preempts
])
@pytest.mark.parametrize("own", [True, False])
def test_the_bits_are_those_of_plain_decoding(native: tuple[Decoder, Backend], perturbed: Decoder, own: bool,
                                              options: dict[str, Any], memory: int) -> None:
    sent = requests(random.Random(own), 16, FORMS)
    plain = engine_for(native, None, speculation=False, kv_cache_dtype=options.get("kv_cache_dtype", "int8"))
    guessed = engine_for(native, native[0] if own else perturbed, memory, **options)
    answers = []
    for engine in (plain, guessed):
        for i, (prompt, params) in enumerate(sent):
            engine.add_request(str(i), prompt, params)
        outputs = run(engine, check=False)
        answers.append([gist(outputs[str(i), 0]) for i in range(len(sent))])
    assert answers[0] == answers[1]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_its_own_draft_is_always_right(native: tuple[Decoder, Backend], temperature: float) -> None:
    """Prompts long and short, prefixes shared, while others come and go."""
    engine = engine_for(native, native[0], max_num_batched_tokens=48)
    generator = random.Random(0)
    shared = [generator.randrange(VOCAB) for _ in range(70)]
    for i in range(8):
        prompt = shared[: 10 * i + 1] + [generator.randrange(VOCAB) for _ in range(i)]
        engine.add_request(str(i), prompt, SamplingParams(max_tokens=20 + 3 * i, temperature=temperature, seed=i,
                                                          top_p=0.95, frequency_penalty=0.3, ignore_eos=True))
    drafted, accepted = map(sum, zip(*drafts(engine), strict=True))
    assert drafted == accepted > 100


def test_a_perturbed_draft_is_sometimes_right(native: tuple[Decoder, Backend], perturbed: Decoder) -> None:
    engine = engine_for(native, perturbed)
    for i in range(6):
        engine.add_request(str(i), [5 + i, 6, 7], SamplingParams(max_tokens=60, temperature=0, ignore_eos=True))
    drafted, accepted = map(sum, zip(*drafts(engine), strict=True))
    assert 0 < accepted < drafted


def test_one_that_costs_more_than_it_gives_is_not_asked(native: tuple[Decoder, Backend], perturbed: Decoder) -> None:
    engine = engine_for(native, perturbed)
    assert engine._draft_model is not None
    assert engine._speculator is not None
    engine._draft_model.cost = StepCost()
    engine._draft_model.cost.observe(1, 100.0)
    engine.add_request("0", [5, 6, 7], SamplingParams(max_tokens=60, temperature=0, ignore_eos=True))
    assert not list(drafts(engine))


def test_other_vocabularies_are_refused(tmp_path: Path) -> None:
    config = Checkpoint(DEMO).model_config
    ours = Tokenizer(DEMO)
    for name in ("config.json", "tokenizer_config.json", "tokenizer.json"):
        data = json.loads((DEMO / name).read_text())
        if name == "tokenizer.json":
            vocab = data["model"]["vocab"]
            vocab["the"], vocab["and"] = vocab["and"], vocab["the"]
        (tmp_path / name).write_text(json.dumps(data))
    with pytest.raises(FptqError, match="draft has another vocabulary than the model: 2 tokens differ, as 'and'"):
        check_draft(ours, config, Tokenizer(tmp_path), config)
    with pytest.raises(FptqError, match="draft has 100 rows of logits"):
        check_draft(ours, config, ours, replace(config, vocab_size=100))
    with pytest.raises(FptqError, match="draft: it has recurrent layers"):
        check_draft(ours, config, ours, replace(config, state_bytes=1))
    check_draft(ours, config, ours, replace(config, vocab_size=config.vocab_size + 64))

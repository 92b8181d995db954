"""Bit for bit the same tokens and log-probabilities, whatever company a request keeps: real kernels, real weights."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import fptq_runtime
from fptq_runtime.config import EngineConfig, KVCacheDtype
from fptq_runtime.engine.block_store import KVDisk
from fptq_runtime.engine.engine import Engine
from fptq_runtime.engine.grammar import Grammar
from fptq_runtime.engine.output import RequestOutput
from fptq_runtime.engine.request import SamplingParams
from fptq_runtime.kernels.base import Backend
from fptq_runtime.models.decoder import Decoder
from fptq_runtime.models.loader import Checkpoint
from fptq_runtime.models.tokenizer import Tokenizer
from tests.engine.fake import gist, run

DEMO = Path(fptq_runtime.__file__).parent / "demo"
VOCAB = Checkpoint(DEMO).model_config.vocab_size
MAX_LEN = 192
FORMS = [None, Grammar.regex("[a-z ,.]{60,}"), None, Grammar.json_schema(
    {"type": "array", "items": {"type": ["string", "number"]}, "minItems": 20})]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(DEMO)


def engine_for(native: tuple[Decoder, Backend], tokenizer: Tokenizer, num_tokens: int = 4096,
               kv_disk: KVDisk | None = None, **options: Any) -> Engine:
    config = EngineConfig(max_model_len=MAX_LEN, **options)
    memory = num_tokens * native[1].token_bytes(native[0].config, config.kv_cache_dtype)
    config = replace(config, kv_cache_memory=memory)
    return Engine(*native, config, tokenizer, kv_disk=kv_disk)


def requests(generator: random.Random, count: int, forms: Sequence[Grammar | None]
             ) -> list[tuple[list[int], SamplingParams]]:
    shared = [[generator.randrange(VOCAB) for _ in range(80)] for _ in range(2)]
    made = []
    for _ in range(count):
        prompt = generator.choice(shared)[: generator.randrange(1, 81)]
        prompt += [generator.randrange(VOCAB) for _ in range(generator.randrange(0, 50))]
        structured = forms[len(made) % len(forms)]
        made.append((prompt, SamplingParams(
            structured=structured,
            max_tokens=generator.randrange(1, 60),
            temperature=generator.choice([0.0, 0.0, 1.0]),
            top_p=generator.choice([1.0, 0.9]),
            seed=generator.randrange(1 << 30),
            logprobs=generator.choice([0, 1, 5]),
            prompt_logprobs=generator.choice([None, None, 1]),
            ignore_eos=generator.random() < 0.5 and structured is None,
        )))
    return made


def solo(engine: Engine, prompt: Sequence[int], params: SamplingParams) -> list[RequestOutput]:
    engine.add_request("solo", prompt, params)
    return run(engine, check=False)["solo", 0]


@pytest.mark.parametrize("kv_dtype", ["int8", "bf16"])
@pytest.mark.parametrize(("options", "num_tokens"), [
    ({}, 4096),
    ({"max_num_batched_tokens": 7}, 4096),
    ({"max_num_batched_tokens": 61, "max_num_seqs": 5, "block_size": 16}, 4096),
    ({"max_num_batched_tokens": 33, "enable_prefix_caching": False, "block_size": 64}, 4096),
    ({"max_num_batched_tokens": 128, "max_num_seqs": 12, "block_size": 16}, 320),
], ids=["wide", "tiny chunks", "few at a time", "no prefix cache", "preempted"])
def test_each_request_gives_what_it_gives_alone(native: tuple[Decoder, Backend], tokenizer: Tokenizer,
                                                kv_dtype: KVCacheDtype, options: dict[str, Any],
                                                num_tokens: int) -> None:
    alone = engine_for(native, tokenizer, max_num_batched_tokens=MAX_LEN, enable_prefix_caching=False,
                       kv_cache_dtype=kv_dtype, speculation=False)
    company = engine_for(native, tokenizer, num_tokens, kv_cache_dtype=kv_dtype, **options)
    generator = random.Random(str(options))
    sent = requests(generator, 32, FORMS if num_tokens == 4096 else [None])  # structured ones end before they crowd
    events: dict[str, list[RequestOutput]] = {str(i): [] for i in range(32)}
    arrivals, preemptions, hits = list(range(32)), 0, 0
    while arrivals or company.has_unfinished_requests:
        for _ in range(generator.randrange(0, 8)):
            if arrivals:
                company.add_request(str(arrivals[0]), *sent[arrivals.pop(0)])
        outputs, stats = company.step()
        preemptions += stats.preemptions
        hits += stats.prefix_hit_tokens
        for output in outputs:
            events[output.request_id].append(output)
    assert (preemptions > 0) == (num_tokens < 4096), preemptions
    assert (hits > 0) == company.config.enable_prefix_caching
    for i, (prompt, params) in enumerate(sent):
        assert gist(events[str(i)]) == gist(solo(alone, prompt, params))


def test_the_second_time_comes_from_the_cache(native: tuple[Decoder, Backend], tokenizer: Tokenizer) -> None:
    engine = engine_for(native, tokenizer)
    prompt = list(range(100, 200))
    params = SamplingParams(max_tokens=40, temperature=0, logprobs=5, ignore_eos=True)
    first = solo(engine, prompt, params)
    again = solo(engine, prompt, params)
    assert (first[0].num_cached_tokens, again[0].num_cached_tokens) == (0, 96)
    assert gist(first) == gist(again)
    context = prompt + [token for event in first for token in event.token_ids]
    scored = solo(engine, context, SamplingParams(max_tokens=0, prompt_logprobs=5))[0].prompt_logprobs
    assert scored is not None
    decoded = tuple(entry for event in first for entry in event.logprobs)
    assert scored[len(prompt) :] == decoded, "scoring a text gives the bits that decoding it gave"


@pytest.mark.parametrize("kv_dtype", ["int8", "bf16"])
def test_a_prefix_from_disk_gives_the_same_bits(native: tuple[Decoder, Backend], tokenizer: Tokenizer, tmp_path: Path,
                                                kv_dtype: KVCacheDtype) -> None:
    disk = KVDisk(tmp_path, 1 << 28, b"")
    prompt = list(range(100, 240))
    params = SamplingParams(max_tokens=40, temperature=0, logprobs=5, ignore_eos=True)
    first = solo(engine_for(native, tokenizer, kv_disk=disk, kv_cache_dtype=kv_dtype), prompt, params)
    for _ in range(200):  # until they are written
        again = solo(engine_for(native, tokenizer, kv_disk=disk, kv_cache_dtype=kv_dtype), prompt, params)
        if again[0].num_restored_tokens == 128:
            break
    assert (again[0].num_cached_tokens, again[0].num_restored_tokens) == (128, 128)
    assert gist(first) == gist(again)

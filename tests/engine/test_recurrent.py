"""Models that keep a state of each sequence, in company, in chunks, preempted and behind steps that fail."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fptq_runtime import quantize
from fptq_runtime.engine import block_manager
from fptq_runtime.engine.engine import Engine
from fptq_runtime.engine.llm import load_engine
from fptq_runtime.engine.output import RequestOutput
from fptq_runtime.engine.request import FinishReason, SamplingParams
from fptq_runtime.engine.sizing import KEPT_SHARE
from fptq_runtime.errors import FptqError
from fptq_runtime.kernels.base import StepInput
from fptq_runtime.quantizer.samples import Calibration
from tests.engine.fake import MODEL, TOKEN_BYTES, FakeDecoder, gist, make_engine, run
from tests.quantizer.models import save_model

GREEDY = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module", params=["lfm2", "qwen3.5", "mamba", "granite-4-h"])
def artifact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("fptq_runtime._native", reason="the native extension is not built")
    path = tmp_path_factory.mktemp(request.param)
    save_model(request.param, path / "float")
    text = path / "text.txt"
    text.write_text("It was a bright cold day in the wood, and the clock was striking thirteen. " * 20)
    quantize(path / "float", path / "w4a8", "rtn", calibration=Calibration("random", 4, 32), text_tokens=400, text=text)
    return path / "w4a8"


def engine_for(artifact: Path, num_tokens: int = 1024, **options: Any) -> Engine[Any]:
    sized = load_engine(artifact, backend="native", threads=2, max_model_len=96, block_size=16)
    token_bytes = sized.backend.token_bytes(sized.model_config, "int8")
    return load_engine(artifact, backend="native", threads=2, max_model_len=96, block_size=16,
                       kv_cache_memory=num_tokens * token_bytes, **options)


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefixes of a block are worth a state."""
    monkeypatch.setattr(block_manager, "LEAST_KEPT", 16)


@pytest.mark.parametrize(("num_tokens", "options"), [
    (1024, {}), (1024, {"max_num_batched_tokens": 7}), (128, {"max_num_seqs": 6, "max_num_batched_tokens": 64}),
], ids=["wide", "tiny chunks", "preempted"])
def test_each_request_gives_what_it_gives_alone(artifact: Path, num_tokens: int, options: dict[str, Any]) -> None:
    alone, company = engine_for(artifact), engine_for(artifact, num_tokens, **options)
    assert not company.config.speculation
    generator = random.Random(num_tokens)
    shared = [generator.randrange(260) for _ in range(40)]
    sent = [([*shared[: generator.randrange(1, 41)], generator.randrange(260)], SamplingParams(
        max_tokens=generator.randrange(1, 50), temperature=generator.choice([0.0, 1.0]), seed=i, logprobs=2,
        ignore_eos=True, prompt_logprobs=generator.choice([None, None, 1]))) for i in range(14)]
    events: dict[str, list[RequestOutput]] = {str(i): [] for i in range(len(sent))}
    arrivals, preemptions, hits = list(events), 0, 0
    while arrivals or company.has_unfinished_requests:
        for name in arrivals[:2]:
            company.add_request(name, *sent[int(name)])
        arrivals = arrivals[2:]
        outputs, stats = company.step()
        company.check_integrity()
        preemptions += stats.preemptions
        hits += stats.prefix_hit_tokens
        for output in outputs:
            events[output.request_id].append(output)
    assert (preemptions > 0) == (num_tokens < 1024)
    assert hits > 0 or not company.config.enable_prefix_caching  # a small cache has less room than one state takes
    assert company.config.enable_prefix_caching or num_tokens < 1024
    for name, request in zip(events, sent, strict=True):
        alone.add_request("solo", *request)
        assert gist(events[name]) == gist(run(alone)["solo", 0])


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_embeddings_and_answers_of_one_text_do_not_meet(artifact: Path, pooling: Any) -> None:
    """They are computed by two executors, each with states of its own."""
    engine, text = engine_for(artifact), [7 + i % 200 for i in range(80)]
    alone = engine_for(artifact, enable_prefix_caching=False)
    embed = SamplingParams(max_tokens=0, pooling=pooling)
    for params in (embed, embed, GREEDY, embed, GREEDY):
        for each in (engine, alone):
            each.add_request("one", text, params)
        got, expected = run(engine)["one", 0], run(alone)["one", 0]
        if params is GREEDY:
            assert gist(got) == gist(expected)
        else:
            assert got[-1].embedding is not None and np.array_equal(got[-1].embedding, expected[-1].embedding)
    assert got[-1].num_cached_tokens == 64


def test_prefixes_on_disk_are_refused(artifact: Path, tmp_path: Path) -> None:
    with pytest.raises(FptqError, match=r"without the states .* prefixes of \w+ForCausalLM need"):
        engine_for(artifact, kv_cache_disk=tmp_path)


@pytest.mark.parametrize("poisoned", [{"a"}, {"c", "d"}, set("abcdef")])
def test_whoever_breaks_a_step_ends_alone_and_the_others_begin_again(poisoned: set[str],
                                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    """A state that has seen a token must not see it twice."""
    plain = make_engine(max_num_seqs=6)
    monkeypatch.setattr(FakeDecoder, "config", replace(MODEL, state_bytes=4))
    engine = make_engine(max_num_seqs=6, max_num_batched_tokens=16)
    prompts = {name: [ord(name) - 90] * (3 + i) for i, name in enumerate("abcdef")}
    expected = {}
    for name, prompt in prompts.items():
        engine.add_request(name, prompt, GREEDY)
        plain.add_request(name, prompt, GREEDY)
        expected |= run(plain)
    poison = {len(prompts[name]) + 4: expected[name, 0][3].token_ids[0] for name in poisoned}
    seen: dict[int, int] = {}

    def follow(batch: StepInput) -> None:
        assert len(set(batch.state_slots.tolist())) == len(batch.state_slots)
        starts, moved = batch.query_start_loc, {}
        for first, last, length, slot in zip(starts[:-1], starts[1:], batch.seq_lens, batch.state_slots, strict=True):
            start = length - (last - first)
            assert start in (0, seen.get(slot)), "the state has seen other tokens than those before"
            if poison.get(length) == batch.token_ids[last - 1]:
                raise RuntimeError("the kernel broke")
            moved[slot] = length
        seen.update(moved)

    engine.backend.executor.before = follow  # type: ignore[attr-defined]
    events = run(engine)
    for name in prompts:
        if name in poisoned:
            assert events[name, 0][-1].finish_reason is FinishReason.ERROR
        else:
            assert gist(events[name, 0]) == gist(expected[name, 0])


def recurrent(monkeypatch: pytest.MonkeyPatch, kept: int, **options: Any) -> Engine[Any]:
    """Of the fake, which has room for so many states of prefixes."""
    memory = 64 * 16 * TOKEN_BYTES  # of make_engine's cache
    monkeypatch.setattr(FakeDecoder, "config", replace(MODEL, state_bytes=memory // KEPT_SHARE // kept))
    engine = make_engine(**options)
    assert engine.backend.executor.limits.kept_states == kept  # type: ignore[attr-defined]
    return engine


def test_a_chat_goes_on_from_its_last_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, prompt = recurrent(monkeypatch, 2), list(range(1, 90))
    for turn in range(3):
        engine.add_request("chat", prompt, GREEDY)
        events = run(engine)["chat", 0]
        assert events[-1].num_cached_tokens == (0, 80, 112)[turn]
        prompt += [token for event in events for token in event.token_ids] + [7] * 20


def test_texts_that_part_share_what_they_begin_with_from_the_third_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second shows where they part."""
    engine, system = recurrent(monkeypatch, 8), list(range(1, 65))
    found = []
    for user in range(1, 5):
        engine.add_request("ask", system + [user] * 30, GREEDY)
        found.append(run(engine)["ask", 0][-1].num_cached_tokens)
    assert found == [0, 0, 64, 64]


@pytest.mark.parametrize("kept", [1, 3, 40])
def test_any_mix_of_requests_has_states_of_its_own_text(kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fake checks each state; what is drawn is what is drawn without a cache."""
    plain = make_engine(enable_prefix_caching=False)
    generator = random.Random(kept)
    engine = recurrent(monkeypatch, kept, max_num_seqs=4, max_num_batched_tokens=48, max_model_len=160)
    stems = [[generator.randrange(1, 97) for _ in range(100)] for _ in range(3)]
    sent: dict[str, tuple[list[int], SamplingParams]] = {}
    events: dict[str, list[RequestOutput]] = {}
    hits = 0
    while len(sent) < 60 or engine.has_unfinished_requests:
        if len(sent) < 60 and generator.random() < 0.5:
            name, stem = f"r{len(sent)}", generator.choice(stems)
            own = [generator.randrange(1, 97)] * generator.randrange(9)
            sent[name] = ([*stem[: generator.randrange(1, 100)], *own],
                          SamplingParams(max_tokens=generator.randrange(1, 40), temperature=0.0, ignore_eos=True,
                                         n=generator.choice([1, 1, 2]), seed=1))
            engine.add_request(name, *sent[name])
        if sent and generator.random() < 0.05:
            engine.abort(generator.choice(list(sent)))
        outputs, stats = engine.step() if engine.has_unfinished_requests else ([], None)
        engine.check_integrity()
        hits += 0 if stats is None else stats.prefix_hit_tokens
        for output in outputs:
            events.setdefault(f"{output.request_id}/{output.index}", []).append(output)
    assert hits > 0
    for name, request in sent.items():
        plain.add_request("solo", *request)
        alone = run(plain)
        for index in range(request[1].n):
            got = events[f"{name}/{index}"]
            if got[-1].finish_reason is not FinishReason.ABORT:
                assert gist(got) == gist(alone["solo", index])

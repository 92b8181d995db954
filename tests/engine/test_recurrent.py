"""Models that keep a state of each sequence, in company, in chunks, preempted and behind steps that fail."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fptq_runtime import quantize
from fptq_runtime.engine.engine import Engine
from fptq_runtime.engine.llm import load_engine
from fptq_runtime.engine.output import RequestOutput
from fptq_runtime.engine.request import FinishReason, SamplingParams
from fptq_runtime.errors import FptqError
from fptq_runtime.kernels.base import StepInput
from fptq_runtime.quantizer.samples import Calibration
from tests.engine.fake import MODEL, FakeDecoder, gist, make_engine, run
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


@pytest.mark.parametrize(("num_tokens", "options"), [
    (1024, {}), (1024, {"max_num_batched_tokens": 7}), (176, {"max_num_seqs": 6, "max_num_batched_tokens": 64}),
], ids=["wide", "tiny chunks", "preempted"])
def test_each_request_gives_what_it_gives_alone(artifact: Path, num_tokens: int, options: dict[str, Any]) -> None:
    alone, company = engine_for(artifact), engine_for(artifact, num_tokens, **options)
    assert not company.config.enable_prefix_caching and not company.config.speculation
    generator = random.Random(num_tokens)
    shared = [generator.randrange(260) for _ in range(40)]
    sent = [([*shared[: generator.randrange(1, 41)], generator.randrange(260)], SamplingParams(
        max_tokens=generator.randrange(1, 50), temperature=generator.choice([0.0, 1.0]), seed=i, logprobs=2,
        ignore_eos=True, prompt_logprobs=generator.choice([None, None, 1]))) for i in range(14)]
    events: dict[str, list[RequestOutput]] = {str(i): [] for i in range(len(sent))}
    arrivals, preemptions = list(events), 0
    while arrivals or company.has_unfinished_requests:
        for name in arrivals[:2]:
            company.add_request(name, *sent[int(name)])
        arrivals = arrivals[2:]
        outputs, stats = company.step()
        company.check_integrity()
        preemptions += stats.preemptions
        for output in outputs:
            events[output.request_id].append(output)
    assert (preemptions > 0) == (num_tokens < 1024)
    for name, request in zip(events, sent, strict=True):
        alone.add_request("solo", *request)
        assert gist(events[name]) == gist(run(alone)["solo", 0])


def test_prefixes_on_disk_are_refused(artifact: Path, tmp_path: Path) -> None:
    with pytest.raises(FptqError, match=r"kv_cache_disk keeps cached prefixes, which \w+ForCausalLM cannot have"):
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

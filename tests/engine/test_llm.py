"""Oracle: transformers' generate on the same float model."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import fptq_runtime
from fptq_runtime.config import EngineConfig
from fptq_runtime.engine.admission import Queued, Work
from fptq_runtime.engine.engine import RequestError
from fptq_runtime.engine.llm import LLM, _sizes, _warm_up, load_engine
from fptq_runtime.engine.request import FinishReason, SamplingParams
from fptq_runtime.engine.sizing import device_cache_memory
from fptq_runtime.kernels.reference import ReferenceBackend
from tests.engine.fake import make_engine

DEMO = Path(fptq_runtime.__file__).parent / "demo"
PROMPTS = ["Once upon a time", "The old man looked at the sea and", "“Where is the king?” she asked."]


@pytest.fixture(scope="module", params=["reference", "native"])
def llm(request: pytest.FixtureRequest) -> LLM:
    if request.param == "native":
        pytest.importorskip("fptq_runtime._native", reason="the native extension is not built")
    return LLM(DEMO, backend=request.param, kv_cache_dtype="float32", threads=2, kv_cache_memory=64 << 20)


@pytest.fixture(scope="module")
def oracle() -> Any:
    return AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32)


def test_greedy_is_what_transformers_generates(llm: LLM, oracle: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    results = llm.generate(PROMPTS, SamplingParams(max_tokens=40, temperature=0, ignore_eos=True, logprobs=1))
    for prompt, [completion] in zip(PROMPTS, results, strict=True):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        assert completion.prompt_token_ids == tuple(ids[0].tolist())
        with torch.inference_mode():
            whole = oracle.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, min_new_tokens=40,
                                    do_sample=False)
            logprobs = oracle(whole).logits[0].double().log_softmax(-1)
        expected = whole[0, ids.shape[1] :].tolist()
        assert list(completion.token_ids) == expected
        given = [entry.logprob for entry in completion.logprobs]
        rows = range(ids.shape[1] - 1, whole.shape[1] - 1)
        assert given == pytest.approx([float(logprobs[r, t]) for r, t in zip(rows, expected, strict=True)], abs=2e-3)
        text = tokenizer.decode(whole[0], skip_special_tokens=True)
        prompt_text = tokenizer.decode(ids[0], skip_special_tokens=True)
        assert prompt_text + completion.text == text
        assert completion.finish_reason is FinishReason.LENGTH


def test_each_prompt_has_its_own_params_and_place(llm: LLM) -> None:
    params = [SamplingParams(max_tokens=i + 1, n=i % 3 + 1, seed=i, ignore_eos=True) for i in range(5)]
    results = llm.generate([[5 + i] for i in range(5)], params)
    assert [len(r) for r in results] == [1, 2, 3, 1, 2]
    for i, completions in enumerate(results):
        assert {len(c.token_ids) for c in completions} == {i + 1}
        assert {c.prompt_token_ids for c in completions} == {(5 + i,)}


def test_prompt_logprobs(llm: LLM) -> None:
    [[completion]] = llm.generate([PROMPTS[1]], SamplingParams(max_tokens=0, prompt_logprobs=2))
    entries = completion.prompt_logprobs
    assert entries[0] is None
    assert [entry.token_id for entry in entries[1:] if entry] == list(completion.prompt_token_ids[1:])
    assert completion.token_ids == ()


def test_bad_prompts_are_refused_before_anything_runs(llm: LLM) -> None:
    with pytest.raises(RequestError, match="context is 1024"):
        llm.generate([[1], [1] * 2000])
    assert not llm.engine.has_unfinished_requests
    with pytest.raises(ValueError, match="2 prompts but 1 params"):
        llm.generate(["a", "b"], [SamplingParams()])
    with pytest.raises(TypeError, match="list"):
        llm.generate("a")


@pytest.mark.parametrize("name", ["n", "max_tokens", "min_tokens", "top_k", "seed", "logprobs", "prompt_logprobs"])
@pytest.mark.parametrize("value", [1.5, "1"])
def test_what_must_be_an_integer(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} must be an integer"):
        SamplingParams(**{name: value})


@pytest.mark.parametrize("value", [0, 1e-300, 101, float("nan")])
def test_a_repetition_penalty_keeps_logits_finite(value: float) -> None:
    with pytest.raises(ValueError, match="repetition_penalty must be between"):
        SamplingParams(repetition_penalty=value)


def test_limits_that_do_not_fit_are_refused_before_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fptq_runtime.engine.llm.load_model", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(ValueError, match="exceeds the model's 1024 positions"):
        load_engine(DEMO, max_model_len=1025)
    with pytest.raises(ValueError, match=r"the KV cache .*, but only .* are available .*; lower kv_cache_memory"):
        load_engine(DEMO, kv_cache_memory=1 << 58, threads=1)


def test_a_cache_larger_than_memory_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fptq_runtime.engine.llm.available_memory", lambda: None)
    with pytest.raises(ValueError, match=r"KV cache of .* does not fit .* kv_cache_memory"):
        load_engine(DEMO, kv_cache_memory=1 << 58, threads=1)


def test_more_prompts_than_the_queue_holds() -> None:
    llm = LLM(DEMO, backend="reference", max_num_seqs=2, max_waiting_requests=2, kv_cache_memory=32 << 20)
    assert len(llm.generate([[1]] * 9, SamplingParams(max_tokens=1))) == 9


def test_an_interrupted_call_leaves_nothing_behind(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    params = SamplingParams(max_tokens=80, temperature=0, ignore_eos=True)  # more than two steps, whatever is guessed
    expected = llm.generate(PROMPTS[:1], params)
    steps = iter([llm.engine.step, llm.engine.step])
    monkeypatch.setattr(llm.engine, "step", lambda: next(steps, interrupt)())
    with pytest.raises(KeyboardInterrupt):
        llm.generate(PROMPTS, params)
    monkeypatch.undo()
    assert llm.generate(PROMPTS[:1], params) == expected
    llm.engine.check_integrity()


def interrupt() -> None:
    raise KeyboardInterrupt


def test_the_context_is_what_the_cache_holds(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        engine = load_engine(DEMO, backend="reference", kv_cache_memory=1 << 20)
    assert 0 < engine.config.max_model_len < 1024
    assert f"lowered to {engine.config.max_model_len}" in caplog.text
    assert "raise kv_cache_memory (--kv-cache-memory)" in caplog.text
    with pytest.raises(ValueError, match="max_model_len 1024, which needs"):
        load_engine(DEMO, backend="reference", kv_cache_memory=1 << 20, max_model_len=1024)
    with pytest.raises(ValueError, match="raise kv_cache_memory"):
        load_engine(DEMO, backend="reference", kv_cache_memory=1 << 10)


def test_on_a_gpu_the_cache_takes_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the reference backend in the GPU's place."""
    free = [1 << 30, (1 << 30) - (100 << 20)]
    monkeypatch.setattr(ReferenceBackend, "free_memory", lambda self: left.pop(0))
    monkeypatch.setattr(ReferenceBackend, "step_bytes", lambda self, model, limits: 800 << 20)
    monkeypatch.setattr("fptq_runtime.engine.llm._warm_up", lambda engine: None)
    left = [*free]
    engine = load_engine(DEMO, backend="reference", gpu_memory_utilization=0.98)
    assert engine.config.kv_cache_memory == device_cache_memory(*free, 0.98, 800 << 20)
    assert engine.config.max_num_batched_tokens == 8192
    left = [*free]
    engine = load_engine(DEMO, backend="reference", kv_cache_memory=4 << 20)
    assert engine.config.kv_cache_memory == 4 << 20
    left = [*free]
    with pytest.raises(ValueError, match="no GPU memory is left"):
        load_engine(DEMO, backend="reference", gpu_memory_utilization=0.5)
    with pytest.raises(ValueError, match="at most 1, not 2"):
        load_engine(DEMO, backend="reference", gpu_memory_utilization=2)


def test_a_warm_up_meets_steps_of_every_size() -> None:
    engine = make_engine(max_model_len=64, max_num_batched_tokens=48, max_num_seqs=9)
    _warm_up(engine)
    batches = engine.backend.executor.batches  # type: ignore[attr-defined]
    assert {len(batch.token_ids) for batch in batches if batch.slot_mapping.max() >= 0} == {1, 2, 4, 8, 16, 32, 48}
    assert {len(batch.seq_lens) for batch in batches if batch.slot_mapping.max() >= 0} == {1, 2, 4, 8}
    engine.check_integrity()
    held = engine._forecast.slots([Work(1, 0, 50)] * 9, 9)
    assert engine._forecast.wait(held, Queued(), 40) == (0, 0), "steps that compile teach nothing"


def test_every_size_of_a_decoding_step_is_met_before_a_request() -> None:
    """Batches that steps are padded to, at each power of two of the context, and a chunk beside one that decodes."""
    config = EngineConfig(max_model_len=3000, max_num_seqs=20, max_num_batched_tokens=128)
    steps = [(step.query_start_loc.tolist(), int(step.seq_lens.max())) for step in _sizes(config)]
    decoding = {(len(starts) - 1, context) for starts, context in steps if len(starts) == starts[-1] + 1}
    assert decoding == {(seqs, context) for seqs in (1, 2, 4, 8, 16, 20) for context in (1024, 2048, 3000)}
    assert {(starts[-1], context) for starts, context in steps if len(starts) <= starts[-1]} == {
        (rows, context) for rows in (65, 128) for context in (1024, 2048, 3000)}
    assert [context for _, context in steps] == sorted((context for _, context in steps), reverse=True)
    for step in _sizes(replace(config, max_model_len=40)):
        assert step.seq_lens.max() == 40
        assert step.slot_mapping.max() == -1
        assert step.positions.max() < 40 <= step.block_tables.shape[1] * config.block_size


def test_the_end_of_sequence_is_generation_configs(tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(DEMO, model)
    llm = LLM(model, backend="reference", kv_cache_memory=32 << 20)
    [[free]] = llm.generate([PROMPTS[0]], SamplingParams(max_tokens=6, temperature=0))
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, free.token_ids[3]]}))
    llm = LLM(model, backend="reference", kv_cache_memory=32 << 20)
    [[ended]] = llm.generate([PROMPTS[0]], SamplingParams(max_tokens=6, temperature=0))
    assert ended.finish_reason is FinishReason.STOP
    assert ended.token_ids == free.token_ids[: free.token_ids.index(free.token_ids[3]) + 1]


def test_a_finetune_ends_at_its_tokenizers_token(tmp_path: Path) -> None:
    """Its configs still name the base model's."""
    model = tmp_path / "model"
    shutil.copytree(DEMO, model)
    llm = LLM(model, backend="reference", kv_cache_memory=32 << 20)
    [[free]] = llm.generate([PROMPTS[0]], SamplingParams(max_tokens=6, temperature=0))
    config = json.loads((model / "tokenizer_config.json").read_text())
    config["eos_token"] = llm.engine.tokenizer.token(free.token_ids[3])
    (model / "tokenizer_config.json").write_text(json.dumps(config))
    llm = LLM(model, backend="reference", kv_cache_memory=32 << 20)
    [[ended]] = llm.generate([PROMPTS[0]], SamplingParams(max_tokens=6, temperature=0))
    assert ended.finish_reason is FinishReason.STOP
    assert ended.token_ids == free.token_ids[: free.token_ids.index(free.token_ids[3]) + 1]


def test_tokens_that_the_model_lacks_are_refused_by_both_numbers(tmp_path: Path, caplog: pytest.LogCaptureFixture
                                                                 ) -> None:
    model = tmp_path / "model"
    shutil.copytree(DEMO, model)
    config = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps({**config, "pad_token": "<new>"}))
    llm = LLM(model, backend="reference", kv_cache_memory=32 << 20)
    assert "tokens up to 4096, but the model's vocabulary only 4096" in caplog.text
    with pytest.raises(RequestError, match=r"token id 4096 .*vocabulary has 4096 tokens"):
        llm.generate(["Once <new> upon"])
    llm.generate(["Once upon"], SamplingParams(max_tokens=1))


def test_prefixes_on_disk_are_of_one_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found again by the same files, on every ISA, whose bits are the same, and not by others that differ in one byte
    of any of them."""
    pytest.importorskip("fptq_runtime._native", reason="the native extension is not built")
    kv, copy = tmp_path / "kv", tmp_path / "model"
    shutil.copytree(DEMO, copy)

    def restored(path: Path, **options: Any) -> int:
        engine = load_engine(path, backend="native", threads=1, kv_cache_disk=kv, **options)
        engine.add_request("a", list(range(100, 200)), SamplingParams(max_tokens=1))
        outputs = []
        while engine.has_unfinished_requests:
            outputs += engine.step()[0]
        engine._scheduler.blocks._store.flush()  # type: ignore[union-attr]
        return outputs[0].num_restored_tokens

    assert restored(DEMO) == 0
    assert restored(copy) == 96
    assert restored(copy, kv_cache_dtype="bf16") == 0
    assert restored(copy, block_size=16) == 0
    monkeypatch.setenv("FPTQ_ISA", "generic")
    assert restored(copy) == 96
    monkeypatch.delenv("FPTQ_ISA")
    (copy / "config.json").write_text((copy / "config.json").read_text() + " ")
    assert restored(copy) == 0

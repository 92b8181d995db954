"""The whole backend in the interpreter: against the reference, through the engine, and against itself in company."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fptq_runtime.artifact.io import GOLDEN
from fptq_runtime.config import EngineConfig, KVCacheDtype
from fptq_runtime.engine.engine import Engine
from fptq_runtime.engine.llm import _unwritten
from fptq_runtime.engine.request import SamplingParams
from fptq_runtime.kernels.base import Activation, Routing, StepLimits, Work, logits_array
from fptq_runtime.kernels.reference import ReferenceBackend
from fptq_runtime.kernels.select import select_backend
from fptq_runtime.kernels.triton.backend import SMALLEST_CONTEXT, TritonBackend, _Inputs, _Shape, _shorter_first, bucket
from fptq_runtime.models.gate import Golden, check
from fptq_runtime.models.golden import check_golden, compute_golden
from fptq_runtime.models.loader import Checkpoint, load_model
from fptq_runtime.quantizer.pipeline import quantize
from fptq_runtime.quantizer.samples import Calibration
from tests.engine.fake import FakeTokenizer, gist, run
from tests.kernels.small import VOCAB, Batcher, Options, Tokens, int32, limits, make_decoder, random_tokens
from tests.models.hf import save_random
from tests.quantizer.models import save_model

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

SMALL = Options(act="dynamic", layers=1, max_len=128)
STEPS = ((("a", 18),), (("b", 7), ("a", 1)), (("c", 1), ("b", 1), ("a", 1)))


@pytest.fixture(scope="module")
def backend() -> TritonBackend:
    return TritonBackend()


def small_limits(options: Options, kv_dtype: KVCacheDtype = "int8") -> Any:
    return limits(options, kv_dtype, block_size=16, num_blocks=24, max_tokens=64)


@pytest.mark.parametrize(("options", "kv_dtype"), [
    (SMALL, "int8"),
    (replace(SMALL, act="static", norm="layer", activation=Activation("gelu_tanh"), rope=False, alibi=True, bias=True,
             embedding_norm=True, kv_heads=4, bits=8, group_size=None), "bf16"),
    (replace(SMALL, act="float", qk_norm=True, window=10), "float32"),
    (replace(SMALL, act="mixed", rank=2, dtype=torch.bfloat16), "int8"),
    (replace(SMALL, routing=Routing(4, 2), intermediate=32), "int8"),
], ids=["llama", "bloom", "qwen3 window", "mixed low rank", "experts"])
def test_steps_match_the_reference(backend: TritonBackend, options: Options, kv_dtype: KVCacheDtype) -> None:
    """A prompt, decoding in padded batches, and both together. A last-bit difference tips a code here and there, as
    between all backends."""
    executors = [each.compile(make_decoder(options, each), small_limits(options, kv_dtype))
                 for each in (backend, ReferenceBackend())]
    batcher = Batcher(small_limits(options, kv_dtype), np.random.default_rng(1))
    sequences = {name: batcher.sequence(random_tokens(batcher.rng, 30)) for name in "abc"}
    errors = []
    for parts in STEPS:
        step = batcher.step([(sequences[name], count) for name, count in parts])
        got, expected = (logits_array(executor.step(step)) for executor in executors)
        assert got.shape == expected.shape == (sum(count for _, count in parts), VOCAB)
        errors += (np.abs(got - expected).max(1) / np.abs(expected).max()).tolist()
    tolerance = {"float32": 2e-5, "bf16": 4e-2, "int8": 4e-2}[kv_dtype]
    assert max(errors) < tolerance
    assert np.median(errors) < tolerance / 2


@pytest.mark.parametrize(("options", "kv_dtype"), [
    (replace(SMALL, heads=3, kv_heads=1, hidden=96, head_dim=32), "int8"),
    (replace(SMALL, act="static", bits=8, window=20), "bf16"),
    (replace(SMALL, routing=Routing(4, 2), intermediate=32), "int8"),
])
def test_bits_do_not_depend_on_company(backend: TritonBackend, options: Options, kv_dtype: KVCacheDtype) -> None:
    """Whole in one step, or in chunks and single tokens beside others."""
    rng = np.random.default_rng(0)
    token_ids = random_tokens(rng, 24)
    decoder = make_decoder(options, backend)

    def logits(chunks: list[int], neighbours: int) -> np.ndarray[Any, Any]:
        executor = backend.compile(decoder, small_limits(options, kv_dtype))
        batcher = Batcher(small_limits(options, kv_dtype), np.random.default_rng(len(chunks)))
        subject = batcher.sequence(token_ids)
        others = [batcher.sequence(random_tokens(batcher.rng, 40)) for _ in range(neighbours)]
        rows = []
        for number, chunk in enumerate(chunks):
            parts: list[tuple[Tokens, int]] = [(other, 1 + number % 2) for other in others[: number % (neighbours + 1)]]
            at = sum(count for _, count in parts)
            step = batcher.step([*parts, (subject, chunk), *((other, 1) for other in others[len(parts) :])])
            rows.append(logits_array(executor.step(step))[at : at + chunk])
        return np.concatenate(rows)

    np.testing.assert_array_equal(logits([24], 0), logits([9, 1, 13, 1], 2))


def engine_for(backend: Any, decoder: Any, num_tokens: int = 1024, **options: Any) -> Engine:
    config = EngineConfig(max_model_len=48, block_size=16, kv_cache_memory=1, **options)
    memory = num_tokens * backend.token_bytes(decoder.config, config.kv_cache_dtype)
    return Engine(decoder, backend, replace(config, kv_cache_memory=memory), FakeTokenizer())  # type: ignore[arg-type]


def test_the_engine_gives_each_request_what_it_gives_alone() -> None:
    """Chunked, preempted, sampled, and launched ahead as on a GPU."""
    backend = TritonBackend()
    backend.asynchronous = True
    decoder = make_decoder(SMALL, backend)
    generator = random.Random(5)
    shared = [generator.randrange(VOCAB) for _ in range(14)]
    sent = [([*shared, generator.randrange(VOCAB)],
             SamplingParams(max_tokens=4, temperature=0.7 * (i % 2), seed=i, logprobs=i, ignore_eos=True))
            for i in range(3)]
    company = engine_for(backend, decoder, 48, max_num_batched_tokens=19)
    for i, request in enumerate(sent):
        company.add_request(str(i), *request)
    events, preemptions = {}, 0
    while company.has_unfinished_requests:
        outputs, stats = company.step()
        company.check_integrity()
        preemptions += stats.preemptions
        for output in outputs:
            events.setdefault(output.request_id, []).append(output)
    assert preemptions > 0
    alone = engine_for(backend, decoder, max_num_batched_tokens=48, enable_prefix_caching=False)
    for i, request in enumerate(sent):
        alone.add_request(str(i), *request)
        assert gist(events[str(i)]) == gist(run(alone)[str(i), 0])


def test_greedy_tokens_and_golden_logits_are_the_reference_backends(backend: TritonBackend) -> None:
    reference = ReferenceBackend()
    options = replace(SMALL, layers=2)
    decoders = {each.name: make_decoder(options, each) for each in (backend, reference)}
    prompt = random_tokens(np.random.default_rng(4), 12)
    assert check_golden(decoders["triton"], backend, compute_golden(decoders["reference"], reference, prompt)) < 1e-2
    params = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
    tokens = []
    for each in (backend, reference):
        engine = engine_for(each, decoders[each.name])
        engine.add_request("a", prompt, params)
        tokens.append([event.token_ids for event in run(engine)["a", 0]])
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize("family", ["llama3-rope", "bloom"])
def test_a_checkpoint_of_transformers(backend: TritonBackend, tmp_path: Path, family: str) -> None:
    model = save_random(family, tmp_path)
    token_ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        expected = model(token_ids).logits[0].numpy()
    from fptq_runtime.models.golden import prompt_logits

    got = prompt_logits(load_model(Checkpoint(tmp_path), backend), backend, token_ids[0].tolist())
    assert np.abs(got - expected).max() < 1e-4 * np.abs(expected).max()


def test_steps_are_padded_to_few_sizes() -> None:
    assert [bucket(n) for n in (1, 2, 3, 5, 8, 9, 16, 17, 33)] == [1, 2, 4, 8, 8, 16, 16, 24, 40]
    made = replace(small_limits(SMALL), max_seqs=6)
    inputs = _Inputs(made, torch.device("cpu"))
    batcher = Batcher(made, np.random.default_rng(0))
    sequences = [batcher.sequence(random_tokens(batcher.rng, n)) for n in (20, 5, 9)]
    for sequence in sequences:
        sequence.computed = 4
    step = replace(batcher.step([(sequence, 1) for sequence in sequences]), logits_rows=int32([0, 2]))
    inputs.load(batcher.step([(sequences[0], 15)]), _Shape(15, 1, 15, SMALLEST_CONTEXT, 16, False))
    batch = inputs.load(step, _Shape(4, 4, 4, SMALLEST_CONTEXT, 1, True))
    assert batch.token_ids.tolist() == [*step.token_ids, 0]
    assert batch.positions.tolist() == [4, 4, 4, 0]
    assert batch.slot_mapping.tolist() == [*step.slot_mapping, -1]
    assert batch.query_start_loc.tolist() == [0, 1, 2, 3, 3]
    assert batch.seq_lens.tolist() == [5, 5, 5, 0]
    assert batch.logits_rows.tolist() == [0, 2, 0, 0]
    assert batch.block_tables.shape == (4, SMALLEST_CONTEXT // 16)
    assert batch.block_tables[:3, :2].tolist() == step.block_tables.tolist()
    assert not batch.block_tables[:, 2:].any()
    assert not batch.block_tables[3].any()
    assert (batch.max_query_len, batch.max_seq_len) == (1, SMALLEST_CONTEXT)


def test_sequences_with_few_rows_come_first() -> None:
    made = small_limits(SMALL)
    batcher = Batcher(made, np.random.default_rng(0))
    long, first, second = (batcher.sequence(random_tokens(batcher.rng, n)) for n in (20, 5, 9))
    step = batcher.step([(first, 2), (long, 17), (second, 1)])
    step = replace(step, logits_rows=int32([1, 18, 19]))
    sorted_step = _shorter_first(step)
    assert sorted_step.query_start_loc.tolist() == [0, 1, 3, 20]
    assert sorted_step.seq_lens.tolist() == [1, 2, 17]
    assert sorted_step.token_ids.tolist() == [*step.token_ids[19:], *step.token_ids[:2], *step.token_ids[2:19]]
    assert sorted_step.slot_mapping[sorted_step.logits_rows].tolist() == step.slot_mapping[step.logits_rows].tolist()
    assert sorted_step.block_tables.tolist() == step.block_tables[[2, 0, 1]].tolist()
    assert _shorter_first(sorted_step) is sorted_step


def test_steps_that_a_start_captures_write_nothing(backend: TritonBackend) -> None:
    made = small_limits(SMALL)
    executor = backend.compile(make_decoder(SMALL, backend), made)
    for step in (_unwritten([1, 1], 40, 16), _unwritten([1, 5], 40, 16)):
        assert executor.step(step).isfinite().all()
    assert not executor.cache.keys.any()
    assert not executor.cache.values.any()


def test_what_it_says_of_itself(backend: TritonBackend) -> None:
    executor = backend.compile(make_decoder(SMALL, backend), small_limits(SMALL))
    hidden, inner = SMALL.hidden, SMALL.intermediate
    layers = hidden * (8 * 16 + hidden + 2 * inner + inner)
    of_rows = hidden * (hidden + 3 * inner + VOCAB)  # all after the last attention
    work = executor.work(3, 2)
    assert work.multiply_adds == 3 * (layers + hidden * VOCAB) - of_rows
    assert isinstance(work, Work)
    assert work.weight_bytes > (layers + hidden * VOCAB) // 2
    assert backend.describe()["backend"] == backend.name == "triton"
    assert any(name.startswith("linear") for name in backend.describe())
    assert backend.free_memory() is None
    assert backend.roofs() is None
    assert executor.seconds == {"forward": 0.0}
    config = make_decoder(replace(SMALL, head_dim=32), backend).config
    assert backend.token_bytes(config, "int8") == config.num_layers * config.num_kv_heads * 2 * (32 + 4)
    config = replace(config, hidden_size=4096, intermediate_size=14336, num_heads=32, vocab_size=128256)
    step, wide = (backend.step_bytes(config, StepLimits.of(config, max_tokens=tokens, max_model_len=64, num_blocks=4,
                                                           max_logits_rows=64)) for tokens in (512, 8192))
    assert 64 * 4 * 128256 < step < 2 << 30
    assert wide - step > 4 * (8192 - 512) * 2 * 14336


def test_steps_and_parameters_that_do_not_fit_are_refused(backend: TritonBackend) -> None:
    made = small_limits(SMALL)
    executor = backend.compile(make_decoder(SMALL, backend), made)
    batcher = Batcher(made, np.random.default_rng(0))
    with pytest.raises(ValueError, match="exceeds"):
        executor.step(batcher.step([(batcher.sequence(random_tokens(batcher.rng, 65)), 65)]))
    with pytest.raises(TypeError, match="str"):
        backend.prepare("weights")


def test_it_is_chosen_by_device() -> None:
    assert select_backend(device="cuda").name == "triton"  # the interpreter counts as one


def test_the_gate_lets_these_kernels_pass(backend: TritonBackend, tmp_path: Path) -> None:
    save_model("llama-tied-bias", tmp_path / "float", num_hidden_layers=1)
    quantize(tmp_path / "float", tmp_path / "out", "rtn-dynamic", calibration=Calibration("random", 1, 16),
             text_tokens=60)
    checkpoint = Checkpoint(tmp_path / "out")
    ratio = check(load_model(checkpoint, backend), backend, Golden.read(tmp_path / "out" / GOLDEN),
                  checkpoint.max_positions)
    assert ratio < 0.6

"""Golden numbers of the model of a step: whoever adds a launch or bytes, or saves some, writes it down here."""

from __future__ import annotations

from collections import Counter

import pytest

from benchmarks.gpu_check.roofline import Launch, Machine, llama_launches, seconds
from fptq_runtime.engine.llm import _unwritten
from fptq_runtime.measure.shapes import SHAPES

LLAMA = SHAPES["llama-3-8b"].config
# Rows of each sequence, their tokens; launches, and milliseconds at least on an H200.
GOLDEN = {
    "decode 1": ([1], 1024, 326, 1.80),
    "decode 16": ([1] * 16, 1024, 327, 2.14),
    "decode 64": ([1] * 64, 1024, 327, 3.24),
    "decode 128": ([1] * 128, 1024, 327, 4.74),
    "mixed": ([1] * 63 + [2048], 4096, 423, 30.09),
    "prefill": ([8192], 8192, 359, 101.32),
}


@pytest.fixture(autouse=True)
def compiled_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """None runs; the host launches them as it would on a device."""
    monkeypatch.delenv("TRITON_INTERPRET")


@pytest.mark.parametrize("name", GOLDEN)
def test_a_step_of_llama_3_8b(name: str) -> None:
    rows, context, count, milliseconds = GOLDEN[name]
    launches = llama_launches(LLAMA, _unwritten(rows, context, 32))
    assert (len(launches), round(1e3 * sum(seconds(launches, Machine()).values()), 2)) == (count, milliseconds)


def test_a_layer_that_decodes_takes_ten_launches_and_one_beside_a_prompt_two_of_attention() -> None:
    decode, mixed = (Counter(launch.kernel for launch in llama_launches(LLAMA, _unwritten(rows, 4096, 32)))
                     for rows in ([1] * 64, [1] * 63 + [2048]))
    of_layers = {name: count // 32 for name, count in decode.items() if count >= 32}
    assert of_layers == {"linear": 4, "norm": 2, "rope_and_cache": 1, "attention": 1, "merge": 1, "activation": 1}
    assert mixed["attention"] == 2 * decode["attention"]


def test_bytes_and_operations_are_those_of_the_model() -> None:
    launches = llama_launches(LLAMA, _unwritten([1], 1024, 32))
    weights = sum(launch.bytes for launch in launches if launch.kernel == "linear")
    layers = LLAMA.num_layers * (6144 * 4096 + 4096 * 4096 + 28672 * 4096 + 4096 * 14336)
    head = 128256 * 4096
    assert 1 < weights / (layers * (0.5 + 2 / 128) + head) < 1.02
    assert sum(launch.ops for launch in launches if launch.kernel == "linear") == 2 * (layers + head)
    cache = 2 * 1024 * LLAMA.num_layers * LLAMA.num_kv_heads * (128 + 4)
    read = sum(launch.bytes for launch in launches if launch.kernel == "attention")
    assert 1 < read / cache < 1.1
    assert Launch("linear", (1,), 10**9, 0).seconds(Machine(1e12, 1, 0.5)) == pytest.approx(0.501)

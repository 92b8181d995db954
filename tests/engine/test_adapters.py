"""Many adapters in one batch: the same bits as alone, keys and values of their own, and slots that come and go."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from fptq_runtime.config import EngineConfig
from fptq_runtime.engine.adapters import Adapters
from fptq_runtime.engine.engine import Engine
from fptq_runtime.engine.llm import LLM
from fptq_runtime.engine.request import SamplingParams
from fptq_runtime.kernels.base import Backend
from fptq_runtime.models.decoder import Decoder
from fptq_runtime.models.loader import Checkpoint
from fptq_runtime.models.lora import AdapterError
from fptq_runtime.models.tokenizer import Tokenizer
from tests.engine.fake import gist, run
from tests.engine.test_batch_invariance import DEMO, VOCAB
from tests.models.peft_files import save_lora

NAMES = ["", "a", "b", "c"]
GREEDY = SamplingParams(max_tokens=12, temperature=0.0, logprobs=1, ignore_eos=True)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("adapters")
    for seed, (name, targets) in enumerate([("a", "all-linear"), ("b", ["q_proj", "v_proj"]),
                                            ("c", ["down_proj", "o_proj"])]):
        model = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32)
        save_lora(model, path / name, seed, target_modules=targets, r=8 + seed)
    return path


@pytest.fixture
def engine(native: tuple[Decoder, Backend], saved: Path) -> Engine[Any]:
    return engine_for(native, saved)


def engine_for(native: tuple[Decoder, Backend], saved: Path, names: list[str] = NAMES[1:], slots: int = 3,
               **options: Any) -> Engine[Any]:
    decoder, backend = native
    adapters = Adapters(Checkpoint(DEMO).model, decoder, backend, slots)
    for name in names:
        adapters.load(name, saved / name)
    config = EngineConfig(max_model_len=192, kv_cache_memory=64 << 20, **options)
    return Engine(decoder, backend, config, Tokenizer(DEMO), adapters=adapters)


def answers(engine: Engine[Any], sent: list[tuple[list[int], SamplingParams, str]]) -> list[Any]:
    for i, (prompt, params, adapter) in enumerate(sent):
        engine.add_request(str(i), prompt, params, adapter=adapter)
    outputs = run(engine, check=False)
    return [gist(outputs[str(i), 0]) for i in range(len(sent))]


def test_company_changes_no_bits(native: tuple[Decoder, Backend], saved: Path) -> None:
    generator = random.Random(0)
    sent = [([generator.randrange(VOCAB) for _ in range(generator.randrange(1, 70))],
             SamplingParams(max_tokens=generator.randrange(1, 20), temperature=generator.choice([0.0, 1.0]),
                            seed=i, logprobs=2, ignore_eos=True), generator.choice(NAMES)) for i in range(24)]
    together = answers(engine_for(native, saved, max_num_batched_tokens=64), sent)
    alone = engine_for(native, saved, ["c", "a", "b"], 5, enable_prefix_caching=False, speculation=False)
    for request, answer in zip(sent, together, strict=True):
        assert answers(alone, [request]) == [answer]
    prompt = sent[0][0]
    assert len({str(answers(alone, [(prompt, GREEDY, name)])) for name in NAMES}) == len(NAMES)


def test_without_an_adapter_the_bits_are_the_models(native: tuple[Decoder, Backend], engine: Engine[Any]) -> None:
    plain = Engine(*native, EngineConfig(max_model_len=192, kv_cache_memory=64 << 20), Tokenizer(DEMO))
    prompt = list(range(3, 60))
    sent = [(prompt, GREEDY, "")]
    plain.add_request("0", prompt, GREEDY)
    assert answers(engine, sent) == [gist(run(plain, check=False)["0", 0])]


def test_prefixes_are_an_adapters_own(engine: Engine[Any], native: tuple[Decoder, Backend], saved: Path) -> None:
    prompt = list(range(5, 105))

    def cached(adapter: str) -> tuple[int, Any]:
        engine.add_request("x", prompt, GREEDY, adapter=adapter)
        events = run(engine, check=False)["x", 0]
        return events[-1].num_cached_tokens, gist(events)

    first = {name: cached(name) for name in NAMES}
    assert {count for count, _ in first.values()} == {0}
    for name in NAMES:
        count, answer = cached(name)
        assert count == 96
        assert answer == first[name][1]
    assert engine.adapters is not None
    engine.adapters.unload("a")
    engine.adapters.load("a", saved / "c")
    assert cached("a") == (96, first["c"][1])  # what it holds counts, not its name


def test_a_dropped_adapter_stays_for_those_that_have_it(engine: Engine[Any], saved: Path) -> None:
    adapters = engine.adapters
    assert adapters is not None
    prompt = list(range(9, 40))
    [expected] = answers(engine, [(prompt, GREEDY, "b")])
    engine.add_request("0", prompt, GREEDY, adapter="b")
    engine.step()
    adapters.unload("b")
    with pytest.raises(AdapterError, match="there is no adapter b"):
        engine.add_request("1", prompt, GREEDY, adapter="b")
    with pytest.raises(AdapterError, match="all 3 places for adapters are taken"):
        adapters.load("d", saved / "a")
    assert gist([*run(engine, check=False)["0", 0]])[0] != ()
    adapters.load("d", saved / "b")
    assert answers(engine, [(prompt, GREEDY, "d")]) == [expected]
    with pytest.raises(AdapterError, match="is loaded already"):
        adapters.load("d", saved / "b")


def test_an_aborted_request_gives_its_adapter_back(engine: Engine[Any], saved: Path) -> None:
    assert engine.adapters is not None
    engine.add_request("0", [5, 6], SamplingParams(n=3, max_tokens=5), adapter="a")
    with pytest.raises(Exception, match="already running"):
        engine.add_request("0", [5, 6], SamplingParams(n=2, max_tokens=5), adapter="a")
    engine.abort("0")
    run(engine, check=False)
    engine.adapters.unload("a")
    engine.adapters.load("e", saved / "a")


def test_offline(saved: Path) -> None:
    """As PEFT has it, prompt by prompt."""
    llm = LLM(DEMO, lora={"a": saved / "a", "b": saved / "b"})
    assert llm.engine.config.max_loras == 2
    prompts = [list(range(5, 30)), list(range(40, 60)), list(range(5, 30))]
    names = ["a", "", "b"]
    completions = llm.generate(prompts, SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0), names)
    for name, prompt, [completion] in zip(names, prompts, completions, strict=True):
        model = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32)
        if name:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, saved / name)
        with torch.no_grad():
            expected = model(torch.tensor([prompt])).logits[0, :-1].log_softmax(-1)
        got = [entry.logprob for entry in completion.prompt_logprobs if entry is not None]
        wanted = expected.gather(1, torch.tensor(prompt[1:])[:, None])[:, 0].tolist()
        assert got == pytest.approx(wanted, abs=0.05)  # keys and values are int8
    with pytest.raises(Exception, match="3 prompts but 1 adapters"):
        llm.generate(prompts, adapter=["a"])

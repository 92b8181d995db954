"""Every family's hidden states behind the last norm, through the engine, against transformers'."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fptq_runtime.engine.llm import load_engine
from fptq_runtime.engine.request import SamplingParams
from tests.engine.fake import run
from tests.models.hf import FAMILIES
from tests.quantizer.models import save_model


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states(family: str, tmp_path: Path) -> None:
    """In chunks, beside a request that draws tokens."""
    model, prompt = save_model(family, tmp_path).eval(), list(range(3, 43))
    with torch.inference_mode():
        hidden = np.asarray(model(torch.tensor([prompt]), output_hidden_states=True).hidden_states[-1][0].float())
    engine = load_engine(tmp_path, kv_cache_dtype="float32", max_model_len=64, max_num_batched_tokens=16,
                         kv_cache_memory=1 << 24)
    engine.add_request("mean", prompt, SamplingParams(max_tokens=0, pooling="mean"))
    engine.add_request("text", prompt, SamplingParams(max_tokens=4))
    engine.add_request("last", prompt, SamplingParams(max_tokens=0, pooling="last"))
    events = run(engine)
    for name, expected in (("mean", hidden.mean(0)), ("last", hidden[-1])):
        embedding = events[name, 0][-1].embedding
        assert embedding is not None
        np.testing.assert_allclose(embedding, expected, atol=1e-4)

"""Golden logits: what the quantizer saw, kept in the artifact, checked again on every machine that serves it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fptq_runtime.errors import FptqError
from fptq_runtime.kernels.base import Backend, Float32Array, StepInput, StepLimits, logits_array
from fptq_runtime.models.decoder import Decoder

# Integer parts are exact everywhere, but float sums in another order tip a few int8 codes a prompt to their neighbour,
# and the layers after amplify one tipped code to the size of the quantization noise itself. Between torch and the
# native kernels, 40 prompts of the demo model differed by at most 0.4 % of max |logit| (root mean square), single
# logits by 2.3 %.
TOLERANCE = 1e-2  # root mean square over the kept logits, each relative to max |logit| of its position
MARGIN = 5e-2  # of max |logit|: a top token that leads by more must stay on top
KEPT = 16  # best logits kept for each position


class GoldenMismatch(FptqError):
    """This machine's kernels do not reproduce the artifact's logits."""


def compute_golden(decoder: Decoder, backend: Backend, prompt_token_ids: Sequence[int]) -> dict[str, Any]:
    """The prompt and, for each of its positions, the best logits (ids, values) and the largest magnitude."""
    logits = prompt_logits(decoder, backend, prompt_token_ids)
    best = np.argsort(-logits, axis=-1, kind="stable")[:, :KEPT]
    return {
        "prompt_token_ids": [int(token) for token in prompt_token_ids],
        "token_ids": best.tolist(),
        "logits": [[float(v) for v in row] for row in np.take_along_axis(logits, best, -1)],
        "max_abs": [float(v) for v in np.abs(logits).max(-1)],
    }


def check_golden(decoder: Decoder, backend: Backend, golden: Mapping[str, Any]) -> float:
    """The deviation: root mean square over the kept logits, relative to max |logit| of their position. Raises
    GoldenMismatch above TOLERANCE, or where the top token differs although it led by more than MARGIN."""
    try:
        ids = np.asarray(golden["token_ids"], dtype=np.int64)  # [T, KEPT]
        expected = np.asarray(golden["logits"], dtype=np.float64)
        scale = np.asarray(golden["max_abs"], dtype=np.float64)  # [T]
        prompt = [int(token) for token in golden["prompt_token_ids"]]
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise GoldenMismatch(f"the golden logits are malformed: {error!r}") from None
    vocab = decoder.config.vocab_size
    well_formed = (
        prompt
        and ids.ndim == 2
        and ids.size
        and ids.shape == expected.shape
        and len(ids) == len(prompt) == len(scale)
        and 0 <= min(prompt) <= max(prompt) < vocab
        and 0 <= ids.min() <= ids.max() < vocab
    )
    if not well_formed:
        raise GoldenMismatch("the golden logits are malformed")
    logits = prompt_logits(decoder, backend, prompt)
    scale = np.maximum(scale, 1e-6)
    difference = (np.take_along_axis(logits, ids, -1) - expected) / scale[:, None]  # [T, KEPT]
    deviation = float(np.sqrt(np.square(difference).mean()))
    if not deviation <= TOLERANCE:
        raise GoldenMismatch(f"golden logits differ by {deviation:.2%} of max |logit| (rms), more than {TOLERANCE:.0%}")
    margin = (expected[:, 0] - expected[:, 1]) / scale if ids.shape[1] > 1 else np.zeros(len(ids))
    wrong = (logits.argmax(-1) != ids[:, 0]) & (margin > MARGIN)
    if wrong.any():
        raise GoldenMismatch(f"the top token differs from the golden one at position {int(wrong.argmax())}")
    return deviation


def prompt_logits(decoder: Decoder, backend: Backend, prompt_token_ids: Sequence[int]) -> Float32Array:
    """Logits of every position of one prompt, computed whole with a float32 KV cache. [T, V]"""
    config, length = decoder.config, len(prompt_token_ids)
    limits = StepLimits.of(config, max_tokens=length, max_model_len=length, num_blocks=-(-length // 16))
    return logits_array(backend.compile(decoder, limits).step(StepInput.whole([prompt_token_ids])))

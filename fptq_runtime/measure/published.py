"""What others publish for models that people compare by, on the whole of WikiText-2's raw test split."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fptq_runtime.config import ModelConfig

SOURCE = "https://github.com/nunchaku-ai/deepcompressor, README, as of 2026"
ACCURACIES = ("FPTQ (arXiv 2308.15987) publishes no perplexity at W4A8: of LLaMA-7B the accuracy on WinoGrande, PIQA, "
              "HellaSwag and ARC-easy, 74.51 % in float and 73.42 % quantized on average, and on MMLU 35.20 % and "
              "32.02 %.")


@dataclass(frozen=True)
class Published:
    """Perplexities of one model, which its shape tells: in float, and by method."""

    model: str
    hidden_size: int
    num_layers: int
    vocab_size: int
    original: float
    methods: Mapping[str, float]


PUBLISHED = (
    Published("Llama-2-7B", 4096, 32, 32000, 5.47, {"SmoothQuant W8A8": 5.54, "QoQ W4A8KV4 g128": 5.67}),
    Published("Llama-3-8B", 4096, 32, 128256, 6.14, {"SmoothQuant W8A8": 6.28, "QoQ W4A8KV4 g128": 6.70}),
)


def published(config: ModelConfig) -> Published | None:
    """For a model of this shape."""
    shape = config.hidden_size, config.num_layers, config.vocab_size
    return next((each for each in PUBLISHED if (each.hidden_size, each.num_layers, each.vocab_size) == shape), None)

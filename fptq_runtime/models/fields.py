"""A config.json, believed value by value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fptq_runtime.config import ModelConfig
from fptq_runtime.errors import FptqError
from fptq_runtime.kernels.base import Curve

MAX_POSITIONS = 1 << 21  # a rope table of 1 GiB at head_dim 128
MAX_LAYERS = 1 << 10
MAX_HEAD_DIM = 256  # what the attention kernels hold in registers and on their stack


class ModelError(FptqError):
    """A config that is malformed, or a model that this runtime does not run. One line, for the user."""


class Fields:
    """A config.json, read with a type and a bound for every value that is believed. `name` may be several names of one
    field; the first that is there counts, as with transformers' attribute maps."""

    def __init__(self, data: Mapping[str, Any], where: str = "config.json") -> None:
        self.data = data
        self.where = where

    def get(self, name: str | Sequence[str], default: Any = None) -> Any:
        """The value as it stands; null is not given."""
        value = self.data.get(self._known(name))
        return default if value is None else value

    def integer(self, name: str | Sequence[str], default: int | None = None, low: int = 1, high: int = 1 << 20) -> int:
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ModelError(f"{self.where}: {self._known(name)} must be an integer between {low} and {high}, not "
                             f"{value!r}")
        return value

    def number(self, name: str | Sequence[str], default: float | None = None, low: float = 0.0,
               high: float = 1e12) -> float:
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise ModelError(f"{self.where}: {self._known(name)} must be a number between {low:g} and {high:g}, not "
                             f"{value!r}")
        return float(value)

    def optional(self, name: str, default: float | None, low: float = 1e-6, high: float = 1e6) -> float | None:
        """A number, or null for none; `default` where the field is missing."""
        return None if self.data.get(name, default) is None else self.number(name, default, low, high)

    def flag(self, name: str | Sequence[str], default: bool) -> bool:
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise ModelError(f"{self.where}: {self._known(name)} must be true or false, not {value!r}")
        return value

    def only(self, name: str | Sequence[str], allowed: Sequence[Any], default: Any) -> Any:
        known = self._known(name)
        value = self.data.get(known, default)
        if value not in allowed:
            supported = ", ".join(map(repr, allowed))
            raise ModelError(f"{self.where}: {known} {value!r} is not supported; only {supported} is")
        return value

    def names(self, name: str, allowed: Sequence[str], count: int) -> list[str]:
        """A list of `count` words, each one of `allowed`."""
        value = self.get(name)
        if not isinstance(value, list) or len(value) != count or any(word not in allowed for word in value):
            raise ModelError(f"{self.where}: {name} must list {count} of {', '.join(allowed)}, not {value!r}")
        return value

    def numbers(self, name: str, count: int, low: float = 1e-6, high: float = 1e6) -> tuple[float, ...]:
        value = self.get(name)
        good = isinstance(value, list) and len(value) == count and all(
            isinstance(v, int | float) and not isinstance(v, bool) and low <= v <= high for v in value)
        if not good:
            raise ModelError(f"{self.where}: {name} must be {count} numbers between {low:g} and {high:g}")
        return tuple(map(float, value))

    def token_ids(self, name: str, vocab_size: int) -> tuple[int, ...]:
        value = self.data.get(name)
        values = [] if value is None else value if isinstance(value, list) else [value]
        for item in values:
            if isinstance(item, bool) or not isinstance(item, int) or not 0 <= item < vocab_size:
                raise ModelError(f"{self.where}: {name} must be token ids below {vocab_size}, not {value!r}")
        return tuple(values)

    def _known(self, name: str | Sequence[str]) -> str:
        names = [name] if isinstance(name, str) else name
        return next((each for each in names if self.data.get(each) is not None), names[0])


def dense_config(
    fields: Fields, architecture: str, *, hidden: str | Sequence[str] = "hidden_size",
    layers: str | Sequence[str] = "num_hidden_layers", heads: str | Sequence[str] = "num_attention_heads",
    positions: str | Sequence[str] = "max_position_embeddings", default_positions: int = 2048,
    default_head_dim: int | None = None, grouped: bool = True, tied: bool = False,
    intermediate: int | None = None,
) -> ModelConfig:
    """What every dense decoder's config.json says, under the family's names. default_head_dim: where `head_dim` is not
    given; None is hidden size over heads. grouped: `num_key_value_heads` counts, and a `head_dim` of its own.
    intermediate: the MLP's width where `intermediate_size` does not say it. tied: the default of tie_word_embeddings.
    Raises ModelError."""
    vocab_size = fields.integer("vocab_size", high=1 << 22)
    hidden_size = fields.integer(hidden, high=1 << 16)
    num_heads = fields.integer(heads, high=1 << 10)
    num_kv_heads = fields.integer("num_key_value_heads", num_heads, high=1 << 10) if grouped else num_heads
    if num_heads % num_kv_heads:
        raise ModelError(f"config.json: {num_heads} attention heads are not a multiple of {num_kv_heads} KV heads")
    given = fields.get("head_dim", default_head_dim)
    if given is None and hidden_size % num_heads:
        raise ModelError(f"config.json: hidden_size {hidden_size} is not a multiple of {num_heads} attention heads")
    if not grouped and given not in (None, hidden_size // num_heads):
        raise ModelError(f"config.json: head_dim {given!r} is not hidden_size over the attention heads, as this "
                         "family's is")
    head_dim = hidden_size // num_heads if given is None else fields.integer("head_dim", given, low=1, high=1 << 16)
    if head_dim > MAX_HEAD_DIM:
        raise ModelError(f"config.json: head_dim {head_dim} is larger than {MAX_HEAD_DIM}, the largest that runs")
    bos = fields.token_ids("bos_token_id", vocab_size)
    return ModelConfig(
        architecture=architecture,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate or fields.integer("intermediate_size", high=1 << 19),
        num_layers=fields.integer(layers, high=MAX_LAYERS),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=fields.integer(positions, default_positions, high=MAX_POSITIONS),
        tie_word_embeddings=fields.flag("tie_word_embeddings", tied),
        bos_token_id=bos[0] if bos else None,
        eos_token_ids=fields.token_ids("eos_token_id", vocab_size),
    )


CURVES: Mapping[str, Curve] = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh", "relu": "relu", "relu2": "relu2", "relu_squared": "relu2",
}  # by transformers' names (ACT2FN)


def read_curve(fields: Fields, name: str | Sequence[str], default: str) -> Curve:
    """The curve of the MLP's activation. Raises ModelError."""
    return CURVES[fields.only(name, tuple(CURVES), default)]

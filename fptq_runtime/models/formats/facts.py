"""Facts of a quantization config: what is read, what changes no number, and what is refused by its name."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from fptq_runtime.artifact.scheme import SchemeError


def refuse_unknown(config: Mapping[str, Any], where: str, read: Collection[str], harmless: Collection[str]) -> None:
    """Raise SchemeError for a fact that may change numbers and that nothing here applies. Null, false, empty and zero
    say that there is none."""
    for name, value in config.items():
        if name not in read and name not in harmless and value not in (None, False, 0, "", [], {}):
            raise SchemeError(f"{where}: {name} is not supported, and what it says would be ignored: "
                              f"{_short(value)}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."

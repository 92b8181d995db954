"""Changes to JSON, safetensors and bytes that keep most of their form, so that they get further than a first check."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

DEEP: Any = []
for _ in range(400):
    DEEP = [DEEP]
VALUES: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 2, 3, 7, 255, 1 << 20, 1 << 31, (1 << 31) - 1, 1 << 53, 1 << 63, 1 << 64, 10**30,
    -(1 << 63), 10**400, 0.5, -0.5, 1e-300, 1e308, -1e308, float("inf"), float("-inf"), float("nan"), "", "x",
    "é" * 999, "1", "-1", "inf", "\ud800", [], {}, [[]], [None], [1], [1, 2], [float("inf")], ["x"], {"x": 1},
    {"": None}, DEEP, [0] * 5000, "re:(a+)+$", "re:[", "float32", "default", "yarn", "llama3", "longrope", "linear",
    "dynamic")
PIECES = (b"[", b"{", b'"', b"9" * 5000, b"\0", b"-", b"1e999", b"null")


class Mutator:
    def __init__(self, random: random.Random) -> None:
        self.random = random

    def json(self, data: bytes) -> bytes:
        """Raises ValueError or RecursionError where the result cannot be written."""
        if self.random.random() < 0.1:
            return self.raw(data)
        document = json.loads(data)
        for _ in range(self.random.choice((1, 1, 1, 2, 3))):
            document = self.value(document)
        return json.dumps(document).encode("utf-8", "surrogateescape")

    def value(self, document: Any) -> Any:
        document = copy.copy(document)
        if not document or not isinstance(document, (dict, list)) or self.random.random() < 0.05:
            return self.random.choice(VALUES)
        keys = list(document) if isinstance(document, dict) else list(range(len(document)))
        key = self.random.choice(keys)
        chance = self.random.random()
        if chance < 0.12:
            del document[key]
        elif chance < 0.2:
            document[key] = document[self.random.choice(keys)]
        elif chance < 0.25 and isinstance(document, dict):
            document[self.random.choice(("x", "head_dim", "rope_scaling", "quantization_config", "rope_theta"))] = \
                self.random.choice(VALUES)
        elif isinstance(document[key], (dict, list)) and chance < 0.8:
            document[key] = self.value(document[key])
        elif isinstance(document[key], str) and chance < 0.6:
            document[key] = self.raw(document[key].encode("utf-8", "surrogatepass")).decode("utf-8", "replace")
        else:
            document[key] = self.random.choice(VALUES)
        return document

    def raw(self, data: bytes) -> bytes:
        changed = bytearray(data)
        for _ in range(self.random.choice((1, 2, 8))):
            at = self.random.randrange(len(changed) or 1)
            match self.random.randrange(4):
                case 0:
                    changed[at : at + 1] = bytes([self.random.randrange(256)])
                case 1:
                    del changed[at : at + self.random.choice((1, 2, 9, len(changed)))]
                case 2:
                    changed[at:at] = self.random.choice(PIECES)
                case _:
                    changed[at:at] = changed[at : at + self.random.randrange(64)]
        return bytes(changed)

    def safetensors(self, data: bytes) -> bytes:
        """Mostly its header. Raises as `json` does."""
        size = int.from_bytes(data[:8], "little")
        header, rest = data[8 : 8 + size], data[8 + size :]
        if self.random.random() < 0.2:
            size = self.random.choice((0, 1, len(header) + 1, 1 << 40, (1 << 64) - 1))
            return size.to_bytes(8, "little") + header + rest
        changed = self.json(header)
        if rest and self.random.random() < 0.1:
            rest = rest[: self.random.randrange(len(rest))]
        return len(changed).to_bytes(8, "little") + changed + rest

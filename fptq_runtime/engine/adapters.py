"""The adapters that requests may name: each in a slot of every linear it adds to."""

from __future__ import annotations

import threading
from collections.abc import Collection
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fptq_runtime.engine.request import Adapter
from fptq_runtime.kernels.base import Backend
from fptq_runtime.models.block import Block, Model
from fptq_runtime.models.decoder import Decoder
from fptq_runtime.models.lora import AdapterError as AdapterError
from fptq_runtime.models.lora import read_lora
from fptq_runtime.models.readout import Bases


class Adapters:
    """Loads, lends and drops adapters, on any thread. decoder: with linears that take `slots` adapters. bases: of the
    model's linears that read something else than those that adapters were trained beside."""

    def __init__(self, model: Model, decoder: Decoder, backend: Backend, slots: int,
                 bases: Bases = MappingProxyType({})) -> None:
        self._model = model
        self._bases = bases
        self._backend = backend
        self._slots = slots
        self._linears: dict[tuple[str, str], Any] = {}
        self.decoder = Decoder(decoder.config, decoder.stem, [self._adaptable(block) for block in decoder.blocks],
                               self._adaptable(decoder.head))
        self._lock = threading.Lock()
        self._loading = threading.Lock()
        self._named: dict[str, Adapter] = {}
        self._held: set[int] = set()  # slots

    @property
    def names(self) -> Collection[str]:
        """Of those that are loaded, as it is whenever it is looked at."""
        return self._named.keys()

    def load(self, name: str, path: Path) -> None:
        """Raises AdapterError."""
        with self._loading:
            self._load(name, path)

    def unload(self, name: str) -> None:
        """Requests that run keep it until they end. Raises AdapterError."""
        with self._lock:
            adapter = self._named.pop(name, None)
            if adapter is None:
                raise AdapterError(f"there is no adapter {name}")
            adapter.dropped = True
            if not adapter.users:
                self._held.discard(adapter.slot)

    def acquire(self, name: str, users: int) -> Adapter:
        """For so many sequences. Raises AdapterError."""
        with self._lock:
            adapter = self._named.get(name)
            if adapter is None:
                raise AdapterError(f"there is no adapter {name}")
            adapter.users += users
            return adapter

    def release(self, adapter: Adapter, users: int = 1) -> None:
        with self._lock:
            adapter.users -= users
            if adapter.dropped and not adapter.users:
                self._held.discard(adapter.slot)

    def _load(self, name: str, path: Path) -> None:
        if name in self._named:
            raise AdapterError(f"an adapter {name} is loaded already; unload it first")
        lora = read_lora(path, self._model, self._bases)
        with self._lock:
            slot = next((slot for slot in range(1, self._slots + 1) if slot not in self._held), 0)
            if not slot:
                raise AdapterError(f"all {self._slots} places for adapters are taken; unload one, or raise max_loras "
                                   "(--max-loras)")
            self._held.add(slot)
        try:
            for key, linear in self._linears.items():
                self._backend.adapt(linear, slot, lora.parts.get(key, ()))
        except BaseException:
            with self._lock:
                self._held.discard(slot)
            raise
        with self._lock:
            self._named[name] = Adapter(name, slot, lora.digest, path)

    def _adaptable(self, block: Block) -> Block:
        def change(name: str, linear: Any) -> Any:
            if block.spec.linear(name).experts > 1:
                return linear
            self._linears[block.spec.name, name] = made = self._backend.adaptable(linear, self._slots)
            return made

        return block.with_linears(change)

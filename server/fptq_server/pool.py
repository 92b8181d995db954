"""Several models in one process, under one budget of memory: a request wakes the one that it names, and the one that
was used longest ago makes room."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

from starlette.requests import Request
from starlette.types import Message, Receive, Scope, Send

from fptq_runtime.engine.sizing import format_bytes
from fptq_runtime.errors import FptqError
from fptq_runtime.memory import give_back_freed_memory
from fptq_server.errors import APIError, ErrorHandlers
from fptq_server.middleware import Admission
from fptq_server.validation import TGI_NAMES

if TYPE_CHECKING:
    from fptq_server.main import Loaded
    from fptq_server.metrics import Metrics

log = logging.getLogger("fptq.server")

STOP_SECONDS = 5.0  # that a model which is being loaded has at the end


@dataclass
class Instance:
    """A model in memory, and how many requests it has."""

    loaded: Loaded
    users: int = 0
    unused: asyncio.Event = field(default_factory=asyncio.Event)
    lifespan: Any = None


@dataclass(frozen=True)
class Plan:
    """What a model will take and give. size: bytes, with its KV cache, by estimate."""

    size: int
    max_model_len: int


@dataclass
class ServedModel:
    """names: the first is the model's id. metrics: since it was first awake, or was replaced. used: when it last was
    asked, on time.monotonic()."""

    names: tuple[str, ...]
    path: Path
    plan: Plan
    metrics: Metrics | None = None
    instance: Instance | None = None
    leaving: bool = False
    used: float = 0.0

    @property
    def id(self) -> str:
        return self.names[0]


class ModelPool:
    """Belongs to one event loop. models: the names and the directory of each. plan and load: raise FptqError, also
    where there is no model; load takes a thread and time. budget: bytes of all that are awake. Raises FptqError where
    two models have a name, or one is larger than the budget."""

    def __init__(self, models: Sequence[tuple[Sequence[str], Path]], plan: Callable[[Path], Plan],
                 load: Callable[[ServedModel], Loaded], budget: int) -> None:
        self.models = [ServedModel(tuple(names), path, plan(path)) for names, path in models]
        self.draining = False
        self._plan = plan
        self._load = load
        self._budget = budget
        self._changing = asyncio.Lock()
        self._named = {name: model for model in self.models for name in model.names}
        if len(self._named) < sum(len(names) for names, _ in models):
            raise FptqError("two models have the same name; give each one, as NAME=ARTIFACT", "artifact")
        for model in self.models:
            self._check(model.id, model.plan.size)

    @property
    def default(self) -> ServedModel:
        """What a request is for that names no model."""
        return self.models[0]

    def find(self, name: str | None) -> ServedModel:
        """Raises APIError."""
        if name is None or name in TGI_NAMES:
            return self.default
        if name not in self._named:
            raise APIError(404, f"the model {name} does not exist; this server has "
                                f"{', '.join(model.id for model in self.models)}", param="model",
                           code="model_not_found")
        return self._named[name]

    async def start(self) -> None:
        """Wake as many as there is room for, in their order."""
        for model in self.models:
            if self._taken() + model.plan.size <= self._budget:
                await self.wake(model)

    async def acquire(self, model: ServedModel) -> Instance:
        """The model, awake until it is released. Raises APIError."""
        while True:
            if self.draining:
                raise APIError(503, "the server is shutting down", reason="draining", code="draining", retry_after=1)
            if (instance := model.instance) is not None and not model.leaving:
                instance.users += 1
                instance.unused.clear()
                model.used = time.monotonic()
                return instance
            try:
                await self.wake(model)
            except FptqError as error:
                log.error("%s cannot be loaded: %s", model.id, error)
                raise APIError(503, f"the model {model.id} cannot be loaded; the server's log says why",
                               reason="failed", code="model_not_loaded") from None

    def release(self, instance: Instance) -> None:
        instance.users -= 1
        if instance.users == 0:
            instance.unused.set()

    async def wake(self, model: ServedModel) -> None:
        """Raises FptqError."""
        async with self._changing:
            if model.instance is None:
                await self._make_room(model.plan.size)
                model.instance = await self._begin(model)
                model.used = time.monotonic()

    async def sleep(self, model: ServedModel) -> None:
        """Once its requests have ended; those that come wake it again."""
        async with self._changing:
            await self._unload(model)

    async def reload(self, model: ServedModel, path: Path) -> None:
        """Serve what lies at path under the model's name. Requests that run end with what they began with, and those
        that come wait only where memory does not hold both. Raises FptqError, and all is as it was, unless the old one
        had to make room."""
        plan = self._plan(path)
        self._check(model.id, plan.size)
        async with self._changing:
            if model.plan.size + plan.size > self._budget:
                await self._unload(model)
            await self._make_room(plan.size, model)
            old, before = model.instance, (model.path, model.plan, model.metrics)
            model.path, model.plan, model.metrics = path, plan, None
            try:
                model.instance = await self._begin(model)
            except BaseException:
                model.path, model.plan, model.metrics = before
                raise
            log.info("%s is %s", model.id, path)
            if old is not None:
                await self._end(old)

    async def drain(self, timeout: float) -> int:
        """Refuse what is new and wait for what runs, at most so many seconds; then abort the rest. How many."""
        self.draining = True
        engines = [model.instance.loaded.engine for model in self.models if model.instance is not None]
        return sum(await asyncio.gather(*(engine.drain(timeout) for engine in engines)))

    async def stop(self) -> None:
        self.draining = True
        with suppress(asyncio.TimeoutError):  # what loads then loads for nobody
            await asyncio.wait_for(self._changing.acquire(), STOP_SECONDS)
        for model in self.models:
            if (instance := model.instance) is not None:
                model.instance = None
                await self._stop(instance)

    def _check(self, name: str, size: int) -> None:
        if size > self._budget:
            raise FptqError(f"{name} takes about {format_bytes(size)} with its KV cache, more than the "
                            f"{format_bytes(self._budget)} of models_memory", "models_memory")

    def _taken(self) -> int:
        return sum(model.plan.size for model in self.models if model.instance is not None)

    async def _make_room(self, size: int, stays: ServedModel | None = None) -> None:
        while self._taken() + size > self._budget:
            awake = [model for model in self.models if model.instance is not None and model is not stays]
            await self._unload(min(awake, key=lambda model: (_users(model) > 0, model.used)))

    async def _begin(self, model: ServedModel) -> Instance:
        loaded = await _in_thread(self._load, model)
        instance = Instance(loaded)
        model.metrics = loaded.metrics
        instance.unused.set()
        instance.lifespan = loaded.app.router.lifespan_context(loaded.app)
        await instance.lifespan.__aenter__()
        return instance

    async def _unload(self, model: ServedModel) -> None:
        if (instance := model.instance) is None:
            return
        model.leaving = True
        try:
            await self._end(instance)
        finally:
            model.instance, model.leaving = None, False
        log.info("%s sleeps", model.id)

    async def _end(self, instance: Instance) -> None:
        """After its requests."""
        await instance.unused.wait()
        await self._stop(instance)
        gc.collect()
        give_back_freed_memory()

    @staticmethod
    async def _stop(instance: Instance) -> None:
        await instance.lifespan.__aexit__(None, None, None)


async def _in_thread(load: Callable[[ServedModel], Loaded], model: ServedModel) -> Loaded:
    """Not of the loop's own threads, for which the process waits at its end."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[Loaded] = loop.create_future()

    def finish(settle: Callable[[Any], None], result: object) -> None:
        if not done.done():
            settle(result)

    def run() -> None:
        try:
            outcome: tuple[Callable[[Any], None], object] = done.set_result, load(model)
        except BaseException as error:
            outcome = done.set_exception, error
        with suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(finish, *outcome)

    threading.Thread(target=run, name="fptq-load", daemon=True).start()
    return await done


def _users(model: ServedModel) -> int:
    return 0 if model.instance is None else model.instance.users


class Dispatch:
    """The routes of the model that a request names: in its body, or as ?model= where it has none."""

    def __init__(self, pool: ModelPool, errors: ErrorHandlers) -> None:
        self._pool = pool
        self._errors = errors

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await Request(scope, receive).body() if scope["method"] == "POST" else b""
        pool = self._pool  # of which one model alone says itself what it knows, adapters too
        instance = await pool.acquire(pool.default if len(pool.models) == 1 else pool.find(_name(scope, body)))
        sent = False

        async def receive_again() -> Message:
            nonlocal sent
            if sent:
                return await receive()
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}

        app, engine = instance.loaded.app, instance.loaded.engine
        admission = Admission(app.router, engine, app.state.answering, self._errors)
        try:
            await admission(scope, receive_again, send)
        finally:
            self._pool.release(instance)


def _name(scope: Scope, body: bytes) -> str | None:
    """None where there is none; what is wrong with a body is for its route to say."""
    name: object = None
    if body:
        with suppress(ValueError, RecursionError):
            parsed = json.loads(body)
            name = parsed.get("model") if isinstance(parsed, dict) else None
    else:
        name = parse_qs(scope["query_string"].decode("latin-1")).get("model", [None])[0]
    return name if isinstance(name, str) else None

"""Replicas of the server on Ray Serve, behind its proxy; each is the application of a pool, whose models it holds.

What the proxy does not do for a language model is done there by Door: it names a prompt's beginning, by which
PrefixRouter finds the replica that has it cached, and ends the answers of a replica that has died.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
import queue
import random
import shutil
import signal
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from hashlib import blake2b
from http import HTTPStatus
from inspect import signature
from pathlib import Path
from typing import Any

import ray
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from pydantic import TypeAdapter
from ray import serve
from ray.serve.config import AutoscalingContext
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fptq_runtime.config import EngineConfig
from fptq_runtime.errors import FptqError
from fptq_server.config import ServerConfig
from fptq_server.errors import ANTHROPIC_PATHS, APIError
from fptq_server.logs import start_logging
from fptq_server.main import listen

log = logging.getLogger("fptq.server")

SESSION = b"x-session-id"  # Serve's own header, which its routers read
KEY_CHARACTERS = 512  # of a prompt, that tell one beginning from another
KEYED_BYTES = 1 << 20  # longer bodies are not read twice
KEYED_SECONDS = 1.0  # in which a body comes, or goes on as it comes
BALANCE, SLACK = 1.25, 8  # a replica has at most so many times the mean of all, and so many requests more
QUEUED_TOKENS = 4096  # that wait at a replica before another one is wanted
OBJECT_STORE = 100 << 20  # bytes; nothing large passes through it
MODULE = "fptq_server.ray_serve"
SCRAPE_SECONDS = 5.0  # that /metrics waits for the others
MOST_OPEN = 10_000  # requests of a replica, past which the proxy keeps them; its engine refuses far fewer
ENVIRONMENT = {  # of the Ray that is started here
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # Ray has 15, which gives replicas what others leave
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": f"{MODULE}:proxy_middlewares",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",  # on a busy machine its imports take longer than Serve's 5
}
OF_ONE_PROCESS = ("uds", "admin_port", "admin_key", "batch_dir", "allow_runtime_lora_updating")


def prefix_key(body: bytes) -> str | None:
    """What requests have in common whose prompts begin alike: the system's words and the user's first, which a
    conversation keeps. None where there is no prompt."""
    try:
        request = json.loads(body)
    except (ValueError, RecursionError):
        return None
    if not isinstance(request, dict):
        return None
    if (given := request.get("prompt_cache_key")) is not None:
        begins = given
    elif isinstance(messages := request.get("messages"), list):
        roles = [message.get("role") if isinstance(message, dict) else None for message in messages]
        begins = [request.get("system"), messages[: roles.index("user") + 1 if "user" in roles else None]]
    else:
        begins = next((request[name] for name in ("prompt", "input", "inputs") if name in request), None)
    if begins is None:
        return None
    text = begins if isinstance(begins, str) else json.dumps(begins)
    return blake2b(f"{request.get('model')}\n{text[:KEY_CHARACTERS]}".encode("utf-8", "replace"),
                   digest_size=8).hexdigest()


class PrefixRouter(RequestRouter):  # type: ignore[misc]
    """By rendezvous hashing of what prefix_key gave, so that all proxies agree and a replica that comes or goes moves
    only its own share; past the bound of BALANCE and SLACK, the next in the same order."""

    async def choose_replicas(self, candidate_replicas: list[RunningReplica],
                              pending_request: PendingRequest | None = None) -> list[list[RunningReplica]]:
        key = ""
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True  # where all are full
            key = pending_request.metadata.session_id
        if not key:
            return [random.sample(candidate_replicas, min(2, len(candidate_replicas)))]
        open_requests = {each.replica_id: self.replica_queue_len_cache.get(each.replica_id) or 0
                         for each in candidate_replicas}
        return [[each] for each in in_order(key, candidate_replicas, open_requests)]


def in_order(key: str, replicas: Sequence[Any], open_requests: Mapping[Any, int]) -> list[Any]:
    """Replicas as they are tried for a key."""
    most = BALANCE * sum(open_requests.values()) / len(replicas) + SLACK

    def rank(each: Any) -> tuple[bool, bytes]:
        name = f"{key} {each.replica_id.unique_id}".encode()
        return open_requests[each.replica_id] > most, blake2b(name, digest_size=8).digest()

    return sorted(replicas, key=rank)


class Door:
    """In Serve's proxy, around everything: gives a request the session of its prefix, where it has none, and an answer
    whose replica died an end that clients understand."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if scope["method"] == "POST" and SESSION not in dict(scope["headers"]):
            scope, receive = await self._with_session(scope, receive)
        started = ended = streams = False

        async def watched(message: Message) -> None:
            nonlocal started, ended, streams
            if message["type"] == "http.response.start":
                started = True
                streams = dict(message["headers"]).get(b"content-type", b"").startswith(b"text/event-stream")
                message["headers"] = list(dict.fromkeys(message["headers"]))  # Serve adds the request's id once more
            elif message["type"] == "http.response.body":
                ended = not message.get("more_body", False)
            await send(message)

        await self._app(scope, receive, watched)
        if ended:
            return
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        error = APIError(503, "the replica that answered has died; send the request again", reason="failed",
                         code="replica_died", retry_after=1)
        if not started:
            await error.response(path)(scope, receive, send)
        elif streams:
            name, body = "", error.body()
            if path.startswith(ANTHROPIC_PATHS):
                name, body = "event: error\n", error.anthropic_body()
            elif path.startswith("/v1/responses"):
                body = json.dumps({"type": "error", "sequence_number": 0, "param": None, "code": error.code,
                                   "message": error.message})
                name = "event: error\n"
            await send({"type": "http.response.body", "body": f"\n\n{name}data: {body}\n\n".encode()})

    @staticmethod
    async def _with_session(scope: Scope, receive: Receive) -> tuple[Scope, Receive]:
        """The same request, of which what was read is given again."""
        messages: list[Message] = []

        async def read() -> None:
            size = 0
            while size <= KEYED_BYTES:
                messages.append(message := await receive())
                size += len(message.get("body", b""))
                if not message.get("more_body", False):
                    return

        async def again() -> Message:
            return messages.pop(0) if messages else await receive()

        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(read(), KEYED_SECONDS)
        whole = bool(messages) and not messages[-1].get("more_body", False)
        key = prefix_key(b"".join(message.get("body", b"") for message in messages)) if whole else None
        headers = [*scope["headers"], (SESSION, key.encode())] if key is not None else scope["headers"]
        return {**scope, "headers": headers}, again


def proxy_middlewares() -> list[Middleware]:
    """For RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH."""
    return [Middleware(Door)]


def by_queued_tokens(context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
    """As many replicas as the open requests want, by target_ongoing_requests, or the tokens that wait."""
    queued = sum((context.aggregated_metrics or {}).get("queued_tokens", {}).values())
    open_requests = context.total_num_requests / context.config.target_ongoing_requests
    return math.ceil(max(open_requests, queued / QUEUED_TOKENS)), {}


class MetricsOfAll:
    """Around a replica's application: a scrape reaches one of them, and its answer has all, by the label replica."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].endswith("/metrics"):
            await self._app(scope, receive, send)
            return
        answer: list[Message] = []

        async def keep(message: Message) -> None:
            answer.append(message)

        await self._app(scope, receive, keep)
        if answer[0]["status"] == HTTPStatus.OK:
            here = serve.get_replica_context()
            handle = serve.get_deployment_handle(here.deployment, here.app_name)
            answer[1:] = [{"type": "http.response.body", "body": by_replica(
                dict(await handle.broadcast("exposition").results_async(timeout_s=SCRAPE_SECONDS)))}]
            answer[0]["headers"] = [(name, value) for name, value in answer[0]["headers"] if name != b"content-length"]
        for message in answer:
            await send(message)


def by_replica(expositions: Mapping[str, bytes]) -> bytes:
    """The metrics of each in one text, with the label replica."""
    merged: dict[str, Metric] = {}
    for replica, text in sorted(expositions.items()):
        for family in text_string_to_metric_families(text.decode()):
            whole = merged.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            for sample in family.samples:
                whole.add_sample(sample.name, {"replica": replica} | sample.labels, sample.value)
    registry = CollectorRegistry()
    registry.register(_Merged(merged))
    return generate_latest(registry)


class _Merged(Collector):
    def __init__(self, families: Mapping[str, Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families.values()


@serve.ingress()
class Replica:
    """models, config and options are those of main.serve_several."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
            self, models: Sequence[tuple[Sequence[str], Path]], config: ServerConfig, memory: int | None,
            options: Mapping[str, Any]) -> None:
        from fptq_server.app import create_pool_app
        from fptq_server.main import make_pool, raise_open_files
        from fptq_server.response_store import ResponseStore

        start_logging(config.log_format)
        raise_open_files()
        store = ResponseStore(config.responses_db)
        self._pool = make_pool(models, config, store, memory, options)
        await self._pool.start()
        first = self._pool.default.instance
        assert first is not None
        app = create_pool_app(self._pool, config, first.loaded.card, store)
        self._front = app.state.metrics
        self._app = MetricsOfAll(app)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return self._app

    async def exposition(self) -> tuple[str, bytes]:
        """This replica's name, and its metrics."""
        from fptq_server.metrics import exposition_of

        each = {model.id: model.metrics for model in self._pool.models if model.metrics is not None}
        return serve.get_replica_context().replica_id.unique_id, exposition_of(self._front, each)

    async def check_health(self) -> None:
        for model in self._pool.models:
            if model.instance is not None and (error := model.instance.loaded.engine.error) is not None:
                raise RuntimeError(f"the engine of {model.id} has died: {error}")

    async def record_autoscaling_stats(self) -> dict[str, float]:
        engines = [model.instance.loaded.engine.engine for model in self._pool.models if model.instance is not None]
        return {"queued_tokens": float(sum(engine.queued_tokens for engine in engines))}


def application(models: Sequence[tuple[Sequence[str], Path]], config: ServerConfig, replicas: tuple[int, int],
                memory: int | None = None, **options: Any) -> serve.Application:
    """models, memory and options: as main.serve_several has them. replicas: the fewest and the most. Each has as many
    CPUs as threads. Raises FptqError."""
    for name in OF_ONE_PROCESS:
        if getattr(config, name):
            raise FptqError(f"{name} is of a server in one process; replicas on Ray share none", name)
    fewest, most = replicas
    if not 1 <= fewest <= most:
        raise FptqError(f"replicas must be MIN:MAX with at least one and MAX no less, not {fewest}:{most}", "replicas")
    scale: dict[str, Any] = {"num_replicas": fewest} if fewest == most else {"autoscaling_config": {
        "min_replicas": fewest, "max_replicas": most,
        "target_ongoing_requests": max(1, options.get("max_num_seqs", EngineConfig.max_num_seqs) * 3 // 4),
        "policy": {"policy_function": f"{MODULE}:by_queued_tokens"}}}
    options["threads"] = options.get("threads") or max(1, len(os.sched_getaffinity(0)) // most)
    deployment = serve.deployment(Replica).options(
        name="fptq", **scale, max_ongoing_requests=MOST_OPEN, health_check_period_s=2.0,
        graceful_shutdown_timeout_s=config.drain_timeout, graceful_shutdown_wait_loop_s=0.5,
        ray_actor_options={"num_cpus": options["threads"], "num_gpus": int(options.get("device") == "cuda")},
        request_router_config={"request_router_class": f"{MODULE}.PrefixRouter"})
    absolute = [(tuple(names), path.resolve()) for names, path in models]
    return deployment.bind(absolute, config, memory, {
        "backend": "auto", "generation_config": True, "chat_template": None, **options})


def app(args: dict[str, Any]) -> serve.Application:
    """For `import_path: fptq_server.ray_serve:app` in a Serve config file. args: artifact, a directory, or several by
    their names; replicas, as "1:3"; models_memory; fields of ServerConfig; what load_engine takes. Raises FptqError."""
    from fptq_runtime.engine.llm import load_engine

    args = dict(args)
    artifact = args.pop("artifact", None)
    if not artifact:
        raise FptqError("artifact must be a directory, or directories by their names", "artifact")
    named = artifact if isinstance(artifact, dict) else {Path(artifact).resolve().name: artifact}
    replicas = parse_replicas(args.pop("replicas", 1))
    memory = args.pop("models_memory", None)
    of_server = {field.name for field in fields(ServerConfig)} & args.keys()
    config = TypeAdapter(ServerConfig).validate_python({name: args.pop(name) for name in of_server})
    known = {*signature(load_engine).parameters, *(field.name for field in fields(EngineConfig)), "generation_config"}
    for name in args.keys() - known:
        raise FptqError(f"{name} is no option of the server or the engine", name)
    for name in ("kv_cache_disk", "draft", "chat_template"):
        if args.get(name) is not None:
            args[name] = Path(args[name])
    return application([((name,), Path(path)) for name, path in named.items()], config, replicas, memory, **args)


def parse_replicas(text: str | int) -> tuple[int, int]:
    """Of MIN:MAX, or of one number for both. Raises FptqError."""
    fewest, _, most = str(text).partition(":")
    try:
        return int(fewest), int(most or fewest)
    except ValueError:
        raise FptqError(f"replicas must be like 2 or 1:4, not {text!r}", "replicas") from None


def serve_on_ray(models: Sequence[tuple[Sequence[str], Path]], config: ServerConfig, replicas: tuple[int, int],
                 models_memory: int | None = None, **options: Any) -> None:
    """Serve until SIGTERM or SIGINT, on the cluster at RAY_ADDRESS, which stays, or a Ray of this machine's that is
    started for it. SIGHUP deploys anew what lies in the directories and files of keys, one replica after another.
    Arguments and errors are application's."""
    bound = application(models, config, replicas, models_memory, **options)
    listen(config).close()  # says what is wrong with the address before the proxy does
    local = not os.environ.get("RAY_ADDRESS")
    os.environ |= ENVIRONMENT
    start_logging(config.log_format)
    directory = tempfile.mkdtemp(prefix="ray-")
    name = f"fptq-{models[0][0][0]}"
    try:
        if local:
            threads = bound._bound_deployment.ray_actor_options["num_cpus"]
            ray.init("local", num_cpus=threads * replicas[1], include_dashboard=False, _temp_dir=directory,
                     object_store_memory=OBJECT_STORE, logging_level=logging.WARNING)
        else:
            ray.init(logging_level=logging.WARNING)
        serve.start(proxy_location="HeadOnly" if local else "EveryNode", http_options={
            "host": config.host, "port": config.port, "keep_alive_timeout_s": 75,
            "ssl_certfile": config.ssl_certfile, "ssl_keyfile": config.ssl_keyfile})
        signals: queue.SimpleQueue[int] = queue.SimpleQueue()
        for each in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(each, lambda number, _: signals.put(number))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})
        while True:
            serve.run(bound, name=name, route_prefix=config.root_path or "/")
            log.info("serving on %s:%d, %s replicas on Ray", config.host, config.port,
                     "–".join(map(str, dict.fromkeys(replicas))))
            if (number := signals.get()) != signal.SIGHUP:
                break
            bound = application(models, config, replicas, models_memory, **options)
        log.info("stopping: running requests have %g s to end", config.drain_timeout)
        serve.delete(name)
        if local:
            serve.shutdown()
        log.info("stopped (%s)", signal.Signals(number).name)
    finally:
        node = ray._private.worker._global_node if local else None
        ray.shutdown()
        if node is not None:
            node.kill_all_processes(check_alive=False, allow_graceful=False, wait=True)
        shutil.rmtree(directory, ignore_errors=True)

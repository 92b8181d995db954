"""Loads a model, opens the port, and serves until told to stop."""

from __future__ import annotations

import asyncio
import errno
import gc
import logging
import os
import resource
import signal
import socket
import ssl
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Protocol

import uvicorn

from fptq_runtime import __version__
from fptq_runtime.artifact.io import LayerRecord, Manifest, is_artifact, read_manifest
from fptq_runtime.artifact.scrub import Scrub
from fptq_runtime.config import EngineConfig, Pooling
from fptq_runtime.engine.async_engine import AsyncEngine
from fptq_runtime.engine.engine import Engine
from fptq_runtime.engine.llm import load_engine, weight_bytes
from fptq_runtime.engine.sizing import format_bytes
from fptq_runtime.errors import FptqError
from fptq_runtime.memory import available_memory
from fptq_runtime.models.chat_template import ChatTemplate
from fptq_runtime.models.loader import Checkpoint, has_hidden_states
from fptq_runtime.models.pooling import MODULES, read_modules, read_pooling
from fptq_runtime.models.tokenizer import Tokenizer
from fptq_server.config import ModelCard, ServerConfig
from fptq_server.defaults import sampling_defaults, sampling_in_force
from fptq_server.http import BoundedProtocol
from fptq_server.keys import ApiKeys
from fptq_server.logs import start_logging
from fptq_server.pool import ModelPool, Plan, ServedModel
from fptq_server.record import peer
from fptq_server.tracing import tracing_of_environment

if TYPE_CHECKING:
    from fastapi import FastAPI

    from fptq_server.metrics import Metrics
    from fptq_server.response_store import ResponseStore
    from fptq_server.tracing import Tracing

log = logging.getLogger("fptq.server")

SWITCH_SECONDS = 0.0005  # of Python's lock: by its own 5 ms the event loop waits for most of a step, and steps for it
CLOSE_TIMEOUT = 10  # seconds that connections have to take their last bytes after the drain
NOT_OF_EMBEDDINGS = (f"this model was not made to compare texts: it has no {MODULES}, as sentence-transformers' models "
                     "do")


class AddressError(FptqError):
    """The host and port cannot be served on."""


def serve(path: Path | str, config: ServerConfig, *, model_names: Sequence[str] = (),
          others: Sequence[tuple[Sequence[str], Path]] = (), models_memory: int | None = None,
          listener: socket.socket | None = None, backend: str = "auto", generation_config: bool = True,
          chat_template: Path | None = None, **engine_options: Any) -> None:
    """Serve a model directory until SIGTERM or SIGINT: then requests that run get config.drain_timeout seconds, and a
    second signal ends them at once.

    model_names: the names clients use, the directory's unless given. others: names and directories of further models.
    models_memory: bytes that all may take together, what is available unless given. listener: what `listen` gave, where
    the caller did that itself. generation_config: whether the model's own gives the defaults of sampling.
    chat_template: a file with one, in place of the model's. backend and engine_options are load_engine's. Raises
    FptqError where the address, the model or an option cannot be used.
    """
    path = Path(path)
    ApiKeys(config.api_keys, config.api_keys_file)  # says what is wrong with them before the model loads
    if (config.admin_port is None) != (config.admin_key is None):
        raise FptqError("admin_port and admin_key go together: whoever has the key swaps models on that port",
                        "admin_port", "admin_key")
    start_logging(config.log_format)
    with listener or listen(config) as listener:  # before the model loads, which can take minutes
        names = model_names or [path.resolve().name]
        options = {"backend": backend, "generation_config": generation_config, "chat_template": chat_template,
                   **engine_options}
        raise_open_files()
        sys.setswitchinterval(SWITCH_SECONDS)
        if others or config.admin_port is not None:
            try:
                serve_several([(names, path), *others], config, listener, models_memory, **options)
            finally:
                if config.uds is not None:
                    Path(config.uds).unlink(missing_ok=True)
            return
        tracing = tracing_of_environment(names[0])
        loaded = load_app(path, config, names, tracing, **options)
        gc.freeze()  # what is there stays: it need not be walked again between two tokens
        try:
            with scrubbing(path, loaded.manifest, config.scrub_interval, loaded.metrics):
                Server(loaded.app, loaded.engine, config, loaded.metrics).run([listener])
        finally:
            gc.unfreeze()  # or the native extension reports what was never freed
            if config.uds is not None:
                Path(config.uds).unlink(missing_ok=True)


@dataclass(frozen=True)
class Loaded:
    """A model behind its application, whose lifespan has not begun. manifest: where it is an artifact."""

    app: FastAPI
    engine: AsyncEngine
    metrics: Metrics
    manifest: Manifest | None
    card: ModelCard


def serve_several(models: Sequence[tuple[Sequence[str], Path]], config: ServerConfig, listener: socket.socket,
                  memory: int | None, **options: Any) -> None:
    """`serve` of what a pool holds. memory: bytes for those that are awake, what is available unless given. options:
    load_app's."""
    from fptq_server.app import create_admin_app, create_pool_app
    from fptq_server.response_store import ResponseStore

    store = ResponseStore(config.responses_db)
    pool = make_pool(models, config, store, memory, options)
    tracing = tracing_of_environment(pool.default.id)

    async def run(admin: socket.socket | None) -> None:
        await pool.start()
        assert pool.default.instance is not None
        app = create_pool_app(pool, config, pool.default.instance.loaded.card, store, tracing)
        server = Server(app, pool, config, app.state.metrics)
        if admin is None:
            await server.serve([listener])
            return
        operator = AdminServer(uvicorn.Config(create_admin_app(pool, config), ws="none", log_config=None,
                                              log_level="warning", access_log=False, server_header=False,
                                              ssl_certfile=config.ssl_certfile, ssl_keyfile=config.ssl_keyfile))
        serving = asyncio.create_task(operator.serve([admin]))
        log.info("models are swapped on %s", peer(admin.getsockname()[:2]))
        await server.serve([listener])
        operator.should_exit = True
        await serving

    with nullcontext() if config.admin_port is None else bind(config.host, config.admin_port, "--admin-port") as admin:
        asyncio.run(run(admin))


def make_pool(models: Sequence[tuple[Sequence[str], Path]], config: ServerConfig, store: ResponseStore,
              memory: int | None, options: Mapping[str, Any]) -> ModelPool:
    """Of models that `load_app` loads, whose responses are in one store. memory and options: as `serve_several` has
    them."""

    def load(model: ServedModel) -> Loaded:
        return load_app(model.path, config, model.names, store=store, metrics=model.metrics, **options)

    return ModelPool(models, lambda path: plan(path, options), load, memory or available_memory() or sys.maxsize)


def plan(path: Path, options: Mapping[str, Any]) -> Plan:
    """What a model directory will take with load_app's options. Raises FptqError."""
    checkpoint = Checkpoint(path)
    if not is_artifact(path) and not checkpoint.quantized:
        raise FptqError(f"{path} is not quantized; make an artifact with `fptq quantize {path} OUT` first")
    model = checkpoint.model_config
    cache = options.get("kv_cache_memory") or EngineConfig.kv_cache_memory
    return Plan(weight_bytes(path) + cache, options.get("max_model_len") or model.max_position_embeddings)


def load_app(path: Path, config: ServerConfig, names: Sequence[str], tracing: Tracing | None = None, *, backend: str,
             generation_config: bool, chat_template: Path | None, store: ResponseStore | None = None,
             metrics: Metrics | None = None, **engine_options: Any) -> Loaded:
    """Arguments and errors are those of `serve`. store: where the model is one of several, that of all; its application
    then has nothing around it. metrics: that go on, where it was loaded before."""
    for name in engine_options.get("lora", {}):
        if name in names:
            raise FptqError(f"{name} is the model's own name; give the adapter another", "lora")
    log.info("loading %s", path)
    sampling = sampling_defaults(path) if generation_config else {}
    template = None if chat_template is None else read_template(chat_template)
    # What the endpoints import takes a good part of the time that a small model loads in.
    threading.Thread(target=import_module, args=("fptq_server.app",), daemon=True).start()
    engine = load_engine(path, backend=backend, chat_template=template, **engine_options)
    check_template_variables(config, engine.tokenizer)
    from fptq_server.app import create_app, model_app
    from fptq_server.metrics import Metrics

    manifest = read_manifest(path) if is_artifact(path) else None
    pooling, no_embeddings = embeddings_of(path, manifest)
    no_scores = no_embeddings if no_embeddings is not None or read_modules(path) else NOT_OF_EMBEDDINGS
    model = replace(model_card(names, engine, sampling, () if manifest is None else manifest.layers),
                    pooling=pooling, no_embeddings=no_embeddings, no_scores=no_scores)
    metrics = metrics or Metrics(__version__, model, config.metrics_aliases)
    async_engine = AsyncEngine(engine, metrics.record_step, metrics.record_deviation)
    log.info("%s", describe(model, config))
    if sampling:
        log.info("requests get, unless they say otherwise, what generation_config.json does: %s",
                 ", ".join(f"{name} {value}" for name, value in sampling.items()))
    if store is None:
        app = create_app(async_engine, engine.tokenizer, config, model, metrics, tracing)
    else:
        meanwhile = ExitStack()
        meanwhile.enter_context(scrubbing(path, manifest, config.scrub_interval, metrics))
        app = model_app(async_engine, engine.tokenizer, config, model, metrics, store, None, meanwhile.close)
    return Loaded(app, async_engine, metrics, manifest, model)


@contextmanager
def scrubbing(path: Path, manifest: Manifest | None, interval: float, metrics: Metrics) -> Iterator[None]:
    """Its files are checked meanwhile, where it is an artifact, which has a manifest, and interval is not 0."""
    if not interval or manifest is None:
        yield
        return
    scrub = Scrub(path, manifest.files, interval, metrics.record_scrub)
    scrub.start()
    try:
        yield
    finally:
        scrub.stop()


def read_template(path: Path) -> str:
    """Raises FptqError where it is no chat template."""
    try:
        template = path.read_text("utf-8")
        if "messages" not in ChatTemplate(template).variables:
            raise FptqError(f"chat_template {path} reads no messages", "chat_template")
    except (OSError, UnicodeDecodeError) as error:
        raise FptqError(f"chat_template {path} cannot be read: {error}", "chat_template") from None
    return template


def check_template_variables(config: ServerConfig, tokenizer: Tokenizer) -> None:
    """Raises FptqError where config gives the chat template what it does not read."""
    read = tokenizer.template_variables if config.chat_template_kwargs else frozenset[str]()
    for name in config.chat_template_kwargs:
        if name not in read:
            raise FptqError(f"chat_template_kwargs: the chat template reads no {name}; it reads "
                            f"{', '.join(sorted(read)) or 'no variables'}", "chat_template_kwargs")


def embeddings_of(path: Path, manifest: Manifest | None) -> tuple[Pooling, str | None]:
    """How a model directory's embeddings are pooled, and why there are none."""
    try:
        pooling = read_pooling(path)
    except FptqError as error:
        return "last", f"this model has no embeddings here: {error}"
    rotated = manifest is not None and any(step.get("type") == "rotation" for step in manifest.recipe.get("steps", ()))
    if rotated and not has_hidden_states(Checkpoint(path)):
        return pooling, "this artifact does not say what its hidden states were before the rotation; quantize it again"
    return pooling, None


def model_card(names: Sequence[str], engine: Engine[Any], sampling: Mapping[str, Any] | None = None,
               layers: Sequence[LayerRecord] = ()) -> ModelCard:
    config = engine.model_config
    kernels = engine.backend.describe()
    return ModelCard(
        id=names[0],
        aliases=tuple(names[1:]),
        adapters=() if engine.adapters is None else engine.adapters.names,
        created=int(time.time()),
        max_model_len=engine.config.max_model_len,
        vocab_size=config.vocab_size,
        sampling=sampling or {},
        description={
            "architecture": config.architecture,
            "num_layers": config.num_layers,
            "hidden_size": config.hidden_size,
            "vocab_size": config.vocab_size,
            "rope": config.rope,
            "sampling": sampling_in_force(sampling or {}),
            "chat_template": engine.tokenizer.chat_template() is not None,
        },
        engine={**asdict(engine.config), "num_blocks": engine.num_blocks, "state_bytes": config.state_bytes},
        kernels={"backend": engine.backend.name, **kernels},
        layers=[_layer(record, kernels) for record in layers],
    )


def _layer(record: LayerRecord, kernels: Mapping[str, str]) -> dict[str, object]:
    """As /info has it. The kernel is that of its kind of layer, or the only one there is."""
    codes = f"{'fp' if record.type == 'float' else 'int'}{record.num_bits}"
    kind = f"linear {codes}" if record.activations != "float" else f"linear {codes}, float input"
    return {
        "name": record.name,
        "weights": codes if record.group_size is None else f"{codes}, groups of {record.group_size}",
        "inputs": record.activations,
        "kernel": kernels.get(kind, kernels.get("kernel")),
        "error": record.error,
    }


def describe(model: ModelCard, config: ServerConfig) -> str:
    """What is served and how, on one line of the log."""
    engine, kernels = model.engine, model.kernels
    memory = engine["kv_cache_memory"]
    blocks, size = engine["num_blocks"], engine["block_size"]
    assert isinstance(memory, int)
    assert isinstance(blocks, int)
    assert isinstance(size, int)
    kernel = ", ".join(f"{name} {kernels[name]}" for name in ("backend", "isa", "threads") if name in kernels)
    return (f"fptq {__version__}, model {model.id} ({model.description['architecture']}), {kernel}, context "
            f"{model.max_model_len} tokens, KV cache {format_bytes(memory)} {engine['kv_cache_dtype']} that fits "
            f"{blocks // -(-model.max_model_len // size)} sequences of that length, "
            f"{'API key required' if config.api_keys or config.api_keys_file else 'no API key'}")


def raise_open_files() -> None:
    """A connection takes a file descriptor; the soft limit is often 1024, far below the hard one."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):  # where unlimited is more than the system takes
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def listen(config: ServerConfig) -> socket.socket:
    """What the server is reached by, bound and not listening yet. Raises FptqError where that, or what it needs to
    speak TLS, cannot be used."""
    if config.ssl_certfile is not None:
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(config.ssl_certfile, config.ssl_keyfile)
        except OSError as error:  # an ssl.SSLError is one
            key = "" if config.ssl_keyfile is None else f" and ssl_keyfile {config.ssl_keyfile}"
            raise FptqError(f"ssl_certfile {config.ssl_certfile}{key} cannot be used: {error.strerror or error}",
                            "ssl_certfile", "ssl_keyfile") from None
    return bind(config.host, config.port) if config.uds is None else bind_unix(config.uds)


def bind_unix(path: str) -> socket.socket:
    """The same of a socket file, in place of one that nobody listens on any more. Everyone on this machine may connect,
    as with a loopback port. Raises AddressError."""
    listener = socket.socket(socket.AF_UNIX)
    try:
        if Path(path).is_socket():
            with socket.socket(socket.AF_UNIX) as probe, suppress(ConnectionRefusedError):
                probe.connect(path)
                raise AddressError(f"{path} is already in use; stop what uses it or choose another --uds")
            Path(path).unlink()
        listener.bind(path)
        Path(path).chmod(0o666)
    except OSError as error:
        listener.close()
        reason = "it exists and is no socket" if error.errno == errno.EADDRINUSE else error.strerror or error
        raise AddressError(f"cannot make the socket {path}: {reason}") from None
    except AddressError:
        listener.close()
        raise
    return listener


def bind(host: str, port: int, option: str = "--port") -> socket.socket:
    """A socket that owns the address and does not listen yet. option: where the port is from. Raises AddressError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError):
        raise AddressError(f"{host} is not an address of this machine; use --host 127.0.0.1 or 0.0.0.0") from None
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        reasons = {
            errno.EADDRINUSE: f"port {port} on {host} is already in use; stop what uses it or choose another {option}",
            errno.EACCES: f"port {port} needs privileges; choose a {option} above 1023",
            errno.EADDRNOTAVAIL: f"{host} is not an address of this machine; use --host 127.0.0.1 or 0.0.0.0",
        }
        raise AddressError(reasons.get(error.errno or 0, f"cannot bind {host} port {port}: {error.strerror}")) from None
    return listener


def tell_manager(state: str) -> None:
    """sd_notify(3), where systemd listens: READY=1 once requests are answered, STOPPING=1 while the last ones are."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager, suppress(OSError):
        manager.connect("\0" + address[1:] if address[0] == "@" else address)
        manager.send(state.encode())


class AdminServer(uvicorn.Server):
    """Beside the server, whose signals they are."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Draining(Protocol):
    """An AsyncEngine, or a ModelPool."""

    draining: bool

    async def drain(self, timeout: float) -> int: ...


class Server(uvicorn.Server):
    """uvicorn, with a drain between the signal and the exit: the port stays open and answers 503, so that a load
    balancer sees /readyz fail while running requests end."""

    def __init__(self, app: Any, engine: Draining, config: ServerConfig, metrics: Metrics) -> None:
        protocol = type("Protocol", (BoundedProtocol,), {"limits": config, "metrics": metrics, "door": app.state.door})
        super().__init__(uvicorn.Config(
            app,
            http=protocol,
            ws="none",
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_keep_alive=75,  # above the usual 60 s of proxies, which must be the first to close
            timeout_graceful_shutdown=CLOSE_TIMEOUT,
            ssl_certfile=config.ssl_certfile,
            ssl_keyfile=config.ssl_keyfile,
        ))
        self._engine = engine
        self._drain_timeout = config.drain_timeout
        self._page = config.page
        self._documented = not (config.api_keys or config.api_keys_file)  # a browser has no key to send
        self._drains: list[asyncio.Task[None]] = []
        self._signal: signal.Signals | None = None
        self._aborted = 0

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        with suppress(ValueError, RuntimeError, NotImplementedError):  # only the main thread gets signals
            self._loop.add_signal_handler(signal.SIGHUP, self._reload)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})  # as `fptq serve` begins with
        await super().serve(sockets)
        if self._signal is not None:
            log.info("stopped (%s, %d aborted)", self._signal.name, self._aborted)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listener in sockets or ():
            address = listener.getsockname()
            url = f"unix:{address}" if isinstance(address, str) else \
                f"{'https' if self.config.is_ssl else 'http'}://{peer(address[:2])}"
            log.info("serving on %s (%sOpenAI API under /v1%s)", url,
                     "a page to try it, " if self._page else "",
                     ", documentation at /docs" if self._documented else "")
        tell_manager("READY=1")

    def _reload(self) -> None:
        try:
            self.config.app.state.reload()  # type: ignore[union-attr]
            if self.config.ssl is not None and self.config.ssl_certfile is not None:
                self.config.ssl.load_cert_chain(self.config.ssl_certfile, self.config.ssl_keyfile)
            log.info("API keys and TLS files were read again")
        except (FptqError, OSError) as error:
            log.error("API keys or TLS files stay as they were: %s", error)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._loop.call_soon_threadsafe(self._begin_exit, signal.Signals(sig))

    def _begin_exit(self, sig: signal.Signals) -> None:
        self._signal = sig
        timeout = 0.0 if self._engine.draining else self._drain_timeout
        tell_manager("STOPPING=1")
        log.info("stopping: %s", f"running requests have {timeout:g} s to end" if timeout else "requests are aborted")
        for connection in list(self.server_state.connections):
            connection.shutdown()  # once its answer is through, so that whoever keeps one asks elsewhere
        self._drains.append(self._loop.create_task(self._drain(timeout)))

    async def _drain(self, timeout: float) -> None:
        if (jobs := self.config.app.state.jobs) is not None:  # type: ignore[union-attr]
            await jobs.stop()
        self._aborted += await self._engine.drain(timeout)
        self.should_exit = True

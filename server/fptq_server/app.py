"""The application: every endpoint and everything around them, listed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

from fastapi import APIRouter, FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from fptq_runtime import __version__
from fptq_runtime.engine.async_engine import AsyncEngine
from fptq_runtime.models.tokenizer import Tokenizer, TokenizerError
from fptq_server.assistant import Assistant
from fptq_server.auth import PUBLIC_PATHS, RequireKey
from fptq_server.batch import BatchRunner
from fptq_server.batch_jobs import BatchJobs
from fptq_server.batch_store import BatchStore
from fptq_server.chat_format import ChatFormat
from fptq_server.config import ModelCard, ServerConfig
from fptq_server.errors import APIError, ErrorHandlers
from fptq_server.keys import ApiKeys
from fptq_server.logprobs import TokenTexts
from fptq_server.metrics import Metrics
from fptq_server.middleware import Admission, Door, RequestContext, RequestLimits, RequestLog, Routes, Routing
from fptq_server.pool import Dispatch, ModelPool
from fptq_server.response_store import ResponseStore
from fptq_server.routes.adapters import adapters_router
from fptq_server.routes.admin import admin_router
from fptq_server.routes.batches import batches_router
from fptq_server.routes.chat import chat_router
from fptq_server.routes.completions import completions_router
from fptq_server.routes.docs import docs_router
from fptq_server.routes.embeddings import Embedder, embeddings_router
from fptq_server.routes.generate import generate_router
from fptq_server.routes.messages import messages_router
from fptq_server.routes.models import models_router
from fptq_server.routes.page import page_router
from fptq_server.routes.pool import pool_models_router, pool_router
from fptq_server.routes.responses import responses_router
from fptq_server.routes.scores import scores_router
from fptq_server.routes.status import status_router
from fptq_server.routes.tokens import tokens_router
from fptq_server.tracing import Tracing

CORS_METHODS = ("GET", "HEAD", "POST", "DELETE")
CORS_EXPOSED = ("X-Request-Id", "Retry-After", "Retry-After-Ms")


def paths_of(routers: Iterable[APIRouter], method: str | None = None) -> list[str]:
    return [route.path_format for router in routers for route in router.routes
            if isinstance(route, APIRoute) and (method is None or route.methods == {method})]


def create_app(engine: AsyncEngine, tokenizer: Tokenizer, config: ServerConfig, model: ModelCard,
               metrics: Metrics, tracing: Tracing | None = None) -> FastAPI:
    """An app around an engine that has not been started; the lifespan starts and stops it. `metrics.record_step` is
    what the engine was given as on_stats. app.state.reload() reads the keys again, app.state.batches runs
    a batch without a server's other requests, app.state.jobs those of /v1/batches."""
    store, batch_store = ResponseStore(config.responses_db), BatchStore(config.batch_dir, config.batch_dir_size)
    app = model_app(engine, tokenizer, config, model, metrics, store, batch_store, store.close, batch_store.close,
                    *([] if tracing is None else [tracing.stop]))
    app.add_middleware(Admission, engine=engine, paths=app.state.answering, errors=ErrorHandlers(metrics))
    _guard(app, config, metrics, app.state.paths, tracing, engine)
    return app


def create_pool_app(pool: ModelPool, config: ServerConfig, model: ModelCard, store: ResponseStore,
                    tracing: Tracing | None = None) -> FastAPI:
    """An app around several models, each of which is a `model_app` with the same store. model: the first's card. The
    lifespan ends what is awake."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await pool.stop()
        store.close()
        if tracing is not None:
            await asyncio.to_thread(tracing.stop)

    metrics = Metrics(__version__, model)
    app = FastAPI(title="FPTQ Serve", version=__version__, lifespan=lifespan, redirect_slashes=False, openapi_url=None)
    app.state.metrics, app.state.jobs = metrics, None
    app.include_router(pool_router(pool, config, metrics))
    if len(pool.models) > 1:
        app.include_router(pool_models_router(pool))
    app.router.default = Dispatch(pool, ErrorHandlers(metrics))
    assert pool.default.instance is not None
    _guard(app, config, metrics, pool.default.instance.loaded.app.state.paths, tracing)
    return app


def create_admin_app(pool: ModelPool, config: ServerConfig) -> FastAPI:
    """What an operator does with the models of a pool, on a port and with a key of its own."""
    assert config.admin_key is not None
    metrics = Metrics(__version__, ModelCard("", 0, 0, 0))  # nobody reads them
    app = FastAPI(title="FPTQ Serve's models", version=__version__, redirect_slashes=False, openapi_url=None)
    app.include_router(admin_router(pool))
    operator = replace(config, api_keys=(config.admin_key,), api_keys_file=None, page=False, public_metrics=False,
                       cors_origins=(), root_path="")
    _guard(app, operator, metrics, [], None)
    return app


def model_app(engine: AsyncEngine, tokenizer: Tokenizer, config: ServerConfig, model: ModelCard, metrics: Metrics,
              store: ResponseStore, batch_store: BatchStore | None, *closes: Callable[[], None]) -> FastAPI:
    """The endpoints of one model, with nothing around them; /v1/batches where they have a store. closes: what the
    lifespan calls at its end."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        engine.start()
        if jobs is not None:
            jobs.start()
        yield
        if jobs is not None:
            await jobs.stop()
        await asyncio.to_thread(engine.stop)
        for close in closes:
            await asyncio.to_thread(close)

    app = FastAPI(title="FPTQ Serve", version=__version__, lifespan=lifespan, redirect_slashes=False,
                  servers=[{"url": config.root_path or "/"}], openapi_url=None)
    texts = TokenTexts(tokenizer)
    chat = ChatFormat(tokenizer, config.tool_call_parser, config.reasoning_parser)
    assistant = Assistant(engine, tokenizer, chat, model, config.chat_template_kwargs)
    answering = (
        completions_router(engine, tokenizer, texts, model, config),
        chat_router(engine, tokenizer, texts, chat, model, config),
        messages_router(assistant, config),
        responses_router(assistant, store, config),
        embeddings_router(engine, tokenizer, model),
        scores_router(Embedder(engine, tokenizer, model), model),
    )
    urls = frozenset(path for path in paths_of(answering, "POST") if "{" not in path)  # that a batch can have
    generate = generate_router(engine, tokenizer, texts, model, config)
    app.state.answering = urls.union(paths_of([generate], "POST"))
    slots = engine.engine.config.max_num_seqs
    app.state.batches = BatchRunner(app, urls, width=2 * slots)  # as many wait as run
    jobs = None if batch_store is None else \
        BatchJobs(batch_store, BatchRunner(app, urls, width=max(1, slots * 3 // 4)))
    app.state.jobs = jobs
    routers = (
        *answering,
        *([] if jobs is None else [batches_router(jobs)]),
        models_router(model),
        generate,
        tokens_router(tokenizer, chat, model, config),
        status_router(engine, model, config, metrics),
        *([adapters_router(engine.engine.adapters, model)] if config.allow_runtime_lora_updating else []),
    )
    paths = paths_of(routers)
    for router in (*routers, docs_router(app), *([page_router()] if config.page else [])):
        app.include_router(router)
    app.state.paths = paths
    return app


def _guard(app: FastAPI, config: ServerConfig, metrics: Metrics, paths: Sequence[str], tracing: Tracing | None,
           engine: AsyncEngine | None = None) -> None:
    """What surrounds every request to the app, whose routes have these paths. engine: where it answers all of them,
    app.state.door is before it; else that is None."""
    metrics.add_routes(paths)
    handlers, requests, routes = ErrorHandlers(metrics), RequestLog(metrics, tracing), Routes(config.root_path, paths)
    app.add_exception_handler(APIError, handlers.api_error)
    app.add_exception_handler(TokenizerError, handlers.tokenizer_error)
    app.add_exception_handler(RequestValidationError, handlers.validation_error)
    app.add_exception_handler(HTTPException, handlers.http_exception)

    keys = ApiKeys(config.api_keys, config.api_keys_file)
    metrics.add_keys(keys.names)
    app.state.reload = keys.load
    # A proxy's word for who the client is, and what a browser is to be told, are the middleware's.
    elsewhere = ["x-forwarded-for", *(["origin"] if config.cors_origins else [])]
    app.state.door = None if engine is None else Door(engine, app.state.answering, routes, keys, handlers, requests,
                                                      elsewhere)
    public = PUBLIC_PATHS.union(["/metrics"] * config.public_metrics, ["/"] * config.page)
    # The last one added is the outermost.
    app.add_middleware(RequestLimits, max_header_bytes=config.max_header_bytes, max_body_bytes=config.max_body_bytes,
                       large_bodies={"/v1/files": config.max_file_bytes},
                       body_timeout=config.body_timeout, errors=handlers)
    app.add_middleware(RequireKey, keys=keys, public_paths=public, errors=handlers)
    app.add_middleware(RequestContext, errors=handlers, requests=requests)
    if config.cors_origins:
        app.add_middleware(CORSMiddleware, allow_origins=config.cors_origins, allow_methods=CORS_METHODS,
                           allow_headers=["*"], expose_headers=CORS_EXPOSED)
    app.add_middleware(Routing, routes=routes)

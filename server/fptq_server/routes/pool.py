"""What a server of several models answers itself: the list of them, whether it lives, and its metrics."""

from __future__ import annotations

import time

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import PlainTextResponse, Response

from fptq_server.config import ServerConfig
from fptq_server.errors import ERROR_RESPONSES
from fptq_server.metrics import Metrics, exposition_of
from fptq_server.pool import ModelPool
from fptq_server.protocol import ModelInfo, ModelList, Status
from fptq_server.routes.status import UNAVAILABLE, engine_problem, wrong_kernels


def pool_models_router(pool: ModelPool) -> APIRouter:
    router = APIRouter(responses=ERROR_RESPONSES)
    created = int(time.time())

    def info(name: str) -> ModelInfo:
        model = pool.find(name)
        return ModelInfo(id=name, created=created, owned_by="fptq", max_model_len=model.plan.max_model_len)

    @router.get("/v1/models")
    async def list_models() -> ModelList:
        """Every model, awake or not, under each of its names."""
        return ModelList(data=[info(name) for model in pool.models for name in model.names])

    @router.get("/v1/models/{model_id:path}")
    async def retrieve_model(model_id: str) -> ModelInfo:
        """One of them by its id, which may hold slashes."""
        return info(model_id if model_id in pool.find(model_id).names else pool.default.id)

    return router


def pool_router(pool: ModelPool, config: ServerConfig, front: Metrics) -> APIRouter:
    """front: metrics of what no model has, such as HTTP responses."""
    router = APIRouter(responses=ERROR_RESPONSES)

    def problems(ready: bool) -> str | None:
        for model in pool.models:
            if model.instance is not None:
                engine = model.instance.loaded.engine
                problem = engine_problem(engine, config.stall_timeout) or (wrong_kernels(engine) if ready else None)
                if problem is not None:
                    return f"{model.id}: {problem}"
        return None

    def answer(problem: str | None) -> Response:
        body = Status(status=problem or "ok").model_dump_json()
        return Response(body, 503 if problem else 200, media_type="application/json")

    @router.get("/livez", response_model=Status, responses=UNAVAILABLE)
    async def livez() -> Response:
        """200 while every engine makes progress, however loaded it is."""
        return answer(problems(ready=False))

    @router.get("/readyz", response_model=Status, responses=UNAVAILABLE)
    async def readyz() -> Response:
        """200 while new requests are taken and the answers of what is awake can be trusted."""
        return answer("draining" if pool.draining else problems(ready=True))

    @router.get("/health", response_model=Status, responses=UNAVAILABLE)
    async def health() -> Response:
        """The same as /readyz."""
        return await readyz()

    @router.get("/metrics", response_class=PlainTextResponse)
    async def prometheus() -> Response:
        """Prometheus text format; what is of a model has the label model_name."""
        each = {model.id: model.metrics for model in pool.models if model.metrics is not None}
        return Response(exposition_of(front, each), media_type=CONTENT_TYPE_LATEST)

    return router

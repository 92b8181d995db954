"""What operators and orchestrators ask: /livez /readyz /health /version /info /metrics."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import PlainTextResponse, Response

from fptq_runtime import __version__
from fptq_runtime.engine.async_engine import AsyncEngine
from fptq_runtime.engine.request import MAX_N, MAX_STOP_STRINGS
from fptq_server.config import ModelCard, ServerConfig
from fptq_server.metrics import Metrics
from fptq_server.protocol import Info, Status, Version

UNAVAILABLE: dict[int | str, dict[str, Any]] = {"5XX": {"model": Status}}


def engine_problem(engine: AsyncEngine, stall_timeout: float) -> str | None:
    """Why it should be started anew."""
    if engine.error is not None:
        return "the engine has died"
    if engine.seconds_since_progress > stall_timeout:
        return "the engine makes no progress"
    return None


def wrong_kernels(engine: AsyncEngine) -> str | None:
    wrong = engine.deviation is not None and engine.deviation > 1
    return "the kernels do not compute what was recorded" if wrong else None


def status_router(engine: AsyncEngine, model: ModelCard, config: ServerConfig, metrics: Metrics) -> APIRouter:
    router = APIRouter(tags=["status"])

    def answer(problem: str | None) -> Response:
        body = Status(status=problem or "ok").model_dump_json()
        return Response(body, 503 if problem else 200, media_type="application/json")

    @router.get("/livez", response_model=Status, responses=UNAVAILABLE)
    async def livez() -> Response:
        """200 while the engine makes progress, however loaded it is."""
        return answer(engine_problem(engine, config.stall_timeout))

    @router.get("/readyz", response_model=Status, responses=UNAVAILABLE)
    async def readyz() -> Response:
        """200 while new requests are taken and their answers can be trusted; the port opens once the model is loaded
        and passed the gate, which is repeated while nobody waits."""
        return answer("draining" if engine.draining else
                      engine_problem(engine, config.stall_timeout) or wrong_kernels(engine))

    @router.get("/health", response_model=Status, responses=UNAVAILABLE)
    async def health() -> Response:
        """The same as /readyz."""
        return await readyz()

    @router.get("/version")
    async def version() -> Version:
        return Version(version=__version__)

    @router.get("/info")
    async def info() -> Info:
        """The model, the engine's limits, the kernel that runs each kind of layer on this machine, and each layer's
        scheme and error where the artifact has them."""
        described = {"id": model.id, "max_model_len": model.max_model_len, **model.description}
        limits = engine.engine.config
        return Info(
            version=__version__, model=described, engine=dict(model.engine), kernels=dict(model.kernels),
            layers=[dict(layer) for layer in model.layers],
            model_id=model.id,
            model_sha=None,
            model_dtype=None,
            model_device_type="cuda" if model.kernels["backend"] == "triton" else "cpu",
            model_pipeline_tag="text-generation",
            max_concurrent_requests=limits.max_unfinished_seqs,
            max_best_of=MAX_N,
            max_stop_sequences=MAX_STOP_STRINGS,
            max_input_length=model.max_model_len - 1,
            max_input_tokens=model.max_model_len - 1,
            max_total_tokens=model.max_model_len,
            max_batch_total_tokens=engine.engine.num_blocks * limits.block_size,
            max_batch_prefill_tokens=limits.max_num_batched_tokens,
            max_client_batch_size=1,
        )

    @router.get("/metrics", response_class=PlainTextResponse)
    async def prometheus() -> Response:
        """Prometheus text format."""
        return Response(metrics.exposition(), media_type=CONTENT_TYPE_LATEST)

    return router

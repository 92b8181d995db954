"""/admin: what an operator does with the models of a pool."""

from __future__ import annotations

from collections.abc import Coroutine
from pathlib import Path
from typing import Annotated, Literal

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, StringConstraints

from fptq_runtime.errors import FptqError
from fptq_server.errors import ERROR_RESPONSES, APIError
from fptq_server.pool import ModelPool

Text = Annotated[str, StringConstraints(min_length=1, max_length=4096)]


class ModelRequest(BaseModel):
    """model: the first one, where none is named."""

    model_config = ConfigDict(extra="forbid")
    model: Text | None = None


class ReloadRequest(ModelRequest):
    """artifact: its directory; the same as before where none is given."""

    artifact: Text | None = None


class ModelState(BaseModel):
    """bytes: what it takes when it is awake, by estimate."""

    id: str
    aliases: list[str]
    artifact: str
    state: Literal["awake", "leaving", "asleep"]
    requests: int
    bytes: int


class ModelStates(BaseModel):
    models: list[ModelState]


def admin_router(pool: ModelPool) -> APIRouter:
    router = APIRouter(prefix="/admin", responses=ERROR_RESPONSES)

    def states() -> ModelStates:
        return ModelStates(models=[ModelState(
            id=model.id, aliases=list(model.names[1:]), artifact=str(model.path), bytes=model.plan.size,
            state="asleep" if model.instance is None else "leaving" if model.leaving else "awake",
            requests=0 if model.instance is None else model.instance.users) for model in pool.models])

    @router.get("/models")
    async def list_models() -> ModelStates:
        """Every model of this server, awake or not."""
        return states()

    @router.post("/sleep")
    async def sleep(body: ModelRequest) -> ModelStates:
        """Free a model's memory once its requests have ended. One that comes wakes it again."""
        await pool.sleep(pool.find(body.model))
        return states()

    @router.post("/wake")
    async def wake(body: ModelRequest) -> ModelStates:
        """Load a model before it is asked."""
        await _done(pool.wake(pool.find(body.model)))
        return states()

    @router.post("/reload")
    async def reload(body: ReloadRequest) -> ModelStates:
        """Load an artifact in a model's place, while the model serves."""
        model = pool.find(body.model)
        await _done(pool.reload(model, model.path if body.artifact is None else Path(body.artifact)))
        return states()

    return router


async def _done(change: Coroutine[None, None, None]) -> None:
    """The operator is told what the server's own start would say."""
    try:
        await change
    except FptqError as error:
        raise APIError(400, str(error), param=error.param) from None

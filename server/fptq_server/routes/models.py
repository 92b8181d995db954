"""/v1/models"""

from __future__ import annotations

from fastapi import APIRouter

from fptq_server.config import ModelCard
from fptq_server.errors import ERROR_RESPONSES
from fptq_server.protocol import ModelInfo, ModelList
from fptq_server.validation import check_model


def models_router(model: ModelCard) -> APIRouter:
    router = APIRouter(tags=["OpenAI"], responses=ERROR_RESPONSES)
    named = {name: ModelInfo(id=name, created=model.created, owned_by="fptq", max_model_len=model.max_model_len)
             for name in (model.id, *model.aliases)}

    def adapted(name: str) -> ModelInfo:
        return ModelInfo(id=name, created=model.created, owned_by="fptq", max_model_len=model.max_model_len,
                         parent=model.id)

    @router.get("/v1/models", response_model_exclude_none=True)
    async def list_models() -> ModelList:
        """The one model of this server, under each of its names, and with each adapter that is loaded."""
        return ModelList(data=[*named.values(), *map(adapted, model.adapters)])

    @router.get("/v1/models/{model_id:path}", response_model_exclude_none=True)
    async def retrieve_model(model_id: str) -> ModelInfo:
        """The model by its id, which may hold slashes."""
        if adapter := check_model(model_id, model):
            return adapted(adapter)
        return named.get(model_id, named[model.id])

    return router

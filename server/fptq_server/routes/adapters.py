"""/v1/load_lora_adapter and /v1/unload_lora_adapter, as vLLM has them."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from fastapi import APIRouter
from starlette.responses import PlainTextResponse

from fptq_runtime.engine.adapters import Adapters
from fptq_runtime.errors import FptqError
from fptq_server.config import ModelCard
from fptq_server.errors import ERROR_RESPONSES, APIError
from fptq_server.protocol import LoadAdapterRequest, UnloadAdapterRequest
from fptq_server.validation import TGI_NAMES

log = logging.getLogger("fptq.server")


def adapters_router(adapters: Adapters | None, model: ModelCard) -> APIRouter:
    """adapters: None where the engine has no place for any."""
    router = APIRouter(tags=["vLLM"], responses=ERROR_RESPONSES)

    @router.post("/v1/load_lora_adapter", response_class=PlainTextResponse)
    async def load_lora_adapter(body: LoadAdapterRequest) -> PlainTextResponse:
        """Load a PEFT adapter from a directory of the server; its name is then a model. Steps go on meanwhile."""
        if body.lora_name in (model.id, *model.aliases, *TGI_NAMES):
            raise APIError(400, f"{body.lora_name} is the model's own name; give the adapter another",
                           param="lora_name")
        if adapters is None:
            raise APIError(400, "max_loras is 0: there is no place for adapters", param="lora_name")
        try:
            await asyncio.to_thread(adapters.load, body.lora_name, Path(body.lora_path))
        except FptqError as error:
            raise APIError(400, str(error), param="lora_path") from None
        log.info("adapter %s loaded from %s", body.lora_name, body.lora_path)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    @router.post("/v1/unload_lora_adapter", response_class=PlainTextResponse)
    async def unload_lora_adapter(body: UnloadAdapterRequest) -> PlainTextResponse:
        """Drop an adapter; requests that run keep it until they end."""
        if adapters is None or body.lora_name not in model.adapters:
            raise APIError(404, f"there is no adapter {body.lora_name}", param="lora_name", code="model_not_found")
        adapters.unload(body.lora_name)
        log.info("adapter %s unloaded", body.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    return router

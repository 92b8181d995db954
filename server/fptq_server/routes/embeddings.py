"""/v1/embeddings"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from starlette.responses import Response

from fptq_runtime.engine.async_engine import AsyncEngine
from fptq_runtime.engine.request import SamplingParams
from fptq_runtime.kernels.base import Float32Array
from fptq_runtime.models.tokenizer import Tokenizer
from fptq_server.config import ModelCard
from fptq_server.errors import ERROR_RESPONSES, APIError
from fptq_server.generation import Generation
from fptq_server.protocol import Embedding, EmbeddingRequest, EmbeddingResponse, EmbeddingUsage
from fptq_server.record import RequestRecord, record_of
from fptq_server.sse import run_while_connected
from fptq_server.validation import check_length, check_model, check_text, tokenizing

MAX_INPUTS = 2048  # OpenAI's


class Embedder:
    """Of one model."""

    def __init__(self, engine: AsyncEngine, tokenizer: Tokenizer, model: ModelCard) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._model = model

    async def prompts(self, given: Sequence[Any], param: str, special: bool, length: int | None) -> list[list[int]]:
        """Token ids of texts, or of token ids; of those that are longer the first `length`, -1: as many as fit. Raises
        APIError that names the parameter."""
        model, tokenizer = self._model, self._tokenizer
        if len(given) > MAX_INPUTS:
            raise APIError(400, f"{param} has {len(given)} inputs; at most {MAX_INPUTS} are taken", param=param)
        characters = sum(len(check_text(each, param, model)) for each in given if isinstance(each, str))
        length = model.max_model_len if length == -1 else length
        prompts = await tokenizing(characters, lambda: [
            encoded(each, tokenizer, special, length) if isinstance(each, str) else each[:length] for each in given])
        for prompt in prompts:
            check_length(prompt, 0, param, model)
        return prompts

    async def embed(self, record: RequestRecord, prompts: list[list[int]], adapter: str = "") -> list[Float32Array]:
        """The pooled hidden states of each prompt, [H]; as many prompts at a time as run at once."""
        params = SamplingParams(max_tokens=0, pooling=self._model.pooling)
        found: list[Float32Array | None] = [None] * len(prompts)
        width = self._engine.engine.config.max_num_seqs
        for start in range(0, len(prompts), width):
            part = prompts[start : start + width]
            with Generation(self._engine, record, "embd", part, params, adapter) as generation:
                async for index, output in generation.outputs():
                    found[start + index] = output.embedding
        record.prompt_tokens = sum(map(len, prompts))
        return [vector for vector in found if vector is not None]


def normalised(vector: Float32Array, dimensions: int | None) -> Float32Array:
    """The first `dimensions` of it, of length 1; zeros stay zeros."""
    cut = vector[:dimensions].astype(np.float64)
    return (cut / max(float(np.sqrt(cut @ cut)), 1e-12)).astype(np.float32)


def encoded(text: str, tokenizer: Tokenizer, special: bool, length: int | None) -> list[int]:
    """Token ids, of a longer text the first: what the tokenizer puts around it stays, as in sentence-transformers."""
    tokens = tokenizer.encode(text, special)
    if length is None or len(tokens) <= length:
        return tokens
    own = tokenizer.encode(text, False)
    extra = len(tokens) - len(own)
    before = next((at for at in range(extra + 1) if tokens[at : at + len(own)] == own), 0)
    return (tokens[:before] + own[: max(0, length - extra)] + tokens[before + len(own) :])[:length]


def embeddings_router(engine: AsyncEngine, tokenizer: Tokenizer, model: ModelCard) -> APIRouter:
    router = APIRouter(tags=["OpenAI"], responses=ERROR_RESPONSES)
    embedder = Embedder(engine, tokenizer, model)
    size = engine.engine.model_config.hidden_size

    @router.post("/v1/embeddings", response_model=EmbeddingResponse)
    async def create_embeddings(body: EmbeddingRequest, request: Request) -> Response:
        """A vector of length 1 for each input, of the model's hidden states behind its last norm."""
        adapter = check_model(body.model, model)
        if model.no_embeddings is not None:
            raise APIError(400, model.no_embeddings, param="model", code="not_supported")
        if body.dimensions is not None and not 1 <= body.dimensions <= size:
            raise APIError(400, f"dimensions must be between 1 and {size}, not {body.dimensions}", param="dimensions")
        given: list[Any] = [body.input] if isinstance(body.input, str) or isinstance(body.input[0], int) \
            else list(body.input)
        prompts = await embedder.prompts(given, "input", body.add_special_tokens is not False,
                                         body.truncate_prompt_tokens)
        vectors = [normalised(vector, body.dimensions) for vector in await run_while_connected(
            request.receive, embedder.embed(record_of(request.scope), prompts, adapter))]
        tokens = sum(map(len, prompts))
        answer = EmbeddingResponse(
            model=adapter or model.id, usage=EmbeddingUsage(prompt_tokens=tokens, total_tokens=tokens),
            data=[Embedding(index=index, embedding=_encoded(vector, body.encoding_format))
                  for index, vector in enumerate(vectors)])
        return Response(answer.model_dump_json(), media_type="application/json")

    return router


def _encoded(vector: Float32Array, encoding: str | None) -> list[float] | str:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode() if encoding == "base64" else vector.tolist()

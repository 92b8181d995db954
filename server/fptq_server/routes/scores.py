"""/v1/score as vLLM has it and /v1/rerank as Jina and Cohere do: how alike texts are to a model of embeddings."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
from fastapi import APIRouter, Request

from fptq_server.config import ModelCard
from fptq_server.errors import ERROR_RESPONSES, APIError
from fptq_server.protocol import (
    EmbeddingUsage,
    RankedDocument,
    RerankDocument,
    RerankRequest,
    RerankResponse,
    Score,
    ScoreBody,
    ScoreRequest,
    ScoreResponse,
)
from fptq_server.record import record_of
from fptq_server.routes.embeddings import Embedder, normalised
from fptq_server.sse import run_while_connected
from fptq_server.validation import check_model, one_of


def scores_router(embedder: Embedder, model: ModelCard) -> APIRouter:
    router = APIRouter(tags=["vLLM"], responses=ERROR_RESPONSES)

    async def alike(body: ScoreBody, request: Request, first: list[str], names: tuple[str, str], second: list[str]
                    ) -> tuple[list[float], str, EmbeddingUsage]:
        """The cosine of each pair, of which `first` may be one text for all; the model's name; what it took."""
        adapter = check_model(body.model, model)
        if model.no_scores is not None:
            raise APIError(400, model.no_scores, param="model", code="not_supported")
        if len(first) not in (1, len(second)):
            raise APIError(400, f"{names[0]} has {len(first)} texts and {names[1]} {len(second)}; give one, or as many",
                           param=names[0])
        length, special = body.truncate_prompt_tokens, body.add_special_tokens is not False
        prompts = [*await embedder.prompts(first, names[0], special, length),
                   *await embedder.prompts(second, names[1], special, length)]
        found = await run_while_connected(request.receive, embedder.embed(record_of(request.scope), prompts, adapter))
        vectors = np.stack([normalised(vector, None) for vector in found])
        cosines = np.sum(vectors[: len(first)] * vectors[len(first) :], axis=1)
        tokens = sum(map(len, prompts))
        return cosines.tolist(), adapter or model.id, EmbeddingUsage(prompt_tokens=tokens, total_tokens=tokens)

    @router.post("/v1/score")
    async def score(body: ScoreRequest, request: Request) -> ScoreResponse:
        """The cosine of each text_1 and text_2, or of one text_1 and every text_2."""
        first = one_of(text_1=body.text_1, queries=body.queries)
        second = one_of(text_2=body.text_2, documents=body.documents)
        for name, given in (("text_1", first), ("text_2", second)):
            if given is None:
                raise APIError(400, f"{name} is required", param=name, code="missing_field")
        scores, name, usage = await alike(body, request, _listed(first), ("text_1", "text_2"), _listed(second))
        return ScoreResponse(
            id=f"score-{record_of(request.scope).id}", created=int(time.time()), model=name, usage=usage,
            data=[Score(index=i, score=each) for i, each in enumerate(scores)])

    @router.post("/v1/rerank")
    @router.post("/v2/rerank", include_in_schema=False)
    async def rerank(body: RerankRequest, request: Request) -> RerankResponse:
        """The documents by how alike they are to the query, the likest first."""
        texts = [each if isinstance(each, str) else each.text for each in body.documents]
        scores, name, usage = await alike(body, request, [body.query], ("query", "documents"), texts)
        order = sorted(range(len(texts)), key=lambda i: -scores[i])[: body.top_n or None]
        documents = [None if body.return_documents is False else RerankDocument(text=text) for text in texts]
        return RerankResponse(
            id=f"rerank-{record_of(request.scope).id}", model=name, usage=usage,
            results=[RankedDocument(index=i, relevance_score=scores[i], document=documents[i]) for i in order])

    return router


def _listed(texts: str | Sequence[str] | None) -> list[str]:
    return [texts] if isinstance(texts, str) else list(texts or ())

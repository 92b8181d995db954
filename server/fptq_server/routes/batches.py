"""/v1/files and /v1/batches, as OpenAI has them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal, TypeVar

from fastapi import APIRouter, File, Form, Query, Request, UploadFile
from starlette.responses import FileResponse

from fptq_server.batch_jobs import BatchJobs
from fptq_server.batch_store import StoredBatch, StoreFullError
from fptq_server.errors import ERROR_RESPONSES, APIError
from fptq_server.protocol_batches import Batch, BatchCreate, BatchList, DeletedFile, FileList, FileObject
from fptq_server.record import record_of

T = TypeVar("T", Batch, FileObject)


def batches_router(jobs: BatchJobs) -> APIRouter:
    router = APIRouter(tags=["OpenAI"], responses=ERROR_RESPONSES)
    store = jobs.store

    def owner(request: Request) -> str:
        return record_of(request.scope).origin.tenant

    def file_of(request: Request, file_id: str, param: str = "file_id", status: int = 404) -> FileObject:
        found = store.find_file(owner(request), file_id)
        if found is None:
            raise APIError(status, f"{param}: there is no file {file_id}", param=param, code="file_not_found")
        return found

    def batch_of(request: Request, batch_id: str) -> StoredBatch:
        found = store.find_batch(owner(request), batch_id)
        if found is None:
            raise APIError(404, f"there is no batch {batch_id}", param="batch_id", code="batch_not_found")
        return found

    @router.post("/v1/files")
    async def create_file(
            request: Request, file: Annotated[UploadFile, File()], purpose: Annotated[str, Form()],
            anchor: Annotated[str, Form(alias="expires_after[anchor]")] = "created_at",
            seconds: Annotated[int | None, Form(alias="expires_after[seconds]", ge=3600, le=2592000)] = None
            ) -> FileObject:
        """Keep a file of requests for a batch."""
        if purpose != "batch":
            raise APIError(400, f"purpose must be batch, not {purpose}", param="purpose", code="not_supported")
        if anchor != "created_at":
            raise APIError(400, f"expires_after.anchor must be created_at, not {anchor}", param="expires_after.anchor")
        try:
            return await store.add_file(owner(request), (file.filename or "")[:255], file.file, seconds)
        except StoreFullError as error:
            raise APIError(413, str(error), reason="too_large", code="storage_full") from None

    @router.get("/v1/files")
    async def list_files(request: Request, purpose: str | None = None, limit: int = Query(10000, ge=1, le=10000),
                         order: Literal["asc", "desc"] = "desc", after: str | None = None) -> FileList:
        mine = [file for file in store.files_of(owner(request)) if purpose in (None, file.purpose)]
        page, more = _page(mine[::-1] if order == "desc" else mine, after, limit)
        return FileList(data=page, first_id=page[0].id if page else None, last_id=page[-1].id if page else None,
                        has_more=more)

    @router.get("/v1/files/{file_id}")
    async def retrieve_file(file_id: str, request: Request) -> FileObject:
        return file_of(request, file_id)

    @router.get("/v1/files/{file_id}/content", response_class=FileResponse,
                responses={200: {"content": {"application/jsonl": {}}}})
    async def retrieve_content(file_id: str, request: Request) -> FileResponse:
        return FileResponse(store.content(file_of(request, file_id).id), media_type="application/jsonl")

    @router.delete("/v1/files/{file_id}")
    async def delete_file(file_id: str, request: Request) -> DeletedFile:
        """Not one that a batch still reads."""
        file_of(request, file_id)
        if store.is_read(file_id):
            raise APIError(409, f"a batch still reads file {file_id}; cancel that first", param="file_id")
        store.delete_file(file_id)
        return DeletedFile(id=file_id)

    @router.post("/v1/batches")
    async def create_batch(body: BatchCreate, request: Request) -> Batch:
        """Answer the requests of a file, behind all others."""
        file = file_of(request, body.input_file_id, "input_file_id", 400)
        if file.purpose != "batch":
            raise APIError(400, f"file {file.id} has the purpose {file.purpose}, not batch", param="input_file_id")
        if body.endpoint not in jobs.endpoints:
            raise APIError(400, f"endpoint must be one of {', '.join(sorted(jobs.endpoints))}", param="endpoint")
        try:
            return jobs.create(body, record_of(request.scope).origin)
        except StoreFullError as error:
            raise APIError(429, str(error), reason="queue_full", code="storage_full", retry_after=60) from None

    @router.get("/v1/batches")
    async def list_batches(request: Request, limit: int = Query(20, ge=1, le=100), after: str | None = None
                           ) -> BatchList:
        """The latest first."""
        mine = [stored.object for stored in store.batches.values() if stored.owner == owner(request)]
        page, more = _page(mine[::-1], after, limit)
        return BatchList(data=page, first_id=page[0].id if page else None, last_id=page[-1].id if page else None,
                         has_more=more)

    @router.get("/v1/batches/{batch_id}")
    async def retrieve_batch(batch_id: str, request: Request) -> Batch:
        return batch_of(request, batch_id).object

    @router.post("/v1/batches/{batch_id}/cancel")
    async def cancel_batch(batch_id: str, request: Request) -> Batch:
        """What is not answered by now stands in the error file as such."""
        found = batch_of(request, batch_id)
        jobs.cancel(found)
        return found.object

    return router


def _page(items: Sequence[T], after: str | None, limit: int) -> tuple[list[T], bool]:
    """Raises APIError where `after` is none of them."""
    ids = [item.id for item in items]
    if after is not None and after not in ids:
        raise APIError(400, f"after: there is no {after}", param="after")
    rest = items[0 if after is None else ids.index(after) + 1:]
    return list(rest[:limit]), len(rest) > limit

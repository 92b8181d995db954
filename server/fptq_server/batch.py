"""Requests that stand in a file, a line each, as OpenAI's batches have them. They take the way of any other through
the application, without a network, and their answers are lines of a file that can be gone on with."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.types import ASGIApp, Message, Scope

from fptq_runtime.artifact.files import open_file
from fptq_runtime.engine.request import Origin
from fptq_runtime.errors import FptqError
from fptq_server.errors import APIError, describe_validation_error
from fptq_server.record import SCOPE_KEY, RequestRecord

LINE_ID = "batch_req_"
WHOLE_ONLY = ("stream", "background")  # whose answers are no one JSON object


class BatchRequest(BaseModel):
    """One line of the input."""

    model_config = ConfigDict(extra="forbid")

    custom_id: Annotated[str, Field(min_length=1, max_length=512)]
    method: str
    url: str
    body: dict[str, Any]


@dataclass(frozen=True)
class Problem:
    """Why a file is no batch. line: from 1; None where it is of the whole file."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None


def read_batch(file: BinaryIO) -> Iterator[tuple[int, BatchRequest | Problem]]:
    """Each line that is not blank, with its number."""
    file.seek(0)
    for number, line in enumerate(file, 1):
        if line.strip():
            yield number, _read(number, line)


def _read(number: int, line: bytes) -> BatchRequest | Problem:
    try:
        return BatchRequest.model_validate(json.loads(line))
    except ValidationError as invalid:
        first = invalid.errors()[0]
        error = describe_validation_error({**first, "loc": ("body", *first["loc"])})
        return Problem("invalid_request", error.message, number, error.param)
    except (ValueError, RecursionError):  # also of bytes that are not UTF-8
        return Problem("invalid_json_line", "this line is not a JSON object", number)


def check_batch(file: BinaryIO, most: int | None = None, url: str | None = None) -> tuple[int, list[Problem]]:
    """How many requests a file has, and why it is no batch, as far as the first hundred reasons. most: requests that
    are taken. url: that all of them must have."""
    seen: dict[str, int] = {}
    problems: list[Problem] = []
    for number, request in read_batch(file):
        if isinstance(request, Problem):
            problems.append(request)
        elif request.custom_id in seen:
            problems.append(Problem("duplicate_custom_id", f"custom_id {request.custom_id} is that of line "
                                    f"{seen[request.custom_id]}, too", number, "custom_id"))
        else:
            seen[request.custom_id] = number
            if url is not None and request.method != "POST":
                problems.append(Problem("invalid_method", f"method must be POST, not {request.method}", number,
                                        "method"))
            elif url is not None and request.url != url:
                problems.append(Problem("mismatched_url", f"url {request.url} is not the batch's endpoint, {url}",
                                        number, "url"))
        if len(problems) == 100:
            break
        if most is not None and len(seen) > most:
            return len(seen), [Problem("too_many_requests", f"there are more than {most} requests")]
    if not seen and not problems:
        problems.append(Problem("empty_file", "there is no request"))
    return len(seen), problems


class Answers:
    """Lines of a file, each appended whole, by custom_id. What is there already stays; a line that was cut off by the
    end of its process goes. Nobody else may write meanwhile. Raises FptqError where that is so, or the file holds
    anything else.

    mode: of a new file, less the umask. succeeded and failed: the custom_ids, by status.
    """

    def __init__(self, path: Path, mode: int = 0o666) -> None:
        self.path = path
        self.succeeded: set[str] = set()
        self.failed: set[str] = set()
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, mode)
        self._file = os.fdopen(descriptor, "r+b", buffering=0)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._go_on()
        except BlockingIOError:
            self.close()
            raise FptqError(f"{path} is written by another process") from None
        except BaseException:
            self.close()
            raise

    def __contains__(self, custom_id: str) -> bool:
        return custom_id in self.succeeded or custom_id in self.failed

    def __len__(self) -> int:
        return len(self.succeeded) + len(self.failed)

    @property
    def size(self) -> int:
        return os.fstat(self._file.fileno()).st_size

    def write(self, answer: dict[str, Any]) -> None:
        line = memoryview(json.dumps(answer, ensure_ascii=False).encode() + b"\n")
        while line:
            line = line[self._file.write(line):]
        self._count(answer)

    def close(self) -> None:
        """What was written is on the disk then."""
        if self._file.writable() and not self._file.closed:
            os.fsync(self._file.fileno())
        self._file.close()

    def _count(self, answer: dict[str, Any]) -> None:
        response = answer["response"]
        ended = self.succeeded if response is not None and response["status_code"] == 200 else self.failed
        ended.add(answer["custom_id"])

    def _go_on(self) -> None:
        whole, line = 0, b""
        with open_file(self.path) as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break
                try:
                    self._count(json.loads(line))
                except (ValueError, KeyError, TypeError):
                    raise self._foreign() from None
                whole, line = whole + len(line), b""
        if line:
            mine = b'{"id": "' + LINE_ID.encode()
            if not line.startswith(mine[:len(line)]):
                raise self._foreign()
            self._file.truncate(whole)

    def _foreign(self) -> FptqError:
        return FptqError(f"{self.path} holds something else than a batch's answers; choose another name")


def answer_line(custom_id: str, response: dict[str, Any] | None, error: dict[str, str] | None = None) -> dict[str, Any]:
    return {"id": LINE_ID + uuid.uuid4().hex, "custom_id": custom_id, "response": response, "error": error}


def unanswered(custom_id: str, code: str, message: str) -> dict[str, Any]:
    return answer_line(custom_id, None, {"code": code, "message": message})


class StoppedError(FptqError):
    """The engine answers no more."""


class BatchRunner:
    """Puts requests to an application, `width` at a time, those of all batches together. urls: of its routes those that
    a batch may have."""

    def __init__(self, app: ASGIApp, urls: frozenset[str], width: int) -> None:
        self._app = app
        self.urls = urls
        self._width = width
        self._slots = asyncio.Semaphore(width)

    async def run(self, requests: Iterable[BatchRequest], origin: Origin, write: Callable[[dict[str, Any]], None],
                  gone: asyncio.Event) -> None:
        """Write each answer as soon as it is there, until all are or `gone` is set: what has no answer by then has
        none. A request that the server is too busy for waits its turn. Raises StoppedError, and whatever `write`
        does."""
        source = iter(requests)

        async def work() -> None:
            for request in source:
                async with self._slots:
                    answer = await self._answer(request, origin, gone)
                if answer is None:
                    return
                write(answer)

        workers = [asyncio.create_task(work()) for _ in range(self._width)]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)

    async def _answer(self, request: BatchRequest, origin: Origin, gone: asyncio.Event) -> dict[str, Any] | None:
        while not gone.is_set():
            record = RequestRecord(origin=origin, admitted=True)
            refusal = self._refusal(request)
            call = Call(request, record, gone)
            if refusal is None:
                await self._app(call.scope, call.receive, call.send)
            else:
                call.status, call.body = refusal.status, bytearray(refusal.body().encode())
            if call.status == 0:  # `gone` was set meanwhile
                return None
            if call.status == 503:
                raise StoppedError("the engine has stopped; the log says why")
            if call.status == 429:
                await _sleep(call.retry_after, gone)
                continue
            return answer_line(request.custom_id, {"status_code": call.status, "request_id": record.id,
                                                   "body": json.loads(call.body)})
        return None

    def _refusal(self, request: BatchRequest) -> APIError | None:
        if request.url not in self.urls:
            return APIError(404, f"there is no endpoint {request.url} for a batch; there are "
                                 f"{', '.join(sorted(self.urls))}", param="url")
        for name in WHOLE_ONLY:
            if request.body.get(name):
                return APIError(400, f"{name} must be false in a batch", param=f"body.{name}", code="not_supported")
        return None


class Call:
    """One request as ASGI has it, whose client is us. status: 0 before there is one."""

    def __init__(self, request: BatchRequest, record: RequestRecord, gone: asyncio.Event) -> None:
        self.scope: Scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": request.method.upper(),
            "scheme": "http", "path": request.url, "raw_path": request.url.encode(), "root_path": "",
            "query_string": b"", "headers": [(b"content-type", b"application/json")], "client": None, "server": None,
            SCOPE_KEY: record,
        }
        self.status = 0
        self.body = bytearray()
        self.retry_after = 1.0
        self._unsent: bytes | None = json.dumps(request.body).encode()
        self._gone = gone

    async def receive(self) -> Message:
        if self._unsent is not None:
            body, self._unsent = self._unsent, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.retry_after = float(dict(message["headers"]).get(b"retry-after", b"1"))
        else:
            self.body += message.get("body", b"")


async def _sleep(seconds: float, gone: asyncio.Event) -> None:
    try:
        await asyncio.wait_for(gone.wait(), seconds)
    except asyncio.TimeoutError:
        return

"""What one request's line in the access log says, gathered on the request's way."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from typing import Any

from starlette.types import Scope

from fptq_runtime.engine.engine import Place
from fptq_runtime.engine.request import ANYONE, Origin, SamplingParams

SCOPE_KEY = "fptq.record"


@dataclass
class RequestRecord:
    """id: the client's X-Request-Id or a random one; a generation's own id ends with it. origin: whose it is, and how
    long it may wait. admitted: it is a line of a batch, whose key was checked when that came. place: held in the queue
    until the engine has it. prompt_tokens: None where nothing was generated. finish_reasons: of the sequences that
    ended. error: what an APIError's `summary` says.
    submitted, scheduled, first_token, last_token: when that was, by time.monotonic(), of the first of several
    sequences, or the last."""

    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    origin: Origin = ANYONE
    admitted: bool = False
    place: Place | None = None
    prompt_tokens: int | None = None
    completion_tokens: int = 0
    finish_reasons: set[str] = field(default_factory=set)
    error: str = ""
    client_gone: bool = False
    params: SamplingParams | None = None
    submitted: float | None = None
    scheduled: float | None = None
    first_token: float | None = None
    last_token: float | None = None

    def __str__(self) -> str:
        parts = []
        if self.prompt_tokens is not None:
            reasons = ",".join(sorted(self.finish_reasons)) or "none"
            parts.append(f"prompt={self.prompt_tokens} out={self.completion_tokens} finish={reasons}")
        if self.client_gone:
            parts.append("client gone")
        if self.error:
            parts.append(self.error)
        return " ".join(parts)

    def fields(self) -> dict[str, Any]:
        """The same for a program."""
        told: dict[str, Any] = {"request_id": self.id, "key": self.origin.tenant, "error": self.error}
        if self.prompt_tokens is not None:
            told |= {"prompt_tokens": self.prompt_tokens, "completion_tokens": self.completion_tokens,
                     "finish_reasons": sorted(self.finish_reasons)}
        return {name: value for name, value in told.items() if value != ""} | {"client_gone": self.client_gone}


def record_of(scope: Scope) -> RequestRecord:
    """Of the request that an ASGI scope or a Request's scope belongs to."""
    if SCOPE_KEY not in scope:
        scope[SCOPE_KEY] = RequestRecord()
    record: RequestRecord = scope[SCOPE_KEY]
    return record


def peer(client: tuple[str, int] | None) -> str:
    """Address and port as the log has them; - where there is none."""
    if client is None:
        return "-"
    host, port = client
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

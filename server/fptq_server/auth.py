"""API keys. Every path is closed unless it is listed here as public."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from fptq_server.errors import APIError, ErrorHandlers

PUBLIC_PATHS = frozenset({"/livez", "/readyz", "/health"})


class RequireKey:
    """ASGI middleware. With no keys the server is open."""

    def __init__(self, app: ASGIApp, keys: Sequence[str], public_paths: frozenset[str],
                 errors: ErrorHandlers) -> None:
        self._app = app
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]
        self._public_paths = public_paths
        self._errors = errors

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._digests and scope["path"] not in self._public_paths:
            headers = Headers(scope=scope)
            scheme, _, key = headers.get("authorization", "").partition(" ")
            keys = [key.strip()] if scheme.lower() == "bearer" else []
            if not any(map(self._accepts, [*keys, headers.get("x-api-key", "")])):
                error = APIError(401, "a valid API key is required, as Authorization: Bearer <key> or x-api-key: <key>",
                                 reason="unauthorized", code="invalid_api_key")
                await self._errors.refuse(scope, error)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _accepts(self, key: str) -> bool:
        digest = hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
        # Every key is compared, so that the time taken tells nothing.
        return sum(hmac.compare_digest(digest, known) for known in self._digests) > 0

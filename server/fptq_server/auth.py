"""Who may call. Every path is closed unless it is listed here as public."""

from __future__ import annotations

from collections import Counter

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from fptq_server.errors import APIError, ErrorHandlers
from fptq_server.keys import ApiKeys
from fptq_server.record import record_of

PUBLIC_PATHS = frozenset({"/livez", "/readyz", "/health"})


class RequireKey:
    """ASGI middleware. Requests are those of their key, by its name. Public paths are so for GET."""

    def __init__(self, app: ASGIApp, keys: ApiKeys, public_paths: frozenset[str], errors: ErrorHandlers) -> None:
        self._app = app
        self._keys = keys
        self._public_paths = public_paths
        self._errors = errors
        self._running: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        public = scope["type"] != "http" or (scope["method"] == "GET" and scope["path"] in self._public_paths)
        if public or not self._keys or record_of(scope).admitted:
            await self._app(scope, receive, send)
            return
        key = self._keys.of(Headers(scope=scope))
        if key is None:
            error = APIError(401, "a valid API key is required, as Authorization: Bearer <key> or x-api-key: <key>",
                             reason="unauthorized", code="invalid_api_key")
        elif key.max_requests is not None and self._running[key.name] >= key.max_requests:
            error = APIError(429, f"this API key may have {key.max_requests} requests at a time", reason="key_limit",
                             code="rate_limit_exceeded", retry_after=1)
        else:
            record_of(scope).origin = key.origin
            self._running[key.name] += 1
            try:
                await self._app(scope, receive, send)
            finally:
                self._running[key.name] -= 1
            return
        await self._errors.refuse(scope, error)(scope, receive, send)

"""/: a page to chat on and to watch the server by, one file, which may load and call nothing but this server."""

from __future__ import annotations

import base64
import hashlib
import re
from importlib import resources

from fastapi import APIRouter
from starlette.responses import HTMLResponse, Response

PAGE = resources.files("fptq_server").joinpath("page.html").read_text("utf-8")


def _hash(element: str) -> str:
    [content] = re.findall(f"<{element}>(.*?)</{element}>", PAGE, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


POLICY = "; ".join((
    "default-src 'none'", "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'", "connect-src 'self'",
    "img-src data:", f"script-src {_hash('script')}", f"style-src {_hash('style')}",
    "require-trusted-types-for 'script'", "trusted-types 'none'",  # no text becomes markup, whoever writes it
))


def page_router() -> APIRouter:
    router = APIRouter(include_in_schema=False)

    @router.get("/")
    async def page() -> Response:
        return HTMLResponse(PAGE, headers={"Content-Security-Policy": POLICY, "Cache-Control": "no-cache"})

    return router

"""The OpenAPI document, and /docs: the same as one page, without scripts and without anything from elsewhere."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

from fastapi import APIRouter, FastAPI
from starlette.responses import HTMLResponse, JSONResponse, Response

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; color: #222; }
code, td:first-child { font-family: ui-monospace, monospace; font-size: 0.93em; }
h2 { margin-top: 2.2em; border-top: 1px solid #ddd; padding-top: 1em; font-size: 1.15em; }
table { border-collapse: collapse; }
td { border-bottom: 1px solid #eee; padding: 0.15em 1.5em 0.15em 0; vertical-align: top; }
@media (prefers-color-scheme: dark) { body { background: #1b1b1b; color: #ddd; } a { color: #8ab4f8; } }
"""
POLICY = ("default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; style-src 'sha256-"
          + base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode() + "'")


def docs_router(app: FastAPI) -> APIRouter:
    """The document is made when first asked for, which takes a quarter of a second: off the event loop."""
    router = APIRouter(include_in_schema=False)

    @router.get("/openapi.json")
    def openapi() -> Response:
        return JSONResponse(app.openapi())

    @router.get("/docs")
    def docs() -> Response:
        return HTMLResponse(page(app.openapi()), headers={"Content-Security-Policy": POLICY})

    return router


def page(document: Mapping[str, Any]) -> str:
    """HTML of an OpenAPI document: each operation, then each schema."""
    title = escape(f"{document['info']['title']} {document['info']['version']}")
    return "\n".join(["<!doctype html>", '<html lang="en"><meta charset="utf-8">',
                      '<meta name="viewport" content="width=device-width">', f"<title>{title}</title>",
                      f"<style>{STYLE}</style>", f"<h1>{title}</h1>",
                      '<p>The same for programs: <a href="openapi.json">openapi.json</a></p>',
                      *_operations(document), *_schemas(document["components"]["schemas"])])


def _operations(document: Mapping[str, Any]) -> Iterator[str]:
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield f"<h2><code>{method.upper()} {escape(path)}</code></h2>"
            yield f"<p>{escape(operation.get('description', operation['summary']))}</p>"
            taken = operation.get("requestBody", {}).get("content", {})
            given = operation["responses"].get("200", {}).get("content", {})
            for word, content in (("takes", taken), ("gives", given)):
                kinds = [_type(entry["schema"]) if entry.get("schema") else escape(media)
                         for media, entry in content.items()]
                if kinds:
                    yield f"<p>{word} {' or '.join(kinds)}</p>"


def _schemas(schemas: Mapping[str, Any]) -> Iterator[str]:
    for name, schema in schemas.items():
        yield f'<h2 id="{escape(name)}">{escape(name)}</h2>'
        if "description" in schema:
            yield f"<p>{escape(schema['description'])}</p>"
        required = schema.get("required", ())
        rows = [f"<tr><td>{escape(field)}<td>{_type(what)}{', required' if field in required else ''}"
                for field, what in schema.get("properties", {}).items()]
        if rows:
            yield f"<table>{''.join(rows)}</table>"


def _type(schema: Any) -> str:
    """What a value may be, in words; null, which every field takes, is left out."""
    match schema:
        case {"$ref": str(path)}:
            name = escape(path.rpartition("/")[2])
            return f'<a href="#{name}">{name}</a>'
        case {"anyOf": list(kinds)} | {"oneOf": list(kinds)}:
            return " or ".join(dict.fromkeys(_type(kind) for kind in kinds if kind != {"type": "null"}))
        case {"enum": list(values)}:
            told = [escape(json.dumps(value)) for value in values if value is not None]
            return f"only {' or '.join(told)}" if told else "refused"
        case {"const": value}:
            return escape(json.dumps(value))
        case {"type": "array", **rest}:
            return f"list of {_type(rest.get('items', {}))}"
        case {"type": "object", "additionalProperties": dict(values)}:
            return f"object of {_type(values)}"
        case {"type": str(kind)}:
            bounds = [f"{word} {schema[key]}" for key, word in (("minimum", "from"), ("exclusiveMinimum", "above"),
                                                                ("maximum", "to"), ("exclusiveMaximum", "below"))
                      if key in schema]
            return escape(" ".join([kind, *bounds]))
    return "anything"

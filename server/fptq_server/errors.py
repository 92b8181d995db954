"""Every refusal in OpenAI's error body: one line that names the cause, never an exception's own text."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Scope

from fptq_runtime.errors import FptqError
from fptq_runtime.models.tokenizer import TokenizerError
from fptq_server.metrics import Metrics
from fptq_server.protocol import ErrorInfo, ErrorResponse
from fptq_server.protocol_messages import AnthropicError, AnthropicErrorInfo
from fptq_server.record import record_of

MAX_MESSAGE = 400  # characters; a message may quote what the client sent

KINDS = {"a valid integer": "an integer", "a valid dictionary or object to extract fields from": "an object",
         "a valid dictionary": "an object", "a valid ": "a "}  # pydantic's words, and ours
TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
ANTHROPIC_PATHS = ("/v1/messages", "/messages")
ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorResponse}, "5XX": {"model": ErrorResponse}}


class APIError(FptqError):
    """A request that gets `status` and one line for an answer. reason: the label under which it is counted, one of
    metrics.REJECTIONS. retry_after: seconds."""

    def __init__(self, status: int, message: str, *, reason: str = "invalid", param: str | None = None,
                 code: str | None = None, retry_after: float | None = None) -> None:
        super().__init__(message, None if param is None else _printable(param))
        self.status = status
        self.message = _printable(message)
        self.reason = reason
        self.code = code
        self.retry_after = retry_after

    @property
    def summary(self) -> str:
        """As the log has it."""
        labels = {"code": self.code, "param": self.param}
        return " ".join([*(f"{name}={value}" for name, value in labels.items() if value is not None), self.message])

    def anthropic_body(self) -> str:
        """In Anthropic's words."""
        types = {400: "invalid_request_error", 413: "request_too_large", 503: "overloaded_error"}
        kind = TYPES.get(self.status) or types.get(self.status) or (
            "invalid_request_error" if self.status < 500 else "api_error")
        return AnthropicError(error=AnthropicErrorInfo(type=kind, message=self.message)).model_dump_json()

    def body(self) -> str:
        default = "invalid_request_error" if self.status < 500 else "server_error"
        return ErrorResponse(error=ErrorInfo(
            message=self.message,
            type=TYPES.get(self.status, default),
            param=self.param,
            code=self.code,
        )).model_dump_json()

    def response(self, path: str = "") -> Response:
        """path: of the request, which says whose clients are to understand it."""
        headers = {}
        if self.retry_after is not None:
            # Retry-After has whole seconds only; the SDKs read the milliseconds first.
            headers["Retry-After"] = str(max(1, math.ceil(self.retry_after)))
            headers["retry-after-ms"] = str(max(1, math.ceil(self.retry_after * 1000)))
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        if self.status == 408 or self.code == "draining":  # what is left may still come; another server may be found
            headers["Connection"] = "close"
        body = self.anthropic_body() if path.startswith(ANTHROPIC_PATHS) else self.body()
        return Response(body, self.status, headers, media_type="application/json")


def bad_parameter(error: FptqError) -> APIError:
    """The engine's refusal of a prompt or a parameter."""
    return APIError(400, str(error), param=error.param)


class ErrorHandlers:
    """FastAPI's exception handlers."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def refuse(self, scope: Scope, error: APIError) -> Response:
        """The answer; it is counted, and noted for the log."""
        self._metrics.record_rejection(error.reason)
        record_of(scope).error = error.summary
        return error.response(scope["path"])

    def api_error(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, APIError)
        return self.refuse(request.scope, error)

    def tokenizer_error(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, TokenizerError)
        return self.api_error(request, bad_parameter(error))

    def validation_error(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        problems = error.errors()
        # A misspelt field is both unknown and missing; what was written tells more.
        unknown = [p for p in problems if p["type"] == "extra_forbidden" and len(p["loc"]) == len(("body", "field"))]
        return self.api_error(request, describe_validation_error((unknown or problems)[0]))

    def http_exception(self, request: Request, error: Exception) -> Response:
        """What the framework itself refuses: no such path, wrong method, unreadable body."""
        assert isinstance(error, HTTPException)
        match error.__cause__:  # of a body that could not be read
            case APIError() as refusal:
                return self.api_error(request, refusal)
            case ClientDisconnect() as gone:
                raise gone
            case UnicodeDecodeError(object=body, start=start):
                return self.api_error(request, APIError(
                    400, f"the request body is not valid UTF-8: byte 0x{body[start]:02x} at offset {start}",
                    code="invalid_json"))
        messages = {
            400: error.detail if "multipart" in request.headers.get("content-type", "")
            else "the request body cannot be read as JSON",
            404: f"there is no endpoint {request.url.path}",
            405: f"{request.url.path} does not take {request.method}",
        }
        response = self.api_error(request, APIError(error.status_code, messages.get(error.status_code, error.detail)))
        response.headers.update(error.headers or {})
        return response


def describe_validation_error(error: Mapping[str, Any]) -> APIError:
    """One pydantic error as one line. Names in angle brackets are the variants of a union, not the client's fields."""
    where = [str(part) for part in error["loc"][1:] if not str(part).startswith("<") and part != "[key]"]
    param = ".".join(where) or None
    match error["type"]:
        case "json_invalid":
            return APIError(400, f"the request body is not valid JSON: {error['ctx']['error']} at character "
                                 f"{error['loc'][1]}", code="invalid_json")
        case "extra_forbidden":
            return APIError(400, f"unknown field {param}", param=param, code="unknown_field")
        case "not_supported":
            return APIError(400, f"{param} {error['msg']}", param=param, code="not_supported")
        case "string_unicode":
            return APIError(400, "a field's name is not valid Unicode")
        case "missing" if param is None:
            return APIError(400, "the request has no body; send a JSON object")
        case "missing":
            return APIError(400, f"{param} is required", param=param, code="missing_field")
        case "too_short" if error["ctx"]["min_length"] == 1:
            return APIError(400, f"{param} is empty; it must have at least 1 item", param=param)
        case "too_long":
            return APIError(400, f"{param} has more than {error['ctx']['max_length']} items", param=param)
    if param is None:
        return APIError(400, "the request body must be a JSON object, sent with Content-Type: application/json")
    message = str(error["msg"]).replace("Input should", "must", 1).replace("List should", "must", 1)
    for theirs, ours in KINDS.items():
        message = message.replace(f"must be {theirs}", f"must be {ours}")
    return APIError(400, f"{param} {message}" if message.startswith("must") else f"{param}: {message}", param=param)


def _printable(text: str) -> str:
    """One line that UTF-8 can carry and a terminal shows, whatever the client put in it."""
    line = " ".join(text.split())
    if len(line) <= MAX_MESSAGE and line.isprintable():
        return line
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line[:MAX_MESSAGE])
    return shown if len(line) <= MAX_MESSAGE else f"{shown}…"

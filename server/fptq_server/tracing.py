"""OpenTelemetry traces of generations, where OTLP's variables say whom to send them to: for each request a span with
gen_ai attributes, and in it one each for the queue, the prefill and the decoding."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fptq_runtime import __version__
from fptq_runtime.engine.request import SamplingParams
from fptq_runtime.errors import FptqError
from fptq_server.record import RequestRecord

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
OPERATIONS = {  # of the routes that generate
    "/v1/chat/completions": "chat", "/v1/messages": "chat", "/v1/responses": "chat",
    "/v1/completions": "text_completion", "/generate": "text_completion", "/generate_stream": "text_completion",
    "/": "text_completion",
}


def tracing_of_environment(model: str) -> Tracing | None:
    """None where no variable asks for traces. Raises FptqError where they cannot be sent."""
    asking = next((name for name in ENDPOINTS if os.environ.get(name)), None)
    if asking is None or os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true" \
            or os.environ.get("OTEL_TRACES_EXPORTER", "").lower() == "none":
        return None
    protocol = next((os.environ[name] for name in PROTOCOLS if os.environ.get(name)), "http/protobuf")
    if protocol != "http/protobuf":
        raise FptqError(f"traces are sent as http/protobuf, not {protocol}; set {PROTOCOLS[0]}=http/protobuf")
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        raise FptqError(f"{asking} asks for traces, and OpenTelemetry is not installed: "
                        "pip install 'fptq-serve[otel]', or unset it") from None
    named = "OTEL_SERVICE_NAME" in os.environ or "service.name=" in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
    name = {} if named else {"service.name": "fptq"}
    provider = TracerProvider(resource=Resource.create({**name, "service.version": __version__}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return Tracing(provider, model)


class Tracing:
    """Spans are made when a request has ended, from what was noted on its way."""

    def __init__(self, provider: TracerProvider, model: str) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("fptq", __version__)
        self._model = model

    def record(self, method: str, path: str, headers: Mapping[str, str], record: RequestRecord, status: int,
               start: float) -> None:
        """start: time.monotonic() at the request's arrival; its end is this moment. A `traceparent` is taken up."""
        from opentelemetry.trace import SpanKind, set_span_in_context
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        operation = OPERATIONS.get(path)
        if method != "POST" or operation is None:
            return
        end = time.monotonic()
        epoch = time.time() - end

        def at(moment: float) -> int:
            return int((epoch + moment) * 1e9)

        attributes = {
            "http.request.method": method, "url.path": path, "http.response.status_code": status,
            "gen_ai.operation.name": operation, "gen_ai.provider.name": "fptq", "gen_ai.request.model": self._model,
            "gen_ai.response.model": self._model, "gen_ai.response.id": record.id, **_usage(record),
            **({} if record.params is None else _asked(record.params)),
        }
        if status >= 400:
            attributes["error.type"] = str(status)
        span = self._tracer.start_span(
            f"{operation} {self._model}", TraceContextTextMapPropagator().extract(dict(headers)), SpanKind.SERVER,
            {name: value for name, value in attributes.items() if value is not None}, start_time=at(start))
        if status >= 500:
            from opentelemetry.trace import Status, StatusCode

            span.set_status(Status(StatusCode.ERROR, record.error))
        moments = (record.submitted, record.scheduled, record.first_token, record.last_token)
        within = set_span_in_context(span)
        for name, begin, finish in zip(("queue", "prefill", "decode"), moments, moments[1:], strict=False):
            if begin is not None and finish is not None:
                self._tracer.start_span(name, within, start_time=at(begin)).end(at(finish))
        span.end(at(end))

    def stop(self) -> None:
        """Sends what is left."""
        self._provider.shutdown()


def _usage(record: RequestRecord) -> dict[str, Any]:
    if record.prompt_tokens is None:
        return {}
    return {
        "gen_ai.usage.input_tokens": record.prompt_tokens,
        "gen_ai.usage.output_tokens": record.completion_tokens,
        "gen_ai.response.finish_reasons": sorted(record.finish_reasons),
    }


def _asked(params: SamplingParams) -> dict[str, Any]:
    return {
        "gen_ai.request.max_tokens": params.max_tokens,
        "gen_ai.request.temperature": params.temperature,
        "gen_ai.request.top_p": params.top_p,
        "gen_ai.request.top_k": params.top_k or None,
        "gen_ai.request.frequency_penalty": params.frequency_penalty,
        "gen_ai.request.presence_penalty": params.presence_penalty,
        "gen_ai.request.seed": params.seed,
        "gen_ai.request.choice.count": params.n if params.n > 1 else None,
        "gen_ai.request.stop_sequences": list(params.stop) or None,
    }

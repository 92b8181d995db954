"""Traces as a collector gets them, read by OpenTelemetry's own protobufs."""

from __future__ import annotations

import gzip
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from fptq_runtime.errors import FptqError
from fptq_server.tracing import tracing_of_environment

trace_service = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2")


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Spans that were sent to where OTLP's variable points."""
    spans: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            if self.headers.get("content-encoding") == "gzip":
                body = gzip.decompress(body)
            request = trace_service.ExportTraceServiceRequest.FromString(body)
            assert self.path == "/v1/traces"
            spans.extend(span for resource in request.resource_spans for scope in resource.scope_spans
                         for span in scope.spans)
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    for name in ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_SDK_DISABLED", "OTEL_EXPORTER_OTLP_PROTOCOL"):
        monkeypatch.delenv(name, raising=False)
    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield spans
        server.shutdown()
        thread.join()


def attributes(span: Any) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        kind = value.WhichOneof("value")
        return [plain(each) for each in value.array_value.values] if kind == "array_value" else getattr(value, kind)

    return {each.key: plain(each.value) for each in span.attributes}


def test_a_request_is_a_span_with_its_phases(run_server: Callable[..., Any], collector: list[Any]) -> None:
    tracing = tracing_of_environment("demo")
    with run_server(tracing=tracing) as served:
        parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
        headers = {"traceparent": parent, "x-request-id": "mine"}
        answer = served.http.post("/v1/chat/completions", headers=headers, json={
            "messages": [{"role": "user", "content": "Once"}], "max_tokens": 5, "temperature": 0.5, "seed": 3,
            "ignore_eos": True}).json()
        assert served.http.post("/v1/completions", json={"promt": "x"}).status_code == 400
        assert served.http.get("/v1/models").status_code == 200
    by_name = {span.name: span for span in collector}
    assert set(by_name) == {"chat demo", "text_completion demo", "queue", "prefill", "decode"}
    chat = by_name["chat demo"]
    assert (chat.trace_id.hex(), chat.parent_span_id.hex()) == tuple(parent.split("-")[1:3])
    found = attributes(chat)
    assert found["gen_ai.response.finish_reasons"] == ["length"]
    expected = {
        "gen_ai.operation.name": "chat", "gen_ai.request.model": "demo", "gen_ai.request.max_tokens": 5,
        "gen_ai.request.temperature": 0.5, "gen_ai.request.seed": 3, "gen_ai.response.id": "mine",
        "gen_ai.usage.input_tokens": answer["usage"]["prompt_tokens"], "gen_ai.usage.output_tokens": 5,
        "http.response.status_code": 200,
    }
    assert expected.items() <= found.items()
    phases = [by_name[name] for name in ("queue", "prefill", "decode")]
    assert all(phase.parent_span_id == chat.span_id for phase in phases)
    times = [chat.start_time_unix_nano, *(time for phase in phases for time in (
        phase.start_time_unix_nano, phase.end_time_unix_nano)), chat.end_time_unix_nano]
    assert times == sorted(times)
    assert phases[2].end_time_unix_nano > phases[2].start_time_unix_nano
    refused = attributes(by_name["text_completion demo"])
    assert (refused["http.response.status_code"], refused["error.type"]) == (400, "400")


def test_nobody_is_told_unless_asked(monkeypatch: pytest.MonkeyPatch, collector: list[Any]) -> None:
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    assert tracing_of_environment("demo") is None
    monkeypatch.delenv("OTEL_SDK_DISABLED")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    with pytest.raises(FptqError, match="http/protobuf, not grpc"):
        tracing_of_environment("demo")
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_PROTOCOL")
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(FptqError, match=r"pip install 'fptq-serve\[otel\]'"):
        tracing_of_environment("demo")
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT")
    assert tracing_of_environment("demo") is None

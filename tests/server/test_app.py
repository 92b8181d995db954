"""The API as its own OpenAPI document describes it, and values that no document foresees."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from fptq_runtime.errors import FptqError
from fptq_server.config import ServerConfig
from fptq_server.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    GenerateParameters,
    GenerateRequest,
    RerankRequest,
    ScoreRequest,
    TokenizeRequest,
)
from fptq_server.protocol_messages import CountTokensRequest, MessagesRequest
from fptq_server.protocol_responses import ResponsesRequest
from tests.server.conftest import Served

schemathesis = pytest.importorskip("schemathesis")

from schemathesis.checks import not_a_server_error  # noqa: E402
from schemathesis.specs.openapi.checks import (  # noqa: E402
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

STORED = "/v1/responses/{response_id}"
BATCHES = {"/v1/files": ("GET", "POST"), "/v1/files/{file_id}": ("GET", "DELETE"), "/v1/files/{file_id}/content": (
    "GET",), "/v1/batches": ("GET", "POST"), "/v1/batches/{batch_id}": ("GET",), "/v1/batches/{batch_id}/cancel": (
    "POST",)}
MESSAGE: dict[str, Any] = {"model": "demo", "messages": [{"role": "user", "content": "x"}]}
MINIMAL: dict[str, tuple[type[BaseModel], dict[str, Any]]] = {
    "/v1/completions": (CompletionRequest, {"prompt": "x", "max_tokens": 1}),
    "/v1/chat/completions": (ChatCompletionRequest, {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}),
    "/generate": (GenerateRequest, {"inputs": "x", "parameters": {"max_new_tokens": 1}}),
    "/": (GenerateRequest, {"inputs": "x", "parameters": {"max_new_tokens": 1}}),
    "/generate_stream": (GenerateRequest, {"inputs": "x", "parameters": {"max_new_tokens": 1}}),
    "/v1/responses": (ResponsesRequest, {"input": "x", "max_output_tokens": 1}),
    "/v1/messages": (MessagesRequest, MESSAGE | {"max_tokens": 1}),
    "/v1/messages/count_tokens": (CountTokensRequest, MESSAGE),
    "/v1/embeddings": (EmbeddingRequest, {"input": "x"}),
    "/v1/score": (ScoreRequest, {"text_1": "x", "text_2": "y"}),
    "/v1/rerank": (RerankRequest, {"query": "x", "documents": ["y"]}),
    "/tokenize": (TokenizeRequest, {"prompt": "x"}),
    "/detokenize": (DetokenizeRequest, {"tokens": [5]}),
}
FIELDS = [(path, None, name) for path, (model, _) in MINIMAL.items() for name in model.model_fields] + [
    ("/generate", "parameters", name) for name in GenerateParameters.model_fields]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=5)
    | st.sampled_from([10**30, -1, 0, 1, 2**31, 2**63, "\ud800", "\0", float("nan"), float("inf")]),
    lambda values: st.lists(values, max_size=3) | st.dictionaries(st.text(max_size=3), values, max_size=2),
    max_leaves=5,
)


@pytest.fixture(scope="module")
def tiny(run_server: Callable[..., Any]) -> Iterator[Served]:
    """A short context, so that no generated request takes long."""
    with run_server(max_model_len=32) as served:
        yield served


@pytest.mark.parametrize("operation", [("POST", path) for path in MINIMAL] + [
    ("GET", path) for path in ("/v1/models", "/v1/models/{model_id}", "/tokenizer_info", "/livez", "/readyz", "/health",
                               "/version", "/info", "/metrics", STORED, f"{STORED}/input_items")] + [
    ("DELETE", STORED), ("POST", f"{STORED}/cancel")] + [
    (method, path) for path, methods in BATCHES.items() for method in methods], ids=" ".join)
def test_openapi(tiny: Served, operation: tuple[str, str]) -> None:
    method, path = operation
    schema = schemathesis.openapi.from_url(tiny.url + "/openapi.json")

    @settings(max_examples=15, database=None, suppress_health_check=list(HealthCheck))
    @given(case=schema[path][method].as_strategy())
    def check(case: Any) -> None:
        case.call_and_validate(checks=[not_a_server_error, status_code_conformance, content_type_conformance,
                                       response_schema_conformance])

    check()


def test_every_operation_is_tested(tiny: Served) -> None:
    paths = tiny.app.openapi()["paths"]
    assert {path for path, methods in paths.items() if "post" in methods} == {
        *MINIMAL, f"{STORED}/cancel", *(path for path, methods in BATCHES.items() if "POST" in methods)}


@pytest.mark.parametrize(("path", "within", "field"), FIELDS, ids=str)
def test_any_value_in_any_field(tiny: Served, path: str, within: str | None, field: str) -> None:
    """An answer or a one-line refusal in OpenAI's form, never a failure."""
    @settings(max_examples=12, database=None)
    @given(value=JSON)
    def check(value: Any) -> None:
        body = json.loads(json.dumps(MINIMAL[path][1]))
        (body if within is None else body[within])[field] = value
        response = tiny.http.post(path, content=json.dumps(body), headers={"Content-Type": "application/json"})
        assert response.status_code in (200, 400, 404), response.text
        if response.status_code != 200:
            error = response.json()["error"]
            param = error.get("param") or ""
            assert set(error) == ({"message", "type"} if "messages" in path else {"message", "type", "param", "code"})
            assert error["message"]
            assert "\n" not in error["message"]
            assert len(error["message"]) < 500
            assert field in error["message"] or field in param or within is not None, error

    check()


@pytest.mark.parametrize("path", MINIMAL)
def test_an_unknown_field_is_named(tiny: Served, path: str) -> None:
    response = tiny.http.post(path, json=MINIMAL[path][1] | {"frobnicate": 1})
    assert response.status_code == 400
    assert response.json()["error"]["message"] == "unknown field frobnicate"
    assert response.json()["error"].get("code") == (None if "messages" in path else "unknown_field")


def test_a_misspelt_field_is_named_before_the_missing_one(tiny: Served) -> None:
    response = tiny.http.post("/v1/completions", json={"promt": "x"})
    assert response.json()["error"]["message"] == "unknown field promt"


@pytest.mark.parametrize(("path", "body", "said"), [
    ("chat/completions", {"messages": "hi"}, "messages must be a list"),
    ("chat/completions", {"messages": ["hi"]}, "messages.0 must be an object"),
    ("chat/completions", {"messages": [], "temperature": "hot"}, "temperature must be a number"),
    ("completions", {"prompt": "x", "max_tokens": "many"}, "max_tokens must be an integer"),
    ("completions", {"prompt": "x", "user": 5}, "user must be a string"),
    ("completions", {"prompt": "x", "echo": "perhaps"}, "echo must be a boolean"),
])
def test_a_wrong_type_is_told_in_plain_words(tiny: Served, path: str, body: dict[str, Any], said: str) -> None:
    error = tiny.http.post(f"/v1/{path}", json=body).json()["error"]
    assert error["message"].partition(",")[0] == said


def test_paths_and_methods(tiny: Served) -> None:
    assert tiny.http.get("/v1/nothing").json()["error"]["message"] == "there is no endpoint /v1/nothing"
    response = tiny.http.get("/v1/completions")
    assert response.status_code == 405
    assert response.headers["Allow"] == "POST"


@pytest.mark.parametrize("path", ["/docs", "/v1/models", "/metrics", "/openapi.json", "/info", "/tokenizer_info"])
def test_head(tiny: Served, path: str) -> None:
    """What GET answers, without its body."""
    answer, head = tiny.http.get(path), tiny.http.head(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["Content-Type"] == answer.headers["Content-Type"]
    assert tiny.http.head("/v1/completions").status_code == 405
    assert tiny.http.head("/nowhere").status_code == 404


@pytest.mark.parametrize("base", ["", "/v1"])
def test_a_base_url_without_version(tiny: Served, base: str) -> None:
    with openai.OpenAI(base_url=tiny.url + base, api_key="none", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["demo"]
        assert client.models.retrieve("demo").id == "demo"
        assert client.completions.create(model="demo", prompt="x", max_tokens=1).choices
        messages: Any = [{"role": "user", "content": "x"}]
        assert client.chat.completions.create(model="demo", messages=messages, max_tokens=1).choices


def test_documentation_needs_nothing_from_elsewhere(tiny: Served) -> None:
    """Every operation and every schema is in it; no script, and nothing that the policy does not name."""
    answer = tiny.http.get("/docs")
    assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
    policy = answer.headers["Content-Security-Policy"]
    [style] = re.findall("<style>(.*?)</style>", answer.text, re.DOTALL)
    assert base64.b64encode(hashlib.sha256(style.encode()).digest()).decode() in policy
    assert not re.search(r"<script|src=|href=[\"'](?!#|openapi.json)|url\(|@import", answer.text)
    document = tiny.app.openapi()
    for path, methods in document["paths"].items():
        for method in methods:
            assert f"<code>{method.upper()} {path}</code>" in answer.text
    for name in document["components"]["schemas"]:
        assert f'<h2 id="{name}">' in answer.text
    assert not set(re.findall('href="#(.*?)"', answer.text)) - set(document["components"]["schemas"])


def test_root_path(run_server: Callable[..., Any]) -> None:
    """Whether or not the proxy leaves it on."""
    with run_server(ServerConfig(root_path="/llm")) as served:
        for path in ("/llm/v1/models", "/v1/models", "/llm/models", "/llm/livez"):
            assert served.http.get(path).status_code == 200, path
        assert served.http.get("/llmx/livez").status_code == 404
        assert served.http.get("/llm/openapi.json").json()["servers"] == [{"url": "/llm"}]


def test_several_names(run_server: Callable[..., Any]) -> None:
    with run_server(aliases=("gpt-4o", "tales/king")) as served, \
            openai.OpenAI(base_url=served.url + "/v1", api_key="none", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["demo", "gpt-4o", "tales/king"]
        for name in ("demo", "gpt-4o", "tales/king"):
            assert client.models.retrieve(name).id == name
            assert client.completions.create(model=name, prompt="x", max_tokens=1).model == "demo"
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("gpt-4")


ORIGIN = "https://app.example:8443"


def test_no_other_origin_by_default(tiny: Served) -> None:
    asked = {"Origin": ORIGIN, "Access-Control-Request-Method": "POST"}
    assert tiny.http.options("/v1/completions", headers=asked).status_code == 405
    assert "Access-Control-Allow-Origin" not in tiny.http.get("/v1/models", headers=asked).headers


@pytest.mark.parametrize(("origins", "allowed"), [((ORIGIN,), ORIGIN), (("https://other.example", ORIGIN), ORIGIN),
                                                  (("*",), "*"), (("https://other.example",), None)], ids=str)
def test_cors(run_server: Callable[..., Any], origins: tuple[str, ...], allowed: str | None) -> None:
    """As the fetch standard asks: a preflight needs no key and names methods and headers; refusals can be read too."""
    with run_server(ServerConfig(cors_origins=origins, api_keys=("key",))) as served:
        preflight = httpx.options(served.url + "/v1/chat/completions", headers={
            "Origin": ORIGIN, "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization,content-type,x-stainless-os"})
        assert preflight.headers.get("Access-Control-Allow-Origin") == allowed
        assert preflight.status_code == (200 if allowed else 400)
        if allowed:
            assert "POST" in preflight.headers["Access-Control-Allow-Methods"]
            for name in ("authorization", "content-type", "x-stainless-os"):
                assert name in preflight.headers["Access-Control-Allow-Headers"]
        for answer in (served.http.get("/v1/models", headers={"Origin": ORIGIN}),
                       httpx.get(served.url + "/v1/models", headers={"Origin": ORIGIN}),
                       served.http.post("/nowhere", headers={"Origin": ORIGIN})):
            assert answer.headers.get("Access-Control-Allow-Origin") == allowed
            if allowed:
                assert "X-Request-Id" in answer.headers["Access-Control-Expose-Headers"]


@pytest.mark.parametrize("origin", ["example.com", "https://example.com/", "https://example.com/app", "", "https://"])
def test_what_is_no_origin(origin: str) -> None:
    with pytest.raises(FptqError, match="cors_origins"):
        ServerConfig(cors_origins=(origin,))

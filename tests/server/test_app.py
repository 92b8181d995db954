"""The API as its own OpenAPI document describes it, and values that no document foresees."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from fptq_server.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    GenerateParameters,
    GenerateRequest,
    TokenizeRequest,
)
from tests.server.conftest import Served

schemathesis = pytest.importorskip("schemathesis")

from schemathesis.checks import not_a_server_error  # noqa: E402
from schemathesis.specs.openapi.checks import (  # noqa: E402
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

MINIMAL: dict[str, tuple[type[BaseModel], dict[str, Any]]] = {
    "/v1/completions": (CompletionRequest, {"prompt": "x", "max_tokens": 1}),
    "/v1/chat/completions": (ChatCompletionRequest, {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}),
    "/generate": (GenerateRequest, {"inputs": "x", "parameters": {"max_new_tokens": 1}}),
    "/generate_stream": (GenerateRequest, {"inputs": "x", "parameters": {"max_new_tokens": 1}}),
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
                               "/version", "/info", "/metrics")], ids=" ".join)
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
    assert {path for path, methods in paths.items() if "post" in methods} == set(MINIMAL)


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
            assert set(error) == {"message", "type", "param", "code"}
            assert error["message"]
            assert "\n" not in error["message"]
            assert len(error["message"]) < 500
            assert field in error["message"] or field in (error["param"] or "") or within is not None, error

    check()


@pytest.mark.parametrize("path", MINIMAL)
def test_an_unknown_field_is_named(tiny: Served, path: str) -> None:
    response = tiny.http.post(path, json=MINIMAL[path][1] | {"frobnicate": 1})
    assert response.status_code == 400
    assert response.json()["error"]["message"] == "unknown field frobnicate"
    assert response.json()["error"]["code"] == "unknown_field"


def test_a_misspelt_field_is_named_before_the_missing_one(tiny: Served) -> None:
    response = tiny.http.post("/v1/completions", json={"promt": "x"})
    assert response.json()["error"]["message"] == "unknown field promt"


def test_paths_and_methods(tiny: Served) -> None:
    assert tiny.http.get("/v1/nothing").json()["error"]["message"] == "there is no endpoint /v1/nothing"
    response = tiny.http.get("/v1/completions")
    assert response.status_code == 405
    assert response.headers["Allow"] == "POST"
    assert tiny.http.get("/docs").status_code == 200

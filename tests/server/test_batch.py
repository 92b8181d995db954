"""Batches: what is a file of requests, what becomes of its answers' file wherever it was cut, and the application as
the one who answers."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fptq_runtime.engine.engine import QueueFullError
from fptq_runtime.engine.request import Origin
from fptq_runtime.errors import FptqError
from fptq_server.batch import Answers, BatchRequest, BatchRunner, Problem, answer_line, check_batch, read_batch
from fptq_server.config import ServerConfig
from tests.server.conftest import Served, refuse_first

COMPLETIONS = "/v1/completions"


def line(custom_id: str, url: str = COMPLETIONS, method: str = "POST", **body: Any) -> dict[str, Any]:
    return {"custom_id": custom_id, "method": method, "url": url, "body": body}


def file_of(*lines: Any) -> io.BytesIO:
    return io.BytesIO(b"".join(each if isinstance(each, bytes) else json.dumps(each).encode() + b"\n"
                               for each in lines))


@pytest.mark.parametrize(("text", "code", "param"), [
    (b"{\n", "invalid_json_line", None),
    (b"\xff\n", "invalid_json_line", None),
    (b"[" * 100000 + b"\n", "invalid_json_line", None),
    (b"[]\n", "invalid_request", None),
    (b'{"custom_id": "b", "method": "POST", "url": "/v1/completions"}\n', "invalid_request", "body"),
    (b'{"custom_id": 7, "method": "POST", "url": "/v1/completions", "body": {}}\n', "invalid_request", "custom_id"),
    (b'{"custom_id": "", "method": "POST", "url": "/v1/completions", "body": {}}\n', "invalid_request", "custom_id"),
    (b'{"custom_id": "\\ud800", "method": "POST", "url": "/", "body": {}}\n', "invalid_request", None),
    (json.dumps(line("a")).encode() + b"\n", "duplicate_custom_id", "custom_id"),
    (json.dumps(line("b", method="GET")).encode() + b"\n", "invalid_method", "method"),
    (json.dumps(line("b", "/v1/models")).encode() + b"\n", "mismatched_url", "url"),
])
def test_a_line_that_is_none_is_told_by_its_number(text: bytes, code: str, param: str | None) -> None:
    _, problems = check_batch(file_of(line("a"), b"\n", text, line("c")), url=COMPLETIONS)
    assert [(problem.code, problem.line, problem.param) for problem in problems] == [(code, 3, param)]


def test_a_file_has_at_least_one_request_and_at_most_so_many() -> None:
    assert check_batch(file_of(line("a"), line("b")), most=2) == (2, [])
    assert [problem.code for problem in check_batch(file_of(line("a"), line("b")), most=1)[1]] == ["too_many_requests"]
    assert check_batch(file_of(b" \n\n"))[1] == [Problem("empty_file", "there is no request")]
    assert len(check_batch(file_of(*[b"?\n"] * 200))[1]) == 100


def test_a_file_of_answers_cut_anywhere_is_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    answers = Answers(path)
    for custom_id, status in (("a", 200), ("é\n", 400)):
        answers.write(answer_line(custom_id, {"status_code": status, "request_id": "r", "body": {}}))
    answers.write(answer_line("c", None, {"code": "batch_expired", "message": "too late"}))
    assert (answers.succeeded, answers.failed, "a" in answers, "x" in answers) == ({"a"}, {"é\n", "c"}, True, False)
    answers.close()
    whole = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for cut in {*range(0, len(whole), 5), *ends, *(end - 1 for end in ends), *(end + 1 for end in ends[:-1])}:
        path.write_bytes(whole[:cut])
        answers = Answers(path)
        kept = sum(end <= cut for end in ends)
        assert len(answers) == kept
        assert path.read_bytes() == whole[:[0, *ends][kept]]
        answers.close()


@pytest.mark.parametrize("text", ["hello", "hello\n", "{}\n", '{"a": 1}', "1\n"])
def test_another_file_is_left_alone(tmp_path: Path, text: str) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text(text)
    with pytest.raises(FptqError, match="something else than a batch's answers"):
        Answers(path)
    assert path.read_text() == text


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    answers = Answers(tmp_path / "out.jsonl")
    with pytest.raises(FptqError, match="written by another process"):
        Answers(tmp_path / "out.jsonl")
    answers.close()
    Answers(tmp_path / "out.jsonl").close()


def answered(served: Served, *lines: dict[str, Any]) -> dict[str, Any]:
    """By custom_id. The server's own event loop runs it, as the engine's streams belong to one."""
    answers: list[dict[str, Any]] = []
    runner: BatchRunner = served.app.state.batches
    origin = Origin("alice", 7)
    requests = [request for _, request in read_batch(file_of(*lines)) if isinstance(request, BatchRequest)]
    loop = served.engine._loop or pytest.fail("nothing was asked of this server yet")
    asyncio.run_coroutine_threadsafe(runner.run(requests, origin, answers.append, asyncio.Event()), loop).result(60)
    assert sorted(answer["custom_id"] for answer in answers) == sorted(each["custom_id"] for each in lines)
    return {answer["custom_id"]: answer["response"] for answer in answers}


@pytest.fixture
def warm(served: Served) -> Served:
    served.http.post(COMPLETIONS, json={"prompt": "x", "max_tokens": 1}).raise_for_status()
    return served


def test_answers_are_the_servers_own(warm: Served) -> None:
    """Right or wrong, on every route: what the same body gets over HTTP, but for ids and times."""
    said = [{"role": "user", "content": "Of a king."}]
    bodies: list[tuple[str, dict[str, Any]]] = [
        (COMPLETIONS, {"prompt": ["Once upon a time", "A king"], "max_tokens": 5, "temperature": 0, "logprobs": 2}),
        (COMPLETIONS, {"prompt": "x", "max_token": 5}),
        (COMPLETIONS, {"prompt": "x" * 20000}),
        (COMPLETIONS, {"prompt": "x", "model": "gpt-5"}),
        (COMPLETIONS, {"prompt": "\ud800"}),
        ("/v1/chat/completions", {"messages": said, "max_tokens": 5, "temperature": 0, "n": 2}),
        ("/v1/chat/completions", {"messages": said, "response_format": {"type": "json_schema", "json_schema": {
            "name": "x", "schema": {"type": "boolean"}}}, "temperature": 0}),
        ("/v1/messages", {"model": "demo", "messages": said, "max_tokens": 5, "temperature": 0}),
        ("/v1/messages", {"model": "demo", "messages": said}),
        ("/v1/responses", {"model": "demo", "input": "Of a king.", "max_output_tokens": 16, "temperature": 0}),
    ]
    answers = answered(warm, *(line(str(i), url, **body) for i, (url, body) in enumerate(bodies)))

    def lasting(body: Any) -> Any:
        if isinstance(body, dict):
            return {key: lasting(value) for key, value in body.items()
                    if key not in ("id", "created", "created_at", "cached_tokens", "cache_read_input_tokens",
                                   "accepted_prediction_tokens", "rejected_prediction_tokens", "input_tokens")}
        return [lasting(each) for each in body] if isinstance(body, list) else body

    for i, (url, body) in enumerate(bodies):
        direct = warm.http.post(url, content=json.dumps(body), headers={"Content-Type": "application/json"})
        assert (answers[str(i)]["status_code"], lasting(answers[str(i)]["body"])) == (
            direct.status_code, lasting(direct.json())), url


@pytest.mark.parametrize(("request_line", "status", "param"), [
    (line("a", "/v1/models"), 404, "url"), (line("a", "/v1/batches"), 404, "url"), (line("a", "/metrics"), 404, "url"),
    (line("a", method="GET"), 405, None), (line("a", prompt="x", stream=True), 400, "body.stream"),
    (line("a", "/v1/responses", input="x", background=True), 400, "body.background"),
])
def test_what_no_batch_can_have(warm: Served, request_line: dict[str, Any], status: int, param: str | None) -> None:
    answer = answered(warm, request_line)["a"]
    assert (answer["status_code"], answer["body"]["error"]["param"]) == (status, param)


def test_a_busy_server_is_asked_again(warm: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_first(warm, monkeypatch, [QueueFullError(0.01) for _ in range(5)])
    answers = answered(warm, *(line(str(i), prompt="x", max_tokens=1) for i in range(8)))
    assert {answer["status_code"] for answer in answers.values()} == {200}


def test_its_lines_count_as_their_keys(run_server: Callable[..., Any]) -> None:
    with run_server(ServerConfig(api_keys=("secret",))) as served:
        served.http.post(COMPLETIONS, json={"prompt": "x", "max_tokens": 1}).raise_for_status()
        assert answered(served, line("a", prompt="x", max_tokens=1))["a"]["status_code"] == 200
        assert 'fptq_key_requests_total{key="alice"} 1.0' in served.http.get("/metrics").text

"""/v1/files and /v1/batches through the openai SDK."""

from __future__ import annotations

import io
import json
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest

from fptq_runtime.errors import FptqError
from fptq_server import batch_jobs, batch_store
from fptq_server.batch_store import BatchStore
from fptq_server.config import ServerConfig
from tests.server.conftest import Served, wait_until

URL = "/v1/completions"
LONG: dict[str, Any] = {"prompt": "Once upon a time", "max_tokens": 900, "ignore_eos": True}


def jsonl(*bodies: dict[str, Any], url: str = URL) -> bytes:
    return b"".join(json.dumps({"custom_id": f"r{i}", "method": "POST", "url": url, "body": body}).encode() + b"\n"
                    for i, body in enumerate(bodies))


def upload(client: openai.OpenAI, content: bytes, **options: Any) -> Any:
    return client.files.create(file=("in.jsonl", io.BytesIO(content)), purpose="batch", **options)


def begin(client: openai.OpenAI, content: bytes, **options: Any) -> Any:
    return client.batches.create(input_file_id=upload(client, content).id, endpoint=URL, completion_window="24h",
                                 **options)


def ended(client: openai.OpenAI, batch_id: str) -> Any:
    wait_until(lambda: client.batches.retrieve(batch_id).status in batch_store.ENDED)
    return client.batches.retrieve(batch_id)


def lines(client: openai.OpenAI, file_id: str | None) -> dict[str, Any]:
    assert file_id is not None
    found = [json.loads(line) for line in client.files.content(file_id).text.splitlines()]
    assert len({line["custom_id"] for line in found}) == len(found)
    return {line["custom_id"]: line for line in found}


def test_a_batch(client: openai.OpenAI, served: Served) -> None:
    bodies = [{"prompt": f"The king had {i} sons", "max_tokens": 4, "temperature": 0} for i in range(60)]
    bodies[7]["temperature"] = -1
    created = begin(client, jsonl(*bodies), metadata={"night": "1"})
    assert (created.status, created.endpoint, created.metadata) == ("validating", URL, {"night": "1"})
    assert created.expires_at == created.created_at + 24 * 3600
    batch = ended(client, created.id)
    assert (batch.status, batch.errors) == ("completed", None)
    assert (batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed) == (60, 59, 1)
    assert batch.created_at <= batch.in_progress_at <= batch.finalizing_at <= batch.completed_at
    answers, errors = lines(client, batch.output_file_id), lines(client, batch.error_file_id)
    assert set(answers) == {f"r{i}" for i in range(60)} - {"r7"}
    assert errors["r7"]["response"]["status_code"] == 400
    assert errors["r7"]["response"]["body"]["error"]["param"] == "temperature"
    direct = served.http.post(URL, json=bodies[3]).json()
    assert answers["r3"]["response"]["body"]["choices"] == direct["choices"]
    file = client.files.retrieve(batch.output_file_id)
    assert (file.purpose, file.bytes) == ("batch_output", len(client.files.content(file.id).content))


@pytest.mark.parametrize(("content", "code", "line"), [
    (b"", "empty_file", None), (b"?\n", "invalid_json_line", 1),
    (jsonl({}, url="/v1/chat/completions"), "mismatched_url", 1)])
def test_a_file_that_is_no_batch(client: openai.OpenAI, content: bytes, code: str, line: int | None) -> None:
    batch = ended(client, begin(client, content).id)
    assert (batch.status, batch.output_file_id, batch.error_file_id) == ("failed", None, None)
    assert [(error.code, error.line) for error in batch.errors.data] == [(code, line)]


def test_mistakes(client: openai.OpenAI) -> None:
    file = upload(client, jsonl({}))
    for options, param in ((("x", URL, "24h"), "input_file_id"), ((file.id, "/v1/files", "24h"), "endpoint"),
                           ((file.id, URL, "soon"), "completion_window")):
        with pytest.raises(openai.BadRequestError) as refused:
            client.batches.create(**dict(zip(("input_file_id", "endpoint", "completion_window"), options,
                                             strict=True)))  # type: ignore[arg-type]
        assert refused.value.param == param
    with pytest.raises(openai.BadRequestError) as refused:
        client.files.create(file=b"x", purpose="vision")
    assert refused.value.param == "purpose"
    for missing in (client.files.retrieve, client.files.delete, client.files.content, client.batches.retrieve,
                    client.batches.cancel):
        with pytest.raises(openai.NotFoundError):
            missing("nothing")


def test_lists_and_deletion(run_server: Callable[..., Any]) -> None:
    with run_server() as served, openai.OpenAI(base_url=served.url + "/v1", api_key="none", max_retries=0) as client:
        batches = [begin(client, jsonl({"prompt": "x", "max_tokens": 1})).id for _ in range(3)]
        for batch in batches:
            ended(client, batch)
        assert [batch.id for batch in client.batches.list(limit=1)] == batches[::-1]  # page by page
        files = {file.id for file in client.files.list(limit=2)}
        assert len(files) == 6
        inputs = [file.id for file in client.files.list(purpose="batch")]
        assert len(inputs) == 3
        assert client.files.delete(inputs[0]).deleted
        assert {file.id for file in client.files.list()} == files - {inputs[0]}


def test_cancel(client: openai.OpenAI, served: Served) -> None:
    file = upload(client, jsonl({"prompt": "x", "max_tokens": 1}, *[LONG] * 60))
    first, second = (client.batches.create(input_file_id=file.id, endpoint=URL, completion_window="24h")
                     for _ in range(2))
    wait_until(lambda: bool(client.batches.retrieve(first.id).request_counts.completed))
    with pytest.raises(openai.ConflictError):
        client.files.delete(file.id)
    assert client.batches.cancel(second.id).status == "cancelled"  # it has not begun
    assert client.batches.cancel(first.id).status in ("cancelling", "cancelled")
    batch = ended(client, first.id)
    assert batch.status == "cancelled"
    answers, errors = lines(client, batch.output_file_id), lines(client, batch.error_file_id)
    assert answers.keys() | errors.keys() == {f"r{i}" for i in range(61)}
    assert not answers.keys() & errors.keys()
    assert {line["error"]["code"] for line in errors.values()} == {"batch_cancelled"}
    assert (batch.request_counts.completed, batch.request_counts.failed) == (len(answers), len(errors))
    wait_until(lambda: not served.engine.engine.has_unfinished_requests)


def test_a_window_that_ends(client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_jobs, "HOUR", 1)
    file = upload(client, jsonl(*[LONG] * 60))
    window: Any = "1h"
    batch = ended(client, client.batches.create(input_file_id=file.id, endpoint=URL, completion_window=window).id)
    assert batch.status == "expired"
    assert {line["error"]["code"] for line in lines(client, batch.error_file_id).values()} == {"batch_expired"}


def test_files_and_batches_are_their_keys(run_server: Callable[..., Any]) -> None:
    with run_server(ServerConfig(api_keys=("alice", "bob"))) as served:
        alice, bob = (openai.OpenAI(base_url=served.url + "/v1", api_key=key) for key in ("alice", "bob"))
        with alice, bob:
            batch = ended(alice, begin(alice, jsonl({"prompt": "x", "max_tokens": 1})).id)
            assert batch.status == "completed"
            assert (list(bob.files.list()), list(bob.batches.list())) == ([], [])
            for missing, name in ((bob.files.content, batch.output_file_id), (bob.files.delete, batch.input_file_id),
                                  (bob.batches.retrieve, batch.id), (bob.batches.cancel, batch.id)):
                with pytest.raises(openai.NotFoundError):
                    missing(name)
            with pytest.raises(openai.BadRequestError):
                bob.batches.create(input_file_id=batch.input_file_id, endpoint=URL, completion_window="24h")


def test_a_batch_outlives_its_server(run_server: Callable[..., Any], tmp_path: Path) -> None:
    """What was answered before is not answered again, and a directory is one server's."""
    config = ServerConfig(batch_dir=tmp_path)
    bodies = [{"prompt": "x", "max_tokens": 1 + 40 * (i > 0)} for i in range(120)]
    with run_server(config, max_num_seqs=4) as served, \
            openai.OpenAI(base_url=served.url + "/v1", api_key="none", max_retries=0) as client:
        with pytest.raises(FptqError, match="another server's"):
            BatchStore(tmp_path, 1)
        created = begin(client, jsonl(*bodies))
        wait_until(lambda: bool(client.batches.retrieve(created.id).request_counts.completed))
    [content] = [path for path in tmp_path.glob("*.jsonl") if b"batch_req_" in path.read_bytes()]
    before = content.read_bytes()
    assert 0 < before.count(b"\n") < 120
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.glob("*.*")} == {0o600}
    with run_server(config) as served, openai.OpenAI(base_url=served.url + "/v1", api_key="none") as client:
        batch = ended(client, created.id)
        assert batch.status == "completed"
        assert len(lines(client, batch.output_file_id)) == 120
        assert client.files.content(batch.output_file_id).content.startswith(before)


def test_a_store_is_bounded(run_server: Callable[..., Any]) -> None:
    content = jsonl({"prompt": "x", "max_tokens": 1})
    with run_server(ServerConfig(batch_dir_size=len(content) + 20, max_file_bytes=5000)) as served, \
            openai.OpenAI(base_url=served.url + "/v1", api_key="none", max_retries=0) as client:
        file = upload(client, content)
        for more in (content, b"x" * 6000):
            with pytest.raises(openai.APIStatusError) as refused:
                upload(client, more)
            assert refused.value.status_code == 413
        created = client.batches.create(input_file_id=file.id, endpoint=URL, completion_window="24h")
        batch = ended(client, created.id)
        assert (batch.status, batch.errors.data[0].code) == ("failed", "storage_full")
        assert len(lines(client, batch.output_file_id)) == 1


def test_a_file_expires(client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    file = upload(client, b"x", expires_after={"anchor": "created_at", "seconds": 3600})
    assert file.expires_at == file.created_at + 3600
    with monkeypatch.context() as patch:
        patch.setattr(batch_store.time, "time", lambda: file.expires_at + 1.0)
        with pytest.raises(openai.NotFoundError):
            client.files.retrieve(file.id)


def test_it_goes_behind_other_requests(run_server: Callable[..., Any]) -> None:
    """Which find slots free and begin at once, however long the batch is."""
    with run_server(max_num_seqs=4) as served, \
            openai.OpenAI(base_url=served.url + "/v1", api_key="none", max_retries=0) as client:
        created = begin(client, jsonl(*[LONG] * 40))
        wait_until(lambda: served.engine.engine.num_running == 3)
        for _ in range(3):
            served.http.post(URL, json={"prompt": "x", "max_tokens": 2}).raise_for_status()
        assert client.batches.retrieve(created.id).request_counts.completed == 0
        client.batches.cancel(created.id)
        ended(client, created.id)

"""The log as a program reads it."""

from __future__ import annotations

import json
import logging
import sys
from datetime import datetime, timezone

import pytest

from fptq_server.logs import JsonFormatter
from tests.server.conftest import Served, wait_until


def test_a_request_is_an_object(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "fptq.access")
    for body, status in (({"prompt": "Once", "max_tokens": 3, "ignore_eos": True}, 200), ({"promt": "x"}, 400)):
        assert served.http.post("/v1/completions", json=body, headers={"x-request-id": f"json-{status}"}
                                ).status_code == status
    entries: dict[str, dict[str, object]] = {}

    def logged() -> bool:
        lines = [JsonFormatter().format(record) for record in caplog.records if record.name == "fptq.access"]
        entries.update({entry["request_id"]: entry for entry in map(json.loads, lines)})
        return {"json-200", "json-400"} <= entries.keys()

    wait_until(logged)
    answered, refused = entries["json-200"], entries["json-400"]
    assert {"method": "POST", "path": "/v1/completions", "status": 200, "completion_tokens": 3,
            "finish_reasons": ["length"], "client_gone": False, "level": "INFO"}.items() <= answered.items()
    assert refused["status"] == 400 and "promt" in str(refused["error"]) and "prompt_tokens" not in refused
    assert abs((datetime.now(timezone.utc) - datetime.fromisoformat(str(answered["time"]))).total_seconds()) < 600


def test_an_exception_stays_on_its_line() -> None:
    try:
        raise ValueError("two\nlines")
    except ValueError:
        record = logging.getLogger("x").makeRecord("x", logging.ERROR, "f", 1, "failed %s", ("é",), None)
        record.exc_info = sys.exc_info()
    line = JsonFormatter().format(record)
    assert "\n" not in line
    assert json.loads(line)["message"] == "failed é"
    assert "ValueError: two\nlines" in json.loads(line)["exception"]

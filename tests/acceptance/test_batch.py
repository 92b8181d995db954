"""`fptq batch`, killed at random moments."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import pytest

from tests.acceptance.harness import Fptq, wait_until

LINES = 60


@pytest.fixture(scope="module")
def requests(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("batch") / "in.jsonl"
    place = random.Random(0)
    bodies: list[dict[str, Any]] = [
        {"prompt": f"The king had {i} sons", "max_tokens": place.randrange(20, 200), "seed": i,
         "ignore_eos": True} for i in range(LINES)]
    bodies[7]["temperature"] = -1
    path.write_text("".join(
        json.dumps({"custom_id": f"r{i}", "method": "POST", "url": "/v1/completions", "body": body}) + "\n"
        for i, body in enumerate(bodies)))
    return path


def choices(out: Path) -> dict[str, Any]:
    """Of each custom_id its status and its texts, or its error. None is there twice."""
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    found = {line["custom_id"]: (line["response"]["status_code"], line["response"]["body"].get(
        "choices", line["response"]["body"].get("error"))) for line in lines}
    assert len(found) == len(lines)
    return found


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])])
def test_nothing_is_lost_or_doubled(fptq: Fptq, demo_artifact: Path, requests: Path, tmp_path: Path, kills: int
                                    ) -> None:
    """After so many SIGKILLs the same command has answered each line once, with what it says undisturbed."""
    out, undisturbed = tmp_path / "out.jsonl", tmp_path / "undisturbed.jsonl"
    place = random.Random(kills)

    def answered() -> int:
        return out.read_bytes().count(b"\n") if out.exists() else 0

    for i in range(kills):
        process = fptq.start("batch", demo_artifact, requests, out, "--max-num-seqs", 8)
        enough = (i + 1) * (LINES - 20) // (kills + 1)
        wait_until(lambda: answered() >= enough or process.poll() is not None, "lines", 120)  # noqa: B023
        time.sleep(place.random() * 0.1)
        process.kill()
        assert process.wait() == -9, "it had ended before"
    before = answered()
    result = fptq("batch", demo_artifact, requests, out, "--json").json
    assert result == {"lines": LINES, "resumed": before, "failed": 1}
    assert fptq("batch", demo_artifact, requests, undisturbed, "--json").json == {**result, "resumed": 0}
    assert choices(out) == choices(undisturbed)
    assert choices(out)["r7"][0] == 400


def test_mistakes(fptq: Fptq, requests: Path, tmp_path: Path) -> None:
    bad, out = tmp_path / "bad.jsonl", tmp_path / "out.jsonl"
    bad.write_text(requests.read_text().splitlines()[0] + "\n{}\n")
    fptq("batch", "demo", bad, out).assert_usage_error("bad.jsonl, line 2", "custom_id")
    fptq("batch", "demo", tmp_path / "none.jsonl", out).assert_usage_error("none.jsonl")
    out.write_text("mine")
    fptq("batch", "demo", requests, out).assert_usage_error("out.jsonl", "something else")
    out.write_text('{"custom_id": "x", "response": null}\n')
    fptq("batch", "demo", requests, out).assert_usage_error("out.jsonl", "other requests")

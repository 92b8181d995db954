"""What an operator reads, by the tools that read it: promtool, a Prometheus that scrapes a server, the dashboard's
queries. Skipped where Prometheus is not installed."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from fptq_server.config import ServerConfig
from fptq_server.metrics import OF_NO_MODEL
from tests.server.conftest import Served, metric, wait_until

DOCKER = Path(__file__).parents[2] / "docker"
VLLM = {  # names that vLLM's own dashboards, KEDA's scalers and the Kubernetes gateway for inference read
    "vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc",
    "vllm:prefix_cache_queries_total", "vllm:prefix_cache_hits_total", "vllm:num_preemptions_total",
    "vllm:prompt_tokens_total", "vllm:generation_tokens_total", "vllm:cache_config_info",
    "vllm:lora_requests_info",
    "vllm:spec_decode_num_draft_tokens_total", "vllm:spec_decode_num_accepted_tokens_total",
    "vllm:request_success_total", *(f"vllm:{name}_{part}" for part in ("sum", "count", "bucket") for name in (
        "iteration_tokens_total", "time_to_first_token_seconds", "inter_token_latency_seconds",
        "time_per_output_token_seconds", "e2e_request_latency_seconds", "request_queue_time_seconds",
        "request_prefill_time_seconds", "request_decode_time_seconds", "request_prompt_tokens",
        "request_generation_tokens")),
}

needs_prometheus = pytest.mark.skipif(shutil.which("prometheus") is None or shutil.which("promtool") is None,
                                      reason="Prometheus is not installed")


@needs_prometheus
@pytest.mark.parametrize("command", [["check", "rules", "alerts.yml"], ["test", "rules", "alerts_test.yml"]])
def test_the_alerts_fire_on_what_they_are_for(command: list[str]) -> None:
    done = subprocess.run(["promtool", *command], cwd=DOCKER, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_each_alert_is_tested_on_both_sides() -> None:
    names = {rule["alert"] for rule in yaml.safe_load((DOCKER / "alerts.yml").read_text())["groups"][0]["rules"]}
    fires, quiet = yaml.safe_load((DOCKER / "alerts_test.yml").read_text())["tests"]
    assert {test["alertname"] for test in fires["alert_rule_test"] if test["exp_alerts"]} == names
    assert {test["alertname"] for test in quiet["alert_rule_test"] if not test.get("exp_alerts")} == names


def test_an_alert_of_a_model_names_it() -> None:
    rules = yaml.safe_load((DOCKER / "alerts.yml").read_text())["groups"][0]["rules"]
    for rule in rules:
        of_a_model = not any(name == "up" or OF_NO_MODEL.match(name) for name in re.findall(r"\w+", rule["expr"]))
        assert ("{{ with $labels.model_name }}{{ . }} on {{ end }}{{ $labels.instance }}"
                in rule["annotations"]["summary"]) is of_a_model, rule["alert"]


@pytest.fixture(scope="module")
def watched(run_server: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """The query API of a Prometheus with docker/prometheus.yml, pointed at a server that answers and refuses."""
    folder = tmp_path_factory.mktemp("prometheus")
    config = yaml.safe_load((DOCKER / "prometheus.yml").read_text())
    with run_server(ServerConfig(metrics_aliases="vllm")) as served, socket.create_server(("127.0.0.1", 0)) as free:
        config |= {"global": {"scrape_interval": "250ms"}, "rule_files": [str(DOCKER / "alerts.yml")]}
        config["scrape_configs"][0]["static_configs"] = [{"targets": [f"127.0.0.1:{served.port}"]}]
        (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        free.close()
        prometheus = subprocess.Popen(
            ["prometheus", f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}",
             f"--web.listen-address={address}"], stderr=subprocess.DEVNULL)
        try:
            with httpx.Client(base_url=f"http://{address}", timeout=30) as http:
                wait_until(lambda: scraped(http, served))
                work(served)
                wait_until(lambda: value(http, "sum(fptq_generated_tokens_total)") ==
                           metric(served, "fptq_generated_tokens_total"))
                yield http
        finally:
            prometheus.terminate()
            prometheus.wait(30)


def scraped(http: httpx.Client, served: Served) -> bool:
    """Twice at least, so that a rate sees what happens from here on."""
    try:
        return value(http, 'count_over_time(up{job="fptq"}[1m])') >= 2
    except (httpx.TransportError, IndexError):
        return False


def value(http: httpx.Client, query: str) -> float:
    return float(results(http, query)[0]["value"][1])


def results(http: httpx.Client, query: str) -> list[dict[str, Any]]:
    answer = http.get("/api/v1/query", params={"query": query})
    if answer.status_code == 503:  # it begins
        return []
    assert answer.status_code == 200, answer.text
    found: list[dict[str, Any]] = answer.json()["data"]["result"]
    return found


def work(served: Served) -> None:
    for body, status in (({"prompt": "Once upon a time " * 20, "max_tokens": 8}, 200),
                         ({"prompt": "Once upon a time " * 20, "max_tokens": 8}, 200), ({"max_tokens": 8}, 400)):
        assert served.http.post("/v1/completions", json=body).status_code == status


def dashboard_queries() -> list[str]:
    panels = json.loads((DOCKER / "grafana/dashboards/fptq.json").read_text())["panels"]
    return [target["expr"].replace("$__rate_interval", "1m") for panel in panels for target in panel["targets"]]


@needs_prometheus
@pytest.mark.slow
@pytest.mark.parametrize("query", dashboard_queries())
def test_every_query_of_the_dashboard_has_data(watched: httpx.Client, query: str) -> None:
    found = results(watched, query)
    assert found
    assert all(sample["value"][1] != "NaN" for sample in found), found


@needs_prometheus
@pytest.mark.slow
def test_a_prometheus_loads_the_alerts(watched: httpx.Client) -> None:
    [group] = watched.get("/api/v1/rules").json()["data"]["groups"]
    assert len(group["rules"]) == len(yaml.safe_load((DOCKER / "alerts.yml").read_text())["groups"][0]["rules"])
    wait_until(lambda: watched.get("/api/v1/rules").json()["data"]["groups"][0]["lastEvaluation"][:4] > "0001")
    assert {rule["health"] for rule in group["rules"]} <= {"ok", "unknown"}


@needs_prometheus
@pytest.mark.slow
def test_vllms_names_are_read(watched: httpx.Client) -> None:
    names = set(watched.get("/api/v1/label/__name__/values").json()["data"])
    assert {name for name in names if name.startswith("vllm:")} == VLLM
    assert {sample["metric"]["model_name"] for sample in results(watched, '{__name__=~"vllm:.*"}')} == {"demo"}
    for theirs, ours in {"vllm:generation_tokens_total": "fptq_generated_tokens_total",
                         'vllm:request_success_total{finished_reason="length"}':
                             'fptq_requests_finished_total{reason="length"}',
                         "vllm:time_to_first_token_seconds_count": "fptq_time_to_first_token_seconds_count"}.items():
        assert value(watched, theirs) == value(watched, ours) > 0
    [sizes] = results(watched, "vllm:cache_config_info")
    assert int(sizes["metric"]["block_size"]) == 32 and int(sizes["metric"]["num_gpu_blocks"]) > 0


def test_there_are_no_other_names_unless_asked_for(served: Served) -> None:
    assert "vllm" not in served.http.get("/metrics").text

"""What Prometheus reads."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from fptq_runtime import __version__
from fptq_runtime.engine.speculation import KINDS, DraftStats
from fptq_runtime.engine.stats import FinishedStats, StepStats
from fptq_server.config import ModelCard
from fptq_server.metrics import Metrics
from tests.server.conftest import Served

CARD = ModelCard("demo", 0, 1024, 4096, {"architecture": "LlamaForCausalLM"})


def samples(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {(sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in text_string_to_metric_families(text) for sample in family.samples}


def value(metrics: Metrics, name: str, **labels: str) -> float:
    return samples(metrics.exposition().decode())[name, tuple(sorted(labels.items()))]


def test_promtool(served: Served) -> None:
    if (promtool := shutil.which("promtool")) is None:
        pytest.skip("promtool is not installed")
    served.http.post("/v1/completions", json={"prompt": "x", "max_tokens": 2})
    done = subprocess.run([promtool, "check", "metrics"], input=served.http.get("/metrics").text, text=True,
                          capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_every_series_exists_before_the_first_event() -> None:
    """A rate over a counter that appears with its first event misses that event."""
    metrics = Metrics(__version__, CARD)
    metrics.add_routes(["/v1/completions"])
    before = samples(metrics.exposition().decode()).keys()
    metrics.record_step(StepStats(
        num_running=3, num_waiting=2, kv_usage=0.5, batch_tokens=7, step_seconds=0.01, prompt_tokens=4,
        recomputed_tokens=2, generated_tokens=3, preemptions=1,
        drafts={kind: DraftStats(4, 2, -0.5) for kind in KINDS}, prefix_query_tokens=10, prefix_hit_tokens=6,
        queue_seconds=[0.001], time_to_first_token=[0.02], inter_token_seconds=[0.01, 0.02],
        finished=[FinishedStats(reason, 0.3, 5, 2, 0.1, 0.1) for reason in ("stop", "length", "abort", "error")]))
    for status in (200, 404, 499, 503):
        metrics.record_response("/v1/completions", status)
        metrics.record_response("/a/path/that/someone/made/up", status)
    metrics.record_rejection("queue_full")
    assert samples(metrics.exposition().decode()).keys() == before


def test_a_step_is_recorded() -> None:
    metrics = Metrics(__version__, CARD)
    metrics.record_step(StepStats(num_running=3, num_waiting=2, kv_usage=0.5, batch_tokens=7, prompt_tokens=4,
                                  prefix_query_tokens=10, prefix_hit_tokens=6, prefix_disk_tokens=4,
                                  generated_tokens=3, preemptions=1,
                                  drafts={"lookup": DraftStats(drafted=4, accepted=2, seconds_saved=-0.5)},
                                  queue_seconds=[0.0005], time_to_first_token=[0.02], inter_token_seconds=[0.01, 0.02],
                                  finished=[FinishedStats("stop", 0.3, 10, 3, 0.0195, 0.03),
                                            FinishedStats("abort", 0.0, 4, 0)]))
    assert value(metrics, "fptq_requests_running") == 3
    assert value(metrics, "fptq_requests_waiting") == 2
    assert value(metrics, "fptq_kv_cache_usage_ratio") == 0.5
    assert value(metrics, "fptq_prompt_tokens_total") == 10
    assert value(metrics, "fptq_generated_tokens_total") == 3
    assert value(metrics, "fptq_preemptions_total") == 1
    assert value(metrics, "fptq_speculation_drafted_tokens_total", kind="lookup") == 4
    assert value(metrics, "fptq_speculation_accepted_tokens_total", kind="lookup") == 2
    assert value(metrics, "fptq_speculation_saved_seconds", kind="lookup") == -0.5
    assert value(metrics, "fptq_prefix_cache_query_tokens_total") == 10
    assert value(metrics, "fptq_prefix_cache_hit_tokens_total") == 6
    assert value(metrics, "fptq_kv_disk_hit_tokens_total") == 4
    assert value(metrics, "fptq_requests_finished_total", reason="stop") == 1
    assert value(metrics, "fptq_queue_seconds_bucket", le="0.001") == 1
    assert value(metrics, "fptq_time_to_first_token_seconds_sum") == 0.02
    assert value(metrics, "fptq_inter_token_seconds_count") == 2
    assert value(metrics, "fptq_end_to_end_seconds_sum") == 0.3
    assert value(metrics, "fptq_request_prompt_tokens_sum") == 14
    assert value(metrics, "fptq_request_generated_tokens_sum") == 3
    assert value(metrics, "fptq_prefill_seconds_sum") == 0.0195
    assert value(metrics, "fptq_decode_seconds_count") == 1
    assert value(metrics, "fptq_end_to_end_seconds_bucket", le="1800.0") == 2
    assert value(metrics, "fptq_batch_tokens_sum") == 7
    assert value(metrics, "fptq_build_info", version=__version__) == 1
    assert value(metrics, "fptq_model_info", model="demo", max_model_len="1024", architecture="LlamaForCausalLM") == 1


def test_apps_do_not_share_metrics() -> None:
    first, second = Metrics(__version__, CARD), Metrics(__version__, CARD)
    first.record_rejection("invalid")
    assert value(second, "fptq_requests_rejected_total", reason="invalid") == 0


def test_alerts_read_metrics_that_exist() -> None:
    """A misspelt name would never alert."""
    rules = yaml.safe_load((Path(__file__).parents[2] / "docker" / "alerts.yml").read_text())
    metrics = Metrics(__version__, CARD)
    names = {name for name, _ in samples(metrics.exposition().decode())}
    for rule in rules["groups"][0]["rules"]:
        read = set(re.findall(r"fptq_\w+", rule["expr"]))
        assert read <= names, rule["alert"]
        assert read or rule["alert"] == "FptqDown"


def test_checks_of_artifact_and_kernels_are_recorded() -> None:
    metrics = Metrics(__version__, CARD)
    metrics.record_deviation(0.25)
    metrics.record_scrub(["model.safetensors"])
    metrics.record_scrub([])
    assert value(metrics, "fptq_golden_deviation_ratio") == 0.25
    assert value(metrics, "fptq_golden_checks_total") == 1
    assert value(metrics, "fptq_artifact_damaged_files") == 0
    assert value(metrics, "fptq_artifact_scrubs_total") == 2

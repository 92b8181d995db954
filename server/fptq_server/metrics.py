"""Prometheus metrics of one app, in a registry of its own. docs/metrics.md describes each."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from fptq_runtime.engine.request import FinishReason
from fptq_runtime.engine.speculation import KINDS
from fptq_runtime.engine.stats import StepStats
from fptq_server.config import MetricsAliases, ModelCard
from fptq_server.metrics_aliases import VllmNames

SECONDS = (0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 0.75, 1, 2.5,
           5, 10, 30, 60, 120)
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
LONG_TOKENS = (*TOKENS, 16384, 32768, 65536, 131072)
LONG_SECONDS = (*SECONDS, 300, 600, 1800)
REJECTIONS = ("queue_full", "draining", "aborted", "engine_stopped", "invalid", "unauthorized", "too_large", "timeout",
              "key_limit", "failed")
STATUS_CLASSES = ("2xx", "3xx", "4xx", "5xx")
OTHER_ROUTES = "other"
OF_NO_MODEL = re.compile("process_|fptq_(http_responses|requests_rejected|key_|build_info)")


class Metrics:
    """Written by the engine's thread (record_step, record_deviation), the scrub's (record_scrub) and the event loop
    (the rest); prometheus_client locks."""

    def __init__(self, version: str, model: ModelCard, aliases: MetricsAliases = "none") -> None:
        """aliases: vllm: each metric that vLLM has, too, is there a second time under its name."""
        disable_created_metrics()  # type: ignore[no-untyped-call]  # they would double the number of series
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)

        def histogram(name: str, text: str, buckets: Iterable[float] = SECONDS) -> Histogram:
            return Histogram(name, text, buckets=tuple(buckets), registry=registry)

        def counter(name: str, text: str, label: str | None = None, values: Iterable[str] = ()) -> Counter:
            made = Counter(name, text, () if label is None else (label,), registry=registry)
            for value in values:  # children that exist from the start let a rate see the first event
                made.labels(value)
            return made

        def gauge(name: str, text: str, label: str | None = None, values: Iterable[str] = ()) -> Gauge:
            made = Gauge(name, text, () if label is None else (label,), registry=registry)
            for value in values:
                made.labels(value)
            return made

        self._queue = histogram("fptq_queue_seconds", "Arrival to first scheduled.")
        self._first_token = histogram("fptq_time_to_first_token_seconds", "Arrival to first token.")
        self._inter_token = histogram("fptq_inter_token_seconds", "Time between two tokens of a sequence.")
        self._end_to_end = histogram("fptq_end_to_end_seconds", "Arrival to the end, whatever the reason.",
                                     LONG_SECONDS)
        self._prefill = histogram("fptq_prefill_seconds", "First scheduled to first token.")
        self._decode = histogram("fptq_decode_seconds", "First token to last.", LONG_SECONDS)
        self._prompt_length = histogram("fptq_request_prompt_tokens", "Of a sequence that ended.", LONG_TOKENS)
        self._answer_length = histogram("fptq_request_generated_tokens", "Of a sequence that ended.", LONG_TOKENS)
        self._step = histogram("fptq_step_seconds", "Duration of one engine step.")
        self._batch = histogram("fptq_batch_tokens", "Tokens computed in one engine step.", TOKENS)
        self._running = gauge("fptq_requests_running", "Sequences that take part in engine steps.")
        self._waiting = gauge("fptq_requests_waiting", "Sequences in the queue.")
        self._kv_usage = gauge("fptq_kv_cache_usage_ratio", "Share of the KV cache's blocks in use.")
        self._prompt = counter("fptq_prompt_tokens",
                               "Prompt tokens of each sequence, computed or found in the prefix cache.")
        self._recomputed = counter("fptq_recomputed_tokens", "Tokens computed again after a preemption.")
        self._generated = counter("fptq_generated_tokens", "Tokens generated.")
        self._finished = counter("fptq_requests_finished", "Sequences finished, by reason.", "reason",
                                 (reason.value for reason in FinishReason))
        self._rejected = counter("fptq_requests_rejected", "HTTP requests refused or given up, by reason.", "reason",
                                 REJECTIONS)
        self._preemptions = counter("fptq_preemptions", "Sequences sent back to the queue for want of KV blocks.")
        self._saved = counter("fptq_saved_tokens", "Tokens not generated, of answers that were given up.")
        self._prefix_query = counter("fptq_prefix_cache_query_tokens", "Prompt tokens looked up in the prefix cache.")
        self._prefix_hit = counter("fptq_prefix_cache_hit_tokens", "Prompt tokens found in the prefix cache.")
        self._prefix_disk = counter("fptq_kv_disk_hit_tokens", "Prompt tokens found there, from disk.")
        self._drafted, self._accepted = (
            counter(f"fptq_speculation_{name}_tokens", text, "kind", KINDS) for name, text in (
                ("drafted", "Tokens that were guessed and computed ahead, by where the guess was from."),
                ("accepted", "Guessed tokens that were right.")))
        self._speculation_saved = gauge("fptq_speculation_saved_seconds", "Of steps, by estimate, less what wrong "
                                        "guesses took.", "kind", KINDS)
        self._deviation = gauge("fptq_golden_deviation_ratio", "Of golden values, in multiples of what is tolerated.")
        self._checks = counter("fptq_golden_checks", "Rounds of golden probes.")
        self._damaged = gauge("fptq_artifact_damaged_files", "Files of the artifact whose bytes have changed.")
        self._scrubs = counter("fptq_artifact_scrubs", "Times that all files of the artifact were read and hashed.")
        self._key_requests = Counter("fptq_key_requests", "HTTP requests, by the name of their API key.", ("key",),
                                     registry=registry)
        self._key_tokens = Counter("fptq_key_tokens", "Tokens of prompts and answers, by the name of their API key.",
                                   ("key", "kind"), registry=registry)
        self._routes: dict[str, re.Pattern[str]] = {}
        self._responses = Counter("fptq_http_responses", "HTTP responses, by route and class of status.",
                                  ("route", "status"), registry=registry)
        build = Gauge("fptq_build_info", "The server's version.", ("version",), registry=registry)
        build.labels(version).set(1)
        info = {key: str(value) for key, value in model.description.items() if isinstance(value, (str, int, float))}
        names = ("model", "max_model_len", *sorted(info))
        Gauge("fptq_model_info", "The served model.", names, registry=registry).labels(
            model.id, str(model.max_model_len), *(info[key] for key in sorted(info))).set(1)

        self._aliases = CollectorRegistry()
        if aliases == "vllm":
            blocks = {"block_size": model.engine["block_size"], "num_gpu_blocks": model.engine["num_blocks"]}
            self._aliases.register(VllmNames(registry, model.id, blocks, model.adapters,
                                             model.engine["max_loras"]))

    def add_routes(self, templates: Iterable[str]) -> None:
        """Responses of these, as /v1/models/{model_id}, are told apart; all others count under one label."""
        self._routes = {template: re.compile(re.sub(r"\{\w+\}", ".*", template)) for template in templates}
        for route in (*self._routes, OTHER_ROUTES):
            for status in STATUS_CLASSES:
                self._responses.labels(route, status)

    def record_step(self, stats: StepStats) -> None:
        self._running.set(stats.num_running)
        self._waiting.set(stats.num_waiting)
        self._kv_usage.set(stats.kv_usage)
        if stats.batch_tokens:
            self._batch.observe(stats.batch_tokens)
            self._step.observe(stats.step_seconds)
        self._prompt.inc(stats.prompt_tokens + stats.prefix_hit_tokens)
        self._recomputed.inc(stats.recomputed_tokens)
        self._generated.inc(stats.generated_tokens)
        self._preemptions.inc(stats.preemptions)
        self._saved.inc(stats.saved_tokens)
        self._prefix_query.inc(stats.prefix_query_tokens)
        self._prefix_hit.inc(stats.prefix_hit_tokens)
        self._prefix_disk.inc(stats.prefix_disk_tokens)
        for kind, draft in stats.drafts.items():
            self._drafted.labels(kind).inc(draft.drafted)
            self._accepted.labels(kind).inc(draft.accepted)
            self._speculation_saved.labels(kind).inc(draft.seconds_saved)
        for histogram, observed in ((self._queue, stats.queue_seconds), (self._first_token, stats.time_to_first_token),
                                    (self._inter_token, stats.inter_token_seconds)):
            for seconds in observed:
                histogram.observe(seconds)
        for finished in stats.finished:
            self._finished.labels(finished.reason).inc()
            self._end_to_end.observe(finished.end_to_end_seconds)
            self._prompt_length.observe(finished.prompt_tokens)
            self._answer_length.observe(finished.generated_tokens)
            for phase, took in ((self._prefill, finished.prefill_seconds), (self._decode, finished.decode_seconds)):
                if took is not None:
                    phase.observe(took)

    def add_keys(self, names: Iterable[str]) -> None:
        for name in names:
            self.record_key(name, 0, 0, requests=0)

    def record_key(self, name: str, prompt_tokens: int, completion_tokens: int, requests: int = 1) -> None:
        self._key_requests.labels(name).inc(requests)
        self._key_tokens.labels(name, "prompt").inc(prompt_tokens)
        self._key_tokens.labels(name, "generated").inc(completion_tokens)

    def record_deviation(self, ratio: float) -> None:
        self._deviation.set(ratio)
        self._checks.inc()

    def record_scrub(self, damaged: list[str]) -> None:
        self._damaged.set(len(damaged))
        self._scrubs.inc()

    def record_rejection(self, reason: str) -> None:
        self._rejected.labels(reason).inc()

    def record_response(self, path: str, status: int) -> None:
        """path: the request's; "" where there was none."""
        route = next((name for name, pattern in self._routes.items() if pattern.fullmatch(path)), OTHER_ROUTES)
        self._responses.labels(route, f"{status // 100}xx").inc()

    def families(self) -> Iterable[Metric]:
        yield from self.registry.collect()
        yield from self._aliases.collect()

    def exposition(self) -> bytes:
        """The text format, version 0.0.4."""
        return generate_latest(self.registry) + generate_latest(self._aliases)


class _ByModel(Collector):
    """front: of what no model has. models: the rest of each, which gets its name as a label."""

    def __init__(self, front: Metrics, models: Mapping[str, Metrics]) -> None:
        self._front = front
        self._models = models

    def collect(self) -> Iterable[Metric]:
        yield from (family for family in self._front.families() if OF_NO_MODEL.match(family.name))
        merged: dict[str, Metric] = {}
        for name, metrics in self._models.items():
            for family in metrics.families():
                if OF_NO_MODEL.match(family.name):
                    continue
                whole = merged.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                for sample in family.samples:
                    whole.add_sample(sample.name, {"model_name": name} | sample.labels, sample.value)
        yield from merged.values()


def exposition_of(front: Metrics, models: Mapping[str, Metrics]) -> bytes:
    """Of a server of several models."""
    registry = CollectorRegistry()
    registry.register(_ByModel(front, models))
    return generate_latest(registry)

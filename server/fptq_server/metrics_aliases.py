"""The same metrics under the names of another server, for the dashboards, autoscalers and gateways that read those."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

VLLM = {
    "fptq_requests_running": ("vllm:num_requests_running",),
    "fptq_requests_waiting": ("vllm:num_requests_waiting",),
    "fptq_kv_cache_usage_ratio": ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc"),
    "fptq_prefix_cache_query_tokens": ("vllm:prefix_cache_queries",),
    "fptq_prefix_cache_hit_tokens": ("vllm:prefix_cache_hits",),
    "fptq_preemptions": ("vllm:num_preemptions",),
    "fptq_prompt_tokens": ("vllm:prompt_tokens",),
    "fptq_generated_tokens": ("vllm:generation_tokens",),
    "fptq_speculation_drafted_tokens": ("vllm:spec_decode_num_draft_tokens",),
    "fptq_speculation_accepted_tokens": ("vllm:spec_decode_num_accepted_tokens",),
    "fptq_requests_finished": ("vllm:request_success",),
    "fptq_batch_tokens": ("vllm:iteration_tokens_total",),
    "fptq_time_to_first_token_seconds": ("vllm:time_to_first_token_seconds",),
    "fptq_inter_token_seconds": ("vllm:inter_token_latency_seconds", "vllm:time_per_output_token_seconds"),
    "fptq_end_to_end_seconds": ("vllm:e2e_request_latency_seconds",),
    "fptq_queue_seconds": ("vllm:request_queue_time_seconds",),
    "fptq_prefill_seconds": ("vllm:request_prefill_time_seconds",),
    "fptq_decode_seconds": ("vllm:request_decode_time_seconds",),
    "fptq_request_prompt_tokens": ("vllm:request_prompt_tokens",),
    "fptq_request_generated_tokens": ("vllm:request_generation_tokens",),
}
LABELS = {"reason": "finished_reason"}


class VllmNames(Collector):
    """model: the label model_name. blocks: of the KV cache, of block_size tokens each. adapters: that are loaded, as it
    is at the time, of max_loras at most."""

    def __init__(self, ours: Collector, model: str, blocks: Mapping[str, object], adapters: Collection[str],
                 max_loras: object) -> None:
        self._ours = ours
        self._labels = {"model_name": model, "engine": "0"}
        self._blocks = {name: str(value) for name, value in blocks.items()}
        self._adapters = adapters
        self._max_loras = max_loras

    def collect(self) -> Iterable[Metric]:
        for family in self._ours.collect():
            for name in VLLM.get(family.name, ()):
                renamed = Metric(name, family.documentation, family.type)
                for sample in family.samples:
                    labels = {LABELS.get(label, label): value for label, value in sample.labels.items()}
                    renamed.add_sample(name + sample.name.removeprefix(family.name), self._labels | labels,
                                       sample.value)
                yield renamed
        labels = self._labels | self._blocks
        sizes = GaugeMetricFamily("vllm:cache_config_info", "The KV cache's blocks.", labels=list(labels))
        sizes.add_metric(list(labels.values()), 1)
        yield sizes
        labels = self._labels | {"max_lora": str(self._max_loras), "waiting_lora_adapters": "",
                                 "running_lora_adapters": ",".join(sorted(self._adapters))}
        loaded = GaugeMetricFamily("vllm:lora_requests_info", "Adapters, as of the value's Unix seconds.",
                                   labels=list(labels))
        loaded.add_metric(list(labels.values()), time.time())
        yield loaded

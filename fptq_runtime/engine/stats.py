"""Plain numbers the engine emits after every step; whoever publishes them is elsewhere."""

from __future__ import annotations

from dataclasses import dataclass, field

from fptq_runtime.engine.speculation import DraftStats


@dataclass(frozen=True)
class FinishedStats:
    """How a sequence ended. end_to_end_seconds: since its arrival. prefill_seconds: from when it was first scheduled to
    its first token; decode_seconds: from there to its last; None of what had not come to its first token."""

    reason: str
    end_to_end_seconds: float
    prompt_tokens: int
    generated_tokens: int
    prefill_seconds: float | None = None
    decode_seconds: float | None = None


@dataclass
class StepStats:
    """One step. Requests with n > 1 count as n sequences everywhere."""

    num_running: int = 0
    num_waiting: int = 0
    kv_usage: float = 0.0  # 0..1
    batch_tokens: int = 0
    step_seconds: float = 0.0
    prompt_tokens: int = 0  # computed this step for the first time, cached ones excluded
    recomputed_tokens: int = 0  # of prompts and answers, whose keys and values a preemption threw away
    generated_tokens: int = 0
    saved_tokens: float = 0.0  # that answers given up would have gone on for, as long as answers are of late
    drafts: dict[str, DraftStats] = field(default_factory=dict)  # by kind
    preemptions: int = 0
    prefix_query_tokens: int = 0
    prefix_hit_tokens: int = 0
    prefix_disk_tokens: int = 0  # of those
    queue_seconds: list[float] = field(default_factory=list)  # of sequences first scheduled in this step
    time_to_first_token: list[float] = field(default_factory=list)
    inter_token_seconds: list[float] = field(default_factory=list)
    finished: list[FinishedStats] = field(default_factory=list)

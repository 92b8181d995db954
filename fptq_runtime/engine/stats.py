"""Plain numbers the engine emits after every step; whoever publishes them is elsewhere."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class FinishedStats:
    """Seconds on the monotonic clock. queue: arrival to first scheduled; None where that moment never came."""

    reason: str
    num_prompt_tokens: int
    num_output_tokens: int
    queue_seconds: float | None
    time_to_first_token: float | None
    end_to_end_seconds: float


@dataclass
class StepStats:
    """One step. Requests with n > 1 count as n sequences everywhere."""

    num_running: int = 0
    num_waiting: int = 0
    kv_usage: float = 0.0  # 0..1
    batch_tokens: int = 0
    step_seconds: float = 0.0
    prompt_tokens: int = 0  # computed this step, cached ones excluded
    generated_tokens: int = 0
    preemptions: int = 0
    prefix_query_tokens: int = 0
    prefix_hit_tokens: int = 0
    queue_seconds: list[float] = field(default_factory=list)  # of sequences first scheduled in this step
    time_to_first_token: list[float] = field(default_factory=list)
    inter_token_seconds: list[float] = field(default_factory=list)
    finished: list[FinishedStats] = field(default_factory=list)

"""How many replicas a load needs: a fleet of the engine's own schedulers and block managers under a recorded trace, on
a clock that moves by what `fptq bench` measured that such steps take.

The assumptions: a step takes what its rows and what these attend to take; nothing is guessed, and nothing refused, so
that what a server would refuse waits here and breaks the objective; HTTP, tokenizing and text cost each token the same;
every answer is as long as the trace says; no replica fails.
"""

from __future__ import annotations

import csv
import datetime
import heapq
import json
import math
import random
import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from fptq_runtime.analysis.plots import STYLE, lines, svg
from fptq_runtime.config import EngineConfig
from fptq_runtime.engine.admission import Forecast
from fptq_runtime.engine.block_manager import BlockManager
from fptq_runtime.engine.request import SamplingParams
from fptq_runtime.engine.scheduler import Scheduler, SchedulerOutput
from fptq_runtime.engine.sequence import Sequence as Running
from fptq_runtime.engine.sizing import cache_tokens, format_bytes
from fptq_runtime.errors import FptqError

Metric = Literal["ttft", "itl", "e2e"]
METRICS: tuple[Metric, ...] = ("ttft", "itl", "e2e")  # first token, between two tokens, whole answer
Routing = Literal["round-robin", "least-loaded", "prefix"]
ROUTINGS: tuple[Routing, ...] = ("round-robin", "least-loaded", "prefix")
IMBALANCE = 1.5  # times the requests of whoever has fewest: beyond it a cached prefix is not worth waiting for
LOADS = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0)  # times the trace's own pace
TRACE_BLOCK = 512  # tokens that a hash of Mooncake's traces stands for
NIGHT = 1 / 3  # of the day's peak


class Arrival(NamedTuple):
    """A request of a trace. seconds: since its first. blocks: ids of its prompt's parts of TRACE_BLOCK tokens; equal
    ids in front are equal text, and none resembles nobody's."""

    seconds: float
    prompt_tokens: int
    output_tokens: int
    blocks: tuple[int, ...] = ()


@dataclass(frozen=True)
class Objective:
    metric: Metric
    percent: float
    seconds: float

    def __str__(self) -> str:
        return f"{self.metric}_p{self.percent:g}"


@dataclass(frozen=True)
class StepCost:
    """Seconds of a step: of its rows, between those that were measured, of each pair of a token and one that it attends
    to, of prompts and of answers, and of handing out each token that it samples."""

    rows: npt.NDArray[np.float64]
    seconds: npt.NDArray[np.float64]
    prompt_pair: float
    answer_pair: float
    delivery: float = 0.0

    @classmethod
    def fit(cls, profile: Mapping[str, Any]) -> StepCost:
        """profile: what `fptq bench --json` printed. Raises FptqError where it says too little."""
        try:
            most = int(profile["max_num_batched_tokens"])
            measured = [(row["phase"] == "decode", int(row["batch"]), int(row["context"]), float(row["tokens_per_s"]))
                        for row in profile["results"]]
        except (KeyError, TypeError, ValueError) as error:
            raise FptqError(f"the profile is not what `fptq bench --json` prints: {error!r}", "profile") from None
        if {decode for decode, *_ in measured} != {True, False}:
            raise FptqError("the profile has to have both phases, prefill and decode", "profile")

        def steps(decode: bool, batch: int, context: int) -> list[int]:
            if decode:
                return [batch]
            full, rest = divmod(batch * context, most)
            return [most] * full + ([rest] if rest else [])

        knots = sorted({batch if decode else min(batch * context, most) for decode, batch, context, _ in measured})
        unit, equations, times = np.eye(len(knots)), [], []
        for decode, batch, context, rate in measured:
            of_knots = [sum(float(np.interp(rows, knots, one)) for rows in steps(decode, batch, context))
                        for one in unit]
            pairs = batch * context * (1 if decode else context / 2)
            equations.append([*of_knots, pairs * (not decode), pairs * decode])
            times.append((batch if decode else batch * context) / rate)
        a = np.array(equations) / np.array(times)[:, None]  # errors are relative
        x = np.zeros(len(knots) + 2)
        known = list(range(len(knots)))
        for pair in (len(knots), len(knots) + 1):  # costs something where contexts tell, and never less than nothing
            if np.linalg.matrix_rank(a[:, [*known, pair]]) > len(known):
                found = np.linalg.lstsq(a[:, [*known, pair]], np.ones(len(a)), rcond=None)[0]
                known += [pair] if found[-1] > 0 else []
        x[known] = np.linalg.lstsq(a[:, known], np.ones(len(a)), rcond=None)[0]
        return cls(np.array(knots, float), np.maximum.accumulate(np.maximum(x[:-2], 0.0)), max(0.0, x[-2]),
                   max(0.0, x[-1]))

    def __call__(self, plan: SchedulerOutput) -> float:
        rows = prompt = answer = sampled = 0
        for item in plan.scheduled:
            rows += item.num_tokens
            sampled += item.samples
            if item.num_tokens == 1:
                answer += item.start
            else:
                prompt += item.num_tokens * (2 * item.start + item.num_tokens)
        return float(np.interp(rows, self.rows, self.seconds)) + self.prompt_pair * prompt / 2 \
            + self.answer_pair * answer + self.delivery * sampled


@dataclass
class Record:
    """Seconds of each metric, and what else happened; `within` of each objective may be passed."""

    within: dict[Objective, float]
    seconds: dict[Metric, array[float]] = field(default_factory=lambda: {metric: array("d") for metric in METRICS})
    late: dict[Objective, int] = field(default_factory=dict)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    preemptions: int = 0
    most_at_once: int = 0  # requests on one replica

    def add(self, metric: Metric, seconds: float) -> None:
        self.seconds[metric].append(seconds)
        for objective in self.within:
            if objective.metric == metric and seconds > objective.seconds:
                self.late[objective] = self.late.get(objective, 0) + 1

    @property
    def is_broken(self) -> bool:
        """More is late than may be at the end."""
        return any(late > self.within[objective] for objective, late in self.late.items())


class Replica:
    """One engine that computes nothing."""

    def __init__(self, config: EngineConfig, num_blocks: int, cost: StepCost, record: Record) -> None:
        self.config = config
        self.scheduler = Scheduler(BlockManager(num_blocks, config.block_size, config.enable_prefix_caching),
                                   config.max_num_seqs, config.max_num_batched_tokens, max_prompt_logits=1)
        self.unfinished = 0
        self._forecast = Forecast(config.max_num_batched_tokens)
        self._cost = cost
        self._record = record
        self._step: SchedulerOutput | None = None

    @property
    def is_idle(self) -> bool:
        return self._step is None

    def add(self, sequence: Running) -> None:
        self.unfinished += 1
        self._record.most_at_once = max(self._record.most_at_once, self.unfinished)
        self.scheduler.add(sequence)

    def begin(self, now: float) -> float | None:
        """When the next step ends; None where there is nothing to do."""
        if not self.unfinished:
            return None
        self._step = step = self.scheduler.schedule(self.scheduler.budget(self._forecast, self.config.itl_target))
        seconds = self._cost(step)
        self._record.preemptions += len(step.preempted)
        for sequence in step.admitted:
            self._record.prompt_tokens += sequence.num_prompt_tokens
            self._record.cached_tokens += sequence.num_cached_tokens
        self._forecast.observe_step(step.num_tokens, seconds)
        return now + seconds

    def end(self, now: float) -> None:
        assert self._step is not None
        step, self._step, record = self._step, None, self._record
        self.scheduler.update(step, [(0,) if item.samples else () for item in step.scheduled])
        for item in step.scheduled:
            if not item.samples:
                continue
            sequence, record.output_tokens = item.sequence, record.output_tokens + 1
            if sequence.last_token_time is None:
                record.add("ttft", now - sequence.arrival_time)
            else:
                record.add("itl", now - sequence.last_token_time)
            sequence.last_token_time = now
            if sequence.num_output_tokens == sequence.params.max_tokens:
                record.add("e2e", now - sequence.arrival_time)
                self.scheduler.finish(sequence)
                self.unfinished -= 1


class Router:
    """Which replica takes a request, as proxies choose: in turn; whoever has fewest; or whoever had the longest part
    of its prompt last, unless that one has many more than others."""

    def __init__(self, routing: Routing, fleet: Sequence[Replica]) -> None:
        self._routing = routing
        self._fleet = fleet
        self._turn = 0
        self._had: dict[int, int] = {}  # replica by block, which stands for all before it too

    def __call__(self, arrival: Arrival) -> int:
        self._turn = (self._turn + 1) % len(self._fleet)
        if self._routing == "round-robin":
            return self._turn
        order = chain(range(self._turn, len(self._fleet)), range(self._turn))
        chosen = min(order, key=lambda index: self._fleet[index].unfinished)
        if self._routing == "prefix":
            had = next((self._had[block] for block in reversed(arrival.blocks) if block in self._had), chosen)
            if self._fleet[had].unfinished <= IMBALANCE * (self._fleet[chosen].unfinished + 1):
                chosen = had
            self._had.update(dict.fromkeys(arrival.blocks, chosen))
        return chosen


@dataclass(frozen=True)
class Outcome:
    """What a fleet did with a trace. percentiles: by objective, in seconds; of what ran until it was `broken`, if it
    was: then they are at least that. seconds: from the first request to the last token."""

    replicas: int
    routing: Routing
    load: float
    met: bool
    broken: bool
    percentiles: Mapping[str, float]
    seconds: float
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    preemptions: int
    most_at_once: int

    @property
    def tokens_per_s(self) -> float:
        return self.output_tokens / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class Plan:
    """fleets: the smallest that meets the objectives, by routing, or the one that was asked for. loads: that of the
    first routing under multiples of the trace's pace. sample: of so many replicas all else is extrapolated."""

    model: str
    objectives: tuple[Objective, ...]
    requests: int
    refused: int
    fleets: tuple[Outcome, ...]
    loads: tuple[Outcome, ...]
    sample: int | None = None
    cost_per_hour: float | None = None

    def cost_per_million(self, fleet: Outcome) -> float | None:
        """Of tokens read and written."""
        tokens = (fleet.prompt_tokens + fleet.output_tokens) * (fleet.replicas / (self.sample or fleet.replicas))
        if self.cost_per_hour is None or not tokens:
            return None
        return self.cost_per_hour * fleet.replicas * fleet.seconds / 3600 / tokens * 1e6

    @property
    def breaks_at(self) -> float | None:
        return next((one.load for one in self.loads if not one.met), None)

    def to_json(self) -> dict[str, Any]:
        fleets = [{**asdict(one), "tokens_per_s": one.tokens_per_s, "cost_per_million_tokens":
                   self.cost_per_million(one)} for one in self.fleets]
        return {**asdict(self), "fleets": fleets, "breaks_at": self.breaks_at}

    def table(self) -> str:
        limits = {str(each): each.seconds for each in self.objectives}
        lines = [f"{self.model}: {self.requests} requests" + (
            f" and {self.refused} that are refused, empty or longer than the context" if self.refused else "") + (
            f"; {self.sample} replicas stand for all" if self.sample else "")]
        for one in self.fleets:
            cost = self.cost_per_million(one)
            seen = ", ".join(f"{name} {1000 * value:.0f} ms (of {1000 * limits[name]:.0f})"
                             for name, value in one.percentiles.items())
            hits = f", {one.cached_tokens / max(1, one.prompt_tokens):.0%} of prompt tokens cached" \
                if one.cached_tokens else ""
            lines.append(f"{one.replicas} replicas, {one.routing}{'' if one.met else ', which do not meet it'}: {seen}"
                         f"{hits}" + ("" if cost is None else f", {cost:.3f} per million tokens"))
        if len(self.fleets) > 1:
            first, last = self.fleets[0], self.fleets[-1]
            lines.append(f"routing by {last.routing} instead of {first.routing} saves "
                         f"{first.replicas - last.replicas} of {first.replicas} replicas")
        if self.loads:
            lines.append("it holds up to 3 times this load" if self.breaks_at is None else
                         f"it breaks at {self.breaks_at:g} times this load")
        return "\n".join(lines)

    def plot(self) -> str:
        """A standalone SVG: each objective's percentile as a share of its limit, by load; 1 is where it breaks."""
        shares = [(str(each), [min(3.0, one.percentiles[str(each)] / each.seconds) for one in self.loads])
                  for each in self.objectives[:2]]
        drawn = lines([f"{one.load:g}×" for one in self.loads], shares, "of the objective")
        return svg(f"<style>{STYLE}</style>{drawn}", 720, 190)


def parse_slo(text: str) -> tuple[Objective, ...]:
    """As ttft_p99=2s,itl_p99=100ms. Raises FptqError."""
    objectives = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        match = re.fullmatch(r"(ttft|itl|e2e)_p(\d+(?:\.\d+)?)\s*=\s*(\d+(?:\.\d+)?)\s*(ms|s)", part)
        if match is None or not 0 < float(match[2]) < 100:
            raise FptqError(f"{part!r} is not like ttft_p99=2s, itl_p99=100ms or e2e_p95=30s", "slo")
        objectives.append(Objective(next(each for each in METRICS if each == match[1]), float(match[2]),
                                    float(match[3]) / (1000 if match[4] == "ms" else 1)))
    if not objectives:
        raise FptqError("an objective is needed, as ttft_p99=2s", "slo")
    return tuple(objectives)


def read_trace(path: Path) -> list[Arrival]:
    """Azure's CSV (TIMESTAMP, ContextTokens, GeneratedTokens) or Mooncake's JSON lines (timestamp in ms, input_length,
    output_length, hash_ids), in the order of time. Raises FptqError."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            is_json = file.read(1) == "{"
            file.seek(0)
            arrivals = list(_mooncake(file) if is_json else _azure(file))
    except (KeyError, TypeError, ValueError) as error:
        raise FptqError(f"{path} is neither Azure's CSV nor Mooncake's JSON lines: {error!r}", "trace") from None
    if not arrivals:
        raise FptqError(f"{path} has no requests", "trace")
    arrivals.sort(key=lambda each: each.seconds)
    first = arrivals[0].seconds
    return [each._replace(seconds=each.seconds - first) for each in arrivals]


def day(trace: Sequence[Arrival], peak: float, seed: int = 0) -> Iterator[Arrival]:
    """24 hours of requests drawn from a trace, at random times: `peak` a second at noon, a third of it at midnight."""
    generator, now = random.Random(seed), 0.0
    while (now := now + generator.expovariate(peak)) < 86400:
        share = NIGHT + (1 - NIGHT) * (1 - math.cos(2 * math.pi * now / 86400)) / 2
        if generator.random() < share:
            yield generator.choice(trace)._replace(seconds=now)


class Simulator:
    """Replicas of one profile under one trace."""

    def __init__(self, profile: Mapping[str, Any], trace: Iterable[Arrival], objectives: Sequence[Objective], *,
                 max_num_seqs: int = 64, max_model_len: int | None = None, kv_cache_memory: int = 512 << 20,
                 itl_target: float | None = None, delivery: float = 0.0) -> None:
        """delivery: seconds that a token takes beside its step. Raises FptqError where the profile, the trace and the
        limits do not fit each other."""
        self.cost = replace(StepCost.fit(profile), delivery=delivery)
        self.config = config = EngineConfig(
            max_model_len=max_model_len or int(profile["max_model_len"]), max_num_seqs=max_num_seqs,
            max_num_batched_tokens=int(profile["max_num_batched_tokens"]), kv_cache_memory=kv_cache_memory,
            itl_target=itl_target)
        tokens = cache_tokens(int(profile["token_bytes"]), config.block_size, kv_cache_memory)
        if tokens < config.max_model_len:
            raise FptqError(f"a KV cache of {format_bytes(kv_cache_memory)} holds {tokens} tokens, fewer than "
                            f"max_model_len {config.max_model_len}; raise kv_cache_memory or lower max_model_len",
                            "kv_cache_memory", "max_model_len")
        self._num_blocks = tokens // config.block_size
        arrivals = list(trace)
        self.trace = [each for each in arrivals if 0 < each.prompt_tokens < config.max_model_len]
        self.refused = len(arrivals) - len(self.trace)
        if not self.trace:
            raise FptqError(f"no request of the trace is shorter than max_model_len {config.max_model_len}",
                            "max_model_len")
        self.objectives = tuple(objectives)
        outputs = [self._outputs(each) for each in self.trace]
        counts: dict[Metric, int] = {"ttft": len(outputs), "itl": sum(outputs) - len(outputs), "e2e": len(outputs)}
        self._within = {each: (1 - each.percent / 100) * counts[each.metric] for each in objectives}

    def run(self, replicas: int, routing: Routing, load: float = 1.0) -> Outcome:
        """load: times the trace's pace. Stops where an objective can be met no more."""
        record = Record(self._within)
        fleet = [Replica(self.config, self._num_blocks, self.cost, record) for _ in range(replicas)]
        route = Router(routing, fleet)
        ends: list[tuple[float, int]] = []  # of steps; a heap
        now = 0.0
        for number, arrival in enumerate(self.trace):
            at = arrival.seconds / load
            now = max(now, self._advance(fleet, ends, at, record))
            if record.is_broken:
                break
            index = route(arrival)
            fleet[index].add(self._sequence(number, arrival, at))
            if fleet[index].is_idle and (end := fleet[index].begin(at)) is not None:
                heapq.heappush(ends, (end, index))
        now = max(now, self._advance(fleet, ends, math.inf, record))
        percentiles = {str(each): float(np.percentile(seen, each.percent)) if len(seen := record.seconds[each.metric])
                       else 0.0 for each in self.objectives}
        met = all(percentiles[str(each)] <= each.seconds for each in self.objectives) and not record.is_broken
        return Outcome(replicas, routing, load, met, record.is_broken, percentiles, now, record.prompt_tokens,
                       record.cached_tokens, record.output_tokens, record.preemptions, record.most_at_once)

    def smallest(self, routing: Routing) -> Outcome:
        """The smallest fleet that meets the objectives, as far as more replicas are never worse. Raises FptqError where
        none does, as where a request alone takes too long."""
        low, best = 0, self.run(1, routing)
        while not best.met:
            if (best.most_at_once == 1 and not best.broken) or best.replicas > len(self.trace):
                raise FptqError(self._hopeless(best), "slo")
            low, best = best.replicas, self.run(2 * best.replicas, routing)
        while best.replicas - low > 1:
            middle = self.run((low + best.replicas) // 2, routing)
            if middle.met:
                best = middle
            else:
                low = middle.replicas
        return best

    def _hopeless(self, outcome: Outcome) -> str:
        missed = ", ".join(f"{each} is {1000 * outcome.percentiles[str(each)]:.0f} ms or more"
                           for each in self.objectives if outcome.percentiles[str(each)] > each.seconds)
        return f"no fleet meets it: with {outcome.replicas} replicas, {missed}; a faster machine, a lower itl_target " \
               "or a wider objective would"

    @staticmethod
    def _advance(fleet: Sequence[Replica], ends: list[tuple[float, int]], until: float, record: Record) -> float:
        """Let steps end, and others begin, until then. When the last one ended."""
        now = 0.0
        while ends and ends[0][0] <= until and not record.is_broken:
            now, index = ends[0]
            fleet[index].end(now)
            end = fleet[index].begin(now)
            if end is None:
                heapq.heappop(ends)
            else:
                heapq.heapreplace(ends, (end, index))
        return now

    def _outputs(self, arrival: Arrival) -> int:
        return min(max(1, arrival.output_tokens), self.config.max_model_len - arrival.prompt_tokens)

    def _sequence(self, number: int, arrival: Arrival, at: float) -> Running:
        """Each token is its block's id, so that prompts are equal where the trace says so."""
        if arrival.blocks:
            tokens = array("i", chain.from_iterable([block] * TRACE_BLOCK for block in arrival.blocks))
            del tokens[arrival.prompt_tokens :]
        else:
            tokens = array("i", [number]) * arrival.prompt_tokens
        params = SamplingParams(max_tokens=self._outputs(arrival), ignore_eos=True)
        return Running(str(number), 0, tokens, params, 0, at)


def plan(profile: Mapping[str, Any], trace: Sequence[Arrival], objectives: Sequence[Objective], *,
         replicas: int | None = None, routings: Sequence[Routing] = (), sample: int | None = None,
         peak: float | None = None, cost_per_hour: float | None = None,
         on_run: Callable[[Outcome], None] = lambda outcome: None, **limits: Any) -> Plan:
    """replicas: that many instead of the fewest. routings: unless given, in turn, and by prefix where the trace tells
    of any. sample: simulate only so many of the replicas, with their share of the requests. peak: a `day` instead of
    the trace's own times. Raises FptqError."""
    if sample is not None and (replicas is None or not 1 <= sample <= replicas):
        raise FptqError("sample is a part of the replicas; give them too", "sample", "replicas")
    share = 1.0 if sample is None or replicas is None else sample / replicas
    requests: Iterable[Arrival] = trace
    if peak is not None:
        requests = day(trace, peak * share)
    elif share < 1:
        generator = random.Random(0)
        requests = [each for each in trace if generator.random() < share]
    simulator = Simulator(profile, requests, objectives, **limits)
    chosen = tuple(routings) or (("round-robin", "prefix") if any(each.blocks for each in trace) else ("round-robin",))
    fleets, loads = [], []
    for routing in chosen:
        outcome = simulator.smallest(routing) if replicas is None else simulator.run(sample or replicas, routing)
        on_run(outcome)
        fleets.append(outcome if sample is None else replace(outcome, replicas=replicas or sample))
    for load in LOADS if peak is None else ():
        outcome = simulator.run(sample or fleets[0].replicas, chosen[0], load)
        on_run(outcome)
        loads.append(outcome)
    return Plan(str(profile.get("model", "")), simulator.objectives, len(simulator.trace), simulator.refused,
                tuple(fleets), tuple(loads), sample, cost_per_hour)


def _azure(lines: Iterable[str]) -> Iterator[Arrival]:
    for row in csv.DictReader(lines):
        stamp, _, fraction = row["TIMESTAMP"].partition(".")
        moment = datetime.datetime.fromisoformat(stamp).replace(tzinfo=datetime.timezone.utc)
        yield Arrival(moment.timestamp() + float(f"0.{fraction or 0}"), int(row["ContextTokens"]),
                      int(row["GeneratedTokens"]))


def _mooncake(lines: Iterable[str]) -> Iterator[Arrival]:
    for line in filter(str.strip, lines):
        row = json.loads(line)
        blocks, length = tuple(row["hash_ids"]), int(row["input_length"])
        if len(blocks) * TRACE_BLOCK < length:
            raise ValueError(f"{len(blocks)} hash_ids are too few for {length} tokens")
        yield Arrival(row["timestamp"] / 1000, length, int(row["output_length"]), blocks)

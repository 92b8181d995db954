"""What structured output takes of real schemas, whether its answers hold, and what it costs.

    python -m benchmarks.structured MODEL SCHEMAS [--per-kind 40] [--out benchmarks/results/structured-NAME]

SCHEMAS is a directory with a directory of .json files for each kind of schema, such as JSONSchemaBench's `data`. The
same schemas are drawn every time. Writes OUT.json and OUT.md: how many are accepted; of the accepted, how many answers
of the model, greedy and shown the schema, end within 400 tokens, and how many are closed there; how many of both
jsonschema-rs finds invalid; the same with random logits that like to close what is open, for which no schema means
anything; how long a mask takes; and tokens a second of a full batch without and with a grammar.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any
from unittest import mock

import jsonschema_rs
import numpy as np
import numpy.typing as npt

from fptq_runtime.engine.engine import Engine
from fptq_runtime.engine.grammar import Grammar, GrammarError, Matcher
from fptq_runtime.engine.llm import load_engine
from fptq_runtime.engine.request import FinishReason, SamplingParams
from fptq_runtime.kernels.base import StepInput
from fptq_runtime.models.chat_template import ChatTemplateError
from fptq_runtime.models.tokenizer import Tokenizer

SHOWN = 1200  # characters of a schema that the model sees
BATCH = 32


@dataclass
class Schema:
    kind: str
    name: str
    schema: Any


@dataclass
class Answers:
    """ended: within max_tokens. closed: whole JSON, but said to be of max_tokens. failed: the engine gave up. invalid:
    schema and what is wrong."""

    asked: int = 0
    ended: int = 0
    closed: int = 0
    failed: int = 0
    invalid: list[str] = field(default_factory=list)
    masks: int = 0
    mask_ms: dict[str, float] = field(default_factory=dict)


def draw(directory: Path, per_kind: int) -> list[Schema]:
    drawn = []
    for kind in sorted(path for path in directory.iterdir() if path.is_dir()):
        files = sorted(kind.glob("*.json"))
        random.Random(0).shuffle(files)
        drawn += [Schema(kind.name, file.name, json.loads(file.read_text())) for file in files[:per_kind]]
    return drawn


def accepted(engine: Engine[Tokenizer], schemas: list[Schema]) -> tuple[list[Schema], dict[str, Any]]:
    taken: list[Schema] = []
    refused: Counter[str] = Counter()
    seconds = []
    for each in schemas:
        started = time.perf_counter()
        try:
            engine.grammars.parser(Grammar.json_schema(each.schema))
            taken.append(each)
        except GrammarError as error:
            where, found, why = str(error).partition(" cannot be enforced: ")
            circular = "a circular reference" if why.startswith("circular") else None
            refused[circular or (where.rpartition("/")[2] if found else str(error)[:60])] += 1
        seconds.append(time.perf_counter() - started)
    by_kind = {kind: [sum(s.kind == kind for s in part) for part in (taken, schemas)]
               for kind in dict.fromkeys(s.kind for s in schemas)}
    return taken, {"schemas": len(schemas), "accepted": len(taken), "by_kind": by_kind,
                   "refused_for": dict(refused.most_common()), "compile_ms": quantiles(seconds)}


def prompt(tokenizer: Tokenizer, schema: Any) -> list[int]:
    text = f"Write a short example as JSON, on one line, of this schema:\n{json.dumps(schema)[:SHOWN]}"
    try:
        return tokenizer.apply_chat_template([{"role": "user", "content": text}])
    except ChatTemplateError:
        return tokenizer.encode(text + "\n")


def ask(engine: Engine[Tokenizer], schemas: list[Schema], max_tokens: int, **params: Any) -> Answers:
    """All of them, a full batch at a time."""
    answers, seconds, waiting = Answers(), list[float](), list(enumerate(schemas))
    texts: dict[str, list[str]] = {}
    with timed(Matcher, "fill", seconds):
        while waiting or engine.has_unfinished_requests:
            while waiting and engine.num_running + engine.num_waiting < BATCH:
                index, each = waiting.pop(0)
                room = engine.config.max_model_len - max_tokens
                engine.add_request(str(index), prompt(engine.tokenizer, each.schema)[-room:], SamplingParams(
                    max_tokens=max_tokens, seed=index, structured=Grammar.json_schema(each.schema), **params))
            for output in engine.step()[0]:
                texts.setdefault(output.request_id, []).append(output.text)
                if output.finish_reason is not None:
                    judge(answers, schemas[int(output.request_id)], "".join(texts[output.request_id]),
                          output.finish_reason)
    answers.masks, answers.mask_ms = len(seconds), quantiles(seconds)
    return answers


def judge(answers: Answers, schema: Schema, text: str, reason: FinishReason) -> None:
    answers.asked += 1
    answers.ended += reason is FinishReason.STOP
    answers.failed += reason is FinishReason.ERROR
    if reason is FinishReason.ERROR:
        return
    try:
        value = json.loads(text, parse_float=number)
    except ValueError as error:
        if reason is FinishReason.STOP:
            answers.invalid.append(f"{schema.kind}/{schema.name}: {error}: {text}")
        return
    answers.closed += reason is FinishReason.LENGTH
    try:
        jsonschema_rs.validator_for(schema.schema, validate_formats=True).validate(value)
    except (ValueError, jsonschema_rs.ValidationError) as error:
        answers.invalid.append(f"{schema.kind}/{schema.name}: {str(error)[:200]}: {text}")


def number(text: str) -> Decimal:
    try:
        return Decimal(text)
    except InvalidOperation:  # an exponent of too many digits
        return Decimal("1e9999")


class Noise:
    """An executor that computes nothing: its logits are random."""

    seconds: dict[str, float] = {}  # noqa: RUF012

    def __init__(self, vocab_size: int) -> None:
        self._generator = np.random.default_rng(0)
        self._vocab_size = vocab_size

    def step(self, batch: StepInput, reuse: bool = False, sampled: Any = None) -> npt.NDArray[np.float32]:
        return 3 * self._generator.standard_normal((batch.logits_rows.size, self._vocab_size), dtype=np.float32)


def closers(tokenizer: Tokenizer, vocab_size: int, eos: int) -> dict[int, float]:
    short = [token_id for token_id in range(min(vocab_size, tokenizer.vocab_size))
             if len(raw := tokenizer.token_bytes(token_id)) <= 3 and any(c in raw for c in b'"}]')]
    return {**dict.fromkeys(short, 12.0), eos: 12.0}


def speed(engine: Engine[Tokenizer], tokens: int, rounds: int = 5) -> dict[str, Any]:
    """Tokens a second of BATCH sequences without and with a grammar, by turns, of greedy answers that do not end."""
    schema = {"type": "array", "items": {"type": "object", "properties": {"name": {"type": "string"},
              "age": {"type": "integer"}}, "required": ["name", "age"]}, "minItems": 1000}
    texts = [prompt(engine.tokenizer, [schema, i]) for i in range(BATCH)]
    forms: dict[str, dict[str, Any]] = {"free": {"ignore_eos": True},
                                        "structured": {"structured": Grammar.json_schema(schema)}}
    rates: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(rounds):
        for name, form in forms.items():
            for i, ids in enumerate(texts):
                engine.add_request(str(i), ids, SamplingParams(max_tokens=tokens, temperature=0, **form))
            while engine.num_waiting or any(s.num_output_tokens == 0 for s in engine._live.values()):
                engine.step()
            before = sum(s.num_output_tokens for s in engine._live.values())
            started = time.perf_counter()
            while engine.has_unfinished_requests:
                engine.step()
            rates[name].append((BATCH * tokens - before) / (time.perf_counter() - started))
    costs = [1 - b / a for a, b in zip(*rates.values(), strict=True)]
    return {"tokens_per_s": {name: statistics.median(values) for name, values in rates.items()},
            "cost": statistics.median(costs), "costs": costs}


@contextmanager
def timed(owner: type, name: str, seconds: list[float]) -> Iterator[None]:
    function: Callable[..., Any] = getattr(owner, name)

    def call(*arguments: Any) -> Any:
        started = time.perf_counter()
        try:
            return function(*arguments)
        finally:
            seconds.append(time.perf_counter() - started)

    with mock.patch.object(owner, name, call):
        yield


def quantiles(seconds: list[float]) -> dict[str, float]:
    """In milliseconds."""
    values = 1e3 * np.array(seconds)
    return {name: round(float(np.quantile(values, q)), 4)
            for name, q in (("p50", 0.5), ("p99", 0.99), ("p99.9", 0.999), ("max", 1))}


def report(results: dict[str, Any]) -> str:
    lines = [f"# Structured output, {results['name']}", "", results["command"] + f" on {results['machine']}.", "",
             f"Of {results['schemas']} schemas {results['accepted']} are accepted "
             f"({results['accepted'] / results['schemas']:.1%}); the others are refused by name.", "",
             "| kind | accepted | of |", "|---|---:|---:|"]
    lines += [f"| {kind} | {taken} | {of} |" for kind, (taken, of) in results["by_kind"].items()]
    lines += ["", "Refused for: " + ", ".join(f"{name} ({n})" for name, n in results["refused_for"].items()) + ".", "",
              "| answers of | asked | ended in 400 tokens | closed there | invalid | failed | masks | p50 ms | p99 ms "
              "| p99.9 ms |", "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|"]
    for name, title in (("model", "the model, greedy"), ("noise", "random logits")):
        a = results[name]
        ms = " | ".join(f"{a['mask_ms'][q]:.3f}" for q in ("p50", "p99", "p99.9"))
        lines.append(f"| {title} | {a['asked']} | {a['ended']} ({a['ended'] / a['asked']:.0%}) "
                     f"| {a['closed']} ({a['closed'] / a['asked']:.0%}) | {len(a['invalid'])} "
                     f"| {a['failed']} | {a['masks']} | {ms} |")
    compile_ms = results["compile_ms"]
    lines += ["", f"Compiling a schema, or finding what it is refused for: p50 {compile_ms['p50']:.1f} ms, "
                  f"p99 {compile_ms['p99']:.1f} ms."]
    if results["speed"]:
        rates = results["speed"]["tokens_per_s"]
        lines += ["", f"At batch {BATCH} {rates['free']:.0f} tokens/s without and {rates['structured']:.0f} with a "
                      f"grammar; the median of {len(results['speed']['costs'])} pairs is "
                      f"{results['speed']['cost']:.1%} less."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("schemas", type=Path)
    parser.add_argument("--per-kind", type=int, default=40)
    parser.add_argument("--answers-per-kind", type=int, help="of the accepted, so many are put to the model; else all")
    parser.add_argument("--max-tokens", type=int, default=400)
    parser.add_argument("--speed-tokens", type=int, default=96, help="0: no speed is measured")
    parser.add_argument("--out", type=Path, required=True, help="without a suffix")
    arguments = parser.parse_args()
    engine = load_engine(arguments.model, max_num_seqs=BATCH)
    vocab_size, name = engine.model_config.vocab_size, arguments.model.name
    taken, results = accepted(engine, draw(arguments.schemas, arguments.per_kind))
    results |= {"name": name, "vocab_size": vocab_size, "machine": platform.processor() or platform.machine(),
                "command": f"`python -m benchmarks.structured {name} SCHEMAS --per-kind {arguments.per_kind}`",
                "speed": speed(engine, arguments.speed_tokens) if arguments.speed_tokens else None}
    bias = closers(engine.tokenizer, vocab_size, min(engine._eos_token_ids))
    with mock.patch.object(engine, "_executor", Noise(vocab_size)):
        results["noise"] = asdict(ask(engine, taken, arguments.max_tokens, logit_bias=bias))
    kinds = dict.fromkeys(each.kind for each in taken)
    put = [each for kind in kinds for each in [s for s in taken if s.kind == kind][: arguments.answers_per_kind]]
    results["model"] = asdict(ask(engine, put, arguments.max_tokens, temperature=0.0))
    arguments.out.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
    arguments.out.with_suffix(".md").write_text(report(results))
    print(report(results))


if __name__ == "__main__":
    main()

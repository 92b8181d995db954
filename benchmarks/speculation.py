"""What speculation is worth: the same requests with and without it, in turn, and whether the answers are the same.

    python -m benchmarks.speculation MODEL [--isa avx2] [--rounds 5] [--out benchmarks/results/speculation-NAME-ISA]

Copy-heavy work (write a file again with a name changed, with and without a prediction; answer from a passage; fill a
JSON schema) and text that cannot be guessed, at batch 1 and 8, with MODEL's own chat template and greedy, except for
the last, which is drawn. Prompts are in the prefix cache beforehand, so that this is decoding, and the clock runs as
long as a batch is full. Writes OUT.json and OUT.md: the median ratio of tokens a second, round by round; the bound,
which is what a step with as many rows as were drafted would leave, were it to cost what the kernels alone take; and
tokens and log-probabilities that differ.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import statistics
import time
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from fptq_runtime.engine import admission, block_manager, output, scheduler, sequence, speculation, stats
from fptq_runtime.engine.engine import Engine
from fptq_runtime.engine.grammar import Grammar
from fptq_runtime.engine.llm import load_engine
from fptq_runtime.engine.output import TokenLogprobs
from fptq_runtime.engine.request import Origin, SamplingParams
from fptq_runtime.kernels.base import StepInput

MAX_TOKENS = 200
CONTEXT = 600  # tokens, of the steps that the bound is measured with
FILES = (admission.Forecast, block_manager.BlockManager, output.TextStream, scheduler.Scheduler, sequence.Sequence,
         speculation.StepCost, speculation.SuffixIndex, stats.StepStats)
PEOPLE = ("Ada Marlowe", "Tobias Kern", "Ines Valdez", "Ruth Okafor", "Jonas Lindqvist", "Mei Tanaka", "Paul Dubois",
          "Clara Whitfield")
SCHEMA = {"type": "object", "additionalProperties": False, "properties": {
    "customer_name": {"type": "string", "maxLength": 40}, "delivery_address": {"type": "string", "maxLength": 60},
    "order_reference_number": {"type": "integer"},
    "items": {"type": "array", "minItems": 2, "maxItems": 3, "items": {
        "type": "object", "additionalProperties": False, "properties": {
            "product_description": {"type": "string", "maxLength": 40}, "unit_price_in_cents": {"type": "integer"},
            "quantity_ordered": {"type": "integer"}},
        "required": ["product_description", "unit_price_in_cents", "quantity_ordered"]}},
    "requires_signature": {"type": "boolean"}}}
SCHEMA["required"] = list(SCHEMA["properties"])  # type: ignore[call-overload]


@dataclass
class Run:
    """Of one batch of requests through one engine."""

    seconds: float
    steps: int
    rows: int
    tokens: int
    drafted: Counter[str]
    accepted: Counter[str]
    answers: dict[str, list[tuple[int, tuple[TokenLogprobs, ...]]]]

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


@dataclass
class Row:
    work: str
    batch: int
    plain: float  # tokens a second
    speculative: float
    ratio: float  # the median of the rounds
    bound: float
    tokens_per_step: float  # of each sequence
    rows_per_step: float
    drafted: dict[str, int] = field(default_factory=dict)
    accepted: dict[str, int] = field(default_factory=dict)
    compared: int = 0
    different: int = 0


def works(engine: Engine[Any]) -> dict[str, list[tuple[list[int], SamplingParams]]]:
    """Eight requests of each kind of work."""
    tokenizer = engine.tokenizer
    greedy = SamplingParams(max_tokens=MAX_TOKENS, temperature=0, logprobs=0)

    def prompt(text: str, begun: str = "") -> list[int]:
        rendered = tokenizer.apply_chat_template([{"role": "user", "content": text}])
        return [*rendered, *tokenizer.encode(begun, add_special_tokens=False)]

    made: dict[str, list[tuple[list[int], SamplingParams]]] = {
        name: [] for name in ("edit", "edit, predicted", "passage", "json", "unguessable")}
    for kind, person in zip(FILES, PEOPLE, strict=True):
        code = inspect.getsource(kind)[:1400]
        name = kind.__name__
        edit = prompt(f"```python\n{code}\n```\nWrite this file again, with the class renamed to {name}2.",
                      f"```python\nclass {name}2:")
        made["edit"].append((edit, greedy))
        predicted = tokenizer.encode(code.split(":", 1)[1], add_special_tokens=False)
        made["edit, predicted"].append((edit, replace(greedy, prediction=tuple(predicted))))
        passage = f"{person} keeps a small lighthouse on the western shore. {inspect.cleandoc(kind.__doc__ or '')} " \
                  f"Every evening {person} writes down which ships have passed, how high the tide stood and what the " \
                  "wind did, and sends the page to the harbour office, where nobody has ever read one of them."
        made["passage"].append((prompt(f"{passage}\n\nQuote the passage word by word.", 'The passage says: "'),
                                greedy))
        order = f"Please send two lamps at 1950 cents and twelve candles at 89 cents to {person}, 4 Harbour Street, " \
                "Rosmere. The order is number 20931. Nobody needs to sign for it."
        made["json"].append((prompt(f"{order}\nWrite this order as JSON by this schema: {json.dumps(SCHEMA)}"),
                             replace(greedy, structured=Grammar.json_schema(SCHEMA))))
        made["unguessable"].append((prompt(f"Tell a strange story about {person} and a {name}."),
                                    replace(greedy, temperature=1.0, seed=len(made["json"]), ignore_eos=True)))
    return made


def run(engine: Engine[Any], requests: list[tuple[list[int], SamplingParams]], batch: int, name: str) -> Run:
    """So many at a time, until fewer are left. Each has a tenant of its own, so that none is guessed from another."""
    for i, (prompt, params) in enumerate(requests):
        engine.add_request(str(i), prompt, replace(params, max_tokens=1, structured=None, prediction=()),
                           Origin(f"{name} {i}"))
    while engine.has_unfinished_requests:
        engine.step()
    result = Run(0.0, 0, 0, 0, Counter(), Counter(), {})
    sent, unfinished = 0, 0
    started = time.perf_counter()
    while sent < len(requests) or unfinished:
        while unfinished < batch and sent < len(requests):
            engine.add_request(str(sent), *requests[sent], Origin(f"{name} {sent}"))
            sent, unfinished = sent + 1, unfinished + 1
        full = unfinished == batch
        outputs, step = engine.step()
        for event in outputs:
            result.answers.setdefault(event.request_id, []).extend((each, event.logprobs) for each in event.token_ids)
            unfinished -= event.finish_reason is not None
        if full:
            result.steps += 1
            result.rows += step.batch_tokens
            result.tokens += sum(len(event.token_ids) for event in outputs)
            for kind, draft in step.drafts.items():
                result.drafted[kind] += draft.drafted
                result.accepted[kind] += draft.accepted
            result.seconds = time.perf_counter() - started
    return result


class Kernels:
    """Seconds that the executor alone takes for a step of some sequences and rows, measured when asked for."""

    def __init__(self, engine: Engine[Any]) -> None:
        self._engine = engine
        self._seconds: dict[tuple[int, int], float] = {}

    def seconds(self, sequences: int, rows: float) -> float:
        """rows of all together; between two whole numbers in proportion."""
        each = max(1.0, rows / sequences)
        low, share = int(each), each % 1
        return (1 - share) * self._of(sequences, low) + share * self._of(sequences, low + 1)

    def _of(self, sequences: int, each: int) -> float:
        if (sequences, each) not in self._seconds:
            batch = StepInput.whole([[7] * CONTEXT] * sequences, self._engine.config.block_size)
            at = np.concatenate([np.arange((s + 1) * CONTEXT - each, (s + 1) * CONTEXT) for s in range(sequences)])
            step = replace(
                batch, token_ids=batch.token_ids[at], positions=batch.positions[at],
                slot_mapping=batch.slot_mapping[at], logits_rows=np.arange(at.size, dtype=np.int32),
                query_start_loc=np.arange(0, at.size + 1, each, dtype=np.int32))
            times = []
            for _ in range(9):
                started = time.perf_counter()
                self._engine.executor.step(step, reuse=True)
                times.append(time.perf_counter() - started)
            self._seconds[sequences, each] = statistics.median(times)
        return self._seconds[sequences, each]


def measure(plain: Engine[Any], speculative: Engine[Any], work: str, requests: list[tuple[list[int], SamplingParams]],
            batch: int, rounds: int, kernels: Kernels) -> Row:
    ratios, runs = [], []
    for number in range(rounds):
        chosen = [requests[(number + i) % len(requests)] for i in range(3 if batch == 1 else 2 * batch)]
        pair = {}
        for name, engine in (("plain", plain), ("speculative", speculative))[:: 1 if number % 2 else -1]:
            pair[name] = run(engine, chosen, batch, f"{work} {batch} {number}")
        ratios.append(pair["speculative"].rate / pair["plain"].rate)
        runs.append(pair)
    of = {name: [pair[name] for pair in runs] for name in ("plain", "speculative")}
    steps = sum(each.steps for each in of["speculative"])
    rows = sum(each.rows for each in of["speculative"]) / steps
    gain = sum(each.tokens for each in of["speculative"]) / steps / batch
    bound = gain * kernels.seconds(batch, batch) / kernels.seconds(batch, max(batch, rows))
    compared = [(one, other) for pair in runs for i in pair["plain"].answers
                for one, other in zip(pair["plain"].answers[i], pair["speculative"].answers[i], strict=True)]
    return Row(
        work, batch, statistics.median(each.rate for each in of["plain"]),
        statistics.median(each.rate for each in of["speculative"]), statistics.median(ratios), bound, gain, rows,
        dict(sum((each.drafted for each in of["speculative"]), Counter())),
        dict(sum((each.accepted for each in of["speculative"]), Counter())),
        len(compared), sum(one != other for one, other in compared),
    )


def report(results: dict[str, Any]) -> str:
    lines = [f"# Speculation, {results['name']}, {results['isa']}", "", results["command"], "",
             f"{results['kernels']}. Medians of {results['rounds']} rounds; the bound is tokens a step over what its "
             "rows cost the kernels.", "",
             "| work | batch | plain tok/s | speculative | ratio | bound | tokens a step | rows | accepted | differ |",
             "|---|---|---|---|---|---|---|---|---|---|"]
    for row in results["rows"]:
        drafted, accepted = sum(row["drafted"].values()), sum(row["accepted"].values())
        lines.append(f"| {row['work']} | {row['batch']} | {row['plain']:.0f} | {row['speculative']:.0f} "
                     f"| **{row['ratio']:.2f}** | {row['bound']:.2f} | {row['tokens_per_step']:.2f} "
                     f"| {row['rows_per_step']:.1f} | {accepted} of {drafted} "
                     f"| {row['different']} of {row['compared']} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--isa", help="FPTQ_ISA; the best that this CPU has unless given")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--work", nargs="+")
    parser.add_argument("--out", type=Path, help="without a suffix")
    arguments = parser.parse_args()
    if arguments.isa:
        os.environ["FPTQ_ISA"] = arguments.isa
    plain = load_engine(arguments.model, speculation=False)
    speculative = load_engine(arguments.model)
    kernels, rows = Kernels(plain), []
    described = plain.backend.describe()
    for work, requests in works(plain).items():
        if arguments.work and work not in arguments.work:
            continue
        for batch in arguments.batch:
            rows.append(measure(plain, speculative, work, requests, batch, arguments.rounds, kernels))
            print(json.dumps(asdict(rows[-1])), flush=True)
    name = arguments.model.resolve().name
    results = {
        "name": name, "isa": described["isa"], "rounds": arguments.rounds,
        "command": f"`python -m benchmarks.speculation {name} --isa {described['isa']} --rounds {arguments.rounds}`",
        "kernels": ", ".join(f"{key} {described[key]}" for key in ("backend", "threads", "isa")),
        "rows": [asdict(row) for row in rows],
    }
    print(report(results))
    if arguments.out is not None:
        arguments.out.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
        arguments.out.with_suffix(".md").write_text(report(results))


if __name__ == "__main__":
    main()

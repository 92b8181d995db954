"""A server under real traffic, too much of it, and clients that go: what it loses, and whether it keeps its promises.

    python -m benchmarks.soak [--minutes 20] [--trace DIR] [--out benchmarks/results/soak] [--write docs/operate.md]

Starts `fptq serve demo` (or --model) and asks, in turn: a pool of greedy requests one by one (what each must give); the
mix in a closed loop, which finds the capacity; the mix at 1.5 times that for --minutes; at 3 times for a fifth of that,
at least 20 s, for the queue fills in the first of them;
--cancels requests whose clients go at random moments; and the pool again. The mix has streams and whole answers,
completions, chats, JSON schemas, samples and clients that leave; its lengths are those of the Azure traces in --trace,
by --scale shorter, or a few of theirs that stand here. Client and server share the machine. Writes OUT.json, and into
the page the table; ends with 1 where a row of it does not hold.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import json
import os
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any

import uvloop
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.load import percentile
from fptq_runtime import __version__

TRACES = Path("../shared/data/azure_llm_trace")
# The middle of each tenth of the conversations' prompts and of their answers; which goes with which is made up.
TYPICAL = [(181, 217), (372, 67), (396, 113), (414, 451), (984, 41), (1045, 151), (1097, 411), (1189, 85), (1877, 96),
           (4083, 395)]
POOL = 200  # greedy requests whose answers are known
HUNG = 150.0  # seconds after which an answer is given up for lost
CACHE = "32MiB"  # which is all written to, and so resident, before memory is watched
IN_FLIGHT = 64  # requests of the closed loop, as many as a step takes
SCHEMA = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 12}, "age": {"type": "integer"}},
          "required": ["name", "age"], "additionalProperties": False}


@dataclass
class Request:
    path: str
    body: dict[str, Any]
    expected: str | None = None  # the answer, where only one is right
    leaves: float | None = None  # seconds after which the client goes


@dataclass
class Answer:
    """Seconds. tokens: how many came, and when. error: what no server should give."""

    status: int = 0
    text: str = ""
    tokens: list[tuple[float, int]] = field(default_factory=list)
    first_token: float | None = None
    between: list[float] = field(default_factory=list)
    retry_after: str | None = None
    finished: bool = False
    error: str | None = None


class Cores:
    """How many the client, the server, and the server's event loop took since this was made; and of how many the loop
    was kept by others on the machine, the engine's threads among them."""

    def __init__(self, served: Served) -> None:
        self._served = served
        self._began, self._before = time.perf_counter(), self._seconds()

    def taken(self) -> dict[str, float]:
        elapsed = time.perf_counter() - self._began
        took = [round((now - before) / elapsed, 2) for now, before in zip(self._seconds(), self._before, strict=True)]
        return dict(zip(("client", "server", "server_loop", "server_loop_waits"), took, strict=True))

    def _seconds(self) -> tuple[float, ...]:
        return time.process_time(), *self._served.cpu_seconds()


@dataclass
class Tally:
    """Of one phase, in which requests were sent from begin to end. Tokens and answers are counted as they come once a
    sixth of it is over: whatever ramps up or down is left out, and of what began before as much comes in as is left
    behind."""

    begin: float
    end: float
    cores: dict[str, float] = field(default_factory=dict)
    sent: int = 0
    finished: int = 0
    left: int = 0
    refused: int = 0
    wrong: int = 0
    greedy: int = 0
    hung: int = 0
    tokens: int = 0
    served: int = 0
    errors: list[str] = field(default_factory=list)
    first_token: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    retries: list[tuple[float, float]] = field(default_factory=list)  # promised, and when it was taken

    def add(self, request: Request, answer: Answer) -> None:
        self.sent += 1
        self.tokens += sum(tokens for at, tokens in answer.tokens if self.counts(at))
        self.served += bool(answer.tokens) and self.counts(answer.tokens[-1][0])
        self.between += answer.between
        if answer.first_token is not None and request.body["stream"]:
            self.first_token.append(answer.first_token)
        if answer.error is not None:
            self.errors.append(answer.error)
        elif answer.status == 429:
            self.refused += 1
            if answer.retry_after is None or not answer.retry_after.isdecimal() or int(answer.retry_after) < 1:
                self.errors.append(f"429 with Retry-After {answer.retry_after}")
        elif answer.finished:
            self.finished += 1
            if request.expected is not None:
                self.greedy += 1
                self.wrong += answer.text != request.expected
        else:
            self.left += 1

    @property
    def seconds(self) -> float:
        return self.end - self.begin

    def counts(self, at: float) -> bool:
        return self.begin + self.seconds / 6 <= at <= self.end

    def rate(self, counted: int) -> float:
        """A second."""
        return counted / (self.seconds * 5 / 6)

    def summary(self, max_wait: float) -> dict[str, Any]:
        right = [0.5 <= promised / max(took, 1.0) <= 2 for promised, took in self.retries]
        return {
            "seconds": round(self.seconds, 1), "cores": self.cores,
            "sent": self.sent, "finished": self.finished, "left": self.left, "refused": self.refused,
            "greedy_finished": self.greedy, "wrong": self.wrong, "hung": self.hung,
            "errors": len(self.errors), "first_errors": self.errors[:5],
            "tokens_per_second": round(self.rate(self.tokens), 1),
            "requests_per_second": round(self.rate(self.served), 2),
            "first_token_p50": _at(self.first_token, 50), "first_token_p99": _at(self.first_token, 99),
            "first_token_in_time": round(statistics.fmean(t <= max_wait for t in self.first_token), 4)
            if self.first_token else None,
            "between_tokens_p50": _at(self.between, 50), "between_tokens_p99": _at(self.between, 99),
            "retries": len(right), "retry_after_right": round(statistics.fmean(right), 3) if right else None,
        }


def _at(values: list[float], percent: float) -> float | None:
    return round(percentile(values, percent), 4) if values else None


class Served:
    """`fptq serve` as a process of its own, on a free port of the loopback interface."""

    def __init__(self, model: str, options: list[str]) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.command = ["fptq", "serve", model, "--port", str(self.port), *options]
        self.process = subprocess.Popen([sys.executable, "-m", "fptq_runtime.cli", *self.command[1:]],
                                        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def resident(self) -> int:
        """Bytes."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.findall(r"VmRSS:\s+(\d+)", status)[0]) << 10

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def cpu_seconds(self) -> tuple[float, float, float]:
        """Of the process, and of its first thread, which has the event loop; and how long that one could have run and
        did not."""
        process = Path(f"/proc/{self.process.pid}")
        user, system = (process / "stat").read_text().rpartition(")")[2].split()[11:13]
        ran, waited, _ = (process / f"task/{self.process.pid}/schedstat").read_text().split()
        return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK"), int(ran) / 1e9, int(waited) / 1e9

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return -9


class Client:
    """A connection a request, and as little else as can be: client and server share the cores."""

    def __init__(self, port: int) -> None:
        self._port = port

    async def get(self, path: str) -> tuple[int, str]:
        async with self._connection() as (reader, writer):
            writer.write(f"GET {path} HTTP/1.1\r\nhost: soak\r\nconnection: close\r\n\r\n".encode())
            head, _, body = (await reader.read()).decode().partition("\r\n\r\n")
            return int(head.split()[1]), body

    async def metric(self, name: str) -> float:
        families = text_string_to_metric_families((await self.get("/metrics"))[1])
        return sum(sample.value for family in families for sample in family.samples if sample.name == name)

    async def send(self, request: Request) -> Answer:
        answer = Answer()
        try:
            await asyncio.wait_for(self._send(request, answer), request.leaves or HUNG)
        except (TimeoutError, asyncio.TimeoutError):
            if request.leaves is None:
                answer.error = "hung"
        except (OSError, ValueError, IndexError, asyncio.IncompleteReadError) as error:
            answer.error = f"{type(error).__name__}: {error}"
        return answer

    async def _send(self, request: Request, answer: Answer) -> None:
        content = json.dumps(request.body).encode()
        began = last = time.perf_counter()
        async with self._connection() as (reader, writer):
            writer.write(f"POST {request.path} HTTP/1.1\r\nhost: soak\r\ncontent-type: application/json\r\n"
                         f"content-length: {len(content)}\r\nconnection: close\r\n\r\n".encode() + content)
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
            answer.status, retry = int(head.split()[1]), re.search(r"(?im)^retry-after: *(.*?)\r?$", head)
            answer.retry_after = None if retry is None else retry[1]
            if answer.status != 200 or not request.body["stream"]:
                body = await reader.read()
                if answer.status == 200:
                    whole = json.loads(body)
                    answer.text, answer.finished = _text(whole["choices"][0]), True
                    answer.tokens.append((time.perf_counter(), whole["usage"]["completion_tokens"]))
                elif answer.status != 429:
                    answer.error = f"{answer.status} {body[:200].decode('utf-8', 'replace')}"
                return
            async for line in reader:
                if line.startswith(b"data: {"):
                    now = time.perf_counter()
                    event = json.loads(line[6:])
                    if "error" in event:
                        answer.error = str(event["error"])
                        return
                    if not event["choices"]:  # the usage: of a chunk's tokens only one was counted
                        answer.tokens.append((now, event["usage"]["completion_tokens"] - len(answer.tokens)))
                        continue
                    piece = _text(event["choices"][0])
                    if not piece and answer.first_token is None:
                        continue  # a chat's first chunk has a role and no token
                    if answer.first_token is None:
                        answer.first_token = now - began
                    else:
                        answer.between.append(now - last)
                    answer.tokens.append((now, 1))
                    last, answer.text = now, answer.text + piece
                elif line.startswith(b"data: [DONE]"):
                    answer.finished = True
            if not answer.finished:
                answer.error = "a stream without its end"

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port, limit=1 << 20)
        try:
            yield reader, writer
        finally:
            writer.close()


def _text(choice: dict[str, Any]) -> str:
    return str(choice.get("text") or (choice.get("message") or choice.get("delta") or {}).get("content") or "")


def lengths(directory: Path, scale: float, context: int) -> tuple[str, list[tuple[int, int]]]:
    """Where they are from, and prompt and answer of each request in tokens, which fit into the context."""
    read = []
    for file in sorted(directory.glob("AzureLLMInferenceTrace_*.csv")):
        with file.open() as opened:
            read += [(row["TIMESTAMP"], int(row["ContextTokens"]), int(row["GeneratedTokens"]))
                     for row in csv.DictReader(opened)]
    pairs = [(prompt, answer) for _, prompt, answer in sorted(read)] or TYPICAL
    scaled = [(max(1, round(prompt / scale)), max(1, round(answer / scale))) for prompt, answer in pairs]
    source = "Azure LLM inference traces 2023" if read else "tenths of the Azure LLM inference traces 2023"
    return source, [(min(prompt, context - 200), min(answer, 150)) for prompt, answer in scaled]


class Mix:
    """What clients ask, drawn from the lengths."""

    def __init__(self, model: str, pairs: list[tuple[int, int]], vocab: int, seed: int) -> None:
        self._model, self._vocab = model, vocab
        self._random = random.Random(seed)
        self._pairs = cycle(pairs)
        self.pool = [self._greedy() for _ in range(POOL)]

    def draw(self) -> Request:
        draw, kind = self._random, self._random.random()
        if kind < 0.5:
            known = draw.choice(self.pool)
            request = Request(known.path, {**known.body, "stream": draw.random() < 0.7}, known.expected)
        elif kind < 0.75:
            request = self._greedy()
            request.body |= {"temperature": 0.8, "top_p": 0.9, "stream": draw.random() < 0.7}
        elif kind < 0.9:
            prompt, answer = next(self._pairs)
            request = Request("/v1/chat/completions", {
                "messages": [{"role": "user", "content": "Tell me of the old clock. " * max(1, prompt // 8)}],
                "max_tokens": answer, "stream": draw.random() < 0.7})
        else:
            request = Request("/v1/chat/completions", {
                "messages": [{"role": "user", "content": f"Who are you, number {draw.randrange(1000)}?"}],
                "max_tokens": 40, "stream": draw.random() < 0.5,
                "response_format": {"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}})
        request.body["model"] = self._model
        if request.body["stream"]:
            request.body["stream_options"] = {"include_usage": True}
        if draw.random() < 0.05:
            request.leaves = draw.uniform(0.01, 3)
        return request

    def leaving(self) -> Request:
        request = self.draw()
        request.leaves = self._random.choice((0.01, 0.2, 2.0)) * self._random.random()
        return request

    def gaps(self, rate: float) -> Iterator[float]:
        while True:
            yield self._random.expovariate(rate)

    def _greedy(self) -> Request:
        prompt, answer = next(self._pairs)
        return Request("/v1/completions", {
            "model": self._model, "prompt": self._random.choices(range(300, self._vocab), k=prompt),
            "max_tokens": answer, "temperature": 0, "stream": False, "ignore_eos": True})


async def closed(served: Served, draw: Callable[[], Request], seconds: float, count: int = sys.maxsize) -> Tally:
    """As many in flight as a step takes, for so long or so many."""
    client, cores, began = Client(served.port), Cores(served), time.perf_counter()
    tally = Tally(began, began + seconds)

    async def worker() -> None:
        nonlocal count
        while count > 0 and time.perf_counter() < tally.end:
            count -= 1
            request = draw()
            tally.add(request, await client.send(request))
        tally.cores = tally.cores or cores.taken()

    await asyncio.gather(*(worker() for _ in range(IN_FLIGHT)))
    tally.end = min(tally.end, time.perf_counter())
    return tally


async def opened(served: Served, mix: Mix, rate: float, seconds: float) -> Tally:
    """So many a second, whatever becomes of them. One of those refused at a time asks until it is taken."""
    client, cores, began, running = Client(served.port), Cores(served), time.perf_counter(), set[asyncio.Task[None]]()
    tally, at, patient = Tally(began, began + seconds), 0.0, False

    async def one(request: Request) -> None:
        nonlocal patient
        answer = await client.send(request)
        tally.hung += answer.error == "hung"
        tally.add(request, answer)
        if answer.status == 429 and answer.retry_after is not None and not patient:
            patient, refused = True, time.perf_counter()
            while time.perf_counter() < tally.end:
                await asyncio.sleep(0.2)
                taken = time.perf_counter() - refused
                again = await client.send(request)
                if again.status != 429:
                    tally.retries.append((float(answer.retry_after), taken))
                    break
            patient = False

    for gap in mix.gaps(rate):
        at += gap
        if at > seconds:
            break
        await asyncio.sleep(max(0.0, began + at - time.perf_counter()))
        task = asyncio.create_task(one(mix.draw()))
        running.add(task)
        task.add_done_callback(running.discard)
    tally.cores = cores.taken()
    await asyncio.gather(*running)
    return tally


async def watch(served: Served, client: Client, samples: list[dict[str, float]]) -> None:
    """Every second. livez: seconds that it took, or infinity where it failed."""
    began = time.perf_counter()
    while True:
        asked, live = time.perf_counter(), False
        with suppress(OSError, IndexError, ValueError):
            live = (await client.get("/livez"))[0] == 200
        samples.append({"at": asked - began, "resident": served.resident(), "descriptors": served.descriptors(),
                        "livez": time.perf_counter() - asked if live else float("inf")})
        await asyncio.sleep(1)


async def idle(client: Client) -> float:
    """Share of the blocks that are held once nothing runs, or is still after a while."""
    for _ in range(600):
        running = await client.metric("fptq_requests_running") + await client.metric("fptq_requests_waiting")
        if running == 0:
            break
        await asyncio.sleep(0.1)
    return await client.metric("fptq_kv_cache_usage_ratio")


async def soak(served: Served, options: argparse.Namespace) -> dict[str, Any]:
    client, load_average = Client(served.port), os.getloadavg()[0]
    for _ in range(1200):
        with suppress(OSError, IndexError, ValueError):
            if (await client.get("/readyz"))[0] == 200:
                break
        await asyncio.sleep(0.1)
    model = json.loads((await client.get("/info"))[1])
    source, pairs = lengths(options.trace, options.scale, model["max_total_tokens"])
    mix = Mix(model["model_id"], pairs, model["model"]["vocab_size"], options.seed)
    for request in mix.pool:
        request.expected = (await client.send(request)).text
    seconds = max(15.0, 60 * min(1.0, options.minutes / 10))
    say(f"{POOL} answers known; lengths: {source}")
    await closed(served, mix.draw, seconds / 4)
    capacity = await closed(served, mix.draw, seconds)
    rate = capacity.rate(capacity.served)
    say(f"capacity: {capacity.summary(options.max_wait)}")
    await idle(client)
    samples: list[dict[str, float]] = []
    watching, before = asyncio.create_task(watch(served, client, samples)), served.descriptors()
    soaked = await opened(served, mix, 1.5 * rate, 60 * options.minutes)
    say(f"at 1.5: {soaked.summary(options.max_wait)}")
    steady = [sample["resident"] for sample in samples if sample["at"] >= 60 * options.minutes / 4]
    overloaded = await opened(served, mix, 3 * rate, max(20.0, 12 * options.minutes))
    say(f"at 3: {overloaded.summary(options.max_wait)}")
    await idle(client)
    cancelled = await closed(served, mix.leaving, 3600, options.cancels)
    held = await idle(client)
    cancels = {name: of for name, of in cancelled.summary(options.max_wait).items() if not name.endswith("per_second")}
    say(f"cancelled: {cancels}")
    watching.cancel()
    wrong = sum([(await client.send(request)).text != request.expected for request in mix.pool])
    await asyncio.sleep(2)
    return {
        "version": __version__, "server": served.command,
        "command": f"python -m benchmarks.soak --minutes {options.minutes:g} --cancels {options.cancels}",
        "cpus": os.cpu_count(), "load_average": load_average, "lengths": source, "max_wait": options.max_wait,
        "capacity": capacity.summary(options.max_wait), "soak": soaked.summary(options.max_wait),
        "overload": overloaded.summary(options.max_wait), "cancels": cancels,
        "wrong_afterwards": wrong, "held_blocks": held,
        "resident_growth": round(max(steady) / steady[0] - 1, 4),
        "resident_bytes": int(steady[-1]), "descriptors": [before, served.descriptors()],
        "livez_worst": round(max(sample["livez"] for sample in samples), 3),
    }


def rows(result: dict[str, Any]) -> list[tuple[str, str, bool]]:
    """What is asked, what was found, whether it holds."""
    at, soaked, over, cancels = (result[name] for name in ("capacity", "soak", "overload", "cancels"))
    bad = sum(phase["wrong"] for phase in (at, soaked, over)) + result["wrong_afterwards"]
    hung, errors = soaked["hung"] + over["hung"], at["errors"] + soaked["errors"] + over["errors"] + cancels["errors"]
    ratio = over["between_tokens_p99"] / at["between_tokens_p99"]
    goodput = over["tokens_per_second"] / at["tokens_per_second"]
    of_core = goodput * at["cores"]["server"] / over["cores"]["server"]  # others on the machine leave more or less
    first, last = result["descriptors"]
    in_time = min(soaked["first_token_in_time"], over["first_token_in_time"])
    retries = [(phase["retries"], phase["retry_after_right"] or 0.0) for phase in (soaked, over)]
    minutes, greedy = soaked["seconds"] / 60, soaked["greedy_finished"] + over["greedy_finished"]
    tried = sum(count for count, _ in retries)
    right = sum(count * share for count, share in retries) / tried if tried else 0.0
    return [
        (f"{minutes:g} minute{'s' * (minutes != 1)} at 1.5 × capacity, {soaked['sent']} requests: none hung",
         f"{hung} hung", hung == 0),
        (f"{greedy} finished greedy requests: each as alone", f"{bad} wrong", bad == 0),
        ("refused by 429 with Retry-After, and nothing else",
         f"{soaked['refused'] + over['refused']} refused, {errors} other errors", errors == 0),
        ("Retry-After right within a factor of 2 (polled every 0.2 s)", f"{right:.0%} of {tried}", right >= 0.9),
        ("resident memory flat after a quarter of that time", f"+{result['resident_growth']:.1%}",
         result["resident_growth"] <= 0.02),
        ("descriptors as before", f"{first} → {last}", last <= first + 2),
        ("`/livez` answers all the while", f"slowest {result['livez_worst']:.2f} s", result["livez_worst"] < 60),
        (f"{over['seconds']:.0f} s at 3 ×: inter-token p99 ≤ 1.5 × that at capacity", f"{ratio:.2f} ×",
         ratio <= 1.5),
        (f"first token within {result['max_wait']:g} s for ≥ 99 % of those accepted", f"{in_time:.1%}",
         in_time >= 0.99),
        ("goodput ≥ 95 % of capacity at 3 ×, and by the core time that the server got", f"{goodput:.0%}, {of_core:.0%}",
         min(goodput, of_core) >= 0.95),
        (f"{cancels['sent']} requests whose clients go: every block back", f"{result['held_blocks']:.0%} held",
         result["held_blocks"] == 0),
    ]


def table(result: dict[str, Any]) -> str:
    lines = [f"| {asked} | {found} | {'yes' if holds else '**no**'} |" for asked, found, holds in rows(result)]
    return "\n".join(["| | found | holds |", "|---|---|---|", *lines])


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--cancels", type=int, default=10_000)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--trace", type=Path, default=TRACES)
    parser.add_argument("--scale", type=float, default=8.0, help="of the trace's lengths to those that are sent")
    parser.add_argument("--max-wait", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--serve", default="", help="further options of `fptq serve`, as '--threads 1'")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/soak"))
    parser.add_argument("--write", type=Path, help="the page whose table is renewed")
    options = parser.parse_args()
    limits = ["--max-wait", str(options.max_wait), "--kv-cache-memory", CACHE]
    served = Served(options.model, [*limits, *options.serve.split()])
    try:
        result = uvloop.run(soak(served, options))
    finally:
        code = served.stop()
    result["exit_code"] = code
    options.out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))
    if options.write is not None:
        marks = "<!-- soak -->", "<!-- /soak -->"
        made = f"{marks[0]}\n{table(result)}\n{marks[1]}"
        page = options.write.read_text()
        options.write.write_text(re.sub(f"{marks[0]}.*{marks[1]}", lambda _: made, page, flags=re.DOTALL))
    sys.exit(code != 0 or not all(holds for _, _, holds in rows(result)))


if __name__ == "__main__":
    main()

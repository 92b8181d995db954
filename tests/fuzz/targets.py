"""What is fuzzed. A target's `start` gets a scratch directory and gives a function of bytes, which returns for all of
them: a refusal is an FptqError of one line, and anything else that is raised has been found. Inputs are what users
have, files or request bodies; tests/fuzz/corpus has some for each.
"""

from __future__ import annotations

import asyncio
import atexit
import io
import json
import random
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fptq_runtime.artifact.files import MANIFEST
from fptq_runtime.artifact.io import GOLDEN, Manifest, read_manifest
from fptq_runtime.engine.block_store import DiskStore, KVDisk
from fptq_runtime.engine.grammar import Grammar, Grammars
from fptq_runtime.errors import FptqError
from fptq_runtime.locate import find_artifact
from fptq_runtime.models.chat_template import ChatTemplate
from fptq_runtime.models.families import parse_config
from fptq_runtime.models.gate import Golden
from fptq_runtime.models.gguf import GgufTensors, config_of
from fptq_runtime.models.loader import Checkpoint, load_block, load_head, load_stem
from fptq_runtime.models.lora import CONFIG, WEIGHTS, read_lora
from fptq_runtime.models.readout import READOUT, read_bases
from fptq_runtime.models.render import environment
from fptq_runtime.models.tensors import DTYPES, Tensors
from fptq_runtime.models.tokenizer import Tokenizer
from fptq_runtime.models.towers import decoder_config
from fptq_server.batch import Answers, Problem, check_batch, read_batch
from fptq_server.config import ServerConfig
from fptq_server.defaults import sampling_defaults
from fptq_server.main import load_app
from fptq_server.parsers import REASONING_FORMATS, TOOL_PARSERS
from fptq_server.parsers.frame import Answer, Parser
from fptq_server.parsers.reasoning import Thinking
from fptq_server.structured import structural_tag
from tests.fuzz.mutator import Mutator

Run = Callable[[bytes], None]
MAX_TOKENS = 48  # of the context in which requests are answered


class Target(NamedTuple):
    start: Callable[[Path], Run]
    mutate: Callable[[Mutator, bytes], bytes] = Mutator.json


class Decisions(random.Random):
    """What a generator of random cases decides by: bytes, then zeros."""

    def __init__(self, data: bytes) -> None:
        super().__init__(0)
        self._data = io.BytesIO(data)

    @property
    def left(self) -> bool:
        return self._data.tell() < len(self._data.getbuffer())

    def getrandbits(self, k: int) -> int:
        return int.from_bytes(self._data.read(-(-k // 8)), "little") & ((1 << k) - 1)

    def random(self) -> float:
        return int.from_bytes(self._data.read(2), "little") / (1 << 16)


@contextmanager
def refusing() -> Iterator[None]:
    try:
        yield
    except FptqError as error:
        if "\n" in str(error):
            raise AssertionError("more than one line") from error
    except MemoryError:
        pass


def loads(data: bytes) -> Any:
    """None where it is no JSON."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def manifest(scratch: Path) -> Run:
    def run(data: bytes) -> None:
        try:  # as somebody would who made it so: its digest fits
            text = Manifest.model_validate(json.loads(data)).to_json().encode()
        except (ValueError, RecursionError):
            text = data
        (scratch / MANIFEST).write_bytes(text)
        with refusing():
            read_manifest(scratch)

    return run


def config(scratch: Path) -> Run:
    """config.json, which is also read as a generation_config.json."""
    def run(data: bytes) -> None:
        (scratch / "generation_config.json").write_bytes(data)
        with refusing():
            sampling_defaults(scratch)
        document = loads(data)
        if isinstance(document, dict):
            with refusing():
                model = parse_config(decoder_config(document)[0])
                for rope in model.ropes:
                    rope.describe(64)

    return run


def checkpoint(scratch: Path) -> Run:
    """config.json beside the demo's weights, and what the linears then are."""
    artifact = find_artifact("demo")
    for file in artifact.iterdir():
        if file.name != "config.json":
            (scratch / file.name).symlink_to(file)

    def run(data: bytes) -> None:
        (scratch / "config.json").write_bytes(data)
        with refusing():
            load_all(scratch)

    return run


def safetensors(scratch: Path) -> Run:
    """Weights, and the two files of an artifact that are of that form, too."""
    model = Checkpoint(find_artifact("demo")).model

    def run(data: bytes) -> None:
        for name in ("model.safetensors", GOLDEN, READOUT):
            (scratch / name).write_bytes(data)
        with refusing():
            tensors = Tensors(scratch, "model.")
            for name in tensors.names:
                with refusing():
                    tensors.get(name, tensors.shape(name) or (), tuple(DTYPES))
        with refusing():
            Golden.read(scratch / GOLDEN)
        with refusing():
            read_bases(scratch / READOUT, model)

    return run


def gguf(scratch: Path) -> Run:
    file = scratch / "model.gguf"

    def run(data: bytes) -> None:
        file.write_bytes(data)
        with refusing():
            (scratch / "config.json").write_text(json.dumps(config_of(GgufTensors(file))))
            load_all(scratch)

    return run


def load_all(path: Path) -> None:
    """The parts of a model that its layers share, and its first."""
    found = Checkpoint(path)
    found.max_positions = min(found.max_positions, 64)
    assert found.linear_schemes is not None
    load_stem(found)
    load_block(found, 0)
    load_head(found)


def adapter(scratch: Path) -> Run:
    """{"config": adapter_config.json, "header": of its safetensors}"""
    model = Checkpoint(find_artifact("demo")).model

    def run(data: bytes) -> None:
        document = loads(data)
        if not isinstance(document, dict):
            return
        header = json.dumps(document.get("header")).encode()
        (scratch / CONFIG).write_text(json.dumps(document.get("config")))
        (scratch / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header + bytes(1 << 14))
        with refusing():
            read_lora(scratch, model)

    return run


def tokenizer(scratch: Path) -> Run:
    """{"tokenizer": tokenizer.json, "config": tokenizer_config.json, "text": what is encoded}"""
    def run(data: bytes) -> None:
        document = loads(data)
        if not isinstance(document, dict):
            return
        (scratch / "tokenizer.json").write_text(json.dumps(document.get("tokenizer")))
        (scratch / "tokenizer_config.json").write_text(json.dumps(document.get("config")))
        with refusing():
            made = Tokenizer(scratch)
            text = str(document.get("text", "x"))[:200].encode("utf-8", "replace").decode()
            stream = made.stream()
            for token in made.encode(text, True):
                stream.step(token)

    return run


def kv_block(scratch: Path) -> Run:
    """A file of --kv-cache-disk: it is the block that was written, or none."""
    blocks = np.zeros((2, 64), np.uint8)
    blocks[0] = np.arange(64)
    store = DiskStore(KVDisk(scratch, 1 << 20, b"model"), blocks)
    digest = bytes(16)
    store.save(digest, 0)
    store.flush()
    [file] = scratch.glob("*.kv")
    written = file.read_bytes()

    def run(data: bytes) -> None:
        file.write_bytes(data)
        found = store.load(digest, 1).result()
        assert found == (data == written)
        assert not found or np.array_equal(blocks[0], blocks[1])

    return run


def batch(scratch: Path) -> Run:
    """A batch's requests, and the same bytes as the answers that it goes on with."""
    def run(data: bytes) -> None:
        count, problems = check_batch(io.BytesIO(data), most=50, url="/v1/completions")
        assert count or problems
        assert all(each.message and "\n" not in each.message for each in problems)
        assert all(each is not None for _, each in read_batch(io.BytesIO(data)) if isinstance(each, Problem))
        (scratch / "out.jsonl").write_bytes(data)
        with refusing():
            answers = Answers(scratch / "out.jsonl")
            assert answers.size <= len(data)
            answers.close()

    return run


def request(scratch: Path) -> Run:
    """{"path", "body"} or {"path", "text"}: whatever comes in is answered, or refused with a status below 500."""
    loaded = load_app(find_artifact("demo"), ServerConfig(), ["demo"], backend="auto", generation_config=True,
                      chat_template=None, max_model_len=MAX_TOKENS, max_num_seqs=16, kv_cache_memory=8 << 20)
    loaded.engine.start()
    atexit.register(loaded.engine.stop)
    loop = asyncio.new_event_loop()

    async def post(path: str, body: bytes) -> tuple[int, bytes]:
        sent = [{"type": "http.request", "body": body, "more_body": False}]
        status, answer = 0, b""

        async def receive() -> Mapping[str, Any]:
            if sent:
                return sent.pop()
            await asyncio.sleep(3600)
            raise AssertionError

        async def send(message: Any) -> None:
            nonlocal status, answer
            status = message.get("status", status)
            answer += message.get("body", b"")

        await loaded.app({
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
            "path": path, "raw_path": path.encode(), "root_path": "", "query_string": b"", "client": None,
            "server": None, "headers": [(b"content-type", b"application/json")], "state": {},
        }, receive, send)
        return status, answer

    def run(data: bytes) -> None:
        document = loads(data)
        if not isinstance(document, dict) or document.get("path") not in PATHS:
            return
        text = document.get("text")
        body = text.encode("utf-8", "replace") if isinstance(text, str) else json.dumps(document.get("body")).encode()
        status, answer = loop.run_until_complete(post(document["path"], body))
        assert 200 <= status < 500, (status, answer[:500])
        if status != 200:
            message = json.loads(answer)["error"]["message"]
            assert message and "\n" not in message
        if b'"finish_reason":"error"' in answer or b"server_error" in answer:
            raise AssertionError(answer[-500:])
        engine = loaded.engine.engine
        engine.check_integrity()

    return run


PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages", "/v1/messages/count_tokens",
         "/v1/embeddings", "/v1/score", "/v1/rerank", "/generate", "/tokenize", "/detokenize")


def template(scratch: Path) -> Run:
    """A chat template: it renders or is refused, within its time, and the process that ran it is gone."""
    def run(data: bytes) -> None:
        source = data.decode("utf-8", "replace")
        with suppress(Exception):  # which the process that renders says better
            environment().parse(source)
        made = ChatTemplate(source)
        with refusing():
            made.render({"messages": [{"role": "user", "content": "Hi"}], "add_generation_prompt": True}).result()

    return run


def grammar(scratch: Path) -> Run:
    """{"kind", "value", "walk"}: what a grammar's masks allow, its parser takes. walk chooses among what they do."""
    artifact = find_artifact("demo")
    model = Tokenizer(artifact)
    size = Checkpoint(artifact).model_config.vocab_size
    grammars = Grammars(model.to_json, size, [1])
    makers: dict[str, Callable[[Any], Grammar]] = {
        "json_schema": Grammar.json_schema, "regex": Grammar.regex, "lark": Grammar.lark, "gbnf": Grammar.gbnf,
        "choice": lambda value: Grammar.choice([str(each) for each in value]),
        "structural_tag": lambda value: structural_tag(value, model.added_tokens)}

    def run(data: bytes) -> None:
        document = loads(data)
        if not isinstance(document, dict):
            return
        kind, value = str(document.get("kind")), document.get("value")
        if kind not in makers:
            return
        if kind not in ("json_schema", "structural_tag") and not isinstance(value, list if kind == "choice" else str):
            return
        walk = [each for each in document.get("walk") or () if isinstance(each, int)] \
            if isinstance(document.get("walk"), list) else []
        with refusing():
            [matcher] = grammars.matchers(makers[kind](value), 1)
            output: list[int] = []
            masks = np.zeros((1, grammars.words), np.int32)
            for step in (walk or [0])[:24]:
                matcher.fill(output, 0, masks)
                allowed = np.flatnonzero(np.unpackbits(masks.view(np.uint8), bitorder="little"))
                if not len(allowed) or allowed[step % len(allowed)] == 1:
                    break
                output.append(int(allowed[step % len(allowed)]))
                forced, _ = matcher.foresee(output, [5, 6])
                assert all(0 <= token < size for token in forced)

    return run


def parser(scratch: Path) -> Run:
    """The parser's number, the pieces' length, then what a model wrote: in pieces it says what it says whole."""
    tools = {"now": {"type": "object", "properties": {}},
             "get_weather": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}}

    def read(make: Callable[[], Parser], pieces: list[str]) -> tuple[str, str, list[tuple[str, str]]]:
        made, answer = make(), Answer()
        for piece in pieces:
            answer.add(made.feed(piece))
        answer.add(made.finish())
        return answer.content, answer.reasoning, [(call.name, call.arguments) for call in answer.calls]

    def run(data: bytes) -> None:
        if len(data) < 3:
            return
        kind = TOOL_PARSERS[data[0] % len(TOOL_PARSERS)]
        text, size = data[2:].decode("utf-8", "replace"), 1 + data[1] % 16

        def make() -> Parser:
            own = kind(tools)
            return Thinking(REASONING_FORMATS[data[1] // 32 % len(REASONING_FORMATS)], bool(data[1] & 16), own) \
                if data[0] & 128 else own

        whole = read(make, [text])
        assert read(make, [text[i : i + size] for i in range(0, len(text), size)]) == whole

    return run


def native(scratch: Path) -> Run:
    """Decisions: calls of the native extension, as tests/fuzz/native.py makes them."""
    from tests.fuzz.native import Caller

    def run(data: bytes) -> None:
        decisions = Decisions(data)
        caller = Caller(decisions)
        for _ in range(200):
            if not decisions.left:
                break
            caller.call()

    return run


TARGETS: dict[str, Target] = {
    "manifest": Target(manifest),
    "config": Target(config),
    "checkpoint": Target(checkpoint),
    "safetensors": Target(safetensors, Mutator.safetensors),
    "gguf": Target(gguf, Mutator.raw),
    "adapter": Target(adapter),
    "tokenizer": Target(tokenizer),
    "kv_block": Target(kv_block, Mutator.raw),
    "batch": Target(batch, Mutator.raw),
    "request": Target(request),
    "template": Target(template, Mutator.raw),
    "grammar": Target(grammar),
    "parser": Target(parser, Mutator.raw),
    "native": Target(native, Mutator.raw),
}

"""Blocks that outlive the cache and the process: the same bits, or none."""

from __future__ import annotations

import errno
import multiprocessing
import os
import random
import stat
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fptq_runtime.engine import block_manager, block_store
from fptq_runtime.engine.block_store import DiskStore, KVDisk
from fptq_runtime.engine.engine import Engine
from fptq_runtime.engine.request import Origin, SamplingParams
from fptq_runtime.errors import FptqError
from tests.engine.fake import VOCAB, FakeExecutor, gist, make_engine, run, solo

PARAMS = SamplingParams(max_tokens=20, temperature=0, logprobs=2, ignore_eos=True)
PROMPT = [i % 90 + 1 for i in range(70)]
BLOCK = 16 * 4 + 40  # bytes of one of the fake model's, with its head


def engine_on(directory: Path, size: int = 1 << 20, fingerprint: bytes = b"", **options: Any) -> Engine[Any]:
    return make_engine(kv_disk=KVDisk(directory, size, fingerprint), **options)


def store_of(engine: Engine[Any]) -> DiskStore:
    store = engine._scheduler.blocks._store
    assert isinstance(store, DiskStore)
    return store


def ask(engine: Engine[Any], prompt: list[int] = PROMPT, tenant: str = "") -> tuple[int, int, Any]:
    """Tokens that were cached, those of them that came from disk, and the answer."""
    engine.add_request("a", prompt, PARAMS, Origin(tenant))
    events = run(engine)["a", 0]
    store_of(engine).flush()
    return events[0].num_cached_tokens, events[0].num_restored_tokens, gist(events)


def files(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.kv"))


def test_a_prefix_survives_its_engine(tmp_path: Path) -> None:
    cached, restored, answer = ask(engine_on(tmp_path / "new" / "kv"))
    assert (cached, restored) == (0, 0)
    assert answer == gist(solo(PROMPT, PARAMS)[0])
    assert len(files(tmp_path / "new" / "kv")) == (70 + 20 - 1) // 16
    assert stat.S_IMODE((tmp_path / "new" / "kv").stat().st_mode) == 0o700
    assert {stat.S_IMODE(file.stat().st_mode) for file in files(tmp_path / "new" / "kv")} == {0o600}
    again = engine_on(tmp_path / "new" / "kv")
    assert ask(again) == (64, 64, answer)
    assert ask(again) == (64, 0, answer), "from memory by then"
    longer = PROMPT[:50] + [7] * 9
    assert ask(engine_on(tmp_path / "new" / "kv"), longer) == (48, 48, gist(solo(longer, PARAMS)[0]))


def test_a_disk_that_fails_costs_only_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, answer = ask(engine_on(tmp_path))

    def stale(self: Path) -> bool:
        raise OSError(errno.ESTALE, "Stale file handle")

    engine = engine_on(tmp_path)
    monkeypatch.setattr(Path, "is_file", stale)
    assert ask(engine) == (0, 0, answer)


@pytest.mark.parametrize("other", [{"fingerprint": b"another model"}, {"block_size": 32}])
def test_what_was_computed_otherwise_is_not_found(tmp_path: Path, other: dict[str, Any]) -> None:
    ask(engine_on(tmp_path))
    assert ask(engine_on(tmp_path, **other))[:2] == (0, 0)


def test_tenants_do_not_find_each_others(tmp_path: Path) -> None:
    ask(engine_on(tmp_path), tenant="a")
    assert ask(engine_on(tmp_path), tenant="b")[:2] == (0, 0)
    assert ask(engine_on(tmp_path), tenant="a")[:2] == (64, 64)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_whatever_happens_to_files_the_answer_is_right(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
                                                       ) -> None:
    directory = tmp_path_factory.mktemp("kv")
    _, _, answer = ask(engine_on(directory))
    for file in data.draw(st.lists(st.sampled_from(files(directory)), min_size=1, max_size=3, unique=True)):
        content = file.read_bytes()
        at = data.draw(st.integers(0, len(content) - 1))
        match data.draw(st.sampled_from(["cut", "grown", "flipped", "emptied", "foreign", "directory", "gone"])):
            case "cut":
                file.write_bytes(content[:at])
            case "grown":
                file.write_bytes(content + b"x")
            case "flipped":
                file.write_bytes(content[:at] + bytes([content[at] ^ 1 << data.draw(st.integers(0, 7))])
                                 + content[at + 1 :])
            case "emptied":
                file.write_bytes(b"")
            case "foreign":
                file.write_bytes(data.draw(st.sampled_from(files(directory))).read_bytes())
            case "directory":
                file.unlink()
                file.mkdir()
            case "gone":
                file.unlink()
    engine = engine_on(directory)
    cached, restored, got = ask(engine)
    assert got == answer
    assert cached == restored <= 64
    assert ask(engine_on(directory))[2] == answer


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1 << 30))
def test_company_does_not_matter(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    """Engines one after the other, in which memory and disk hold little."""
    directory = tmp_path_factory.mktemp("kv")
    generator = random.Random(seed)
    families = [[generator.randrange(1, VOCAB) for _ in range(90)] for _ in range(3)]
    for _ in range(3):
        engine = engine_on(directory, generator.choice([600, 3000, 1 << 20]), max_model_len=128,
                           num_blocks=generator.randrange(8, 24), max_num_seqs=generator.randrange(1, 5),
                           speculation=generator.random() < 0.5)
        sent = {str(i): generator.choice(families)[: generator.randrange(1, 90)] for i in range(8)}
        for name, prompt in sent.items():
            engine.add_request(name, prompt, PARAMS)
        events = run(engine)
        store_of(engine).flush()
        for name, prompt in sent.items():
            assert gist(events[name, 0]) == gist(solo(prompt, PARAMS, max_model_len=128)[0])


def test_others_go_on_while_a_prefix_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, answer = ask(engine_on(tmp_path))
    engine, gate, read = engine_on(tmp_path), threading.Event(), DiskStore._read
    monkeypatch.setattr(DiskStore, "_read", lambda *args: gate.wait(60) and read(*args))
    engine.add_request("other", [7] * 9, replace(PARAMS, max_tokens=60))
    engine.step()
    engine.add_request("read", PROMPT, PARAMS)
    during = [output for _ in range(30) for output in engine.step()[0]]
    engine.check_integrity()
    assert {output.request_id for output in during} == {"other"}
    assert len(during) == 30
    gate.set()
    got = run(engine)["read", 0]
    assert (got[0].num_restored_tokens, gist(got)) == (64, answer)


@pytest.mark.parametrize("ends", [False, True])
def test_a_disk_that_does_not_answer_costs_only_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends: bool
                                                          ) -> None:
    _, _, answer = ask(engine_on(tmp_path))
    engine, gate, read = engine_on(tmp_path), threading.Event(), DiskStore._read
    monkeypatch.setattr(DiskStore, "_read", lambda *args: gate.wait(60) and read(*args))
    monkeypatch.setattr(block_manager, "LOAD_SECONDS", 0.2)
    for name in ("a", "b"):
        engine.add_request(name, PROMPT, PARAMS)
    engine.step()
    if ends:
        engine.abort("a")
    while engine.num_running == 0:
        engine.step()
        engine.check_integrity()
    gate.set()
    events = run(engine)["b", 0]
    assert gist(events)[1:] == answer[1:]
    assert not events[-1].num_restored_tokens
    for _ in range(1000):
        engine.step()
        if engine._scheduler.blocks.num_loading_blocks == 0:
            break
        time.sleep(0.01)
    assert engine._scheduler.blocks.num_loading_blocks == 0
    engine.check_integrity()


def test_no_prefix_is_read_in_the_place_of_another(tmp_path: Path) -> None:
    """The cache has room for two of the prompts at a time."""
    prompts = [[first] * 70 for first in range(1, 7)]
    for prompt in prompts:
        ask(engine_on(tmp_path), prompt)
    engine = engine_on(tmp_path, max_model_len=160, num_blocks=15)
    for i, prompt in enumerate(prompts):
        engine.add_request(str(i), prompt, PARAMS)
    events = run(engine)
    assert [events[str(i), 0][-1].num_restored_tokens for i in range(6)] == [64] * 6


def test_the_oldest_make_room(tmp_path: Path) -> None:
    engine = engine_on(tmp_path, 40 * BLOCK, max_model_len=1024)
    for first in range(1, 12):
        ask(engine, [first] * 100)
    assert 20 < len(files(tmp_path)) <= 40
    fresh = engine_on(tmp_path, 40 * BLOCK, max_model_len=1024)
    assert ask(fresh, [11] * 100)[:2] == (96, 96)
    assert ask(fresh, [1] * 100)[:2] == (0, 0)


def test_what_is_used_stays(tmp_path: Path) -> None:
    for first in range(1, 14):
        ask(engine_on(tmp_path, 40 * BLOCK), [1] * 100)  # a new engine each time: from disk
        ask(engine_on(tmp_path, 40 * BLOCK), [first + 1] * 100)
    assert ask(engine_on(tmp_path, 40 * BLOCK), [1] * 100)[:2] == (96, 96)


def test_others_files_are_left_alone(tmp_path: Path) -> None:
    others = [tmp_path / name for name in ("notes.txt", "mine.kv", "mine.tmp", f"{'0' * 63}g.kv")]
    for file in others:
        file.write_text("mine" * 1000)
        os.utime(file, (1, 1))
    (abandoned := tmp_path / ".1-1.tmp").write_bytes(b"x" * 1000)
    (recent := tmp_path / ".2-2.tmp").write_bytes(b"x")
    os.utime(abandoned, (1, 1))
    engine = engine_on(tmp_path, 3 * BLOCK, max_model_len=1024)
    ask(engine, [5] * 400)
    assert all(file.exists() for file in others)
    assert recent.exists()
    assert not abandoned.exists()


def test_a_full_disk_costs_only_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                          caplog: pytest.LogCaptureFixture) -> None:
    engine = engine_on(tmp_path)
    full = True

    def rename(self: Path, target: Path) -> None:
        if full:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.replace(target)

    monkeypatch.setattr(Path, "rename", rename)
    expected = gist(solo(PROMPT, PARAMS)[0])
    assert ask(engine)[2] == expected
    assert "No space left" in caplog.text
    assert list(tmp_path.iterdir()) == []
    full = False
    ask(engine, [9] * 50)
    assert files(tmp_path) == [], "for a minute nothing is tried"
    now = block_store.time.monotonic()
    monkeypatch.setattr(block_store.time, "monotonic", lambda: now + 61)
    ask(engine, [8] * 50)
    assert len(files(tmp_path)) == 4


def _serve(directory: Path, seed: int, done: Any) -> None:
    generator = random.Random(seed)
    for _ in range(10):
        engine = engine_on(directory, 60 * BLOCK)
        for _ in range(5):
            prompt = [generator.randrange(1, 5)] * generator.randrange(20, 100)
            assert ask(engine, prompt)[2] == gist(solo(prompt, PARAMS)[0])
    done.put(seed)


def test_processes_share_a_directory(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    done = context.Queue()
    processes = [context.Process(target=_serve, args=(tmp_path, seed, done)) for seed in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert sorted(done.get(timeout=1) for _ in processes) == [0, 1]
    assert sum(file.stat().st_size for file in files(tmp_path)) <= 60 * BLOCK


@pytest.mark.parametrize(("disk", "options", "said"), [
    (KVDisk(Path("/proc/no"), 1 << 20, b""), {}, "cannot be written to"),
    (KVDisk(Path("kv"), 100, b""), {}, "two blocks"),
    (KVDisk(Path("kv"), 1 << 20, b""), {"enable_prefix_caching": False}, "no_prefix_cache"),
])
def test_what_cannot_be_is_said(disk: KVDisk, options: dict[str, Any], said: str, tmp_path: Path,
                                monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FptqError, match=said):
        make_engine(kv_disk=disk, **options)


def test_a_cache_out_of_reach_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(FakeExecutor, "blocks", property(lambda _: None))
    with pytest.raises(FptqError, match="native backend"):
        engine_on(tmp_path)
